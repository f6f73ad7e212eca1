"""PEFT adapters that cannot be read exactly, broken files and pickles: each is refused by name.

Letters: K in_features, N out_features, R a rank.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flora_core.adapters import peft
from flora_core.adapters.peft import load_peft_adapter, save_peft_adapter
from tests.support.rounds import bank_like_update


@pytest.fixture
def saved(tmp_path):
    """A good adapter on disk, and a way to change its config."""
    folder = tmp_path / "adapter"
    save_peft_adapter(bank_like_update(), folder)

    def change(**fields):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return folder

    return change


UNSUPPORTED = {
    "dora": ({"use_dora": True}, "use_dora=True is not supported; train without DoRA"),
    "lora-bias": ({"lora_bias": True}, "lora_bias=True is not supported"),
    "bias": ({"bias": "all"}, "bias='all' is not supported; train with bias='none'"),
    "modules-to-save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
    "tokens": ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication=.* is not supported"),
    "parameters": ({"target_parameters": ["w"]}, "target_parameters=.* is not supported; target nn.Linear"),
    "tying": ({"ensure_weight_tying": True}, "ensure_weight_tying=True is not supported"),
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa' changed the base weights.*path_initial_model_for_weight_conv"),
    "pissa-niter": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base weights"),
    "olora": ({"init_lora_weights": "olora"}, "'olora' changed the base weights"),
    "corda": ({"init_lora_weights": "corda"}, "'corda' changed the base weights"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "'lora_ga' changed the base weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' is not supported; use one of True, False"),
    "qalora": ({"use_qalora": True}, "unknown field use_qalora=True.*train without it, or delete it"),
    "kasa": ({"kasa_config": {"beta": 1}}, "unknown field kasa_config="),
    "velora": ({"velora_config": {"num_groups": 64}}, "unknown field velora_config="),
    "bd-lora": ({"use_bdlora": {"nblocks": 2}}, "unknown field use_bdlora="),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "unknown field alora_invocation_tokens="),
    "future": ({"twist": 0.5}, "unknown field twist=0.5"),
    "other-method": ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
    "rank": ({"r": 8}, "module 'a.q': the config says rank 8 .* the tensors have rank 3"),
    "rank-pattern": ({"rank_pattern": {"b.a.q": 3}}, "module 'b.a.q': the config says rank 3 .*tensors have rank 2"),
    "rank-text": ({"r": "3"}, "r and rank_pattern must hold numbers, got '3'"),
    "alpha-text": ({"alpha_pattern": {"q": None}}, "lora_alpha and alpha_pattern must hold numbers, got None"),
    "target": ({"target_modules": ["b.a.q"]}, "module 'a.q' is not what target_modules, .* name"),
    "target-regex": ({"target_modules": "a.q"}, "module 'b.a.q' is not what target_modules"),
    "excluded": ({"exclude_modules": ["b.a.q"]}, "module 'b.a.q' is not what target_modules, exclude_modules"),
    "layer": ({"target_modules": ["q"], "layers_to_transform": 3}, "module 'a.q' is not what .*layers_to_transform"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_loaded_exactly_is_refused_by_name(case, saved):
    fields, words = UNSUPPORTED[case]
    with pytest.raises(ValueError, match=words):
        load_peft_adapter(saved(**fields))


def test_harmless_and_default_fields_are_ignored(saved):
    folder = saved(
        lora_dropout=0.1, revision="main", inference_mode=False, peft_version="99", use_dora=False,
        modules_to_save=None, new_feature=None, another_new=False, megatron_config=None, loftq_config={},
        runtime_config={"x": 1}, target_modules=None, layers_pattern=None, init_lora_weights="gaussian",
    )  # fmt: skip
    assert load_peft_adapter(folder).ranks == {"a.q": 3, "b.a.q": 2}


def test_every_field_that_peft_writes_is_known():
    """A field that a newer peft adds must be judged: read, harmless, or refused unless unset."""
    peft = pytest.importorskip("peft")
    from flora_core.adapters import peft_config as known

    defaults = peft.LoraConfig().to_dict()
    unknown = set(defaults) - known._HARMLESS - known._READ - set(known._REFUSED)
    assert {field for field in unknown if defaults[field] not in (None, False)} == set()
    assert {f: defaults[f] for f in known._REFUSED} == {f: value for f, (value, _) in known._REFUSED.items()}


TENSORS = {
    "dora": ("base_model.model.a.q.lora_magnitude_vector", "DoRA: train with use_dora=False"),
    "embedding": ("base_model.model.e.lora_embedding_A", "an adapted embedding: train without it"),
    "base": ("base_model.model.e.base_layer.weight", "weights of the base: save with save_embedding_layers=False"),
    "head": ("base_model.model.lm_head.weight", "trained embeddings: save with save_embedding_layers=False"),
    "bias": ("base_model.model.a.q.lora_B.bias", "biases: train with bias='none'"),
    "strange": ("a.q.lora_C.weight", r"not plain LoRA factors: a.q.lora_C.weight; train without them"),
    "alone": ("base_model.model.z.lora_A.weight", "lora_A and lora_B must come together, got one alone for z"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_factors_are_refused_by_name(case, saved):
    key, words = TENSORS[case]
    path = saved() / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**{k: t.clone() for k, t in tensors.items()}, key: torch.zeros(3, 4)}, path)
    with pytest.raises(ValueError, match=words):
        load_peft_adapter(path.parent)


def test_factors_of_wrong_shape_or_dtype_are_refused(saved):
    path = saved() / "adapter_model.safetensors"
    tensors = {k: t.clone() for k, t in load_file(path).items()}
    key = "base_model.model.a.q.lora_B.weight"
    save_file({**tensors, key: tensors[key].T.contiguous()}, path)
    with pytest.raises(ValueError, match=r"lora_A must be \(r, in\) and lora_B \(out, r\).*got \(3, 4\) and \(3, 5\)"):
        load_peft_adapter(path.parent)
    save_file({**tensors, key: tensors[key].to(torch.int32)}, path)
    with pytest.raises(ValueError, match=r"factors must be floating-point, got torch.int32"):
        load_peft_adapter(path.parent)
    save_file({}, path)
    with pytest.raises(ValueError, match=r"holds no LoRA factors; the adapter is empty"):
        load_peft_adapter(path.parent)


def test_missing_broken_and_pickled_files_have_errors_of_their_own(saved):
    folder = saved()
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_peft_adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin, a pickle, .* safe_serialization=True"):
        load_peft_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model.safetensors; give the folder that peft saved"):
        load_peft_adapter(folder)
    config.write_text('{"r": ')
    with pytest.raises(ValueError, match="does not hold valid JSON"):
        load_peft_adapter(folder)
    config.write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_peft_adapter(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no PEFT adapter: adapter_config.json is missing; give"):
        load_peft_adapter(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no PEFT adapter: there is no such folder"):
        load_peft_adapter(folder / "nowhere")


@pytest.mark.parametrize("trusted", [True, False])
def test_a_file_that_is_cut_while_it_is_read_is_named(saved, trusted, monkeypatch):
    folder = saved()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    monkeypatch.setattr(peft, "read_header", lambda *_, **__: None)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_peft_adapter(folder, trusted=trusted)


def test_the_folder_above_adapters_is_refused_with_their_names(saved, tmp_path):
    folder = saved()
    for name in ("run/checkpoint-100", "run/checkpoint-90", "run/other/default"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, tmp_path / name)
    words = r"is missing, and its subfolders 'checkpoint-90', 'other.default', 'checkpoint-100' hold one"
    with pytest.raises(FileNotFoundError, match=words):
        load_peft_adapter(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"is missing; give the folder"):
        load_peft_adapter(tmp_path / "run", trusted=False)


def test_a_relative_base_is_read_as_peft_reads_it_and_from_the_adapter(saved, tmp_path, monkeypatch):
    folder = saved()
    config = json.loads((folder / "adapter_config.json").read_text())

    def base_of(name):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        return load_peft_adapter(folder).base

    (tmp_path / "work" / "base").mkdir(parents=True)
    (folder.parent / "base").mkdir()
    assert base_of("./base") == str(folder.parent / "base")
    (folder / "base").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert base_of("./base") == str(tmp_path / "work" / "base")
    assert base_of("base") == str(tmp_path / "work" / "base")
    assert base_of("owner/name") == "owner/name"
    assert base_of("./nowhere") == "./nowhere"


def test_loaded_factors_survive_the_file(saved):
    folder = saved()
    update = load_peft_adapter(folder)
    path = folder / "adapter_model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(float(factor.abs().max()) > 0 for pair in update.adapters.values() for factor in pair)
