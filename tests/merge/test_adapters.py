"""Adapters merged on disk: names, missing modules, copies of the base's weights, scale, reports.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flora_core as flora
from flora_core.cli.main import main
from flora_core.merge.shards import Entry, read_shard, same_values
from tests.support.checkpoints import CONFIG, files, save_adapters, save_checkpoint, weights

WEIGHTS = "adapter_model.safetensors"
UP = "model.layers.{}.mlp.up_proj"


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def rewrite(adapter, change) -> None:
    path = Path(adapter) / WEIGHTS
    save_file({key: tensor.contiguous() for key, tensor in change(load_file(path)).items()}, path)


def configure(folder, **fields) -> None:
    path = Path(folder) / ("adapter_config.json" if (Path(folder) / WEIGHTS).exists() else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def product(adapter, module: str) -> torch.Tensor:
    """``s B A`` by hand, in float64 (N, K)."""
    update = flora.load_peft_adapter(adapter)
    A, B = update.adapters[module]
    return update.scaling[module] * B.double().T @ A.double()


@pytest.fixture
def base(tmp_path) -> Path:
    return save_checkpoint(tmp_path / "base", weights(dtype=torch.float32))


@pytest.fixture
def adapter(tmp_path) -> str:
    (path,) = save_adapters(tmp_path / "a", (3,), modules=["self_attn.q_proj", "mlp.up_proj"])
    configure(path, target_modules=["q_proj", "up_proj"])
    return path


# Missing modules.


@pytest.mark.parametrize(
    ("targets", "more"),
    [
        (["q_proj", "up_proj"], {}),
        (r".*\.(q_proj|up_proj)", {}),
        (["q_proj", "up_proj"], {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"}),
        (["q_proj", "mlp.up_proj", "down_proj"], {"exclude_modules": ["down_proj"]}),
    ],
)
def test_modules_that_the_config_names_and_the_file_lacks_are_refused(targets, more, base, adapter, tmp_path):
    configure(adapter, target_modules=targets, **more)
    flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "whole")
    rewrite(adapter, lambda tensors: {key: t for key, t in tensors.items() if "layers.2.mlp" not in key})
    before = files(tmp_path)
    with pytest.raises(ValueError, match=rf"lacks factors of 1 modules .* has: {UP.format(2)}; .*--partial"):
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")
    with pytest.raises(ValueError, match="lacks factors of 1 modules"):
        flora.export_adapter(base, {adapter: 1}, tmp_path / "out")
    assert files(tmp_path) == before


def test_layers_that_the_config_leaves_out_are_not_missing(base, adapter, tmp_path):
    configure(adapter, layers_to_transform=[0, 1], layers_pattern="layers")
    rewrite(adapter, lambda tensors: {key: t for key, t in tensors.items() if "layers.2" not in key})
    report = flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")
    assert report.modules == 4
    assert report.notes == ()


def test_partial_merges_what_is_there_and_reports_the_rest(base, adapter, tmp_path):
    lost = UP.format(1)
    rewrite(adapter, lambda tensors: {k: t for k, t in tensors.items() if f"{lost}.lora_B" not in k})
    with pytest.raises(ValueError, match=f"must come together, got one alone for {lost}"):
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")
    report = flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out", partial=True, verify=True)
    assert report.modules == 5
    assert report.adapters[0]["missing"] == [lost]
    assert any(f"is partial: 1 modules have no factors: {lost}" in note for note in report.notes)
    record = json.loads((tmp_path / "out" / "flora_merge.json").read_text())
    assert record["notes"] == list(report.notes)
    assert record["adapters"][0]["missing"] == [lost]
    found, before = merged(tmp_path / "out"), merged(base)
    assert torch.equal(found[f"{lost}.weight"], before[f"{lost}.weight"])
    assert not torch.equal(found[f"{UP.format(0)}.weight"], before[f"{UP.format(0)}.weight"])
    again = flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out", partial=True)
    assert again.notes == report.notes


def test_all_linear_needs_the_model_class_and_says_when_it_is_not_available(base, adapter, tmp_path):
    configure(adapter, target_modules="all-linear")
    configure(base, architectures=["NoSuchModel"])
    report = flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")
    assert any("is not certain: transformers does not name its modules" in note for note in report.notes)


# Readings.


def save_two_towers(folder: Path, one: str, other: str) -> Path:
    tensors = weights(dtype=torch.float32)
    both = {f"{tower}.{name}": tensor.clone() for tower in (one, other) for name, tensor in tensors.items()}
    return save_checkpoint(folder, both, config={"model_type": "x"})


def test_a_path_that_fits_two_towers_is_refused_with_both(adapter, tmp_path):
    base = save_two_towers(tmp_path / "base", "student", "draft")
    with pytest.raises(ValueError, match=r"candidates are 'student.model.layers.*', 'draft.model.layers.*full module"):
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")
    (path,) = save_adapters(tmp_path / "b", (2,), prefix="student.model.")
    flora.merge_into_checkpoint(base, {path: 1}, tmp_path / "out")
    changed = {n for n, t in merged(tmp_path / "out").items() if not torch.equal(t, merged(base)[n])}
    assert {name.partition(".")[0] for name in changed} == {"student"}


def test_a_path_of_another_tower_is_not_shortened(tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in weights(dtype=torch.float32).items()}
    base = save_checkpoint(tmp_path / "base", bare)
    (path,) = save_adapters(tmp_path / "b", (2,), prefix="vision_tower.")
    with pytest.raises(ValueError, match=r"9 of its 9 modules are not there: vision_tower.*which may be another tower"):
        flora.merge_into_checkpoint(base, {path: 1}, tmp_path / "out")


def test_a_headless_path_is_not_given_to_the_only_tower_with_such_layers(adapter, tmp_path):
    tensors = {name.replace("model.", "vision."): tensor for name, tensor in weights(dtype=torch.float32).items()}
    base = save_checkpoint(tmp_path / "base", tensors, config={"model_type": "x"})
    with pytest.raises(ValueError, match=r"which part it belongs to is not clear: candidates are 'vision.layers"):
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")


def test_a_path_of_a_part_is_read_where_one_place_fits_and_the_reading_is_reported(base, tmp_path):
    (path,) = save_adapters(tmp_path / "a", (2,), prefix="")
    report = flora.merge_into_checkpoint(base, {path: 1}, tmp_path / "out")
    assert any(r"module paths are read as the base's: * as model.*" in note for note in report.notes)
    assert report.adapters[0]["paths"] == "* as model.*"


# Weights of the base beside the factors.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_of_the_base_s_weights_are_compared_and_ignored(dtype, base, adapter, tmp_path):
    flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "wanted")
    before = merged(base)
    head = {"base_model.model.lm_head.base_layer.weight": before["lm_head.weight"].to(dtype)}
    raw = {f"base_model.model.{name}": tensor.to(dtype) for name, tensor in before.items() if "norm" in name}
    rewrite(adapter, lambda tensors: {**tensors, **head, **raw})
    report = flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out", verify=True)
    assert all(torch.equal(t, merged(tmp_path / "wanted")[n]) for n, t in merged(tmp_path / "out").items())
    assert any("are equal to the base's and were not needed" in note for note in report.notes)


@pytest.mark.parametrize("key", ["lm_head.base_layer.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_changed_copy_of_a_weight_of_the_base_is_refused(key, base, adapter, tmp_path):
    copy = merged(base)[key.replace("base_layer.", "")].clone()
    copy.view(-1)[-1] += 1
    rewrite(adapter, lambda tensors: {**tensors, f"base_model.model.{key}": copy})
    configure(adapter, base_model_name_or_path="owner/other")
    reason = "is of another base; give" if "base_layer" in key else "it was trained, or is of another base"
    with pytest.raises(ValueError, match=rf"{key}' is not '.*' of base .*base \(other values\): .*{reason}") as error:
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")
    assert "its config names 'owner/other'" in str(error.value)
    rewrite(adapter, lambda tensors: {**tensors, f"base_model.model.{key}": copy[:-1]})
    with pytest.raises(ValueError, match=r"\(shapes \(.*\) and \(.*\)\)"):
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")


def test_values_are_compared_over_pieces_and_after_rounding(tmp_path):
    numbers = torch.randn(700_000)
    tensors = {
        "a": numbers,
        "b": numbers.clone(),
        "c": numbers.bfloat16(),
        "d": numbers.clone(),
        "e": numbers[:-1].clone(),
    }
    tensors["d"][-1] += 1
    save_file(tensors, tmp_path / "x.safetensors")
    entries: dict[str, Entry] = {one.name: one for one in read_shard(tmp_path / "x.safetensors").entries}
    assert same_values(entries["a"], entries["b"])
    assert same_values(entries["c"], entries["a"])
    assert not same_values(entries["a"], entries["d"])
    assert not same_values(entries["d"], entries["c"])
    assert not same_values(entries["a"], entries["e"])


# Reports.


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_adapters_that_change_nothing_are_reported(factor, base, adapter, tmp_path):
    rewrite(adapter, lambda tensors: {k: t * 0 if factor in k else t for k, t in tensors.items()})
    report = flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")
    (note,) = report.notes
    assert f"adapter {adapter} changes nothing" in note
    assert flora.export_adapter(base, {adapter: 1}, tmp_path / "one").notes[0] == note


def test_modules_that_change_nothing_are_named(base, adapter, tmp_path):
    rewrite(adapter, lambda tensors: {k: t * 0 if f"{UP.format(1)}.lora_B" in k else t for k, t in tensors.items()})
    report = flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")
    assert any(f"1 of its 6 modules change nothing: {UP.format(1)}" in note for note in report.notes)


def test_named_bases_are_written_down_and_other_ones_reported(base, tmp_path):
    paths = save_adapters(tmp_path, (2, 3))
    given = dict.fromkeys(paths, 1)
    for path, name in zip(paths, ("org/base", "org/base"), strict=True):
        configure(path, base_model_name_or_path=name)
    assert flora.merge_into_checkpoint(base, given, tmp_path / "same").notes == ()
    configure(paths[1], base_model_name_or_path="org/other")
    report = flora.merge_into_checkpoint(base, given, tmp_path / "two")
    assert "name different bases" in report.notes[0]
    assert "client-1: 'org/other'" in report.notes[0]
    record = json.loads((tmp_path / "two" / "flora_merge.json").read_text())
    assert [one["base"] for one in record["adapters"]] == ["org/base", "org/other"]
    configure(base, _name_or_path="org/third")
    report = flora.merge_into_checkpoint(base, {paths[1]: 1}, tmp_path / "three")
    assert "names base 'org/other', and it is merged into" in report.notes[0]
    assert "'org/third'" in report.notes[0]


def test_the_command_prints_shares_scale_and_notes(base, tmp_path, capsys):
    paths = save_adapters(tmp_path, (2, 3))
    words = ["aggregate", "--base", str(base), "--adapter", f"{paths[0]}=3", "--adapter", f"{paths[1]}=1"]
    rewrite(paths[1], lambda tensors: {key: tensor * 0 for key, tensor in tensors.items()})
    assert main([*words, "--out", str(tmp_path / "out"), "--scale", "-0.5"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("share of client-0", "0.75 (rank 2, alpha / r 0.75)", "0.25 (rank 3", "scale of the sum", "-0.5"):
        assert part in text
    assert "changes nothing" in text


# Scale.


@pytest.mark.parametrize("scale", [0.5, -1.0, 2.5])
def test_the_sum_is_merged_at_a_stated_strength(scale, base, tmp_path):
    paths = save_adapters(tmp_path, (4, 1))
    given = {paths[0]: 3, paths[1]: 1}
    report = flora.merge_into_checkpoint(base, given, tmp_path / "out", scale=scale, verify=True)
    flora.export_adapter(base, given, tmp_path / "one", scale=scale)
    assert report.scale == scale
    module = UP.format(1)
    exact = scale * (0.75 * product(paths[0], module) + 0.25 * product(paths[1], module))
    change = merged(tmp_path / "out")[f"{module}.weight"].double() - merged(base)[f"{module}.weight"].double()
    assert float((change - exact).abs().max()) < 1e-6 < float(exact.abs().max())
    assert float((product(tmp_path / "one", module) - exact).abs().max()) < 1e-6
    assert json.loads((tmp_path / "out" / "flora_merge.json").read_text())["scale"] == scale


def test_the_scale_holds_for_strategies_that_are_not_exact_and_leaves_their_relative_error(base, tmp_path):
    given = dict.fromkeys(save_adapters(tmp_path, (4, 2)), 1)
    one = flora.merge_into_checkpoint(base, given, tmp_path / "one", strategy="flora_svd", options={"tau": 0.9})
    half = flora.merge_into_checkpoint(
        base, given, tmp_path / "half", strategy="flora_svd", options={"tau": 0.9}, scale=0.5, verify=True
    )
    assert half.aggregation_error == pytest.approx(one.aggregation_error)
    name = f"{UP.format(0)}.weight"
    W, whole, part = (merged(folder)[name].double() for folder in (base, tmp_path / "one", tmp_path / "half"))
    assert torch.allclose(part - W, (whole - W) / 2, atol=1e-7)


@pytest.mark.parametrize("scale", [0, float("nan"), float("inf"), "1", True])
def test_a_scale_that_is_no_strength_is_refused(scale, base, adapter, tmp_path):
    with pytest.raises(ValueError, match="scale must be a finite number other than 0, got"):
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out", scale=scale)


def test_another_scale_is_another_merge(base, adapter, tmp_path):
    flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")
    with pytest.raises(FileExistsError, match="merge of other inputs"):
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out", scale=2)


# Readers without patterns.


def test_unequal_ranks_are_reported_with_the_layout_for_readers_without_patterns(base, tmp_path):
    paths = [
        *save_adapters(tmp_path / "a", (4,), modules=["mlp.up_proj"]),
        *save_adapters(tmp_path / "b", (3,), modules=["mlp.up_proj", "mlp.down_proj"]),
    ]
    given = dict.fromkeys(paths, 1)
    (note,) = flora.export_adapter(base, given, tmp_path / "stacked").notes
    assert "readers that ignore them (vLLM, llama.cpp)" in note
    assert flora.export_adapter(base, given, tmp_path / "even", layout="vllm").notes == ()
    config = json.loads((tmp_path / "even" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]


# Files of the base.


def test_files_of_adapters_and_trainers_in_the_base_are_not_copied(base, adapter, tmp_path):
    flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "wanted")
    for folder in (base, base / "adapter", base / "runs" / "best"):
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        (folder / "note.txt").write_text("x")
    (base / "checkpoint-50").mkdir()
    (base / "checkpoint-50" / "vocab.txt").write_text("x")
    (base / "trainer_state.json").write_text("{}")
    (base / "flora_merge.json").write_text("{}")
    report = flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out", verify=True)
    assert set(files(tmp_path / "out")) == set(files(tmp_path / "wanted")) | {"note.txt"}
    assert {"adapter_config.json", WEIGHTS, "adapter/note.txt", "checkpoint-50/vocab.txt"} <= set(report.left_out)
    again = flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out", verify=True)
    assert again.certificate


def test_shards_without_an_index_are_merged_and_the_index_is_made(base, adapter, tmp_path):
    flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "wanted")
    index = base / "model.safetensors.index.json"
    wanted = json.loads(index.read_text())
    index.unlink()
    report = flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out", verify=True)
    made = json.loads((tmp_path / "out" / index.name).read_text())
    assert made == wanted
    assert all(torch.equal(t, merged(tmp_path / "wanted")[n]) for n, t in merged(tmp_path / "out").items())
    assert any("has 3 shards without an index" in note for note in report.notes)
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 shards .* missing: model-00002-of-00003.safetensors"):
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "other")


def test_an_index_that_leaves_out_a_shard_of_its_series_is_refused(base, adapter, tmp_path):
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = "model-00003-of-00003.safetensors"
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != last}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"names 2 shards and not {last}, whose tensors would be lost"):
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")


# Quantised bases.


def quantise(kind: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    stem = name.removesuffix(".weight")
    packed = torch.zeros(4, 4, dtype=torch.int32)
    return {
        "gptq": {f"{stem}.qweight": packed, f"{stem}.scales": torch.ones(1, 4)},
        "compressed-tensors": {f"{stem}.weight_packed": packed, f"{stem}.weight_scale": torch.ones(1)},
        "bitsandbytes": {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(2)},
        "scaled": {name: tensor / 7, f"{stem}.weight_scale": torch.full((1,), 7.0)},
    }[kind]


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors", "bitsandbytes", "scaled"])
def test_a_quantised_base_is_named_and_serves_an_export(kind, adapter, tmp_path):
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in weights(dtype=torch.float32).items():
        tensors |= quantise(kind, name, tensor) if "proj" in name else {name: tensor}
    config = {**CONFIG, "quantization_config": {"quant_method": kind}}
    base = save_checkpoint(tmp_path / "base", tensors, config=config)
    with pytest.raises(ValueError, match=rf"is quantised \({kind}\): it stores .*give the base in BF16.*--as-adapter"):
        flora.merge_into_checkpoint(base, {adapter: 1}, tmp_path / "out")
    flora.export_adapter(base, {adapter: 1}, tmp_path / "one")
    module = UP.format(2)
    assert torch.allclose(product(tmp_path / "one", module), product(adapter, module), atol=1e-7)
