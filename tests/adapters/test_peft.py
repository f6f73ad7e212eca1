"""PEFT adapters in and out, against peft itself: the same logits in both directions.

Letters: K in_features, N out_features, R a rank.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flora_core.adapters.peft import load_peft_adapter, save_peft_adapter, save_stacked_adapter
from flora_core.adapters.update import ClientUpdate, RoundResult
from flora_core.aggregation import aggregate
from flora_core.merge.in_place import merge_adapter_
from tests.support.rounds import bank_like_update

os.environ.setdefault("HF_HUB_OFFLINE", "1")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    # peft's own use of transformers, not ours.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),
    # peft counts a pattern key as unused when an earlier one matched; "first match wins" needs such keys.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
FAMILIES = pytest.mark.parametrize("family", list(TARGETS))
TOKENS = torch.arange(14).view(2, 7) * 5 % 31


def make_model(family: str, dtype=torch.float64):
    """A random two-layer model; the same weights at every call."""
    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    return model.to(dtype).eval()


def make_peft(family: str, seed: int = 1, dtype=torch.float64, **config):
    """A peft model whose adapter has random factors, B not zero."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    model = peft.get_peft_model(make_model(family, dtype), peft.LoraConfig(**{**settings, **config}))
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def assert_same(got: torch.Tensor, want: torch.Tensor):
    assert float((got - want).abs().max() / want.abs().max()) < 1e-9


def peft_from(family: str, folder: Path, dtype=torch.float64):
    return peft.PeftModel.from_pretrained(make_model(family, dtype), folder).eval()


# Case -> fields for both families, or for each (peft warns of a pattern that matches nothing).
CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 8},
    "patterns": {
        "llama": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*\.0\.self_attn.*": 9}},
        "gpt2": {"rank_pattern": {"1.mlp.c_proj": 3}, "alpha_pattern": {"attn.c_attn": 5}},
    },
    "rslora-patterns": {
        "llama": {"use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 7}},
        "gpt2": {"use_rslora": True, "rank_pattern": {"c_attn": 1}},
    },
    "first-match-wins": {
        "llama": {"rank_pattern": {r".*0\.self_attn\.q_proj": 2, "proj": 9, "q_proj": 3}},
        "gpt2": {"rank_pattern": {"attn": 9, r"c_(attn|proj)": 5, "c_attn": 6}},
    },
    "regex-targets": {"target_modules": r".*\.(1\.self_attn\.q_proj|h\.1\.attn\.c_attn)|.*1\.self_attn\.[kv]_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"layers_to_transform": [1]},
    "exclude": {"exclude_modules": r".*\.0\.(mlp\.down_proj|mlp\.c_proj)"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dropout": {"lora_dropout": 0.5},
}


def config_of(case: str, family: str) -> dict:
    fields = CONFIGS[case]
    return fields.get(family, fields)


@FAMILIES
@pytest.mark.parametrize("case", CONFIGS)
def test_peft_s_adapter_goes_in_and_out_with_the_same_logits(family, case, tmp_path):
    theirs = make_peft(family, **config_of(case, family))
    theirs.save_pretrained(tmp_path / "client-a")
    want = logits(theirs)
    update = load_peft_adapter(tmp_path / "client-a")
    assert update.base == (theirs.peft_config["default"].base_model_name_or_path or None)
    assert (update.client, update.weight) == ("client-a", 1.0)
    adapted = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert update.ranks == {name: module.r["default"] for name, module in adapted.items()}
    assert update.scaling == {name: module.scaling["default"] for name, module in adapted.items()}

    ours = make_model(family)
    before = logits(ours)
    assert float((before - want).abs().max()) > 1e-3, "the adapter must matter for this test to mean anything"
    save_peft_adapter(update, tmp_path / "ours", fan_in_fan_out=family == "gpt2")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    back = load_peft_adapter(tmp_path / "ours")
    assert (back.scaling, back.ranks) == (update.scaling, update.ranks)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(ours, tmp_path / "ours").eval()), want)

    merged = make_model(family)
    merge_adapter_(merged, update)
    assert_same(logits(merged), want)


