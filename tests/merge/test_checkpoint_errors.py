"""Refusals of a merge on disk: before anything is written, with name, expected, got and remedy."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import flora_core as flora
from flora_core.cli.main import main
from flora_core.common.files import SaveError
from flora_core.merge import checkpoint as merge_module
from tests.support.checkpoints import CONFIG, files, save_adapters, save_checkpoint, weights


@pytest.fixture
def case(tmp_path):
    """A base, three adapters, and a call that must be refused and leave nothing behind."""
    base, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)

    class Case:
        folder, adapters, out = base, paths, tmp_path / "out"

        def refused(self, words, error=ValueError, adapters=None, out=None, **options):
            before = files(tmp_path)
            given = dict.fromkeys(self.adapters, 1) if adapters is None else adapters
            with pytest.raises(error, match=words):
                flora.merge_into_checkpoint(self.folder, given, out or self.out, **options)
            assert files(tmp_path) == before
            assert not list(tmp_path.glob(".merging-*"))

        def rewrite(self, shard, change):
            path = self.folder / f"model-0000{shard}-of-00003.safetensors"
            save_file(change(load_file(path)), path, metadata={"format": "pt"})

        def configure(self, path, **fields):
            file = path / ("config.json" if path == self.folder else "adapter_config.json")
            file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return Case()


# Words of the command.


@pytest.mark.parametrize("weight", ["x", "-1", "nan", "inf", ""])
def test_weights_that_do_not_parse(weight, case, capsys):
    words = ["--base", str(case.folder), "--adapter", f"{case.adapters[0]}={weight}", "--out", str(case.out)]
    assert main(["aggregate", *words]) == 2
    assert f"expected DIR or DIR=WEIGHT, the weight a finite number of at least 0, got '{weight}'" in (
        capsys.readouterr().err
    )


def test_an_adapter_given_twice_by_two_names(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--base", "base", "--adapter", "client-0=2", "--adapter", case.adapters[0], "--out", "out"]
    assert main(["aggregate", *words]) == 2
    assert "is given twice; give it once, with the sum of both weights" in " ".join(capsys.readouterr().err.split())


def test_options_that_do_not_parse_or_contradict(case, capsys):
    words = ["aggregate", "--base", str(case.folder), "--adapter", case.adapters[0], "--out", str(case.out)]
    for more, text in (
        (["--option", "tau"], "--option must be KEY=VALUE, such as tau=0.99, got 'tau'"),
        (["--strategy", "flora_svd", "--option", "tua=0.9"], "no option 'tua'; did you mean 'tau'"),
        (["--strategy", "flroa"], "unknown strategy 'flroa'; did you mean 'flora'"),
        (["--verify", "--as-adapter"], "--verify certifies a merged base, and --as-adapter writes none"),
        (["--as-adapter", "vlm"], "layout must be one of peft, vllm, got 'vlm'"),
    ):
        assert main([*words, *more]) == 2
        assert text in " ".join(capsys.readouterr().err.split())
    assert not case.out.exists()


def test_a_folder_with_an_equals_sign_is_taken_as_it_is(case, tmp_path):
    path = tmp_path / "rank=8"
    shutil.copytree(case.adapters[0], path)
    words = ["aggregate", "--base", str(case.folder), "--adapter", str(path), "--out", str(case.out)]
    assert main(words) == 0


# Places.


@pytest.mark.parametrize("place", ["base", "base/deep/out", "client-0/out", "."])
def test_the_output_inside_an_input_or_around_one(place, case, tmp_path):
    case.refused("lie in one another; choose a place for the output", out=tmp_path / place)


def test_the_output_inside_an_input_by_a_link(case, tmp_path):
    (tmp_path / "link").symlink_to(case.folder)
    case.refused("lie in one another", out=tmp_path / "link" / "out")


def test_an_output_that_holds_something(case, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    case.refused(r"already holds thesis\.tex: choose a new or an empty folder", FileExistsError, out=tmp_path / "full")
    case.refused("is a file, and a folder is to be made", FileExistsError, out=tmp_path / "full" / "thesis.tex")


def test_too_little_room(case, monkeypatch):
    usage = shutil.disk_usage(case.folder)._replace(free=1000)
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda _: usage)
    case.refused("GB more, and the disk has 0.0 GB free; free some space", SaveError)


def test_an_output_where_nothing_can_be_written(case, tmp_path):
    (tmp_path / "file").write_text("x")
    words = "could not save .*out: .*; a part of the path is a file, not a folder: choose another place"
    case.refused(words, SaveError, out=tmp_path / "file" / "deep" / "out")


# The base.


def test_no_base_and_no_weights(case, tmp_path):
    case.folder = tmp_path / "nothing"
    case.refused("is no folder; give the folder of a checkpoint", FileNotFoundError)
    case.folder = tmp_path / "base"
    os.remove(case.folder / "config.json")
    case.refused("holds no config.json; give the folder of a whole checkpoint", FileNotFoundError)


def test_a_pickled_base(case):
    for path in case.folder.glob("model*"):
        path.unlink()
    case.refused(r"neither model.safetensors nor model.safetensors.index.json", FileNotFoundError)
    (case.folder / "pytorch_model.bin").write_bytes(b"pickle")
    case.refused("pytorch_model.bin, a pickle, .* save it again with save_pretrained", FileNotFoundError)


def test_a_missing_shard(case):
    os.remove(case.folder / "model-00002-of-00003.safetensors")
    case.refused(
        r"names 3 shards, and 1 of them are missing: model-00002-of-00003.safetensors \(there are: model-00001",
        FileNotFoundError,
    )


def test_an_index_that_disagrees_with_the_shards(case):
    index = case.folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first, last = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
    for change, words in (
        ({"model.norm.weight": first}, f"'model.norm.weight' is in {last}, the index says {first}"),
        ({"model.more.weight": first}, f"'model.more.weight' is in none, the index says {first}"),
        ({"model.norm.weight": "../../etc/passwd"}, "'../../etc/passwd' must be the name of a safetensors file"),
        ({"model.norm.weight": 3}, "must have a weight_map from tensors to files"),
    ):
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], **change}}))
        case.refused(words)
    del good["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(good))
    case.refused(f"disagrees with the shards on 1 tensors: 'model.norm.weight' is in {last}, the index says nothing")


def test_a_tensor_in_two_shards_and_two_forms_of_weights(case):
    case.rewrite(3, lambda tensors: {**tensors, "model.embed_tokens.weight": torch.zeros(2, 2)})
    case.refused("'model.embed_tokens.weight' is in two shards")
    shutil.copy(case.folder / "model-00001-of-00003.safetensors", case.folder / "model.safetensors")
    case.refused("holds both model.safetensors and model.safetensors.index.json")


def test_a_shard_that_is_cut_or_lies(case):
    path = case.folder / "model-00002-of-00003.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    case.refused("model-00002-of-00003.safetensors is not a whole safetensors file")
    path.write_bytes(struct.pack("<Q", 1 << 60) + good[8:])
    case.refused("model-00002-of-00003.safetensors is not a whole safetensors file")


def test_weights_of_several_dtypes(case):
    case.rewrite(2, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    case.refused(r"several dtypes: (BF16|F32) .*such as model.layers.*of two downloads.*--mixed-dtypes")
    report = flora.merge_into_checkpoint(
        case.folder, dict.fromkeys(case.adapters, 1), case.out, mixed_dtypes=True, verify=True
    )
    assert report.modules == 9


def test_a_quantised_weight(case):
    case.rewrite(2, lambda tensors: {n: t.to(torch.int8) if t.dim() == 2 else t for n, t in tensors.items()})
    case.refused("quantised: it stores .* as I8, which would lose the update; give the base in BF16, F16 or F32")


def test_a_weight_that_overflows(case):
    for shard in (1, 2, 3):
        case.rewrite(shard, lambda tensors: {name: tensor.half() * 0 + 65504 for name, tensor in tensors.items()})
    for path in case.adapters:
        file = f"{path}/adapter_model.safetensors"
        save_file({name: tensor * 0 + 10 for name, tensor in load_file(file).items()}, file)
    case.refused("is not finite in float16 after the merge.*save the base in bfloat16 or float32 first")


# Adapters and bases that do not fit.


def test_an_adapter_of_another_base(case, tmp_path):
    (deep,) = save_adapters(tmp_path / "deep", (2,), layers=5)
    case.refused(
        r"6 of its 15 modules are not there: model.layers.3.mlp.down_proj.*; the base has, for example,"
        r" model.*; give the base that it was trained on",
        adapters={deep: 1},
    )
    (wide,) = save_adapters(tmp_path / "wide", (2,), width=2)
    case.configure(tmp_path / "wide" / "client-0", base_model_name_or_path="some/other-1b")
    case.refused(
        r"9 of its 9 modules have another shape: model.layers.0.mlp.down_proj: the adapter has \(N, K\) = \(64, 96\),"
        r" the base \(32, 48\); .*its config names 'some/other-1b'",
        adapters={wide: 1},
    )


def test_fused_projections_are_named(case, tmp_path):
    tensors = {"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(96, 32)}
    case.folder = save_checkpoint(tmp_path / "fused", tensors)
    (path,) = save_adapters(tmp_path / "a", (2,), layers=1, modules=["self_attn.q_proj"])
    case.refused("it stores model.layers.0.self_attn fused as qkv_proj: train on the fused module", adapters={path: 1})


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head(stored, case, tmp_path):
    base = weights()
    if stored:
        base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    else:
        del base["lm_head.weight"]
    config = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    case.folder = save_checkpoint(tmp_path / "tied", base, config=config)
    adapters = {"lm_head": (torch.ones(2, 32), torch.ones(2, 64))}
    flora.save_peft_adapter(flora.ClientUpdate("a", adapters, {"lm_head": 1.0}), tmp_path / "head")
    case.refused("tie_word_embeddings.*untie it first", adapters={tmp_path / "head": 1})


def test_square_weights_whose_side_nobody_tells(case):
    for path in case.adapters:
        case.configure(case.folder.parent / os.path.basename(path), fan_in_fan_out=True)
    flora.merge_into_checkpoint(case.folder, dict.fromkeys(case.adapters, 1), case.out)  # others are not square
    shutil.rmtree(case.out)
    (path,) = save_adapters(case.folder.parent / "square", (2,), modules=["self_attn.q_proj"])
    case.configure(case.folder.parent / "square" / "client-0", fan_in_fan_out=True)
    case.refused("says fan_in_fan_out=True, model_type 'llama' is not known to store", adapters={path: 1})


# Adapters.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora=True is not supported; train without DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*train without modules_to_save"),
        ({"init_lora_weights": "pissa"}, "changed the base weights"),
        ({"r": 5}, "the config says rank 5"),
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA'"),
    ],
)
def test_features_that_are_not_merged(fields, words, case):
    case.configure(case.folder.parent / "client-1", **fields)
    case.refused(words)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "an adapted embedding: train without it"),
        (
            "base_model.model.model.embed_tokens.weight",
            "trained, or is of another base.* save_embedding_layers=False",
        ),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector", "DoRA: train with use_dora=False"),
    ],
)
def test_tensors_that_are_not_factors(key, words, case):
    file = f"{case.adapters[1]}/adapter_model.safetensors"
    save_file({**load_file(file), key: torch.zeros(2, 2)}, file)
    case.refused(words)


def test_the_same_adapter_under_another_name(case, tmp_path):
    shutil.copytree(case.adapters[0], tmp_path / "copy")
    case.refused("copy is the same as .*client-0; give it once", adapters={case.adapters[0]: 1, tmp_path / "copy": 2})


def test_values_that_are_not_finite_are_found_before_anything_is_written(case):
    file = f"{case.adapters[2]}/adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, file)
    case.refused("client-2', module 'model.layers.2.mlp.up_proj': A, B and scaling must be finite")


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "3", True, None])
def test_weights_that_are_none(weight, case):
    case.refused("must be a finite number of at least 0, got", adapters={case.adapters[0]: weight})


def test_no_adapters_and_no_weight_above_0(case):
    case.refused("at least one PEFT adapter, got none", adapters={})
    case.refused("weights are all 0", adapters=dict.fromkeys(case.adapters, 0))


def test_ranks_that_a_strategy_does_not_take(case):
    case.refused("strategy 'fedit' needs equal ranks, got 1 from .*; give these clients one rank", strategy="fedit")
