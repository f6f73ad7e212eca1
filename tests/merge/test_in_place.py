"""Writing rounds and adapters into weights: exact to one rounding per element, or nothing is changed at all.

Letters: K in_features, N out_features, R one client's rank, P the sum of ranks.
"""

from __future__ import annotations

import math

import pytest
import torch

from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation import aggregate
from flora_core.merge.in_place import apply_base_delta_, merge_adapter_, new_low_bits
from flora_core.model.targets import target_weights
from flora_kernels.reference import join_master

N, K = 70, 50
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)


def round_of_clients(size: float, take: int = 10, n: int = N, k: int = K) -> list[ClientUpdate]:
    """Ten clients of the demo's ranks with rsLoRA scalings, of which ``take`` take part, one in a single module.

    The first two nearly cancel, so that terms are far larger than their sum.
    """
    generator = torch.Generator().manual_seed(take)
    updates = []
    for i, rank in enumerate(RANKS):
        adapters = {
            module: (torch.randn(rank, k, generator=generator), torch.randn(rank, n, generator=generator) * size)
            for module in (("x", "y") if i != 2 else ("x",))
        }
        scaling = dict.fromkeys(adapters, 2 * rank / math.sqrt(rank))
        updates.append(ClientUpdate(f"c{i}", adapters, scaling, weight=3.0 + i))
    (A, B), twin = updates[1].adapters["x"], updates[0].adapters["x"]
    twin[0][:32], twin[1][:32] = A, -B * (1 + 2**-9)
    return updates[:take]


def exact_sum(updates, module) -> torch.Tensor:
    total = sum(update.weight for update in updates)
    parts = [
        update.weight / total * update.scaling[module] * (B.double().T @ A.double())
        for update in updates
        for A, B in [update.adapters.get(module, (None, None))]
        if A is not None and B is not None
    ]
    return torch.stack(parts).sum(0)


def ulps(got, ideal, before) -> float:
    """Largest distance from the correctly rounded value, in units in the last place of max(|before|, |after|)."""
    largest = torch.maximum(before.abs(), got.abs())
    spacing = (torch.nextafter(largest, torch.tensor(math.inf)) - largest).double()
    return float(((got.double() - ideal.float().double()).abs() / spacing).max())


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4], ids=["large", "like-the-weight", "small"])
@pytest.mark.parametrize("take", [10, 3, 1], ids=["all", "three", "one"])
def test_fp32_weight_is_the_exact_sum_rounded_once(size, take, scale):
    n, k = scale(70, 576, "rows of a weight"), scale(50, 576, "columns of a weight")
    updates = round_of_clients(size, take, n, k)
    before = {m: torch.randn(n, k, generator=torch.Generator().manual_seed(5)) * 0.02 for m in "xy"}
    weights = {m: w.clone() for m, w in before.items()}
    deviations = apply_base_delta_(weights, aggregate(updates).base_delta, check_rows=None)
    for module in "xy":
        ideal = before[module].double() + exact_sum(updates, module)
        assert ulps(weights[module], ideal, before[module]) <= 1
        want = float((weights[module].double() - ideal).norm() / exact_sum(updates, module).norm())
        assert deviations[module].relative == pytest.approx(want, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4], ids=["large", "like-the-weight", "small"])
def test_bf16_weight_with_low_bits_is_the_exact_sum_rounded_once_over_rounds(size, scale):
    n, k = scale(70, 576, "rows of a weight"), scale(50, 576, "columns of a weight")
    weights = {m: (torch.randn(n, k, generator=torch.Generator().manual_seed(5)) * 0.02).bfloat16() for m in "xy"}
    low = new_low_bits(weights)
    for take in (10, 3, 5):
        updates = round_of_clients(size, take, n, k)
        before = {m: join_master(weights[m], low[m]) for m in "xy"}
        before_16 = {m: weights[m].clone() for m in "xy"}
        apply_base_delta_(weights, aggregate(updates).base_delta, low_bits=low)
        for module in "xy":
            ideal = before[module].double() + exact_sum(updates, module)
            master = join_master(weights[module], low[module])
            assert ulps(master, ideal, before[module]) <= 1
            largest = torch.maximum(before_16[module].abs(), weights[module].abs())
            spacing = torch.nextafter(largest, torch.full_like(largest, math.inf)).double() - largest.double()
            off = (weights[module].double() - ideal.float().bfloat16().double()).abs() / spacing
            assert float(off.max()) <= 1