def test_peft_s_sorting_of_patterns_is_not_followed_into_another_rank(tmp_path):
    """peft writes rank_pattern with sorted keys, so the first match can change; it cannot load that file itself."""
    theirs = make_peft("llama", rank_pattern={"q_proj": 2, ".*proj": 3})
    theirs.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_from("llama", tmp_path)
    with pytest.raises(
        ValueError, match=r"config says rank 3 .*tensors have rank 2; .* sorts the keys of rank_pattern"
    ):
        load_peft_adapter(tmp_path)


def test_eva_adapter_with_its_own_ranks_is_plain_lora(tmp_path):
    """EVA leaves the base as it is; peft writes the ranks that it chose into rank_pattern."""
    theirs = make_peft("llama", rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 4.5})
    theirs.peft_config["default"].init_lora_weights = "eva"
    theirs.peft_config["default"].eva_config = peft.EvaConfig()
    theirs.save_pretrained(tmp_path)
    ours = make_model("llama")
    merge_adapter_(ours, load_peft_adapter(tmp_path))
    assert_same(logits(ours), logits(theirs))


@FAMILIES
def test_adapters_of_other_dtypes_keep_them(family, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        theirs = make_peft(family)
        theirs.save_pretrained(tmp_path / "wide")
        update = load_peft_adapter(tmp_path / "wide")
        update.adapters = {m: (A.to(dtype), B.to(dtype)) for m, (A, B) in update.adapters.items()}
        save_peft_adapter(update, tmp_path / "narrow")
        back = load_peft_adapter(tmp_path / "narrow")
        for module, pair in update.adapters.items():
            assert all(torch.equal(x, y) for x, y in zip(pair, back.adapters[module], strict=True))


def three_clients(family, folder, rslora) -> list[ClientUpdate]:
    """Adapters of three ranks, one of which adapts fewer modules, as peft saves them."""
    updates = []
    for i, (rank, weight) in enumerate([(5, 10.0), (3, 70.0), (1, 20.0)]):
        targets = TARGETS[family][: 1 + (i != 1)]
        make_peft(family, i, r=rank, lora_alpha=3 + i, use_rslora=rslora, target_modules=targets).save_pretrained(
            folder / f"c{i}"
        )
        updates.append(load_peft_adapter(folder / f"c{i}", weight=weight))
    return updates


@FAMILIES
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_stacked_round_is_one_peft_adapter(family, rslora, tmp_path):
    result = aggregate(three_clients(family, tmp_path, rslora))
    save_stacked_adapter(result, tmp_path / "stack", fan_in_fan_out=family == "gpt2", base_model="tiny")
    config = json.loads((tmp_path / "stack" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert {config["r"], *config["rank_pattern"].values()} == {9, 6}, "P is 5 + 3 + 1, and 5 + 1 where one is missing"
    assert config["use_rslora"] is False
    assert config["base_model_name_or_path"] == "tiny"
    merged = make_model(family)
    targets = merged.state_dict()
    for module, change in result.dense().items():
        targets[f"{module}.weight"] += change.T if family == "gpt2" else change
    assert_same(logits(peft_from(family, tmp_path / "stack")), logits(merged))
    stacked = load_peft_adapter(tmp_path / "stack")
    assert set(stacked.scaling.values()) == {1.0}
    for module, change in aggregate([stacked]).dense().items():
        assert_same(change, result.dense()[module])


def test_stacked_factors_are_the_clients_own_with_weights_and_scalings_in_b(tmp_path):
    """Ten mixed ranks under rsLoRA in float32, as peft would read them: A bit for bit, B to one rounding."""
    generator = torch.Generator().manual_seed(0)
    updates = []
    for i, rank in enumerate([64, 32, 16, 16, 8, 8, 4, 4, 4, 4]):
        pair = torch.randn(rank, 20, generator=generator), torch.randn(rank, 30, generator=generator)
        updates.append(ClientUpdate(f"c{i}", {"q": pair}, {"q": 2 * math.sqrt(rank)}, weight=1.0 + i))
    save_stacked_adapter(aggregate(updates), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A_PK, B_NP = (tensors[f"base_model.model.q.lora_{factor}.weight"] for factor in "AB")
    assert torch.equal(A_PK, torch.cat([update.adapters["q"][0] for update in updates]))
    want = [update.weight / 55 * update.scaling["q"] * update.adapters["q"][1].double() for update in updates]
    want_NP = torch.cat(want).T
    assert float(((B_NP - want_NP).abs() / want_NP.abs()).max()) < 1e-6


@FAMILIES
def test_flora_equals_peft_s_own_concatenation(family, tmp_path):
    """``add_weighted_adapter(combination_type="cat")`` is an independent oracle (not under rsLoRA, see DESIGN)."""
    updates = three_clients(family, tmp_path, rslora=False)
    theirs = peft.PeftModel.from_pretrained(make_model(family), tmp_path / "c0", adapter_name="c0")
    for name in ("c1", "c2"):
        theirs.load_adapter(tmp_path / name, adapter_name=name)
    theirs.add_weighted_adapter(["c0", "c1", "c2"], [0.1, 0.7, 0.2], "all", combination_type="cat")
    theirs.set_adapter("all")
    for module, change in aggregate(updates).dense().items():
        layer = theirs.get_submodule(f"base_model.model.{module}")
        want = layer.get_delta_weight("all").detach()
        assert_same(change, want.T if family == "gpt2" else want)


def test_views_of_a_bank_save_and_rank_zero_is_left_out(tmp_path):
    update = bank_like_update()
    save_peft_adapter(update, tmp_path / "c")
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["alpha_pattern"]) == (True, 16, {})
    # "a.q" would match "b.a.q" too, so the key is anchored and escaped.
    assert config["r"] == 3
    assert config["rank_pattern"] == {"^b\\.a\\.q": 2}
    back = load_peft_adapter(tmp_path / "c", client="renamed", weight=7)
    assert (back.client, back.weight, list(back.adapters)) == ("renamed", 7, ["a.q", "b.a.q"])
    assert back.scaling == {m: s for m, s in update.scaling.items() if s}
    for module, pair in back.adapters.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, update.adapters[module], strict=True))
        assert all(factor.is_contiguous() for factor in pair)


MAKE_SCALING = {
    "any": lambda s, r: s,
    "fraction": lambda s, r: s / r,
    "plain": lambda s, r: round(s + 1) / r,
    "rslora": lambda s, r: round(s + 1) / math.sqrt(r),
}


def test_scalings_survive_bit_for_bit(scale, tmp_path):
    @settings(max_examples=scale(40, 400, "adapters"), deadline=None)
    @given(
        ranks=st.lists(st.integers(1, 64), min_size=1, max_size=4),
        numbers=st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=4),
        kind=st.sampled_from(list(MAKE_SCALING)),
    )
    def check(ranks, numbers, kind):
        adapters = {f"m{i}": (torch.ones(r, 2), torch.ones(r, 3)) for i, r in enumerate(ranks)}
        scaling = {f"m{i}": MAKE_SCALING[kind](numbers[i], r) for i, r in enumerate(ranks)}
        save_peft_adapter(ClientUpdate("c", adapters, scaling), tmp_path / "c")
        back = load_peft_adapter(tmp_path / "c")
        assert list(back.ranks.values()) == ranks
        if kind == "any":  # not every number is some alpha / r: the nearest is
            assert back.scaling == {m: pytest.approx(s, rel=4e-16, abs=0) for m, s in scaling.items()}
        else:
            assert back.scaling == scaling

    check()


def test_saving_replaces_an_adapter_but_nothing_else(tmp_path):
    update = bank_like_update()
    save_peft_adapter(update, tmp_path / "c")
    update.adapters["a.q"][0].zero_()
    save_peft_adapter(update, tmp_path / "c")
    assert float(load_peft_adapter(tmp_path / "c").adapters["a.q"][0].abs().max()) == 0
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds notes.txt: choose a new or an empty folder"):
        save_peft_adapter(update, tmp_path / "c")
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"


def test_an_adapter_without_factors_is_not_saved(tmp_path):
    empty = ClientUpdate("c", {"q": (torch.zeros(0, 4), torch.zeros(0, 5))}, {"q": 0.0})
    with pytest.raises(ValueError, match=r"client 'c' adapts no module with a rank above 0; there is nothing to save"):
        save_peft_adapter(empty, tmp_path / "c")
    with pytest.raises(ValueError, match=r"base_delta is empty, .* save the clients' next_adapter instead"):
        save_stacked_adapter(RoundResult({}), tmp_path / "c")
    assert not (tmp_path / "c").exists()
