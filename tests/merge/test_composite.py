"""Adapters merged on disk into composite and renamed checkpoints, against peft's own merge.

transformers stores other names than its modules have: the stored weights must be those that peft's merged model saves.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import flora_core as flora
from flora_core.adapters.base import Base, values_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
TEXT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
)
TEXT["num_key_value_heads"] = 2


def qwen_vl():
    vision: dict[str, Any] = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, patch_size=4
    )
    text: dict[str, Any] = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    text.pop("head_dim")
    tokens: dict[str, Any] = dict(image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={**vision, "fullatt_block_indexes": [1]}, **tokens
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma3():
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16)
    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config={**vision, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def mixtral():
    sizes: dict[str, Any] = {key: value for key, value in TEXT.items() if key != "head_dim"}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=2))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def adapted(model, folder: Path, **fields) -> dict[str, torch.Tensor]:
    """Save a random adapter of a copy of the model; the weights that peft's merge of it saves."""
    config = peft.LoraConfig(**cast(Any, {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **fields}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft's own call
        trained: Any = peft.get_peft_model(copy.deepcopy(model), config)
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)  # the head is a target
        trained.save_pretrained(folder)
    trained.merge_and_unload().save_pretrained(folder.parent / "wanted")
    return weights(folder.parent / "wanted")


CASES = {
    "qwen2.5-vl text": (qwen_vl, dict(target_modules=["q_proj", "v_proj"]), 4),
    "qwen2.5-vl both": (qwen_vl, dict(target_modules=["q_proj", "qkv"]), 4),
    "qwen2.5-vl vision": (qwen_vl, dict(target_modules=["qkv"]), 2),
    "gemma3 both": (gemma3, dict(target_modules=["q_proj", "v_proj"]), 8),
    "gemma3 text": (gemma3, dict(target_modules=r".*language_model.*\.(q_proj|down_proj)"), 4),
    "mixtral": (mixtral, dict(target_modules=["q_proj", "o_proj"]), 4),
}


@pytest.mark.parametrize("case", CASES)
def test_stored_weights_are_those_of_peft_s_merge(case, tmp_path):
    make, fields, count = CASES[case]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    wanted = adapted(model, tmp_path / "a", **fields)
    report = flora.merge_into_checkpoint(tmp_path / "base", {tmp_path / "a": 1}, tmp_path / "out", verify=True)
    found, before = weights(tmp_path / "out"), weights(tmp_path / "base")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert sum(not torch.equal(found[name], before[name]) for name in before) == report.modules == count
    assert report.notes == ()


def test_an_adapter_of_the_text_class_goes_into_the_composite_s_language_model(tmp_path):
    torch.manual_seed(0)
    model = gemma3()
    model.save_pretrained(tmp_path / "base")
    text = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT))
    adapted(text, tmp_path / "a", target_modules=["q_proj"])
    report = flora.merge_into_checkpoint(tmp_path / "base", {tmp_path / "a": 1}, tmp_path / "out", verify=True)
    assert any("read as the base's: * as language_model.*" in note for note in report.notes)
    before = weights(tmp_path / "base")
    changed = {name for name, tensor in weights(tmp_path / "out").items() if not torch.equal(tensor, before[name])}
    assert changed == {f"language_model.model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    assert report.modules == 2


def test_a_lower_tower_s_adapter_that_fits_two_towers_is_refused(tmp_path):
    torch.manual_seed(0)
    gemma3().save_pretrained(tmp_path / "base")
    text = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**TEXT))
    adapted(text, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"candidates are '(language_model|vision_tower).*', '(lang|vision)"):
        flora.merge_into_checkpoint(tmp_path / "base", {tmp_path / "a": 1}, tmp_path / "out")


def test_missing_modules_of_a_renamed_tower_are_named(tmp_path):
    torch.manual_seed(0)
    model = qwen_vl()
    model.save_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "a", target_modules=["q_proj", "qkv"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "visual.blocks.1" not in key}, path)
    with pytest.raises(ValueError, match=r"lacks factors of 1 modules .* has: model.visual.blocks.1.attn.qkv;"):
        flora.merge_into_checkpoint(tmp_path / "base", {tmp_path / "a": 1}, tmp_path / "out")