def test_one_ulp_is_not_for_free():
    """fp32 accumulation, or coefficients in fp32, must fail the measure that the tests above rely on."""
    updates = round_of_clients(1.0)
    before = torch.randn(N, K, generator=torch.Generator().manual_seed(5)) * 0.02
    ideal = before.double() + exact_sum(updates, "x")
    stacks = {"x": aggregate(updates).base_delta["x"]}
    for spoilt, accumulate in ((stacks, "float32"), ({"x": (*stacks["x"][:2], stacks["x"][2].float())}, "float64")):
        weight = before.clone()
        apply_base_delta_({"x": weight}, spoilt, accumulate=accumulate)
        assert ulps(weight, ideal, before) > 1


def test_nearest_bf16_loses_a_small_update_and_says_so():
    update = round_of_clients(1e-7, 1)
    weights = {m: torch.ones(N, K, dtype=torch.bfloat16) for m in "xy"}
    deviations = apply_base_delta_(weights, aggregate(update).base_delta, rounding="nearest")
    assert all(deviation.relative > 0.9 for deviation in deviations.values())
    low = new_low_bits(weights)
    deviations = apply_base_delta_(weights, aggregate(update).base_delta, low_bits=low)
    assert all(deviation.relative < 0.1 for deviation in deviations.values())


def test_conv1d_weight_is_written_through_its_transpose():
    updates = round_of_clients(1e-2)
    parameter = torch.randn(K, N, generator=torch.Generator().manual_seed(5)) * 0.02
    before = parameter.T.clone()
    apply_base_delta_({"x": parameter.T}, {"x": aggregate(updates).base_delta["x"]})
    assert ulps(parameter.T, before.double() + exact_sum(updates, "x"), before) <= 1
    sixteen = before.bfloat16().T.contiguous()
    low = torch.zeros(K, N, dtype=torch.int16)
    master = join_master(sixteen, low).T
    apply_base_delta_({"x": sixteen.T}, {"x": aggregate(updates).base_delta["x"]}, low_bits={"x": low.T})
    assert ulps(join_master(sixteen, low).T, master.double() + exact_sum(updates, "x"), master) <= 1


def test_stochastic_rounding_repeats_with_its_seed():
    stack = aggregate(round_of_clients(1e-4)).base_delta
    weights = [{m: torch.ones(N, K, dtype=torch.bfloat16) for m in "xy"} for _ in range(3)]
    for weight, seed in zip(weights, (1, 1, 2), strict=True):
        apply_base_delta_(weight, stack, rounding="stochastic", seed=seed)
    assert torch.equal(weights[0]["x"], weights[1]["x"])
    assert not torch.equal(weights[0]["x"], weights[2]["x"])


def test_checked_rows_are_as_many_as_asked_for():
    stack = {"x": aggregate(round_of_clients(1e-2)).base_delta["x"]}
    assert apply_base_delta_({"x": torch.zeros(N, K)}, stack, check_rows=0)["x"].exact == 0
    few = apply_base_delta_({"x": torch.zeros(N, K)}, stack, check_rows=7)["x"].exact
    every = apply_base_delta_({"x": torch.zeros(N, K)}, stack, check_rows=None)["x"].exact
    assert few is not None
    assert every is not None
    assert 0 < few < every


