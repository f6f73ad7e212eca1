"""lora_linear and lora_linears on every backend: values, gradients, exactness, independence, isolation, memory.

Letters: M packed tokens, K in_features, N out_features, R one client's rank, C clients.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
import torch

from flora_core import LoraWeights, Segments, lora_linear, lora_linears, testing
from flora_core.common import seeds
from flora_core.testing import DTYPES, LINEAR_SHAPES, LinearCase, LinearInputs, check_linear, make_linear, run_linear

MIXED, LONE, MANY = LINEAR_SHAPES[0], LINEAR_SHAPES[1], LINEAR_SHAPES[7]
# Every slice starts at a multiple of 64 bytes, so that the library's products cannot depend on where it lies.
ALIGNED = LinearCase("clients that may change places bit for bit", (16, 48, 32), 64, 64, (16, 32, 16))

RESULT_LIKE = {"y": "dy", "dx": "x", "dA": "A", "dB": "B"}


def in_dtypes(*shapes: LinearCase):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in testing.in_dtypes(shapes)])


@pytest.fixture(params=testing.backends("shrink"))
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def take(inputs: LinearInputs, clients: list[int]) -> LinearInputs:
    """The same inputs for some clients, in another order."""

    def rows(tensor: torch.Tensor, segments: Segments) -> torch.Tensor:
        return torch.cat([tensor[segments[c]] for c in clients])

    def entries(values):
        return values and [values[c] for c in clients]

    return replace(
        inputs,
        x=rows(inputs.x, inputs.tokens),
        dy=rows(inputs.dy, inputs.tokens),
        A=rows(inputs.A, inputs.ranks),
        B=rows(inputs.B, inputs.ranks),
        tokens=Segments.from_lengths(inputs.tokens.lengths[c] for c in clients),
        ranks=Segments.from_lengths(inputs.ranks.lengths[c] for c in clients),
        scaling_C=entries(inputs.scaling_C),
        dropout_C=entries(inputs.dropout_C),
        dropout_seed_C=entries(inputs.dropout_seed_C),
        row_C=entries(inputs.row_C),
    )


def taken(inputs: LinearInputs, results: dict[str, torch.Tensor], clients: list[int]) -> dict[str, torch.Tensor]:
    """Some clients' rows of the results, in another order."""
    parts = inputs.parts
    return {name: torch.cat([result[parts[name][c]] for c in clients]) for name, result in results.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("base", [True, False], ids=["", "branch-alone"])
@in_dtypes(*LINEAR_SHAPES)
def test_lora_linear(case, base, dropout, backend):
    inputs = make_linear(case, base=base, dropout=dropout)
    with testing.nan_filled():
        out = run_linear(inputs, backend)
    assert {result.dtype for result in out.values()} == {case.dtype}
    check_linear(inputs, out)


@pytest.mark.parametrize("layout", ["padded", "transposed"])
@in_dtypes(MIXED, LONE)
def test_strides_do_not_matter(case, layout, backend):
    inputs = make_linear(case, layout=layout, dropout=True)
    assert not inputs.weight.is_contiguous()
    check_linear(inputs, run_linear(inputs, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_masters_get_fp32_gradients(dtype, backend):
    inputs = make_linear(replace(MIXED, dtype=dtype), masters=True, dropout=True)
    out = run_linear(inputs, backend)
    assert [out[name].dtype for name in ("y", "dx", "dA", "dB")] == [dtype, dtype, torch.float32, torch.float32]
    check_linear(inputs, out)


def test_many_random_shapes(scale, backend):
    random_ = random.Random(0)
    for number in range(scale(60, 600, "random shapes")):
        clients = random_.randint(1, 6)
        # A single token of a single rank is left out: its sums may cancel to less than their rounding.
        rows = tuple(random_.choice([0, *range(2, 20)]) for _ in range(clients))
        K, N = random_.randint(8, 70), random_.randint(8, 70)
        ranks = tuple(random_.randint(0, min(K, N, 40)) for _ in range(clients))
        case = LinearCase("random", rows, K, N, ranks, random_.choice(list(DTYPES.values())))
        layout = random_.choice(["contiguous", "padded", "transposed"])
        inputs = make_linear(
            case, number, base=random_.random() < 0.5, dropout=random_.random() < 0.5, masters=True, layout=layout
        )
        try:
            check_linear(inputs, run_linear(inputs, backend))
        except AssertionError as error:
            raise AssertionError(f"{case.id}, rows {rows}, seed {number}, {layout}: {error}") from error


def planted(case: LinearCase, dropout: bool):
    """Every fault in every client in which it can be told, with the client."""
    for client, (rows, rank) in enumerate(zip(case.rows, case.ranks, strict=True)):
        for fault in testing.LINEAR_FAULTS + (testing.DROPOUT_FAULTS if dropout and client != 1 else ()):
            alone = rank == sum(case.ranks) and fault == "rows of a neighbour"
            if rows and rank and not alone:
                yield fault, client


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("base", [True, False], ids=["", "branch-alone"])
@in_dtypes(MIXED, LINEAR_SHAPES[6])
def test_planted_faults_are_caught(case, base, dropout):
    inputs = make_linear(case, base=base, dropout=dropout)
    ref64, low = testing.oracle_linear(inputs), testing.oracle_linear(inputs, case.dtype)
    for fault, client in planted(case, dropout):
        wrong = testing.oracle_linear(inputs, case.dtype, fault, client)
        ratios = testing.budget_ratios(wrong, ref64, low, inputs.parts)
        missed = [name for name, row in ratios.items() if row[client] <= 1]
        assert not missed, f"{fault} in client {client} is not seen in {missed}: {ratios}"
        untouched = {name: row[:client] + row[client + 1 :] for name, row in ratios.items()}
        if fault != "rows of a neighbour":  # whose own rows then get the gradient
            assert max(ratio for row in untouched.values() for ratio in row) <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_budget_fails_what_is_not_finite_or_misshapen(value):
    inputs = make_linear(MIXED)
    out = run_linear(inputs)
    for name in out:
        spoilt = {**out, name: out[name].clone()}
        spoilt[name][-1, -1] = value
        with pytest.raises(AssertionError, match=f"{name} of client 2: inf"):
            check_linear(inputs, spoilt)
    with pytest.raises(AssertionError, match="dA must have shape"):
        check_linear(inputs, {**out, "dA": torch.cat([out["dA"], out["dA"]])})


def test_nan_filled_fills():
    with testing.nan_filled():
        assert torch.ones(2).new_empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@in_dtypes(*LINEAR_SHAPES)
def test_ternary_integers_are_exact(case, dropout, backend):
    inputs = make_linear(case, exact=True, dropout=dropout)
    ref64, out = testing.oracle_linear(inputs), run_linear(inputs, backend)
    for name, exact in ref64.items():
        assert torch.equal(exact.to(case.dtype).double(), exact), f"{name} of the case itself is not exact"
        assert torch.equal(out[name].double(), exact), name


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_gradcheck(dropout, backend):
    inputs = make_linear(LinearCase("small", (3, 0, 2), 5, 4, (2, 1, 3), torch.float64), dropout=dropout)

    def run(x, A, B):
        return lora_linear(
            *(x, inputs.weight, inputs.bias, A, B, inputs.tokens, inputs.ranks, inputs.scaling_C),
            dropout_C=inputs.dropout_C,
            dropout_seed_C=inputs.dropout_seed_C,
            row_C=inputs.row_C,
            backend=backend,
        )

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (inputs.x, inputs.A, inputs.B)])


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@in_dtypes(MIXED)
def test_lora_linears_equals_separate_calls(case, dropout, backend):
    # As q, k, v: N differs, ranks differ, the input is the same.
    parts = [
        make_linear(replace(case, N=n, ranks=ranks), seed, dropout=dropout)
        for seed, n, ranks in ((0, 48, (1, 7, 16)), (1, 24, (4, 0, 3)), (2, 24, (0, 0, 0)))
    ]
    x = parts[0].x
    for number, part in enumerate(parts):
        part.x, part.dropout_seed_C = x, [number * 10 + c for c in range(3)] if dropout else None
    separate = [run_linear(part, backend) for part in parts]

    shared = x.detach().requires_grad_()
    factors = [(part.A.detach().requires_grad_(), part.B.detach().requires_grad_()) for part in parts]
    targets = [
        LoraWeights(part.weight, part.bias, A, B, part.ranks, part.scaling_C)
        for part, (A, B) in zip(parts, factors, strict=True)
    ]
    keys = [part.dropout_seed_C for part in parts] if dropout else None
    ys = lora_linears(
        shared, targets, parts[0].tokens, dropout_C=parts[0].dropout_C, dropout_seed_C=keys,  # pyright: ignore
        row_C=parts[0].row_C, backend=backend,
    )  # fmt: skip
    torch.autograd.backward(ys, [part.dy for part in parts])
    for y, (A, B), one in zip(ys, factors, separate, strict=True):
        assert same({"y": y, "dA": A.grad, "dB": B.grad}, {name: one[name] for name in ("y", "dA", "dB")})  # pyright: ignore
    assert shared.grad is not None
    testing.check_budget(
        {"dx": shared.grad},
        {"dx": sum(testing.oracle_linear(part)["dx"] for part in parts)},  # pyright: ignore
        {"dx": sum(testing.oracle_linear(part, case.dtype)["dx"] for part in parts)},  # pyright: ignore
        {"dx": parts[0].tokens},
    )


@in_dtypes(MIXED, LINEAR_SHAPES[2], LINEAR_SHAPES[4])
def test_permuting_clients_permutes_exact_results(case, backend):
    inputs, order = make_linear(case, exact=True, dropout=True), [2, 0, 1]
    assert same(run_linear(take(inputs, order), backend), taken(inputs, run_linear(inputs, backend), order))


@in_dtypes(ALIGNED)
def test_permuting_clients_permutes_the_branch_bit_for_bit(case, backend):
    inputs, order = make_linear(case, base=False, dropout=True), [2, 0, 1]
    assert same(run_linear(take(inputs, order), backend), taken(inputs, run_linear(inputs, backend), order))


@in_dtypes(MIXED, MANY)
def test_a_client_alone_gets_what_it_gets_in_the_cohort(case, backend):
    inputs = make_linear(case, dropout=True)
    ref64, low = testing.oracle_linear(inputs), testing.oracle_linear(inputs, case.dtype)
    for c in range(len(case.rows)):
        alone = take(inputs, [c])
        testing.check_budget(
            run_linear(alone, backend), taken(inputs, ref64, [c]), taken(inputs, low, [c]), alone.parts
        )


@in_dtypes(ALIGNED)
def test_the_branch_of_a_client_does_not_depend_on_the_others_at_all(case, backend):
    inputs = make_linear(case, base=False, dropout=True)
    together = run_linear(inputs, backend)
    for c in range(len(case.rows)):
        assert same(run_linear(take(inputs, [c]), backend), taken(inputs, together, [c]))


@in_dtypes(MIXED)
def test_micro_batches_continue_the_mask_and_add_up(case, backend):
    inputs = make_linear(case, dropout=True)
    assert inputs.row_C is not None
    cut = [length // 2 for length in case.rows]
    early = [slice(rows.start, rows.start + n) for rows, n in zip(inputs.tokens, cut, strict=True)]
    late = [slice(rows.start + n, rows.stop) for rows, n in zip(inputs.tokens, cut, strict=True)]
    whole = {name: torch.zeros_like(getattr(inputs, like)) for name, like in RESULT_LIKE.items()}
    for rows, first_C in ((early, inputs.row_C), (late, [row + n for row, n in zip(inputs.row_C, cut, strict=True)])):
        index = torch.cat([torch.arange(part.start, part.stop) for part in rows])
        tokens = Segments.from_lengths(part.stop - part.start for part in rows)
        piece = replace(inputs, x=inputs.x[index], dy=inputs.dy[index], tokens=tokens, row_C=first_C)
        for name, result in run_linear(piece, backend).items():
            whole[name][index if name in ("y", "dx") else slice(None)] += result
    check_linear(inputs, whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "A", "B", "dy"])
@in_dtypes(MIXED)
def test_a_fault_stays_with_its_client(case, where, value, backend):
    inputs = make_linear(case, dropout=True)
    clean = run_linear(inputs, backend)
    for spoilt in range(len(case.rows)):
        tensor = getattr(inputs, where).clone()
        tensor[(inputs.tokens if where in ("x", "dy") else inputs.ranks)[spoilt]] = value
        out = run_linear(replace(inputs, **{where: tensor}), backend)
        others = [c for c in range(len(case.rows)) if c != spoilt]
        assert same(taken(inputs, out, others), taken(inputs, clean, others))
        assert not all(taken(inputs, out, [spoilt])[name].isfinite().all() for name in out)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@in_dtypes(MIXED)
def test_saved_for_backward_is_x_s_a_b_and_nothing_else(case, dropout):
    inputs = make_linear(case, dropout=dropout)
    x, A, B = (tensor.requires_grad_() for tensor in (inputs.x, inputs.A, inputs.B))
    target = LoraWeights(
        inputs.weight, inputs.bias, A, B, inputs.ranks, inputs.scaling_C, dropout_seed_C=inputs.dropout_seed_C
    )
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linears(x, [target, target], inputs.tokens, dropout_C=inputs.dropout_C, row_C=inputs.row_C)
    size = case.dtype.itemsize
    s_bytes = size * sum(rows * rank for rows, rank in zip(case.rows, case.ranks, strict=True))
    shared = {t.data_ptr(): t.numel() * t.element_size() for t in saved}
    assert shared[x.data_ptr()] == x.numel() * size, "x itself must be saved, not a copy"
    assert sum(shared.values()) == size * (x.numel() + A.numel() + B.numel()) + 2 * s_bytes
    assert len(saved) == 1 + 2 * 3, "x once for both targets, S, A and B for each"


def test_autocast_changes_nothing(backend):
    inputs = make_linear(MIXED, dropout=True)
    plain = run_linear(inputs, backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(run_linear(inputs, backend), plain)


def test_a_base_under_autocast_gives_the_dtype_of_x():
    inputs = make_linear(MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        assert run_linear(inputs)["y"].dtype == torch.float32


def test_only_what_is_asked_for_gets_a_gradient(backend):
    inputs = make_linear(MIXED)
    out = run_linear(inputs, backend)
    for wanted in ("x", "A", "B"):
        leaf = getattr(inputs, wanted).detach().requires_grad_()
        tensors = {"x": inputs.x, "A": inputs.A, "B": inputs.B, wanted: leaf}
        y = lora_linear(
            tensors["x"], inputs.weight, inputs.bias, tensors["A"], tensors["B"],
            inputs.tokens, inputs.ranks, inputs.scaling_C, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(y, leaf, inputs.dy)
        assert torch.equal(gradient, out[f"d{wanted}"])
    y = lora_linear(
        *(inputs.x, inputs.weight, inputs.bias, inputs.A, inputs.B, inputs.tokens, inputs.ranks, inputs.scaling_C)
    )
    assert not y.requires_grad


def test_an_expanded_gradient_is_read_right(backend):
    """``y.sum().backward()`` hands in a gradient of stride 0."""
    inputs = make_linear(MIXED)
    run = functools.partial(run_linear, backend=backend)
    dy = torch.ones(()).expand(inputs.dy.shape)
    assert same(run(replace(inputs, dy=dy)), run(replace(inputs, dy=torch.ones_like(inputs.dy))))


def test_tensors_serve_as_well_as_lists(backend):
    inputs = make_linear(MIXED, dropout=True)
    tensors = {name: torch.tensor(getattr(inputs, name)) for name in ("scaling_C", "dropout_seed_C", "row_C")}
    probabilities = torch.tensor(inputs.dropout_C, dtype=torch.float64)
    assert same(run_linear(replace(inputs, dropout_C=probabilities, **tensors), backend), run_linear(inputs, backend))


def test_dropout_of_zero_is_no_dropout(backend):
    inputs = make_linear(MIXED)
    off = replace(inputs, dropout_C=[0.0] * 3)
    assert same(run_linear(off, backend), run_linear(inputs, backend))


def test_first_row_is_0_unless_given(backend):
    inputs = make_linear(MIXED, dropout=True)
    assert same(run_linear(replace(inputs, row_C=None), backend), run_linear(replace(inputs, row_C=[0] * 3), backend))


def test_a_target_may_bring_its_own_keys(backend):
    inputs = make_linear(MIXED, dropout=True)
    own = [seeds.dropout_seed(0, f"client {c}", 3, "q_proj") for c in range(3)]
    target = LoraWeights(inputs.weight, inputs.bias, inputs.A, inputs.B, inputs.ranks, inputs.scaling_C, own)
    (y,) = lora_linears(
        inputs.x, [target], inputs.tokens, dropout_C=inputs.dropout_C, dropout_seed_C=[[0, 0, 0]], row_C=inputs.row_C,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(y, run_linear(replace(inputs, dropout_seed_C=own), backend)["y"])
