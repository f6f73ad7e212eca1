"""Merging adapters into a checkpoint on disk, against float64 and against peft itself.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import flora_core as flora
from flora_core.aggregation.terms import exact_stacks, round_terms
from flora_core.cli.main import main
from flora_core.merge import checkpoint as merge_module
from flora_core.merge import writer
from flora_core.testing import budget_ratio, plain_rounding
from tests.support.checkpoints import CONFIG, files, save_adapters, save_checkpoint, weights

os.environ.setdefault("HF_HUB_OFFLINE", "1")
WEIGHTS = (3.0, 1.0, 2.5)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def merged(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def expected(base, paths, numbers=WEIGHTS) -> dict[str, torch.Tensor]:
    """The exact result in float64, from the adapters as ``load_peft_adapter`` reads them."""
    updates = [flora.load_peft_adapter(p, client=p, weight=number) for p, number in zip(paths, numbers, strict=True)]
    found = {name: tensor.double() for name, tensor in base.items()}
    for module, (A, B, coef) in exact_stacks(round_terms(updates)).items():
        found[f"{module}.weight"] = found[f"{module}.weight"] + (B.double().T * coef) @ A.double()
    return found


def rounded_once(value: torch.Tensor, exact: torch.Tensor) -> bool:
    """Within half a unit of the last place, and what a sum of 12 products in float32 may add to that."""
    info = torch.finfo(value.dtype)
    slack = 32 * torch.finfo(torch.float32 if info.bits < 64 else torch.float64).eps * exact.abs().max()
    bound = exact.abs() * info.eps / 2 + info.smallest_normal * info.eps + slack
    return bool(((value.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [0, 3], ids=["one file", "shards"])
@pytest.mark.parametrize("rows", [1, 1 << 30], ids=["a row at a time", "whole"])
def test_every_weight_is_the_exact_sum_rounded_once_and_every_other_byte_is_the_base_s(
    dtype, shards, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(writer, "BLOCK_BYTES", rows)
    base = weights(dtype=dtype)
    folder, paths = save_checkpoint(tmp_path / "base", base, shards=shards), save_adapters(tmp_path)
    out = tmp_path / "out"
    report = flora.merge_into_checkpoint(folder, dict(zip(paths, WEIGHTS, strict=True)), out, verify=True)
    found, exact = merged(out), expected(base, paths)
    assert list(found) == list(merged(folder))
    changed = [name for name in found if not torch.equal(found[name], base[name])]
    assert len(changed) == report.modules == 9
    assert all(rounded_once(found[name], exact[name]) for name in found)
    before, after = files(folder), files(out)
    assert set(after) == set(before) | {"flora_merge.json"}
    assert {name for name in before if before[name] != after[name]} == {
        "README.md",
        *(name for name in before if name.endswith(".safetensors")),
    }
    for name in before:
        if name.endswith(".safetensors"):
            length = 8 + int.from_bytes(before[name][:8], "little")
            assert after[name][:length] == before[name][:length]
    assert report.certificate is not None
    # In 16 bits the one rounding is all of the bound, else the sum's worst case, which nobody meets, is most of it.
    least = 0.5 if dtype.itemsize == 2 else 0
    assert least < report.certificate["largest_share_of_bound"] <= 1
    assert report.certificate["error_by_module"].keys() == {name.removesuffix(".weight") for name in changed}
    worst = max(report.certificate["error_by_module"].values())
    assert worst < 20 * torch.finfo(dtype).eps


def test_the_sums_are_those_of_the_op_that_takes_the_native_kernel(tmp_path, monkeypatch):
    called, keep = [], writer.stacked_merge_
    monkeypatch.setattr(writer, "stacked_merge_", lambda *a: (called.append(a), keep(*a)))
    folder, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    flora.merge_into_checkpoint(folder, dict.fromkeys(paths, 1), tmp_path / "out")
    assert len(called) == 9


def test_the_order_of_adapters_and_the_scale_of_weights_change_no_weight_beyond_its_rounding(tmp_path):
    base = weights()
    folder, paths = save_checkpoint(tmp_path / "base", base), save_adapters(tmp_path)
    flora.merge_into_checkpoint(folder, {paths[2]: 25, paths[0]: 30, paths[1]: 10}, tmp_path / "out")
    exact = expected(base, paths)
    assert all(rounded_once(tensor, exact[name]) for name, tensor in merged(tmp_path / "out").items())


def test_adapters_of_several_dtypes_and_of_other_modules_are_summed_exactly(tmp_path):
    base = weights(dtype=torch.float32)
    folder = save_checkpoint(tmp_path / "base", base)
    paths = [
        *save_adapters(tmp_path / "a", (4,), dtype=torch.bfloat16, modules=["mlp.up_proj"]),
        *save_adapters(tmp_path / "b", (3,), dtype=torch.float16, layers=1),
    ]
    flora.merge_into_checkpoint(folder, dict(zip(paths, (1, 3), strict=True)), tmp_path / "out", verify=True)
    exact, found = expected(base, paths, (1, 3)), merged(tmp_path / "out")
    assert all(rounded_once(tensor, exact[name]) for name, tensor in found.items())
    assert not torch.equal(found["model.layers.2.mlp.up_proj.weight"], base["model.layers.2.mlp.up_proj.weight"])


def test_a_base_without_the_prefix_of_its_head_and_an_adapter_without_it(tmp_path):
    base = weights(layers=1, dtype=torch.float32)
    bare = {name.removeprefix("model."): tensor for name, tensor in base.items() if name != "lm_head.weight"}
    (with_prefix,) = save_adapters(tmp_path / "a", (2,), layers=1)
    (without,) = save_adapters(tmp_path / "b", (2,), layers=1, prefix="")
    for name, tensors, path in (("bare", bare, with_prefix), ("whole", base, without)):
        folder = save_checkpoint(tmp_path / name, tensors)
        flora.merge_into_checkpoint(folder, {path: 1}, tmp_path / f"{name}-out")
    one, two = merged(tmp_path / "bare-out"), merged(tmp_path / "whole-out")
    assert all(torch.equal(tensor, two[f"model.{name}"]) for name, tensor in one.items())
    assert not torch.equal(one["layers.0.mlp.up_proj.weight"], bare["layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(("strategy", "options"), [("flora_svd", {"tau": 0.9}), ("flexlora", {}), ("hetlora", {})])
def test_other_strategies_merge_what_aggregate_makes_and_tell_their_error(strategy, options, tmp_path):
    base = weights(dtype=torch.float32)
    folder, paths = save_checkpoint(tmp_path / "base", base), save_adapters(tmp_path)
    report = flora.merge_into_checkpoint(
        folder,
        dict(zip(paths, WEIGHTS, strict=True)),
        tmp_path / "out",
        strategy=strategy,
        options=options,
        verify=True,
    )
    updates = [flora.load_peft_adapter(path, weight=w) for path, w in zip(paths, WEIGHTS, strict=True)]
    result = flora.aggregate(updates, strategy, **options)
    found = merged(tmp_path / "out")
    for module, change in result.dense().items():
        exact = base[f"{module}.weight"].double() + change
        assert budget_ratio(found[f"{module}.weight"], exact, exact.float()) <= 1
    assert report.aggregation_error == pytest.approx(result.certificate.aggregation_error, rel=1e-9)
    assert report.certificate is not None
    assert report.certificate["error"] == pytest.approx(report.aggregation_error, rel=1e-3)


def test_the_record_tells_what_was_merged_and_names_no_place(tmp_path):
    folder, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    flora.merge_into_checkpoint(folder, dict(zip(paths, WEIGHTS, strict=True)), tmp_path / "out")
    text = (tmp_path / "out" / "flora_merge.json").read_text()
    assert str(tmp_path) not in text
    record = json.loads(text)
    assert [one["name"] for one in record["adapters"]] == ["client-0", "client-1", "client-2"]
    assert sum(one["share"] for one in record["adapters"]) == pytest.approx(1, rel=1e-15)
    assert record["certificate"] is None
    assert "# The base" not in (tmp_path / "out" / "README.md").read_text()


def test_weights_in_other_formats_stay_behind(tmp_path):
    folder, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json", ".gitattributes"):
        (folder / name).write_text("old")
    report = flora.merge_into_checkpoint(folder, {paths[0]: 1}, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json"}
    assert {"README.md", "consolidated.safetensors", "pytorch_model.bin"} <= set(report.left_out)


def test_the_same_command_again_changes_nothing_and_can_still_verify(tmp_path):
    folder, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    adapters = dict.fromkeys(paths, 1)
    flora.merge_into_checkpoint(folder, adapters, tmp_path / "out")
    before = files(tmp_path / "out")
    again = flora.merge_into_checkpoint(folder, adapters, tmp_path / "out")
    assert again.resumed_bytes == again.size_bytes
    assert files(tmp_path / "out") == before
    assert flora.merge_into_checkpoint(folder, adapters, tmp_path / "out", verify=True).certificate
    assert json.loads((tmp_path / "out" / "flora_merge.json").read_text())["certificate"]["error"] > 0
    with pytest.raises(FileExistsError, match="holds a merge of other inputs"):
        flora.merge_into_checkpoint(folder, {paths[0]: 1}, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [("model.layers.1.mlp.up_proj.weight", "times its rounding bound"), ("model.norm.weight", "no adapter changes it")],
)
def test_verify_finds_one_flipped_bit(tensor, words, tmp_path, monkeypatch):
    """The lowest bit but one of one element, in a merged weight and in a copied one."""
    folder, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    keep = merge_module.write_shard

    def broken(shard, path, *rest):
        done = keep(shard, path, *rest)
        for entry in shard.entries:
            if entry.name == tensor:
                data = bytearray(path.read_bytes())
                data[entry.start + 8] ^= 2
                path.write_bytes(data)
        return done

    monkeypatch.setattr(merge_module, "write_shard", broken)
    with pytest.raises(ValueError, match=words):
        flora.merge_into_checkpoint(folder, dict.fromkeys(paths, 1), tmp_path / "out", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "client-0", "client-1", "client-2"]


# Against peft.


def family(name: str, dtype: torch.dtype):
    """A tiny model, and what an adapter of it has."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).to(dtype), {"target_modules": ["q_proj", "down_proj"]}
    if name == "phi3":
        config = transformers.Phi3Config(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0,
        )  # fmt: skip
        return transformers.Phi3ForCausalLM(config).to(dtype), {"target_modules": ["qkv_proj", "gate_up_proj"]}
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    return transformers.GPT2LMHeadModel(config).to(dtype), targets