def bad_calls():
    """Case -> (weights, keyword arguments, words of the refusal)."""
    fine, half = torch.zeros(N, K), torch.zeros(N, K, dtype=torch.float16)
    sixteen = torch.zeros(N, K, dtype=torch.bfloat16)
    return {
        "unknown": ({"x": fine}, {}, "modules without a weight: y; known: x"),
        "shape": ({"x": fine, "y": torch.zeros(N, K + 1)}, {}, r"A_PK must have shape \(any, 51\)"),
        "fp16": ({"x": fine, "y": half}, {}, "'y' is torch.float16, which has no low bits; .* or choose rounding='nea"),
        "no-low": ({"x": fine, "y": sixteen}, {}, "'y' is bfloat16, so rounding='low_bits' needs its low_bits"),
        "rounding": (
            {"x": fine, "y": fine},
            {"rounding": "up"},
            "rounding must be one of low_bits, nearest, stochastic",
        ),
        "no-seed": ({"x": sixteen, "y": sixteen}, {"rounding": "stochastic"}, "seed must be given"),
        "stochastic-fp32": ({"x": sixteen, "y": fine}, {"rounding": "stochastic", "seed": 1}, "for bfloat16 weights"),
    }


@pytest.mark.parametrize("case", list(bad_calls()))
def test_bad_calls_are_refused_before_anything_is_changed(case):
    weights, options, words = bad_calls()[case]
    before = {module: weight.clone() for module, weight in weights.items()}
    with pytest.raises(ValueError, match=words):
        apply_base_delta_(weights, aggregate(round_of_clients(1.0)).base_delta, **options)
    assert all(torch.equal(weights[module], before[module]) for module in weights)


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 8)
        self.q_proj = torch.nn.Linear(8, 6, bias=False)
        self.v_proj = torch.nn.Linear(8, 4, bias=False)
        self.norm = torch.nn.LayerNorm(8)
        self.lm_head = torch.nn.Linear(8, 9, bias=False)
        self.lm_head.weight = self.embed.weight


def tiny_update(*modules, k=8, sizes=(("q_proj", 6), ("v_proj", 4), ("lm_head", 9))):
    n = dict(sizes)
    adapters = {m: (torch.ones(2, k), torch.ones(2, n.get(m, 6))) for m in modules}
    return ClientUpdate("c", adapters, dict.fromkeys(modules, 0.5))


def test_merge_adapter_adds_s_b_a():
    model = Tiny()
    before = {m: w.clone() for m, w in target_weights(model, ["q_proj", "v_proj"]).items()}
    deviation = merge_adapter_(model, tiny_update("q_proj"))
    assert torch.equal(model.q_proj.weight, before["q_proj"] + 1.0)  # s R = 0.5 * 2 ones
    assert torch.equal(model.v_proj.weight, before["v_proj"])
    assert deviation.relative < 1e-6
    assert model.q_proj.weight.requires_grad, "the parameter must stay a parameter"
    none = ClientUpdate("c", {"gone": (torch.ones(0, 8), torch.ones(0, 6))}, {"gone": 0.0})
    assert merge_adapter_(model, none).relative == 0.0


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (("q_proj", "k_proj", "gone"), r"no module 'k_proj', 'gone'; did you mean 'v_proj'\?"),
        (("q_proj", "norm"), "'norm' is a LayerNorm; an adapter can be merged into nn.Linear and Conv1D only"),
        (("q_proj", "lm_head"), "'lm_head' shares its weight with embed.weight, .* untie them first"),
    ],
)
def test_merge_adapter_refuses_before_anything_is_changed(modules, words):
    model = Tiny()
    before = model.q_proj.weight.clone()
    with pytest.raises(ValueError, match=words):
        merge_adapter_(model, tiny_update(*modules))
    assert torch.equal(model.q_proj.weight, before)


def test_merge_adapter_refuses_quantised_weights_other_shapes_and_nan():
    model = Tiny()
    with pytest.raises(ValueError, match=r"A_PK must have shape \(any, 8\)"):
        merge_adapter_(model, tiny_update("q_proj", k=7))
    spoilt = tiny_update("q_proj")
    spoilt.adapters["q_proj"][0][0, 0] = math.nan
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        merge_adapter_(model, spoilt)
    model.q_proj.weight = torch.nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"'q_proj' has a quantised .*\(Tensor, torch.int8\), .* load the model in a fl"
    ):
        merge_adapter_(model, tiny_update("q_proj"))
