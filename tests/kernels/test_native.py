"""The native library against float64, the reference's bits and itself: instruction sets, threads, ragged and strided.

tests/ops/test_stacked_merge.py, test_ops.py and test_cohort_adamw.py run on it too, through the public ops.
Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from flora_core import Segments, testing
from flora_core.testing import LinearCase, MergeCase, make_linear, make_merge, oracle_linear, oracle_merge
from flora_kernels import reference
from flora_kernels.types import Dropout, MergeItem

native = pytest.importorskip("flora_kernels.native", exc_type=ImportError)
ISAS = [name for name, code in native._ISAS.items() if 0 < code <= native._native.cpu_isa()]
DTYPES = list(testing.DTYPES.values())
ids: dict[str, Any] = dict(ids=lambda value: testing.NAME_OF.get(value, str(value)))


def whole(length: int) -> dict[str, Segments]:
    return {"W": Segments.from_lengths([length])}


def check(out: torch.Tensor, inputs: testing.MergeInputs) -> None:
    low = oracle_merge(inputs, inputs.weight.dtype)
    testing.check_budget({"W": out}, {"W": oracle_merge(inputs)}, {"W": low}, whole(inputs.weight.shape[0]))


# Sizes beside every edge: a row, a tile of 4, 6 or 12 rows and 8, 16 or 32 columns, a group of tiles, a piece of P.
SHAPES = [(1, 1, 1), (5, 7, 3), (13, 33, 257), (97, 31, 16), (11, 300, 5), (150, 65, 40)]


@pytest.mark.parametrize("accumulate", ["float32", "float64"])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("isa", ISAS)
def test_merge_on_every_instruction_set(isa, dtype, accumulate):
    for n, k, p in SHAPES:
        case = MergeCase("", n, k, (p,), dtype)
        inputs, before = make_merge(case), make_merge(case)
        native.merge_(inputs.weight, inputs.A, inputs.B, inputs.coef, accumulate=accumulate, isa=isa, threads=2)
        check(inputs.weight, before)


@pytest.mark.parametrize("p", [0, 1, 255, 256, 1000, 4096])
@pytest.mark.parametrize("isa", ISAS)
def test_long_sums(isa, p):
    case = MergeCase("", 21, 45, (p,), torch.bfloat16)
    for accumulate in ("float32", "float64"):
        inputs, before = make_merge(case), make_merge(case)
        native.merge_(inputs.weight, inputs.A, inputs.B, inputs.coef, accumulate=accumulate, isa=isa)
        check(inputs.weight, before)


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("isa", ISAS)
def test_any_strides(isa, dtype):
    """W, A and B as every second column, upside down in memory, or transposed: as their contiguous copies."""
    case = MergeCase("", 29, 43, (3, 8), dtype)
    plain = make_merge(case)
    native.merge_(plain.weight, plain.A, plain.B, plain.coef, accumulate="float64", isa=isa)
    for lay_out in (
        lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
        lambda t: torch.cat([t, t])[: len(t)],
        lambda t: t.T.contiguous().T,
        lambda t: torch.stack([t.T, t.T], 1).flatten(0, 1)[::2].T,
    ):
        inputs = make_merge(case)
        W, A, B = (lay_out(tensor) for tensor in (inputs.weight, inputs.A, inputs.B))
        coef = torch.stack([inputs.coef, inputs.coef], -1)[:, 0]
        native.merge_(W, A, B, coef, accumulate="float64", isa=isa)
        if dtype == torch.float64:
            check(W, make_merge(case))
        else:
            # Exact sums rounded once: the order in which a transposed weight multiplies does not show.
            assert torch.equal(W, plain.weight)


def merged(case: MergeCase, threads: int, isa: str, **options) -> list[torch.Tensor]:
    inputs, low = make_merge(case), torch.zeros(case.N, case.K, dtype=torch.int16)
    options = {**options, "low_bits_NK": low} if options.pop("low", False) else options
    native.merge_(inputs.weight, inputs.A, inputs.B, inputs.coef, threads=threads, isa=isa, **options)
    return [inputs.weight, low]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "options",
    [dict(), dict(accumulate="float64"), dict(rounding="stochastic", seed=-3), dict(low=True, accumulate="float64")],
    ids=["nearest", "float64", "stochastic", "low-bits"],
)
def test_the_bits_do_not_depend_on_threads(options, isa):
    case = MergeCase("more tiles than threads, and work enough to wake them", 203, 190, (64, 7), torch.bfloat16)
    one = merged(case, 1, isa, **options)
    for threads in (2, 3):
        assert all(map(torch.equal, merged(case, threads, isa, **options), one))


def test_many_in_one_call_are_one_after_another():
    cases = [MergeCase("", n, k, (p,), dtype) for n, k, p in SHAPES for dtype in DTYPES]
    together, apart = [make_merge(case) for case in cases], [make_merge(case) for case in cases]
    native.merge_many_([MergeItem(one.weight, one.A, one.B, one.coef) for one in together], threads=2)
    for one, other in zip(together, apart, strict=True):
        native.merge_(other.weight, other.A, other.B, other.coef, threads=1)
        assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("accumulate", ["float32", "float64"])
@pytest.mark.parametrize("isa", ISAS)
def test_stochastic_rounding_draws_the_reference_s_bits(isa, accumulate):
    """Every sum is exact in fp32 and none in bf16, so the draws alone decide."""
    random = torch.Generator().manual_seed(3)
    W = torch.randint(-64, 65, (37, 83), generator=random).bfloat16()
    A, B = (torch.randint(-9, 10, (5, size), generator=random).float() for size in (83, 37))
    coef = torch.full((5,), 2.0**-10)
    W[3, 4], W[5, 6] = float("inf"), float("nan")
    for seed in (0, 7, 2**62 + 12345, -1):
        ours, right = W.clone(), W.clone()
        native.merge_(ours, A, B, coef, rounding="stochastic", seed=seed, accumulate=accumulate, isa=isa)
        reference.merge_(right, A, B, coef, rounding="stochastic", seed=seed)
        assert torch.equal(ours.view(torch.int16), right.view(torch.int16))
        assert not torch.equal(ours, W)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rounding", ["nearest", "low bits"])
def test_rounding_of_exact_sums_is_the_reference_s(rounding, isa):
    """Ties, subnormal numbers, overflow and what is not finite, on both sides of zero."""
    steps = torch.tensor([0.0, 2.0**-8, 3 * 2.0**-8, 2.0**-9, 2.0**-8 + 2.0**-20, 1e-40, 3e38, float("inf"), 1e-45])
    for dtype in (torch.bfloat16,) if rounding == "low bits" else (torch.bfloat16, torch.float16):
        W = torch.tensor([1.0, -1.0, 0.0, 3e38, -3e38, 65504.0, -1.5, 6e-8]).to(dtype)[:, None].repeat(1, len(steps))
        both = [W.clone(), W.clone()]
        lows = [torch.full(W.shape, -77, dtype=torch.int16) if rounding == "low bits" else None for _ in both]
        factors = steps[None], torch.tensor([[1.0, -1, 1, 1, -1, 1, -1, 1]]), torch.ones(1)
        native.merge_(both[0], *factors, low_bits_NK=lows[0], isa=isa)
        reference.merge_(both[1], *factors, low_bits_NK=lows[1])
        real = ~both[1].isnan()
        assert torch.equal(both[0].isnan(), both[1].isnan())
        assert torch.equal(both[0][real], both[1][real])
        if lows[0] is not None and lows[1] is not None:
            assert torch.equal(lows[0][real], lows[1][real])


# shrink, expand and wgrad.

LINEAR = [
    LinearCase("ranks around a block of dot products, tokens around a tile", (13, 0, 41), 130, 67, (1, 5, 13)),
    LinearCase("one token", (1, 1), 9, 300, (4, 0)),
    LinearCase("more columns than are summed at once", (6, 3), 2100, 40, (7, 2)),
    LinearCase("more tokens than are summed at once, whole tiles, panels of ranks", (131, 260), 96, 144, (9, 20)),
]


def run(inputs: testing.LinearInputs, kernels, **options) -> dict[str, torch.Tensor]:
    """y, dx, dA, dB of the branch alone by a backend's primitives."""
    i, dropout = inputs, None
    if i.dropout_C is not None:
        dropout = Dropout([round(65536 * p) for p in i.dropout_C], i.dropout_seed_C or (), i.row_C or ())
    s = kernels.shrink(i.x, i.A, i.tokens, i.ranks, None, dropout, **options)
    y = torch.zeros(len(i.x), i.B.shape[1], dtype=i.x.dtype)
    kernels.expand_(y, s, i.B, i.tokens, i.ranks, i.scaling_C, **options)
    ds = kernels.shrink(i.dy, i.B, i.tokens, i.ranks, i.scaling_C, **options)
    dx = torch.zeros_like(i.x)
    kernels.expand_(dx, ds, i.A, i.tokens, i.ranks, None, dropout, **options)
    dA, dB = kernels.wgrad(ds, i.x, s, i.dy, i.tokens, i.ranks, i.scaling_C, i.A.dtype, dropout, **options)
    return {"y": y, "dx": dx, "dA": dA, "dB": dB}


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in testing.in_dtypes(LINEAR)])
@pytest.mark.parametrize("isa", ISAS)
def test_lora_primitives(isa, case, dropout):
    for masters in (False, True):
        inputs = make_linear(case, base=False, dropout=dropout, masters=masters)
        with testing.nan_filled():
            out = run(inputs, native, isa=isa, threads=2)
        low = oracle_linear(inputs, inputs.x.dtype)
        testing.check_budget(out, oracle_linear(inputs), low, inputs.parts)


