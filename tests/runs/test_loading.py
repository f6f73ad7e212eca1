"""Models and devices that a recipe names: loaded, or refused in the recipe's terms."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flora_core.cli.main import main
from flora_core.common import devices
from flora_core.config.recipe import Recipe, load
from flora_core.runs.build import build_model
from flora_core.runs.loading import load_model, load_tokenizer, model_folder
from tests.support.federations import make_model, make_records, make_tokenizer

CPU = torch.device("cpu")
# A family that transformers does not know, in files beside its weights.
CONFIGURATION = "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
MODELING = (
    "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
)


@pytest.fixture
def own_family(tmp_path: Path, monkeypatch):
    """The folder of a model whose family lies beside its weights as Python code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    yield folder
    for name in [name for name in sys.modules if "transformers_modules" in name]:
        del sys.modules[name]


def test_refuses_code_beside_the_weights_without_a_question(own_family: Path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    with pytest.raises(ValueError, match=r"own comes with Python code of its own, .*trust_remote_code=true in the rec"):
        load_model(str(own_family), CPU, torch.float32)


def test_runs_code_beside_the_weights_where_the_recipe_allows_it(own_family: Path, tmp_path: Path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in make_records("a", 12)))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {own_family}\ndata: {tmp_path / 'data.jsonl'}\nclients: {{count: 2, ranks: [2]}}\n"
        "train: {max_length: 32}\nfederation: {rounds: 1}\n"
    )
    assert main(["run", str(recipe), "--out", str(tmp_path / "refused")]) == 2
    assert main(["run", str(recipe), "trust_remote_code=true", "--out", str(tmp_path / "run")]) == 0
    again = load_model(str(tmp_path / "run" / "model"), CPU, torch.float32, trust_remote_code=True)
    assert type(again).__name__ == "OwnForCausalLM"


def test_names_a_family_without_a_causal_model(tmp_path: Path):
    sizes: dict[str, Any] = dict(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is of the family T5, which transformers has no causal language") as caught:
        load_model(str(tmp_path), CPU, torch.float32)
    assert len(str(caught.value)) < 300


def test_refuses_the_folder_of_an_adapter_and_says_how_to_go_on_from_it(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter, not a model\..*flora aggregate --base BASE --adapter /"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds both a model and an adapter"):
        model_folder(str(tmp_path))


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_knows_hub_names_on_every_system(separator: str, monkeypatch):
    monkeypatch.setattr("os.sep", separator)
    assert model_folder("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    for path in ("./owner/name", "a\\b", "C:\\models\\a", "~/a", "a/b/c", "../a", "owner/", "/a"):
        with pytest.raises(FileNotFoundError, match=r"is not a folder .*a hub name \(owner/name\)"):
            model_folder(path)


def test_a_tokenizer_and_a_model_are_loaded_without_bars(tmp_path: Path, capsys):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    assert load_tokenizer(str(tmp_path))("w1")["input_ids"]
    assert load_model(str(tmp_path), CPU, torch.bfloat16).dtype == torch.bfloat16
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["mps", "xpu", "meta"])
def test_refuses_devices_that_it_has_no_kernels_for(name: str):
    with pytest.raises(ValueError, match=rf"device='{name}' is not supported: .*use device=cpu"):
        devices.pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_refuses_a_gpu_that_is_not_there(name: str):
    with pytest.raises(ValueError, match=rf"device='{name}' is not here \(0 CUDA devices\); use device=cpu"):
        devices.pick_device(name)


GROUPS = {
    "none": ({}, "0::/", math.inf),
    "container": ({"cpu.max": "150000 100000"}, "0::/", 1.5),
    "no bound": ({"cpu.max": "max 100000"}, "0::/", math.inf),
    "of the parent": ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 2.0),
    "the smallest": ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b", 0.5),
    "version 1": ({"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
                  "4:cpu,cpuacct:/docker/x\n3:memory:/", 3.0),
    "version 1 without a bound": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/",
                                  math.inf),
}  # fmt: skip


@pytest.mark.parametrize("case", GROUPS)
def test_reads_the_processor_share_of_a_container(case: str, tmp_path: Path):
    files, own, cores = GROUPS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert devices._cgroup_cores(tmp_path, tmp_path / "own") == cores
    assert devices._cgroup_cores(tmp_path, tmp_path / "no such file") == math.inf


