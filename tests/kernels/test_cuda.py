"""The CUDA kernels, on a GPU or executed on the host: float64, exact integers, order of threads, isolation.

``tests/support/cuda/emulated.py`` builds them with the host compiler; ``tests/kernels/test_cuda_harness.py`` tests the
harness itself.
Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flora_core import Segments, testing
from flora_core.testing import LINEAR_SHAPES, MERGE_SHAPES, LinearCase, MergeCase, make_linear, make_merge
from flora_kernels import reference
from flora_kernels.reference import MergeItem
from tests.support.cuda.emulated import EmulationError, Library, at_hand, host_compiler

DTYPES = {name: testing.DTYPES[name] for name in ("bf16", "fp16", "fp32", "fp64")}
MIXED, EMPTY, RANK_0, ODD, LONG = (LINEAR_SHAPES[i] for i in (0, 2, 4, 6, 8))
WIDE = LinearCase(
    "more than one tile of every axis, and a rank of each alignment", (70, 0, 131, 1), 150, 300, (70, 3, 20, 6)
)
CROWD = LinearCase("more clients than a warp has lanes", (1, 2, 0) * 15, 24, 16, (1, 3, 2, 0, 4) * 9)
# Wide accesses, aligned and ragged at the edge, past one tile, and P past one step of the sum.
MERGES = (*MERGE_SHAPES, MergeCase("tiles past one", 130, 264, (40, 33)), MergeCase("one column", 9, 1, (2, 3)))
ORDERS = {"forward": 0, "reverse": 1}
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
in_each_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


@pytest.fixture
def library() -> Library:
    if host_compiler() is None:
        pytest.skip("needs g++ or clang++ to build the kernels for the host")
    return at_hand()


@pytest.fixture
def backend(library):
    with library.as_backend("emulated") as name:
        yield name


def linear_cases(*shapes: LinearCase):
    cases = testing.in_dtypes(shapes, DTYPES.values())
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in cases])


@in_each_order
@linear_cases(*LINEAR_SHAPES, WIDE)
def test_the_branch_with_dropout(case, order, library, backend):
    library.order = order
    inputs = make_linear(case, base=False, dropout=True)
    testing.check_linear(inputs, testing.run_linear(inputs, backend))


@linear_cases(CROWD)
def test_a_place_is_found_among_many_clients(case, backend):
    inputs = make_linear(case, base=False)
    testing.check_linear(inputs, testing.run_linear(inputs, backend))


@linear_cases(MIXED, RANK_0, ODD, LONG)
def test_ternary_integers_are_exact(case, backend):
    inputs = make_linear(case, exact=True, dropout=True)
    out = testing.run_linear(inputs, backend)
    for name, exact in testing.oracle_linear(inputs).items():
        assert torch.equal(out[name].double(), exact), name


@pytest.mark.parametrize("layout", ["padded", "transposed"])
@in_each_dtype
def test_strides_and_masters(layout, dtype, backend):
    inputs = make_linear(replace(MIXED, dtype=dtype), layout=layout, dropout=True, masters=True)
    testing.check_linear(inputs, testing.run_linear(inputs, backend))


@in_each_dtype
def test_a_long_client_is_summed_in_chunks(dtype, library):
    """Past 2048 tokens: the parts of three chunks, beside a client that is not cut."""
    case = LinearCase("chunks", (5, 4200, 0), 8, 16, (2, 3, 1), dtype)
    inputs = make_linear(case, exact=True)
    tokens, ranks, scaling = inputs.tokens, inputs.ranks, inputs.scaling_C
    size = sum((m.stop - m.start) * (p.stop - p.start) for m, p in zip(tokens, ranks, strict=True))
    ds, s = (torch.randint(-1, 2, (size,), generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = library.wgrad(ds, inputs.x, s, inputs.dy, tokens, ranks, scaling, wide)
    exact = reference.wgrad(
        ds.double(), inputs.x.double(), s.double(), inputs.dy.double(), tokens, ranks, scaling, torch.float64
    )
    for mine, right in zip(out, exact, strict=True):
        assert torch.equal(mine.double(), right)


def alone(inputs: testing.LinearInputs, client: int) -> testing.LinearInputs:
    rows, bank, one = inputs.tokens[client], inputs.ranks[client], slice(client, client + 1)
    return replace(
        inputs,
        **{name: getattr(inputs, name)[part] for name, part in (("x", rows), ("dy", rows), ("A", bank), ("B", bank))},
        tokens=Segments([rows.stop - rows.start]),
        ranks=Segments([bank.stop - bank.start]),
        **{name: getattr(inputs, name)[one] for name in ("scaling_C", "dropout_C", "dropout_seed_C", "row_C")},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_client_s_bits_do_not_depend_on_its_cohort(dtype, backend):
    inputs = make_linear(replace(WIDE, dtype=dtype), base=False, dropout=True)
    together = testing.run_linear(inputs, backend)
    for client in range(len(WIDE.rows)):
        for name, result in testing.run_linear(alone(inputs, client), backend).items():
            assert torch.equal(result, together[name][inputs.parts[name][client]]), f"{name} of client {client}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "A", "B", "dy"])
def test_a_fault_stays_with_its_client(where, value, backend):
    inputs, spoilt = make_linear(replace(MIXED, dtype=torch.bfloat16), dropout=True), 1
    clean, tensor = testing.run_linear(inputs, backend), getattr(inputs, where).clone()
    tensor[(inputs.tokens if where in ("x", "dy") else inputs.ranks)[spoilt]] = value
    out = testing.run_linear(replace(inputs, **{where: tensor}), backend)
    for name, result in out.items():
        for client, rows in enumerate(inputs.parts[name]):
            if client != spoilt:
                assert torch.equal(result[rows], clean[name][rows]), f"{name} of client {client}"
    assert not all(result[inputs.parts[name][spoilt]].isfinite().all() for name, result in out.items())


@in_each_dtype
def test_bits_do_not_depend_on_the_order_of_threads(dtype, library, backend):
    case = WIDE if dtype == torch.bfloat16 else LINEAR_SHAPES[7]
    inputs = make_linear(replace(case, dtype=dtype), dropout=True)
    first = testing.run_linear(inputs, backend)
    for order in (1, 2, 3):
        library.order = order
        again = testing.run_linear(inputs, backend)
        assert all(torch.equal(first[name], again[name]) for name in first), f"order {order}"


def test_a_client_that_keeps_nothing_gets_zeros(library):
    inputs = make_linear(replace(MIXED, dtype=torch.bfloat16))
    dropout = reference.Dropout([65536, 0, 65536], [1, 2, 3], [0, 0, 0])
    s = library.shrink(inputs.x, inputs.A, inputs.tokens, inputs.ranks, None, dropout)
    assert s[:20].eq(0).all()
    assert not s[20:55].eq(0).any()
    y = library.expand_(inputs.dy.clone(), s + 1, inputs.B, inputs.tokens, inputs.ranks, None, dropout)
    assert torch.equal(y[inputs.tokens[0]], inputs.dy[inputs.tokens[0]])


def merge_items(dtype: torch.dtype, factor: torch.dtype | None = None, **options) -> list[testing.MergeInputs]:
    inputs = [make_merge(replace(case, dtype=dtype), seed, **options) for seed, case in enumerate(MERGES)]
    if factor is None:
        return inputs
    return [replace(one, A=one.A.to(factor), B=one.B.to(factor)) for one in inputs]


def merged(library: Library, inputs: list[testing.MergeInputs], **options) -> list[torch.Tensor]:
    items = [MergeItem(one.weight.clone(), one.A, one.B, one.coef) for one in inputs]
    library.merge_many_(items, **options)
    return [item.weight for item in items]


@in_each_order
@pytest.mark.parametrize("accumulate", ["float32", "float64"])
@pytest.mark.parametrize("factor", ["bf16", "fp16", "fp32"])
@in_each_dtype
def test_merge_many(dtype, factor, accumulate, order, library):
    library.order = order
    inputs = merge_items(dtype, DTYPES[factor])
    for one, out in zip(inputs, merged(library, inputs, accumulate=getattr(torch, accumulate)), strict=True):
        ratio = testing.budget_ratio(out, testing.oracle_merge(one), testing.oracle_merge(one, dtype))
        assert ratio <= 1, f"{tuple(out.shape)}: {ratio}"


@in_each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "padded", "transposed"])
def test_merged_integers_are_exact(layout, dtype, library):
    inputs = merge_items(dtype, exact=True, layout=layout)
    for one, out in zip(inputs, merged(library, inputs), strict=True):
        # The sums are whole multiples of 1/4, so float32 holds them; the one rounding is torch's.
        assert torch.equal(out, testing.oracle_merge(one).to(dtype))


@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64])
def test_low_bits_are_an_fp32_master(accumulate, library):
    for one in merge_items(torch.bfloat16):
        low = torch.randint(-(2**15), 2**15, one.weight.shape, generator=torch.Generator().manual_seed(3))
        weight, low_bits = one.weight.clone(), low.to(torch.int16)
        start = replace(one, weight=reference.join_master(weight, low_bits))
        library.merge_(weight, one.A, one.B, one.coef, low_bits_NK=low_bits, accumulate=accumulate)
        out = reference.join_master(weight, low_bits)
        assert testing.budget_ratio(out, testing.oracle_merge(start), testing.oracle_merge(start, torch.float32)) <= 1
        assert torch.equal(reference.split_master(out)[0], weight)


def test_stochastic_rounding_is_the_reference_s_bit_for_bit(library):
    for i, one in enumerate(merge_items(torch.bfloat16, exact=True)):
        mine, right = one.weight.clone(), one.weight.clone()
        # Exact in float32 and far from any bf16, so that the draw decides.
        coef, seed = one.coef / 1024, 2**62 + 5 + i
        library.merge_(mine, one.A, one.B, coef, rounding="stochastic", seed=seed)
        reference.merge_(right, one.A, one.B, coef, rounding="stochastic", seed=seed)
        assert torch.equal(mine, right)


def test_more_layers_than_one_launch_can_name(library):
    inputs = [make_merge(MergeCase("tiny", 3, 8, (2,), torch.bfloat16), seed) for seed in range(240)]
    outs = merged(library, inputs)
    alone_ = [merged(library, [one])[0] for one in (inputs[0], inputs[231], inputs[232], inputs[239])]
    for index, out in zip((0, 231, 232, 239), alone_, strict=True):
        assert torch.equal(outs[index], out)


def test_a_stack_of_many_ranks(library):
    case = MergeCase("P that no step divides", 20, 40, (1030,), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        one = make_merge(replace(case, dtype=dtype))
        (out,) = merged(library, [one])
        assert testing.budget_ratio(out, testing.oracle_merge(one), testing.oracle_merge(one, dtype)) <= 1


HYPER = [[3e-2, 0.9, 0.999, 1e-8, 0.1, 5, 1], [0.1, 0.8, 0.95, 1e-3, 0, 0, 1], [5e-2, 0.0, 0.99, 1e-6, 0, 1000, 0.5]]


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_cohort_adamw(dtype, shift, library):
    lengths, owner = (900, 7, 0, 1300, 41), (0, 1, 2, 2, 1)
    random, parts = torch.Generator().manual_seed(0), Segments(lengths)
    start = [torch.randn(sum(lengths) + shift, generator=random, dtype=torch.float64).to(dtype) for _ in range(4)]
    start[3].abs_()
    hyper_CH = torch.tensor(HYPER, dtype=torch.float64)
    low, ref64, out = ([t[shift:].to(kind, copy=True) for t in start] for kind in (dtype, torch.float64, dtype))
    out = [torch.cat([tensor.new_zeros(shift), tensor])[shift:] for tensor in out]
    for p, g, m, v in (low, ref64):
        reference.cohort_adamw_(p, g, m, v, parts, hyper_CH, owner)
    p, g, m, v = out
    library.cohort_adamw_(p, g, m, v, parts, hyper_CH, owner)
    for name, mine, right, rounded in zip("pgmv", out, ref64, low, strict=True):
        testing.check_budget({name: mine}, {name: right}, {name: rounded}, {name: parts})
    for before, after in zip(start, out, strict=True):
        assert all(torch.equal(before[shift:][parts[i]], after[parts[i]]) for i in (1, 4)), "step 0 changes nothing"


def test_what_has_no_kernel_is_refused_by_name(library):
    one = make_merge(MergeCase("", 4, 8, (2,)))
    before = one.weight.clone()
    with pytest.raises(EmulationError, match="A and B must have one dtype on CUDA, got fp32 and fp16; convert one"):
        library.merge_(one.weight, one.A, one.B.half(), one.coef)
    assert torch.equal(one.weight, before)
    inputs = make_linear(MIXED)
    with pytest.raises(EmulationError, match="A must be of the dtype fp32"):
        library.shrink(inputs.x, inputs.A.half(), inputs.tokens, inputs.ranks)