@pytest.mark.parametrize("isa", ISAS)
def test_lora_bits_do_not_depend_on_threads_or_on_the_other_clients(isa):
    case = LinearCase("work enough to wake the threads", (40, 90, 30), 300, 200, (16, 24, 3), torch.float32)
    for dropout in (False, True):
        inputs = make_linear(case, base=False, dropout=dropout)
        one, two = (run(inputs, native, isa=isa, threads=threads) for threads in (1, 2))
        assert all(torch.equal(one[name], two[name]) for name in one)
    rows, bank = inputs.tokens[1], inputs.ranks[1]
    alone = replace(
        inputs,
        **dict(x=inputs.x[rows], dy=inputs.dy[rows], A=inputs.A[bank], B=inputs.B[bank]),
        **dict(tokens=Segments.from_lengths([90]), ranks=Segments.from_lengths([24]), scaling_C=inputs.scaling_C[1:2]),
        **dict(dropout_C=[0.3], dropout_seed_C=[5], row_C=[3]),
    )
    among = replace(inputs, dropout_C=[0.5, 0.3, 0.0], dropout_seed_C=[1, 5, 2], row_C=[0, 3, 9])
    alone, among = run(alone, native, isa=isa, threads=1), run(among, native, isa=isa, threads=2)
    for name, part in {"y": rows, "dx": rows, "dA": bank, "dB": bank}.items():
        assert torch.equal(alone[name], among[name][part])