def test_limits_threads_to_the_cores_that_it_may_use(monkeypatch):
    threads = torch.get_num_threads()
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "_cgroup_cores", lambda: math.inf)
    assert devices.usable_cores() >= 1
    monkeypatch.setattr(devices, "_cgroup_cores", lambda: 0.5)
    assert devices.usable_cores() == 1
    devices.limit_threads(None)
    devices.limit_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    devices.limit_threads(None)
    assert given == [1, 3]
    monkeypatch.undo()
    assert torch.get_num_threads() == threads


def test_a_recipe_loads_its_model_by_its_own_settings(tmp_path: Path):
    make_model().save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "r.yaml").write_text(f"model: {tmp_path / 'm'}\nfederation: {{rounds: 1}}\ndtype: bfloat16\n")
    recipe: Recipe = load(tmp_path / "r.yaml", ["device=cpu"])
    assert recipe.trust_remote_code is False
    assert build_model(recipe)[0].dtype == torch.bfloat16


def folder_of(model: Any, path: Path) -> Path:
    """Save a model and a tokenizer into a folder."""
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def tokenized(folder: Path) -> str:
    """Return the folder to load a model from, once its tokenizer is loaded."""
    path = model_folder(str(folder))
    load_tokenizer(path)
    return path


def refused(folder: Path, error: type[Exception] | tuple[type[Exception], ...], match: str) -> None:
    """Require that a folder is refused, as the model of a run, in one line of this text."""
    with pytest.raises(error, match=match) as caught:
        load_model(tokenized(folder), CPU, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [-500, 100, 4, 0])
def test_names_a_truncated_weight_file(tmp_path: Path, keep: int):
    file = folder_of(make_model(), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, ValueError, r"is damaged: .*model\.safetensors.*; copy or download that file anew")


def test_names_the_damaged_one_of_several_weight_files(tmp_path: Path):
    make_model().save_pretrained(tmp_path, max_shard_size="8KB")
    make_tokenizer().save_pretrained(tmp_path)
    last = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    assert last.name != "model-00001-of-00001.safetensors"
    last.write_bytes(last.read_bytes()[:-8])
    refused(tmp_path, ValueError, last.name)


def test_refuses_a_truncated_pickle_of_weights(tmp_path: Path):
    folder_of(make_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(make_model().state_dict(), tmp_path / "pytorch_model.bin")
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-500])
    refused(tmp_path, (ValueError, OSError), str(tmp_path))


def test_refuses_a_folder_without_a_model(tmp_path: Path):
    refused(tmp_path, ValueError, r"has no config\.json, so it is not the folder of a transformers model")


def test_refuses_a_folder_without_a_tokenizer(tmp_path: Path):
    make_model().save_pretrained(tmp_path)
    refused(tmp_path, ValueError, r"has no tokenizer \(.*tokenizer\.save_pretrained")


@pytest.mark.parametrize(
    ("config", "words"),
    [({"model_type": "zzz"}, r"of the type 'zzz' \(model_type in config\.json\)"), ({}, "has no model_type that")],
)
def test_refuses_a_config_of_no_known_model(tmp_path: Path, config: dict[str, str], words: str):
    folder_of(make_model(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, ValueError, words)


def test_refuses_a_file_as_the_model(tmp_path: Path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "x.gguf", ValueError, "is a file, and a model is a folder .*a GGUF file is quantised")
    folder_of(make_model(), tmp_path)
    refused(tmp_path / "model.safetensors", ValueError, rf"is a file, .*give its folder, {tmp_path}")


def bert_config(**options: Any) -> transformers.BertConfig:
    sizes: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return transformers.BertConfig(vocab_size=len(make_tokenizer()), **sizes, **options)


def test_refuses_a_checkpoint_without_a_language_model_head(tmp_path: Path):
    decoder = transformers.BertModel(bert_config(is_decoder=True))
    refused(folder_of(decoder, tmp_path), ValueError, r"lacks \d+ weights of a causal .*cls\.predictions.*random")


def test_refuses_encoders(tmp_path: Path):
    encoder = transformers.BertForMaskedLM(bert_config())
    refused(folder_of(encoder, tmp_path), TypeError, "must be a causal LM, got BertLMHeadModel with is_decoder=False")


def test_takes_a_decoder_of_an_encoder_family(tmp_path: Path):
    folder = folder_of(transformers.BertLMHeadModel(bert_config(is_decoder=True)), tmp_path)
    assert type(load_model(str(folder), CPU, torch.float32)).__name__ == "BertLMHeadModel"


def test_refuses_a_second_cpu():
    with pytest.raises(ValueError, match="device='cpu:1' is not here: there is one; use device=cpu"):
        devices.pick_device("cpu:1")
