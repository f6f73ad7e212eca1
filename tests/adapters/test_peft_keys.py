"""Names of an adapter's tensors in the spellings of wrappers and raw state dicts."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import flora_core as flora
from flora_core.adapters.peft_keys import plain_name

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
WEIGHTS = "adapter_model.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def trained() -> peft.PeftModel:
    """A PEFT model with non-zero factors."""
    sizes: dict[str, Any] = dict(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft's own call
        return peft.get_peft_model(model, config)


def assert_same(one: flora.ClientUpdate, other: flora.ClientUpdate) -> None:
    assert one.scaling == other.scaling
    assert one.adapters.keys() == other.adapters.keys()
    for module, pair in one.adapters.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(pair, other.adapters[module], strict=True))


def respelled(source, folder, change):
    """A copy of an adapter whose tensors have other names."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda k: "_orig_mod." + k,
        lambda k: k.replace("base_model.", "base_model._orig_mod.", 1),
        lambda k: k.replace("base_model.model.", "base_model.model._orig_mod.", 1),
        lambda k: k.replace(".self_attn", "._orig_mod.self_attn"),
        lambda k: k.replace(".lora_", "._orig_mod.lora_").replace(".weight", "._orig_mod.weight"),
        lambda k: "module." + k,
        lambda k: "module._orig_mod." + k,
        lambda k: "_forward_module.module." + k,
        lambda k: k.replace("base_model.model.", "base_model.model.module.", 1),
        lambda k: "_fsdp_wrapped_module." + k.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        lambda k: k.replace(".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"),
        lambda k: k.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"),
        lambda k: k.replace("lora_A", "lora_A.clinic-7").replace("lora_B", "lora_B.clinic-7"),
        lambda k: k.removeprefix("base_model.model."),
        lambda k: "module." + k.removeprefix("base_model.model."),
        lambda k: "base_model.model." + k,
        lambda k: "policy." + k,
    ],
)
def test_reads_every_spelling_of_plain_factors(change, trained, tmp_path):
    trained.save_pretrained(tmp_path / "a")
    other = respelled(tmp_path / "a", tmp_path / "b", change)
    assert set(load_file(other / WEIGHTS)) != set(load_file(tmp_path / "a" / WEIGHTS))
    assert_same(flora.load_peft_adapter(other, client="a"), flora.load_peft_adapter(tmp_path / "a"))


def test_reads_the_state_dict_of_a_compiled_model_with_compiled_layers(trained, tmp_path):
    trained.save_pretrained(tmp_path / "a")
    layers = trained.base_model.model.model.layers
    plain = layers[0]
    layers[0] = torch.compile(plain)
    try:
        state = torch.compile(trained).state_dict()
    finally:
        layers[0] = plain
    factors = {key: tensor.clone() for key, tensor in state.items() if "lora_" in key}
    assert any(key.count("_orig_mod.") == 2 and ".default.weight" in key for key in factors)
    shutil.copytree(tmp_path / "a", tmp_path / "raw")
    save_file(factors, tmp_path / "raw" / WEIGHTS)
    assert_same(flora.load_peft_adapter(tmp_path / "raw", client="a"), flora.load_peft_adapter(tmp_path / "a"))


def test_leaves_parts_of_module_paths_alone():
    assert plain_name("base_model.model.net.module.fc.weight") == "net.module.fc.weight"
    assert plain_name("model.norm.weight") == "model.norm.weight"
    assert plain_name("module.weight") == "weight"


def test_refuses_two_names_of_one_factor_and_two_adapters_in_one_file(trained, tmp_path):
    trained.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    key = f"base_model.model.{MODULE}.lora_A.weight"
    save_file({**tensors, f"_orig_mod.{key}": tensors[key].clone()}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(
        ValueError, match=rf"'_orig_mod.{key}' and '{key}' are both lora_A of '{MODULE}'; keep one of them"
    ):
        flora.load_peft_adapter(tmp_path / "a")
    other = {k.replace("lora_A", "lora_A.b").replace("lora_B", "lora_B.b"): t.clone() for k, t in tensors.items()}
    save_file({**tensors, **other}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match=r"holds 2 adapters: .*'b' \(base_model.*save each alone"):
        flora.load_peft_adapter(tmp_path / "a")


def test_half_a_module_is_refused_or_left_out_on_request(trained, tmp_path):
    trained.save_pretrained(tmp_path / "a")
    whole = flora.load_peft_adapter(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    del tensors[f"base_model.model.{MODULE}.lora_B.weight"]
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match=rf"must come together, got one alone for {MODULE};.*partial=True"):
        flora.load_peft_adapter(tmp_path / "a")
    update = flora.load_peft_adapter(tmp_path / "a", partial=True)
    assert set(update.adapters) == set(whole.adapters) - {MODULE}


def test_a_copy_of_the_head_is_named_as_the_base_s_weight_and_not_as_an_embedding(trained, tmp_path):
    trained.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({**tensors, "base_model.model.lm_head.base_layer.weight": torch.ones(2, 2)}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match=r"lm_head.base_layer.weight \(weights of the base: save with") as error:
        flora.load_peft_adapter(tmp_path / "a")
    assert "trained embeddings" not in str(error.value)


def test_keys_of_this_engine_in_the_config_are_no_unknown_fields(trained, tmp_path):
    trained.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "flora": {"round": 3}, "flora_base": "abc"}))
    assert flora.load_peft_adapter(tmp_path / "a").ranks