FORMS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 2, "lora_alpha": 6, "rank_pattern": {"layers.1.mlp.down_proj": 5, r"h.1.attn.c_attn": 5},
                 "alpha_pattern": {"q_proj": 7, "c_attn": 3}},
}  # fmt: skip


def peft_adapter(name, path, form, seed):
    peft = pytest.importorskip("peft")
    model, targets = family(name, torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(**targets, **FORMS[form]))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    model.save_pretrained(path)
    return path


def merged_by_peft(name, folder, paths, numbers, dtype) -> dict[str, torch.Tensor]:
    """peft's own result: one adapter merged, or several by ``add_weighted_adapter("cat")``."""
    import peft

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = peft.PeftModel.from_pretrained(model, paths[0], adapter_name="0", autocast_adapter_dtype=False)
    for i, path in enumerate(paths[1:], 1):
        model.load_adapter(path, adapter_name=str(i), autocast_adapter_dtype=False)
    model = model.to(dtype)
    if len(paths) > 1:
        shares = [number / sum(numbers) for number in numbers]
        model.add_weighted_adapter([str(i) for i in range(len(paths))], shares, "all", combination_type="cat")
        model.set_adapter("all")
    return model.merge_and_unload().state_dict()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("llama", ["plain"]),
        ("llama", ["rslora"]),
        ("llama", ["plain", "patterns"]),
        ("gpt2", ["plain"]),
        ("gpt2", ["patterns", "plain"]),
        ("phi3", ["plain"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_the_same_as_peft_within_the_rounding(name, forms, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, numbers = tmp_path / "base", (2.0, 3.0)[: len(forms)]
    family(name, dtype)[0].save_pretrained(folder, max_shard_size="3KB")
    paths = [str(peft_adapter(name, tmp_path / f"a{i}", form, i)) for i, form in enumerate(forms)]
    report = flora.merge_into_checkpoint(folder, dict(zip(paths, numbers, strict=True)), tmp_path / "out", verify=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).state_dict()
    ref64 = merged_by_peft(name, folder, paths, numbers, torch.float64)
    with plain_rounding():
        low = merged_by_peft(name, folder, paths, numbers, dtype)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    changed = [key for key in found if not torch.equal(found[key], base[key])]
    assert len(changed) == report.modules > 3
    for key in found:
        assert budget_ratio(found[key], ref64[key], low[key]) <= 1, key
        assert rounded_once(found[key], ref64[key]), key


# One adapter instead of a merged base.


@pytest.mark.parametrize("layout", ["peft", "vllm"])
@pytest.mark.parametrize(("strategy", "options"), [("flora", {}), ("flora_svd", {"tau": 1.0}), ("flexlora", {})])
def test_one_adapter_has_the_sum_of_all(layout, strategy, options, tmp_path):
    folder, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path, (4, 1, 6))
    numbers = dict(zip(paths, WEIGHTS, strict=True))
    report = flora.export_adapter(folder, numbers, tmp_path / "one", strategy=strategy, options=options, layout=layout)
    updates = [flora.load_peft_adapter(path, weight=w) for path, w in numbers.items()]
    exact = flora.aggregate(updates, strategy, **options).dense()
    one = flora.load_peft_adapter(tmp_path / "one")
    assert one.adapters.keys() == exact.keys()
    for module, (A, B) in one.adapters.items():
        found = one.scaling[module] * B.double().T @ A.double()
        size = torch.linalg.matrix_norm(exact[module])
        assert torch.linalg.matrix_norm(found - exact[module]) <= 8 * torch.finfo(torch.float32).eps * size
    assert report.ranks == one.ranks
    assert report.aggregation_error < 1e-6 or strategy == "flexlora"


def test_what_vllm_reads_alone_gives_the_right_scaling(tmp_path):
    """vLLM's reader takes r, lora_alpha and use_rslora of the config, one for all modules, and no pattern."""
    folder, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path, (4, 7))
    paths += save_adapters(tmp_path / "b", (3,), modules=["mlp.up_proj"])
    configs = {"use_rslora": True, "lora_alpha": 6}, {"lora_alpha": 21, "alpha_pattern": {"up_proj": 14}}, {}
    exact: dict[str, Any] = dict.fromkeys(flora.load_peft_adapter(paths[0]).adapters, 0)
    for path, fields in zip(paths, configs, strict=True):
        file = tmp_path / path / "adapter_config.json"
        config = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps(config))
        for module, (A, B) in flora.load_peft_adapter(path).adapters.items():
            scale = {4: 6 / 2, 7: 14 / 7 if "up_proj" in module else 21 / 7, 3: 0.75}[A.shape[0]]
            exact[module] = exact[module] + scale / 3 * B.double().T @ A.double()
    flora.export_adapter(folder, dict.fromkeys(paths, 1), tmp_path / "one", layout="vllm")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert config["r"] == 16
    assert not config["use_rslora"]
    assert len(tensors) == 2 * len(exact) == 18
    for module, change in exact.items():
        A, B = (tensors[f"base_model.model.{module}.lora_{factor}.weight"].double() for factor in "AB")
        assert A.shape[0] == B.shape[1] == config["r"]
        found = config["lora_alpha"] / config["r"] * B @ A
        assert torch.linalg.matrix_norm(found - change) <= 1e-6 * torch.linalg.matrix_norm(change)