def test_stored_experts_that_are_no_modules_are_not_missing_but_reported(tmp_path):
    torch.manual_seed(0)
    model = mixtral()
    model.save_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "a", target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_config.json"
    # Stored as experts.N.w1; the model class has all of them in one parameter.
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["q_proj", "w1"]}))
    report = flora.merge_into_checkpoint(tmp_path / "base", {tmp_path / "a": 1}, tmp_path / "out")
    assert report.modules == 2
    assert any("experts.0.w1" in note and "no modules of the model class" in note for note in report.notes)


def test_all_linear_promises_every_linear_but_the_head(tmp_path):
    torch.manual_seed(0)
    model = gemma3()
    model.save_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "a", target_modules="all-linear")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_modules": "all-linear"}))
    report = flora.merge_into_checkpoint(tmp_path / "base", {tmp_path / "a": 1}, tmp_path / "out")
    assert report.notes == ()
    assert report.modules > 20


def test_a_head_saved_as_peft_saves_it_is_merged(tmp_path):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**TEXT, "tie_word_embeddings": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    wanted = adapted(model, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    report = flora.merge_into_checkpoint(tmp_path / "base", {tmp_path / "a": 1}, tmp_path / "out", verify=True)
    found = weights(tmp_path / "out")
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert any("lm_head.base_layer.weight are equal to the base's" in note for note in report.notes)


def test_a_head_saved_as_peft_saves_it_is_loaded_for_its_own_base_alone(tmp_path):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**TEXT, "tie_word_embeddings": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    wanted = adapted(model, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    update = flora.load_peft_adapter(tmp_path / "a")
    assert update.trained_on is not None
    assert set(update.trained_on.weights) == {"lm_head"}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"was trained on .*, and the model is another base"):
        flora.merge_adapter_(other, update)
    assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        base = cast(Any, transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")).to(dtype)
        flora.merge_adapter_(base, update)
        found = base.state_dict()
        assert all(torch.allclose(found[name].float(), wanted[name], atol=atol) for name in wanted)
    # Saved again, the adapter still knows its base.
    flora.save_peft_adapter(update, tmp_path / "again")
    with pytest.raises(ValueError, match="another base"):
        flora.merge_adapter_(other, flora.load_peft_adapter(tmp_path / "again"))


def test_a_record_of_other_modules_and_a_copy_of_the_head_are_both_compared(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "tie_word_embeddings": False}))
    adapted(model, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    update = flora.load_peft_adapter(tmp_path / "a")
    others = [name for name in update.adapters if name != "lm_head"]
    record = Base("b", 2, values_of((name, model.get_parameter(f"{name}.weight")) for name in others))
    flora.save_peft_adapter(replace(update, trained_on=record), tmp_path / "b")
    path = tmp_path / "b" / "adapter_model.safetensors"
    key = "base_model.model.lm_head.base_layer.weight"
    save_file({**load_file(path), key: load_file(tmp_path / "a" / path.name)[key]}, path)
    found = flora.load_peft_adapter(tmp_path / "b").trained_on
    assert found is not None
    assert (found.name, found.round, set(found.weights)) == ("b", 2, {*others, "lm_head"})


def test_a_copy_of_the_head_of_another_shape_is_refused_as_it_is_loaded(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "tie_word_embeddings": False}))
    adapted(model, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    key = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(path)
    save_file({**tensors, key: tensors[key][:-1].contiguous()}, path)
    with pytest.raises(ValueError, match="the base's weight of 'lm_head' must be floating-point of shape"):
        flora.load_peft_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match="weights of the base: save with save_embedding_layers=False"):
        flora.load_peft_adapter(tmp_path / "a", trusted=False)


def test_an_adapter_of_a_composite_model_is_refused_on_a_bare_language_model_with_the_name_to_change(tmp_path):
    model = gemma3()
    text = transformers.Gemma3ForCausalLM(cast(Any, model.config).text_config)
    text.save_pretrained(tmp_path / "text")
    adapted(model, tmp_path / "a", target_modules=r".*language_model.*q_proj")
    with pytest.raises(ValueError, match=r"without 'language_model.' they fit: take that part out of its"):
        flora.merge_into_checkpoint(tmp_path / "text", {tmp_path / "a": 1}, tmp_path / "out")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key.replace("language_model.", ""): tensor for key, tensor in load_file(path).items()}, path)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["q_proj"]}))
    report = flora.merge_into_checkpoint(tmp_path / "text", {tmp_path / "a": 1}, tmp_path / "out")
    assert report.modules == 2
