"""The Triton kernels held against the float64 oracles: values, exact integers, the mask, isolation, independence.

Run by tests/kernels/test_triton.py in a process of its own under TRITON_INTERPRET=1, and by hand where there is a GPU:
``python -m pytest tests/support/triton/ops.py``.
Letters: M packed tokens, K in_features, N out_features, R one client's rank, C clients.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from flora_core import MergeItem, Segments, cohort_adamw_, stacked_merge_many_, testing
from flora_core.ops import fusion
from flora_core.testing import LINEAR_SHAPES, MERGE_SHAPES, LinearCase, LinearInputs, make_linear, make_merge
from flora_kernels import reference
from flora_kernels import triton as kernels
from flora_kernels.reference import draws as reference_draws
from flora_kernels.triton.common import draws_of
from tests.ops import test_shared_input

# The package's attribute of that name is the launcher.
wgrad_file = importlib.import_module("flora_kernels.triton.wgrad")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
NARROW = (torch.float32, torch.bfloat16, torch.float16)
MIXED, EMPTY, RANK_0, ODD, MANY, LONG = (LINEAR_SHAPES[i] for i in (0, 2, 4, 6, 7, 8))
SMALL = LinearCase("two tiles for one client, one for the others", (70, 0, 33, 1), 70, 40, (20, 3, 5, 2))
# Tiles past one in every direction, none of them whole.
WIDE = LinearCase("more than one tile of every axis", (70, 0, 131, 1), 150, 300, (20, 3, 70, 5))
VECTORS = json.loads((Path(__file__).parents[1] / "dropout_vectors.json").read_text())["masks"]
# NumPy says so when it multiplies the NaN that a test plants.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def in_dtypes(*shapes: LinearCase):
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in testing.in_dtypes(shapes, NARROW)])


in_each_dtype = pytest.mark.parametrize("dtype", NARROW, ids=["fp32", "bf16", "fp16"])


def run(inputs: LinearInputs) -> dict[str, torch.Tensor]:
    with testing.nan_filled():
        return testing.run_linear(inputs, "triton")


@in_dtypes(*LINEAR_SHAPES)
def test_the_branch_with_dropout(case):
    inputs = make_linear(case, base=False, dropout=True, device=DEVICE)
    testing.check_linear(inputs, run(inputs))


@in_dtypes(MIXED, EMPTY, WIDE)
def test_lora_linear(case):
    inputs = make_linear(case, device=DEVICE)
    testing.check_linear(inputs, run(inputs))


@in_dtypes(MIXED, RANK_0, ODD, LONG)
def test_ternary_integers_are_exact(case):
    inputs = make_linear(case, exact=True, dropout=True, device=DEVICE)
    out = run(inputs)
    for name, exact in testing.oracle_linear(inputs).items():
        assert torch.equal(out[name].double(), exact), name


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@in_dtypes(MIXED, RANK_0)
def test_targets_that_share_x_are_read_and_written_once(case, dropout, monkeypatch):
    shared, launches = {"shrink_many": kernels.shrink_many, "expand_many_": kernels.expand_many_}, []
    for name, launch in shared.items():
        counted = lambda *args, n=name, f=launch: launches.append((n, len(args[1]))) or f(*args)  # noqa: E731
        monkeypatch.setattr(kernels, name, counted)
    inputs = test_shared_input.three(case, dropout, DEVICE)
    with testing.nan_filled():
        out = test_shared_input.run(inputs, "triton")
    test_shared_input.check(inputs, out)
    assert launches == [("shrink_many", 3), ("expand_many_", 3)]


@in_each_dtype
def test_more_targets_than_a_launch_holds(dtype):
    case = replace(MIXED, dtype=dtype)
    inputs = test_shared_input.three(case, True, DEVICE) + test_shared_input.three(case, True, DEVICE)[1:]
    with testing.nan_filled():
        out = test_shared_input.run(inputs, "triton")
    test_shared_input.check(inputs, out)


@pytest.mark.parametrize("layout", ["padded", "transposed"])
@in_each_dtype
def test_strides_and_masters(layout, dtype):
    inputs = make_linear(replace(MIXED, dtype=dtype), layout=layout, dropout=True, masters=True, device=DEVICE)
    testing.check_linear(inputs, run(inputs))


@triton.jit
def _mask_kernel(out_ptr, seed, first_row, q, STREAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS
    keep = draws_of(first_row + tl.arange(0, ROWS), column, seed, ROWS, COLUMNS, STREAM) >= q
    place = tl.arange(0, ROWS)[:, None] * (COLUMNS * tl.num_programs(0)) + column + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + place, keep.to(tl.int8))


def mask(rows: int, columns: int, q: int, seed: int, first_row: int, stream: int = 0) -> torch.Tensor:
    tall, tiles = triton.next_power_of_2(rows), triton.cdiv(columns, 64)
    out = torch.empty(tall, tiles * 64, dtype=torch.int8, device=DEVICE)
    _mask_kernel[(tiles,)](out, seed, first_row, q, STREAM=stream, ROWS=tall, COLUMNS=64)  # pyright: ignore
    return out[:rows, :columns].bool().cpu()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["why"])
def test_the_mask_is_the_reference_s_bit_for_bit(vector):
    shape, q, seed, first = (vector["rows"], vector["columns"]), vector["q"], vector["seed"], vector["first_row"]
    assert torch.equal(
        mask(*shape, q, seed, first), reference.dropout_keep(*shape, q, seed, first, torch.device("cpu"))
    )


def test_the_draws_of_rounding_are_the_reference_s():
    draws = reference_draws.draws(16, 128, 2**62 + 3, 9, 1, torch.device("cpu"))
    for q in (1, 20000, 65535):
        assert torch.equal(mask(16, 128, q, 2**62 + 3, 9, stream=1), draws >= q)


@in_dtypes(MIXED, EMPTY, WIDE)
def test_linear_and_linear_lora(case):
    inputs = make_linear(case, device=DEVICE)
    assert inputs.bias is not None
    s_flat = reference.shrink(inputs.x, inputs.A, inputs.tokens, inputs.ranks)
    clients = inputs.tokens, inputs.ranks, inputs.scaling_C
    with testing.nan_filled():
        plain = kernels.linear(inputs.x, inputs.weight, inputs.bias)
        fused = kernels.linear_lora(inputs.x, inputs.weight, inputs.bias, s_flat, inputs.B, *clients)

    def base(dtype: torch.dtype) -> torch.Tensor:
        return reference.linear(inputs.x.to(dtype), inputs.weight.to(dtype), inputs.bias.to(dtype))  # pyright: ignore

    def both(dtype: torch.dtype) -> torch.Tensor:
        return reference.expand_(base(dtype), s_flat.to(dtype), inputs.B.to(dtype), *clients)

    for out, oracle in ((plain, base), (fused, both)):
        with testing.plain_rounding():
            low = oracle(case.dtype)
        testing.check_budget({"y": out}, {"y": oracle(torch.float64)}, {"y": low}, {"y": inputs.tokens})


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("fuse", fusion.FUSIONS)
@in_each_dtype
def test_every_way_to_fuse(dtype, fuse, dropout):
    inputs = make_linear(replace(MIXED, dtype=dtype), dropout=dropout, masters=True, device=DEVICE)
    with testing.nan_filled():
        testing.check_linear(inputs, testing.run_linear(inputs, "triton", fuse))


@in_each_dtype
def test_the_choice_by_time_gives_right_results(dtype):
    inputs = make_linear(replace(MIXED, dtype=dtype), dropout=True, masters=True, device=DEVICE)
    testing.check_linear(inputs, testing.run_linear(inputs, "triton", "auto"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fuse", fusion.FUSIONS)
def test_a_fault_stays_with_its_client_in_every_way(fuse, value):
    inputs, spoilt = make_linear(replace(RANK_0, dtype=torch.bfloat16), device=DEVICE), 2
    clean = testing.run_linear(inputs, "triton", fuse)
    for where in ("x", "A", "B", "dy"):
        tensor = getattr(inputs, where).clone()
        tensor[(inputs.tokens if where in ("x", "dy") else inputs.ranks)[spoilt]] = value
        out = testing.run_linear(replace(inputs, **{where: tensor}), "triton", fuse)
        for name, result in out.items():
            for client in (0, 1):
                rows = inputs.parts[name][client]
                assert torch.equal(result[rows], clean[name][rows]), f"{name} of client {client}, {where}"
        assert not all(result[inputs.parts[name][spoilt]].isfinite().all() for name, result in out.items())


@in_dtypes(MIXED, RANK_0)
def test_place(case):
    inputs = make_linear(case, device=DEVICE)
    s_flat = reference.shrink(inputs.x, inputs.A, inputs.tokens, inputs.ranks)
    scaling_C = torch.tensor(inputs.scaling_C, device=DEVICE)
    scaling_C[0] = float("nan")
    wide = torch.full((len(inputs.x), 9 + 64), 7.0, dtype=case.dtype, device=DEVICE)
    right = wide.clone()
    kernels.place_(wide[:, 9:], s_flat, inputs.tokens, inputs.ranks, scaling_C)
    reference.place_(right[:, 9:], s_flat, inputs.tokens, inputs.ranks, scaling_C)
    assert torch.equal(wide.nan_to_num(5.0), right.nan_to_num(5.0))


@in_each_dtype
def test_the_fused_tail_is_exact_and_keeps_a_fault_with_its_client(dtype):
    inputs = make_linear(replace(WIDE, dtype=dtype), exact=True, device=DEVICE)
    s_flat = reference.shrink(inputs.x, inputs.A, inputs.tokens, inputs.ranks)
    exact = reference.linear(inputs.x.double(), inputs.weight.double(), inputs.bias.double())  # pyright: ignore
    reference.expand_(exact, s_flat.double(), inputs.B.double(), inputs.tokens, inputs.ranks, inputs.scaling_C)
    for spoilt in (None, 0, 2, 3):
        B = inputs.B.clone()
        if spoilt is not None:
            B[inputs.ranks[spoilt]] = float("nan")
        clients = inputs.tokens, inputs.ranks, inputs.scaling_C
        out = kernels.linear_lora(inputs.x, inputs.weight, inputs.bias, s_flat, B, *clients)
        for c, rows in enumerate(inputs.tokens):
            assert out[rows].isnan().all() if c == spoilt else torch.equal(out[rows], exact[rows].to(dtype))


def test_a_client_without_tokens_gets_zeros_whatever_its_scaling():
    x, dy, s = (torch.ones(*shape, device=DEVICE) for shape in ((5, 8), (5, 16), (10,)))
    scaling_C = torch.tensor([2.0, float("nan")], device=DEVICE)
    clients = Segments([5, 0]), Segments([2, 3]), scaling_C
    for found in (kernels.wgrad(s, x, s, dy, *clients, torch.float32), reference.wgrad(s, x, s, dy, *clients, x.dtype)):
        assert not any(gradient[2:].any() for gradient in found)
        assert found[1][:2].eq(10).all()


@in_each_dtype
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_a_long_client_is_summed_in_chunks(dtype, dropout, monkeypatch):
    monkeypatch.setattr(wgrad_file, "CHUNK", 32)
    inputs = make_linear(replace(LONG, dtype=dtype), exact=True, dropout=dropout, device=DEVICE)
    out = run(inputs)
    for name, exact in testing.oracle_linear(inputs).items():
        assert torch.equal(out[name].double(), exact), name
    inputs = make_linear(replace(LONG, dtype=dtype), dropout=dropout, device=DEVICE)
    testing.check_linear(inputs, run(inputs))


def alone(inputs: LinearInputs, client: int) -> LinearInputs:
    rows, bank, one = inputs.tokens[client], inputs.ranks[client], slice(client, client + 1)
    return replace(
        inputs,
        **{name: getattr(inputs, name)[part] for name, part in (("x", rows), ("dy", rows), ("A", bank), ("B", bank))},
        tokens=Segments([rows.stop - rows.start]),
        ranks=Segments([bank.stop - bank.start]),
        **{name: getattr(inputs, name)[one] for name in ("scaling_C", "dropout_C", "dropout_seed_C", "row_C")},
    )


@in_each_dtype
def test_a_client_s_bits_do_not_depend_on_its_cohort(dtype, monkeypatch):
    monkeypatch.setattr(wgrad_file, "CHUNK", 32)
    inputs = make_linear(replace(SMALL, dtype=dtype), base=False, dropout=True, device=DEVICE)
    together = run(inputs)
    for client in range(len(SMALL.rows)):
        for name, result in run(alone(inputs, client)).items():
            assert torch.equal(result, together[name][inputs.parts[name][client]]), f"{name} of client {client}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "A", "B", "dy"])
def test_a_fault_stays_with_its_client(where, value):
    inputs, spoilt = make_linear(replace(MIXED, dtype=torch.bfloat16), dropout=True, device=DEVICE), 1
    clean, tensor = run(inputs), getattr(inputs, where).clone()
    tensor[(inputs.tokens if where in ("x", "dy") else inputs.ranks)[spoilt]] = value
    out = run(replace(inputs, **{where: tensor}))
    for name, result in out.items():
        for client, rows in enumerate(inputs.parts[name]):
            if client != spoilt:
                assert torch.equal(result[rows], clean[name][rows]), f"{name} of client {client}"
    assert not all(result[inputs.parts[name][spoilt]].isfinite().all() for name, result in out.items())


def test_a_step_repeats_bit_for_bit():
    inputs = make_linear(replace(SMALL, dtype=torch.bfloat16), dropout=True, device=DEVICE)
    one, two = run(inputs), run(inputs)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("low_bits", [False, True], ids=["", "low-bits"])
@pytest.mark.parametrize("accumulate", ["float32", "float64"])
def test_merge_many(accumulate, low_bits):
    """Layers of several shapes and dtypes, aligned or not, in one call."""
    dtypes = [torch.bfloat16] if low_bits else [*NARROW, torch.float64]
    cases = [replace(case, dtype=dtype) for dtype in dtypes for case in MERGE_SHAPES]
    inputs = [make_merge(case) for case in cases]
    items = []
    for one in inputs:
        tensors = [tensor.to(DEVICE, copy=True) for tensor in (one.weight, one.A, one.B, one.coef)]
        low = torch.zeros(one.weight.shape, dtype=torch.int16, device=DEVICE) if low_bits else None
        items.append(MergeItem(*tensors, low_bits=low))  # pyright: ignore[reportCallIssue]
    stacked_merge_many_(items, accumulate=accumulate, backend="triton")
    for one, item in zip(inputs, items, strict=True):
        out, start = item.weight.cpu(), one.weight
        if item.low_bits is not None:
            out, start = reference.join_master(out, item.low_bits.cpu()), start.float()
        before = replace(one, weight=start)
        whole, low = {"W": Segments([len(out)])}, testing.oracle_merge(before, out.dtype)
        testing.check_budget({"W": out}, {"W": testing.oracle_merge(before)}, {"W": low}, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cohort_adamw(dtype):
    lengths, owner = (900, 7, 0, 1300, 41), (0, 1, 2, 2, 1)
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(sum(lengths), generator=random, dtype=torch.float64).to(dtype) for _ in range(4)]
    start[3].abs_()
    hyper_CH = torch.tensor(
        [[3e-2, 0.9, 0.999, 1e-8, 0.1, 5, 1], [0.1, 0.8, 0.95, 1e-3, 0, 0, 1], [5e-2, 0.0, 0.99, 1e-6, 0, 1000, 0.5]],
        dtype=torch.float64,
    )
    parts = Segments(lengths)
    low, ref64 = [t.clone() for t in start], [t.to(torch.float64, copy=True) for t in start]
    for p, g, m, v in (low, ref64):
        reference.cohort_adamw_(p, g, m, v, parts, hyper_CH, owner)
    p, g, m, v = out = [t.to(DEVICE, copy=True) for t in start]
    cohort_adamw_(p, g, m, v, parts, hyper_CH.to(DEVICE), owner=owner, backend="triton")
    for name, mine, right, rounded in zip("pgmv", out, ref64, low, strict=True):
        testing.check_budget({name: mine.cpu()}, {name: right}, {name: rounded}, {name: parts})
    for before, after in zip(start, out, strict=True):
        assert all(torch.equal(before[parts[i]], after.cpu()[parts[i]]) for i in (1, 4)), "step 0 must change nothing"
