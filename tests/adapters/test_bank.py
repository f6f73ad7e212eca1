"""AdapterConfig reads what PEFT reads; AdapterBank stores all adapters stacked, in one buffer.

Letters: K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from flora_core import AdapterBank, AdapterConfig
from flora_core.config.adapter import match_pattern, matches_target

NAMES = ("ann", "bob", "cyd")
SHAPES = {"layer.q": (6, 4), "layer.v": (5, 8)}
RANKS = {"layer.q": (2, 0, 3), "layer.v": (1, 4, 0)}
SCALING = {"layer.q": (2.0, 0.0, 0.5), "layer.v": (1.0, 3.0, 0.0)}


def make_bank(dtype: torch.dtype = torch.float32) -> AdapterBank:
    """Three clients; every element holds its own place in the flat buffer."""
    bank = AdapterBank(NAMES, RANKS, SCALING, SHAPES, dtype)
    bank.param.copy_(torch.arange(bank.param.numel()))
    return bank


def test_the_bank_is_flat_and_stacked():
    bank = make_bank()
    q, v = bank.modules["layer.q"], bank.modules["layer.v"]
    assert (q.A_PK.shape, q.B_PN.shape, v.A_PK.shape, v.B_PN.shape) == ((5, 4), (5, 6), (5, 8), (5, 5))
    # A of the first module, its B, then the next module: nothing between, nothing twice.
    stored = torch.cat([part.flatten() for module in (q, v) for part in (module.A_PK, module.B_PN)])
    assert torch.equal(stored, torch.arange(5 * (4 + 6 + 8 + 5)).float())
    assert (q.ranks.lengths, v.ranks.lengths) == (RANKS["layer.q"], RANKS["layer.v"])
    assert (q.scaling_C, v.scaling_C) == (SCALING["layer.q"], SCALING["layer.v"])


def test_views_share_the_flat_buffer():
    bank = make_bank()
    storage = bank.param.untyped_storage().data_ptr()
    for entry in bank.modules.values():
        assert entry.A_PK.untyped_storage().data_ptr() == entry.B_PN.untyped_storage().data_ptr() == storage
    A, B = bank.adapters("cyd")["layer.q"]
    A.zero_()
    B.fill_(-1)
    q = bank.modules["layer.q"]
    assert not q.A_PK[2:].any()
    assert (q.B_PN[2:] == -1).all()
    assert (bank.param == 0).sum() == 1 + 3 * 4  # its own place 0, and what was zeroed
    bank.param.fill_(7)
    assert (q.A_PK == 7).all()


def test_views_of_another_buffer_have_the_same_layout():
    bank = make_bank()
    views = bank.views_of(bank.param.clone())
    for module, entry in bank.modules.items():
        assert torch.equal(views[module][0], entry.A_PK)
        assert torch.equal(views[module][1], entry.B_PN)


def test_segments_and_owner_cover_every_client_s_elements():
    bank = make_bank()
    segments = bank.segments
    assert segments.total == bank.param.numel()
    assert len(segments) == len(bank.owner) == 2 * len(SHAPES) * len(NAMES)
    for c, name in enumerate(NAMES):
        mine = [bank.param[rows] for rows, owner in zip(segments, bank.owner, strict=True) if owner == c]
        wanted = [factor.flatten() for pair in bank.adapters(name).values() for factor in pair]
        assert torch.equal(torch.cat(mine), torch.cat(wanted))


def test_adapters_and_scaling_leave_out_modules_of_rank_0():
    bank = make_bank()
    assert {name: list(bank.adapters(name)) for name in NAMES} == {
        "ann": ["layer.q", "layer.v"],
        "bob": ["layer.v"],
        "cyd": ["layer.q"],
    }
    assert bank.scaling("ann") == {"layer.q": 2.0, "layer.v": 1.0}
    assert bank.scaling("bob") == {"layer.v": 3.0}
    assert not any(factor.requires_grad for pair in bank.adapters("ann").values() for factor in pair)


def test_a_subset_is_a_copy_in_the_asked_order():
    bank = make_bank(torch.float64)
    part = bank.subset(["cyd", "ann"])
    assert (part.names, part.param.dtype) == (("cyd", "ann"), torch.float64)
    assert part.modules["layer.q"].ranks.lengths == (3, 2)
    assert part.modules["layer.q"].scaling_C == (0.5, 2.0)
    for name in part.names:
        for module, pair in bank.adapters(name).items():
            assert all(torch.equal(*both) for both in zip(pair, part.adapters(name)[module], strict=True))
    part.param.fill_(-1)
    assert (bank.param >= 0).all()


def test_all_clients_in_order_are_the_bank_itself():
    bank = make_bank()
    assert bank.subset(list(NAMES)) is bank
    assert bank.subset(NAMES[::-1]) is not bank


def test_load_copies_in_and_changes_nobody_else():
    bank, other = make_bank(), make_bank()
    adapters = {m: (A + 100, (B + 100).double()) for m, (A, B) in other.adapters("ann").items()}
    bank.load("ann", adapters)
    for rows, owner in zip(bank.segments, bank.owner, strict=True):
        assert torch.equal(bank.param[rows], other.param[rows] + (100 if owner == 0 else 0))
    adapters["layer.q"][0].zero_()
    assert bank.adapters("ann")["layer.q"][0].all()


def wrong_adapters():
    good = make_bank().adapters("ann")
    A, B = good["layer.v"]
    yield {"layer.q": good["layer.q"]}, "client 'ann'.*missing: .'layer.v'., unknown: none"
    yield {**good, "layer.x": (A, B)}, "missing: none, unknown: .'layer.x'."
    yield {**good, "layer.v": (A[:, 1:], B)}, r"A of layer.v must be \(1, 8\) \(rank first\), got \(1, 7\)"
    yield {**good, "layer.v": (A, B.T)}, r"B of layer.v must be \(1, 5\) \(rank first\), got \(5, 1\)"
    yield {**good, "layer.v": (torch.zeros(2, 8), torch.zeros(2, 5))}, r"A of layer.v must be \(1, 8\).*got \(2, 8\)"


@pytest.mark.parametrize(("adapters", "words"), list(wrong_adapters()))
def test_a_load_that_fails_changes_nothing(adapters, words):
    bank = make_bank()
    before = bank.param.clone()
    with pytest.raises(ValueError, match=words):
        bank.load("ann", {module: (A + 1, B + 1) for module, (A, B) in adapters.items()})
    assert torch.equal(bank.param, before)


def test_reset_is_peft_s_start():
    bank = AdapterBank(["a"], {"m": [64]}, {"m": [1.0]}, {"m": (80, 100)})
    bank.reset("a", seed=0)
    A, B = bank.adapters("a")["m"]
    assert not B.any()
    bound = 1 / math.sqrt(100)
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound
    # Kaiming with a = sqrt(5) has variance 1 / (3 K); 5 standard errors of the mean and of the variance of a uniform.
    n = A.numel()
    assert abs(A.mean().item()) <= 5 * bound / math.sqrt(3 * n)
    assert abs(A.var().item() - bound**2 / 3) <= 5 * bound**2 * math.sqrt(4 / 45 / n)


def test_reset_makes_b_zero_unless_the_bank_is_new():
    bank = make_bank()
    bank.reset("ann", seed=0)
    assert not any(B.any() for _, B in bank.adapters("ann").values())
    kept = {module: B.clone() for module, (_, B) in bank.adapters("bob").items()}
    bank.reset("bob", seed=0, new=True)
    assert all(torch.equal(B, kept[module]) for module, (_, B) in bank.adapters("bob").items())


def test_a_padded_stack_has_one_more_client_of_rank_0_and_is_made_once():
    module = make_bank(torch.float64).modules["layer.q"]
    padded = module.padded
    assert padded is module.padded
    assert (padded.A_PK is module.A_PK, padded.B_PN is module.B_PN) == (True, True)
    assert padded.ranks.lengths == (2, 0, 3, 0)
    assert torch.equal(torch.as_tensor(padded.scaling_C), torch.tensor([2.0, 0.0, 0.5, 0.0], dtype=torch.float64))


def test_reset_does_not_depend_on_the_cohort_and_touches_nobody_else():
    whole = make_bank()
    before = whole.param.clone()
    part = whole.subset(["cyd", "ann"])
    whole.reset("ann", seed=5)
    part.reset("ann", seed=5)
    for module, pair in whole.adapters("ann").items():
        assert all(torch.equal(*both) for both in zip(pair, part.adapters("ann")[module], strict=True))
    for rows, owner in zip(whole.segments, whole.owner, strict=True):
        if owner:
            assert torch.equal(whole.param[rows], before[rows])
    again = make_bank()
    again.reset("ann", seed=6)
    assert not torch.equal(again.param, whole.param)


def test_reset_differs_by_client_and_module():
    bank = AdapterBank(["a", "b"], {"x": [2, 2], "y": [2, 2]}, {"x": [1, 1], "y": [1, 1]}, {"x": (4, 4), "y": (4, 4)})
    for name in ("a", "b"):
        bank.reset(name, seed=0)
    starts = [bank.adapters(name)[module][0] for name in ("a", "b") for module in ("x", "y")]
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(starts, 2))


def test_scaling_follows_alpha_and_rslora():
    assert AdapterConfig(rank=16).scaling_of("m") == 2.0
    assert AdapterConfig(rank=16, alpha=8).scaling_of("m") == 0.5
    assert AdapterConfig(rank=16, alpha=8, use_rslora=True).scaling_of("m") == 2.0
    config = AdapterConfig(rank=4, alpha=8, rank_pattern={"q": 16, "v": 0}, alpha_pattern={"layers.1.q": 4})
    assert [config.rank_of(f"layers.0.{name}") for name in "qkv"] == [16, 4, 0]
    assert [config.scaling_of(f"layers.0.{name}") for name in "qkv"] == [0.5, 2.0, 0.0]
    assert config.scaling_of("layers.1.q") == 0.25


def test_targets_are_the_client_s_own_or_the_cohort_s():
    config = AdapterConfig(rank=4, rank_pattern={"v": 0})
    assert [config.targets(f"l.{name}", ["q", "v"]) for name in "qkv"] == [True, False, False]
    own = AdapterConfig(rank=4, target_modules=["k"])
    assert [own.targets(f"l.{name}", ["q", "v"]) for name in "qkv"] == [False, True, False]
    assert not AdapterConfig(rank=0).targets("l.q", ["q"])
    assert AdapterConfig(rank=0).scaling_of("l.q") == 0.0


MODULES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.my_up_proj",
    "transformer.h.1.attn.c_attn",
    "lm_head",
]
PATTERNS = [
    ["q_proj"],
    ["k_proj", "q_proj"],
    ["layers.1.self_attn.q_proj", "q_proj"],
    ["q_proj", "layers.1.self_attn.q_proj"],
    [r"layers\.[01]\..*_proj"],
    [r"model\.layers\.1\.self_attn\.q_proj"],
    ["^model.layers.1.self_attn.q_proj"],
    ["proj"],
    ["up_proj", "c_attn|lm_head"],
    [r".*self_attn\.(q|k)_proj", "mlp.up_proj"],
    [],
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_patterns_mean_what_they_mean_in_peft(patterns):
    other = pytest.importorskip("peft.utils.other")
    values = {pattern: number for number, pattern in enumerate(patterns)}
    for module in MODULES:
        wanted = values.get(other.get_pattern_key(patterns, module), -1)
        assert match_pattern(values, module, -1) == wanted, module


TARGETS = [
    *(["q_proj"], ["proj"], ["self_attn.q_proj", "c_attn"], ["model.layers.1.mlp.up_proj"], ["up_proj"], ["lm_head"]),
    *(
        ".*q_proj",
        "q_proj",
        r".*\.layers\.1\..*",
        r"(.*\.)?(q|k)_proj",
        "nothing",
        ".*(c_attn|lm_head)",
        r"model\.layers\.1",
    ),
]


@pytest.mark.parametrize("wanted", TARGETS, ids=str)
def test_targets_mean_what_they_mean_in_peft(wanted):
    peft = pytest.importorskip("peft")
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    config = peft.LoraConfig(target_modules=wanted)
    for module in MODULES:
        assert matches_target(wanted, module) == bool(tuners.check_target_module_exists(config, module)), module


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_and_scale_are_peft_s(use_rslora):
    """peft builds the layers itself; ours must have its rank and scale in every module."""
    peft = pytest.importorskip("peft")
    layer = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in "qk"})
    model = torch.nn.ModuleDict({"l0": layer, "l1": copy.deepcopy(layer)})
    fields = dict(rank_pattern={"l1.q": 3, "k": 5}, alpha_pattern={"q": 7, "l0.k": 9}, use_rslora=use_rslora)
    ours = AdapterConfig(rank=4, alpha=6, **fields)  # pyright: ignore[reportArgumentType]
    theirs = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "k"], **fields)
    layers = dict(peft.inject_adapter_in_model(theirs, model).named_modules())
    for module in ("l0.q", "l0.k", "l1.q", "l1.k"):
        assert layers[module].r["default"] == ours.rank_of(module)
        assert layers[module].scaling["default"] == ours.scaling_of(module)