@pytest.mark.parametrize("isa", ISAS)
def test_dropout_masks_are_the_reference_s(isa):
    """x = 1 and A = the identity show every element of the mask."""
    tokens, ranks = Segments.from_lengths([5, 20]), Segments.from_lengths([77, 77])
    drawn = [20000, 65535], [2**62 + 99, -7], [2**32 - 5, 1000]
    dropout = Dropout(*drawn)
    x, A = torch.ones(25, 77), torch.eye(77).repeat(2, 1)
    s = native.shrink(x, A, tokens, ranks, None, dropout, isa=isa).view(25, 77)
    y = native.expand_(torch.zeros(25, 77), torch.ones(25 * 77), A, tokens, ranks, None, dropout, isa=isa)
    for rows, q, seed, first in zip(tokens, *drawn, strict=True):
        keep = reference.dropout_keep(rows.stop - rows.start, 77, q, seed, first, torch.device("cpu"))
        wanted = keep * torch.tensor(65536 / (65536 - q))
        assert torch.equal(s[rows], wanted)
        assert torch.equal(y[rows], wanted)


def test_dropped_elements_are_zero_even_where_x_is_not_finite():
    tokens, ranks = Segments.from_lengths([4]), Segments.from_lengths([2])
    x = torch.full((4, 16), float("nan"))
    dropout = Dropout([65536], [1], [0])
    assert torch.equal(native.shrink(x, torch.ones(2, 16), tokens, ranks, None, dropout), torch.zeros(8))


