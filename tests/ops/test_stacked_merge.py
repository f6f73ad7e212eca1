"""stacked_merge_ and stacked_merge_many_: the sum, its one rounding, low bits, stochastic rounding.

Letters: K in_features, N out_features, P sum of ranks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flora_core import MergeItem, Segments, stacked_merge_, stacked_merge_many_, testing
from flora_core.testing import MERGE_SHAPES, MergeCase, MergeInputs, make_merge, oracle_merge, ulp
from flora_kernels.reference import join_master, split_master

CASES = [pytest.param(case, id=case.id) for case in testing.in_dtypes(MERGE_SHAPES)]
# Ten clients of the ranks that the demo has.
TEN = MergeCase("the demo's ranks", 72, 88, (64, 32, 16, 16, 8, 8, 4, 4, 4, 4))


@pytest.fixture(params=testing.backends("merge_"))
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def merge(inputs: MergeInputs, **options) -> torch.Tensor:
    """The merged weight, W itself."""
    stacked_merge_(inputs.weight, inputs.A, inputs.B, inputs.coef, **options)
    return inputs.weight


def check(out: torch.Tensor, before: MergeInputs) -> float:
    whole = {"W": Segments.from_lengths([before.weight.shape[0]])}
    low = oracle_merge(before, before.weight.dtype)
    return testing.check_budget({"W": out}, {"W": oracle_merge(before)}, {"W": low}, whole)


@pytest.mark.parametrize("accumulate", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "padded", "transposed"])
@pytest.mark.parametrize("case", CASES)
def test_stacked_merge(case, layout, accumulate, backend):
    inputs, before = make_merge(case, layout=layout), make_merge(case)
    address = inputs.weight.data_ptr()
    with testing.nan_filled():
        out = merge(inputs, accumulate=accumulate, backend=backend)
    assert out.data_ptr() == address
    check(out, before)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in testing.in_dtypes(MERGE_SHAPES[3:])])
def test_what_lies_around_the_weight_stays(case, backend):
    inputs = make_merge(case, layout="padded")
    merge(inputs, backend=backend)
    assert inputs.weight._base is not None
    assert inputs.weight._base.isnan().sum() == inputs.weight._base.numel() - inputs.weight.numel()


@pytest.mark.parametrize("dtype", list(testing.DTYPES.values()))
def test_planted_faults_are_caught(dtype):
    for case in (MERGE_SHAPES[0], MERGE_SHAPES[3]):
        inputs = make_merge(replace(case, dtype=dtype))
        for fault in testing.MERGE_FAULTS:
            with pytest.raises(AssertionError, match="W of client 0"):
                check(oracle_merge(inputs, dtype, fault), inputs)
        zeroed = oracle_merge(inputs, dtype)
        zeroed.view(-1)[zeroed.abs().flatten().argsort()[zeroed.numel() // 2]] = 0
        with pytest.raises(AssertionError, match="W of client 0"):
            check(zeroed, inputs)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("case", CASES)
def test_integers_are_exact(case, layout, backend):
    exact = oracle_merge(make_merge(case, exact=True))
    assert torch.equal(merge(make_merge(case, exact=True, layout=layout), backend=backend).double(), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_may_have_16_bits(dtype, backend):
    inputs = make_merge(replace(MERGE_SHAPES[0], dtype=dtype))
    inputs.A, inputs.B = inputs.A.to(dtype), inputs.B.to(dtype)
    before = replace(inputs, weight=inputs.weight.clone())
    check(merge(inputs, backend=backend), before)


def cancelling(inputs: MergeInputs) -> MergeInputs:
    """Two clients who undo each other but for one part in a million: in float32 their sum would be noise."""
    A = torch.cat([inputs.A, inputs.A])
    B = 1000 * torch.cat([inputs.B, -inputs.B * (1 + 1e-6)])
    return replace(
        inputs, A=A, B=B, coef=torch.cat([inputs.coef] * 2), ranks=Segments.from_lengths([len(inputs.A)] * 2)
    )


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("hard", [False, True], ids=["", "cancelling"])
@pytest.mark.parametrize("update", [1e-3, 1.0, 30.0])
def test_in_float64_an_fp32_weight_is_the_exact_sum_within_one_ulp(update, hard, layout, backend):
    inputs = make_merge(TEN, layout=layout, update=update)
    inputs = cancelling(inputs) if hard else inputs
    before, exact = inputs.weight.double(), oracle_merge(inputs)
    after = merge(inputs, accumulate="float64", backend=backend).double()
    wanted = exact.float().double()
    assert ((after - wanted).abs() <= ulp(torch.maximum(before.abs(), after.abs()), torch.float32)).all()


@pytest.mark.parametrize("layout", ["contiguous", "padded", "transposed"])
@pytest.mark.parametrize("hard", [False, True], ids=["", "cancelling"])
@pytest.mark.parametrize("update", [1e-6, 1e-3, 1.0])
def test_with_low_bits_a_bf16_weight_is_the_exact_sum_within_one_fp32_ulp(update, hard, layout, backend):
    inputs = make_merge(replace(TEN, dtype=torch.bfloat16), layout=layout, update=update)
    inputs = cancelling(inputs) if hard else inputs
    low_bits = torch.randint(-(2**15), 2**15, inputs.weight.shape, generator=torch.Generator().manual_seed(1))
    low_bits = low_bits.to(torch.int16)
    master = join_master(inputs.weight, low_bits)
    exact = oracle_merge(replace(inputs, weight=master))
    merge(inputs, low_bits_NK=low_bits, accumulate="float64", backend=backend)
    after = join_master(inputs.weight, low_bits).double()
    assert (
        (after - exact.float().double()).abs() <= ulp(torch.maximum(master.abs(), after.abs()), torch.float32)
    ).all()
    # The bf16 part alone is the master rounded to nearest.
    assert ((inputs.weight.double() - after).abs() <= ulp(after, torch.bfloat16) / 2).all()


def test_low_bits_keep_small_updates_of_many_rounds(backend):
    """As an fp32 master would: bf16 alone loses most of them."""
    case = replace(TEN, dtype=torch.bfloat16)
    inputs = make_merge(case)
    low_bits, plain = torch.zeros(inputs.weight.shape, dtype=torch.int16), inputs.weight.clone()
    master, first = inputs.weight.float(), inputs.weight.double()
    for number in range(10):
        update = make_merge(case, seed=number, update=1e-4)
        factors = (update.A, update.B, update.coef)
        stacked_merge_(inputs.weight, *factors, low_bits_NK=low_bits, accumulate="float64", backend=backend)
        stacked_merge_(master, *factors, accumulate="float64", backend=backend)
        stacked_merge_(plain, *factors, backend=backend)
    assert torch.equal(join_master(inputs.weight, low_bits), master)
    lost = (plain.double() - master.double()).norm() / (master.double() - first).norm()
    assert lost > 0.5, "the case is too easy to show why low bits are there"


def test_a_master_of_low_bits_starts_from_a_plain_bf16_weight():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(join_master(weight, torch.zeros(5, 7, dtype=torch.int16)), weight.float())
    high, low = split_master(weight.float())
    assert torch.equal(high, weight)
    assert not low.any()


def test_stochastic_rounding_is_unbiased(scale, backend):
    """Each weight goes to a neighbour; on average to itself within 3 standard errors, whatever its sign and odds."""
    case = replace(MERGE_SHAPES[3], dtype=torch.bfloat16)
    rounds = scale(20, 400, "draws of each weight")
    start = make_merge(case, update=0.05)
    master = oracle_merge(start, torch.float32)
    below = (master.view(torch.int32) >> 16 << 16).view(torch.float32).double()
    step = (below.float().view(torch.int32) + 0x10000).view(torch.float32).double() - below
    odds = (master.double() - below) / step
    error = torch.zeros_like(below)
    for number in range(rounds):
        inputs = make_merge(case, update=0.05)
        out = merge(inputs, rounding="stochastic", seed=number, accumulate="float64", backend=backend).double()
        assert ((out == below) | (out == below + step)).all()
        error += (out - below) / step - odds
    # The odds of a fresh float32 sum may differ by its own rounding, 2**-16 of a step: far below the standard error.
    for chosen in (master > 0, master < 0, odds < 0.1, odds > 0.9):
        variance = (odds * (1 - odds))[chosen].sum() * rounds
        assert error[chosen].sum().abs() <= 3 * variance.sqrt()


def test_stochastic_rounding_repeats_by_seed_and_leaves_what_is_exact(backend):
    case = replace(MERGE_SHAPES[0], dtype=torch.bfloat16)
    one, same, other = (
        merge(make_merge(case), rounding="stochastic", seed=seed, backend=backend) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    exact = make_merge(case, exact=True)
    wanted = oracle_merge(exact)
    assert torch.equal(merge(exact, rounding="stochastic", seed=3, backend=backend).double(), wanted)


def test_stochastic_rounding_draws_anew_for_every_row(backend):
    half_way = MergeInputs(
        torch.ones(600, 64, dtype=torch.bfloat16),
        torch.ones(1, 64),
        torch.full((1, 600), 2.0**-8),
        torch.ones(1),
        Segments.from_lengths([1]),
    )
    out = merge(half_way, rounding="stochastic", seed=0, backend=backend)
    assert len({tuple(row.tolist()) for row in out}) == 600


def test_stochastic_rounding_does_not_depend_on_strides(backend):
    case = replace(MERGE_SHAPES[3], dtype=torch.bfloat16)
    options = dict(rounding="stochastic", seed=5, accumulate="float64", backend=backend)
    plain = merge(make_merge(case), **options)
    for layout in ("padded", "transposed"):
        assert torch.equal(merge(make_merge(case, layout=layout), **options), plain)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_many_is_one_after_another(rounding, backend):
    cases = [replace(case, dtype=torch.bfloat16) for case in MERGE_SHAPES]
    together, apart = [make_merge(case) for case in cases], [make_merge(case) for case in cases]
    items = [MergeItem(one.weight, one.A, one.B, one.coef) for one in together]
    stacked_merge_many_(items, rounding=rounding, seed=7, backend=backend)
    for number, (one, other) in enumerate(zip(together, apart, strict=True)):
        assert torch.equal(one.weight, merge(other, rounding=rounding, seed=7 + number, backend=backend))


def test_nothing_to_merge_is_no_error():
    stacked_merge_many_([])


def test_the_order_of_clients_does_not_matter_beyond_rounding(backend):
    inputs = make_merge(replace(TEN, dtype=torch.float64))
    order = torch.cat([torch.arange(rows.start, rows.stop) for rows in reversed(list(inputs.ranks))])
    other = replace(inputs, weight=inputs.weight.clone(), A=inputs.A[order], B=inputs.B[order], coef=inputs.coef[order])
    before = replace(inputs, weight=inputs.weight.clone())
    check(merge(inputs, backend=backend), before)
    check(merge(other, backend=backend), before)


def test_autocast_changes_nothing(backend):
    case = replace(TEN, dtype=torch.bfloat16)
    plain, other = make_merge(case), make_merge(case)
    low_bits = [torch.zeros(plain.weight.shape, dtype=torch.int16) for _ in "12"]
    merge(plain, low_bits_NK=low_bits[0], backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        merge(other, low_bits_NK=low_bits[1], backend=backend)
    assert torch.equal(plain.weight, other.weight)
    assert torch.equal(*low_bits)


def test_a_frozen_parameter_is_no_obstacle(backend):
    inputs, before = make_merge(MERGE_SHAPES[0]), make_merge(MERGE_SHAPES[0])
    inputs.weight = torch.nn.Parameter(inputs.weight)
    check(merge(inputs, backend=backend).detach(), before)


def test_what_is_merged_shares_memory_with_nothing(backend):
    """On a GPU two tiles would write one place in either order, or one would read what another has written."""
    whole, factors = torch.ones(6, 8), (torch.ones(2, 4), torch.ones(2, 3), torch.ones(2))
    quarters = [MergeItem(whole[i : i + 3, j : j + 4], *factors) for i in (0, 3) for j in (0, 4)]
    stacked_merge_many_(quarters, backend=backend)
    assert torch.equal(whole, torch.full((6, 8), 3.0))
    twice = [quarters[0], MergeItem(whole[2:5, 3:7], *factors)]
    with pytest.raises(ValueError, match=r"items\[0\].weight_NK is written and must share no memory with items\[1\]"):
        stacked_merge_many_(twice, backend=backend)
    with pytest.raises(ValueError, match="weight_NK is written and must share no memory with A_PK; pass its clone"):
        stacked_merge_(whole[:3, :4], whole[1:3, :4], *factors[1:], backend=backend)
    assert torch.equal(whole, torch.full((6, 8), 3.0))