def test_more_ranks_than_vllm_serves_are_refused(tmp_path):
    folder, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path, (400, 113))
    with pytest.raises(ValueError, match="needs rank 513, and vLLM serves at most 512: recompress with"):
        flora.export_adapter(folder, dict.fromkeys(paths, 1), tmp_path / "one", layout="vllm")
    report = flora.export_adapter(
        folder, dict.fromkeys(paths, 1), tmp_path / "one", layout="vllm", strategy="flora_svd"
    )
    assert set(report.ranks.values()) == {32}


# The command.


def test_the_command_merges_verifies_and_exports(tmp_path, capsys):
    folder, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    words = ["aggregate", "--base", str(folder), "--adapter", f"{paths[0]}=3", "--adapter", paths[1]]
    assert main([*words, "--out", str(tmp_path / "out"), "--verify"]) == 0
    out, err = capsys.readouterr()
    assert "rounding bound" in out
    assert "every other byte is the base's" in out
    assert "not copied" in out
    assert "MB/s" in err or "kB/s" in err
    record = json.loads((tmp_path / "out" / "flora_merge.json").read_text())
    assert [one["share"] for one in record["adapters"]] == [0.75, 0.25]
    options = ["--as-adapter", "vllm", "--strategy", "flora_svd", "--option", "tau=0.9"]
    assert main([*words, "--out", str(tmp_path / "one"), *options]) == 0
    assert "rank" in capsys.readouterr().out
    assert flora.load_peft_adapter(tmp_path / "one").ranks


def test_a_base_of_conv1d_says_so_in_an_exported_adapter(tmp_path):
    tensors = {f"transformer.h.{i}.attn.c_attn.weight": torch.randn(32, 96) for i in range(2)}
    folder = save_checkpoint(tmp_path / "base", tensors, config={**CONFIG, "model_type": "gpt2"})
    adapters = {f"transformer.h.{i}.attn.c_attn": (torch.randn(2, 32), torch.randn(2, 96)) for i in range(2)}
    flora.save_peft_adapter(flora.ClientUpdate("a", adapters, dict.fromkeys(adapters, 1.0)), tmp_path / "a")
    flora.export_adapter(folder, {tmp_path / "a": 1}, tmp_path / "one")
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