@pytest.mark.parametrize("isa", ISAS)
def test_a_client_s_nan_stays_with_it(isa):
    case = LinearCase("two clients in one tile of rows", (3, 4), 20, 24, (5, 6))
    inputs, clean = make_linear(case, base=False), make_linear(case, base=False)
    inputs.x[:3], inputs.A[:5], inputs.B[:5] = float("nan"), float("inf"), float("nan")
    sick, well = run(inputs, native, isa=isa), run(clean, native, isa=isa)
    for name, parts in inputs.parts.items():
        assert torch.equal(sick[name][parts[1]], well[name][parts[1]])


def test_a_scale_that_is_not_finite_stays_with_its_client():
    """It is data, as X is: refusing it would let one client stop all."""
    case = LinearCase("two clients in one tile of rows", (3, 4), 20, 24, (5, 6))
    inputs = make_linear(case, base=False)
    clean, sick = run(inputs, native), run(replace(inputs, scaling_C=[float("nan"), inputs.scaling_C[1]]), native)
    for name, parts in inputs.parts.items():
        assert torch.equal(sick[name][parts[1]], clean[name][parts[1]])
    assert sick["y"][:3].isnan().all()


def test_the_environment_names_an_instruction_set():
    """For every call that names none, also through the ops; a name that is none is refused."""
    show = "from flora_kernels import native; print(native.describe())"
    for isa in ISAS:
        environment = {**os.environ, "PYTHONPATH": str(native.prefix().parent), "FLORA_ISA": isa}
        done = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split(", ")[1] == isa
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_FORCED_ISA", "sse9")
        with pytest.raises(ValueError, match="FLORA_ISA must be one of auto, portable, avx2, avx512, got 'sse9'"):
            native.describe()
        bits = [merged(MergeCase("", 40, 50, (200,)), 1, isa)[0] for isa in ISAS]
        for isa, wanted in zip(ISAS, bits, strict=True):
            patch.setattr(native, "_FORCED_ISA", isa)
            assert torch.equal(merged(MergeCase("", 40, 50, (200,)), 1, "auto")[0], wanted)


# adamw.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", ISAS)
def test_adamw_on_every_instruction_set(isa, dtype):
    random, sizes = torch.Generator().manual_seed(0), [40001, 0, 17, 33000]
    hyper = torch.tensor(
        [[1e-3, 0.9, 0.999, 1e-8, 0.1, 3, 0.5], [2e-2, 0.3, 0.99, 1e-6, 0, 1, 1], [9, 9, 9, 9, 9, 0, 9]]
    )
    buffers = [torch.randn(sum(sizes), generator=random, dtype=torch.float64).abs() + 0.01 for _ in range(4)]
    buffers[0] *= -1
    wide = [buffer.clone() for buffer in buffers]
    segments, owner = Segments.from_lengths(sizes), [0, 2, 1, 2]
    reference.cohort_adamw_(*wide, segments, hyper.double(), owner)  # pyright: ignore[reportCallIssue]
    low = [buffer.to(dtype, copy=True) for buffer in buffers]
    reference.cohort_adamw_(*low, segments, hyper.to(dtype), owner)  # pyright: ignore[reportCallIssue]
    results = []
    for threads in (1, 2):
        results.append(ours := [buffer.to(dtype, copy=True) for buffer in buffers])
        native.cohort_adamw_(*ours, segments, hyper.to(dtype), owner, isa=isa, threads=threads)
        for out, right, rounded, before in zip(ours, wide, low, buffers, strict=True):
            parts = {"W": Segments.from_lengths([sizes[0], sum(sizes[1:])])}
            testing.check_budget({"W": out}, {"W": right}, {"W": rounded}, parts)
            assert torch.equal(out[-33000:], before.to(dtype)[-33000:])
    assert all(map(torch.equal, *results))
