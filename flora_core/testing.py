"""Cases, input makers, oracles and the error budget: one set for the tests and benchmarks of every backend.

The oracles are written plainly and apart from the kernels: dense formulas per client, gradients from autograd, and a
Philox in Python ints. In float64 an oracle gives the truth (``ref64``), in the tested dtype it shows the rounding that
this dtype cannot avoid (``low``); the budget holds a result against both.

Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from . import ops
from .backends import availability, resolve
from .segments import Segments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


def backends(op: str) -> list[str]:
    """The backends that run a primitive here."""

    def runs(name: str) -> bool:
        try:
            return bool(resolve(name, op))
        except ValueError:
            return False

    return [name for name in availability() if runs(name)]


def budget_ratio(out: torch.Tensor, ref64: torch.Tensor, low: torch.Tensor) -> float:
    """How much of its error budget a result uses; a right one stays at or below 1.

    ``max|out - ref64| / (2 (max|low - ref64| + eps(low.dtype) max|ref64|))``; in float64 over ``1e-9 max|ref64|``.
    """
    if not out.numel():
        return 0.0
    error, size = (out.double() - ref64).abs().max().item(), ref64.abs().max().item()
    if low.dtype == torch.float64:
        budget = 1e-9 * size
    else:
        budget = 2 * ((low.double() - ref64).abs().max().item() + torch.finfo(low.dtype).eps * size)
    if error == 0:
        return 0.0
    # A NaN compares as false, so the good case is the one to ask for.
    return error / budget if error < float("inf") and budget > 0 else float("inf")


Results = Mapping[str, torch.Tensor]


def budget_ratios(out: Results, ref64: Results, low: Results, parts: Mapping[str, Segments]) -> dict[str, list[float]]:
    """The ratio of every result in every client's rows."""
    for name in out:
        if out[name].shape != ref64[name].shape:
            raise AssertionError(f"{name} must have shape {tuple(ref64[name].shape)}, got {tuple(out[name].shape)}")
    return {
        name: [budget_ratio(out[name][rows], ref64[name][rows], low[name][rows]) for rows in parts[name]]
        for name in out
    }


def check_budget(out: Results, ref64: Results, low: Results, parts: Mapping[str, Segments]) -> float:
    """Raise AssertionError with every ratio above 1; give back the worst."""
    ratios = budget_ratios(out, ref64, low, parts)
    over = [f"{name} of client {c}: {r:.3g}" for name, row in ratios.items() for c, r in enumerate(row) if not r <= 1]
    if over:
        raise AssertionError("error / budget above 1: " + "; ".join(over))
    return max((ratio for row in ratios.values() for ratio in row), default=0.0)


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of a dtype at each value, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.double().abs().clamp(min=info.tiny)).exponent
    return info.eps * torch.exp2(exponent.double() - 1)


@contextmanager
def nan_filled() -> Iterator[None]:
    """Fill whatever is allocated with NaN, so that a result that is not wholly written shows."""
    # torch fills fresh memory with NaN while deterministic algorithms are on; cuBLAS then wants a workspace of its own.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def saved_bytes(run: Callable[[], Any], fixed: torch.nn.Module | Iterable[torch.Tensor], context: Any = None) -> int:
    """Bytes that autograd keeps of a run: every storage once, without those of the fixed tensors or the model's own."""
    tensors = fixed.parameters() if isinstance(fixed, torch.nn.Module) else fixed
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in tensors}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # The tensor is held as well, so that no address is used twice.
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in known else storage.nbytes(), tensor
        return tensor

    with context or nullcontext(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(size for size, _ in kept.values())


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 7) -> tuple[int, int, int, int]:
    """Philox4x32 as Salmon et al. (SC 2011) print it, in Python ints."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right % 2**32, (left >> 32) ^ c3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=256)
def keep_mask(rows: int, columns: int, q: int, seed: int, first_row: int = 0) -> torch.Tensor:
    """Which elements dropout keeps, bool (rows, columns), drawn one by one."""
    kept = torch.empty(rows, columns, dtype=torch.bool)
    for row in range(rows):
        for group in range(0, columns, 8):
            words = philox4x32((group // 8, first_row + row, 0, 0), (seed % 2**32, seed >> 32))
            draws = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
            for column in range(group, min(group + 8, columns)):
                kept[row, column] = draws[column - group] >= q
    return kept


@dataclass(frozen=True)
class LinearCase:
    """Shapes of one packed LoRA linear: each client's tokens and rank, and why the case is there."""

    why: str
    rows: tuple[int, ...]
    K: int
    N: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def id(self) -> str:
        ranks = ",".join(map(str, self.ranks))
        return f"M{sum(self.rows)}-K{self.K}-N{self.N}-R{ranks}-{_NAME_OF[self.dtype]}"


LINEAR_SHAPES = (
    LinearCase("R=1, and ranks that are no multiple of 16", (20, 5, 12), 64, 48, (1, 7, 16)),
    LinearCase("one token, alone", (1,), 16, 24, (3,)),
    LinearCase("a client without tokens between two that have some", (8, 0, 16), 32, 32, (4, 5, 8)),
    LinearCase("no tokens at all", (0, 0), 16, 8, (4, 2)),
    LinearCase("rank 0 between two clients that adapt", (9, 6, 7), 32, 40, (4, 0, 9)),
    LinearCase("nobody adapts this module", (5, 3), 16, 16, (0, 0)),
    LinearCase("K and N that no vector width divides", (11, 17), 53, 35, (5, 2)),
    LinearCase("many clients, and a rank above one tile", (6, 4, 3, 5, 2, 4, 3), 96, 72, (64, 32, 16, 16, 8, 8, 4)),
    LinearCase("tokens above one tile", (150, 3), 24, 16, (6, 4)),
)


@dataclass
class LinearInputs:
    """What ``lora_linear`` takes, and the upstream gradient dy."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    dy: torch.Tensor
    tokens: Segments
    ranks: Segments
    scaling_C: list[float]
    dropout_C: list[float] | None = None
    dropout_seed_C: list[int] | None = None
    row_C: list[int] | None = None

    @property
    def parts(self) -> dict[str, Segments]:
        """How the clients share the first axis of each result."""
        return {"y": self.tokens, "dx": self.tokens, "dA": self.ranks, "dB": self.ranks}


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same 2-D values: contiguous | padded (within wider rows, NaN around them) | transposed."""
    if layout == "padded":
        wide = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 5), float("nan")).to(tensor)
        wide[1:-1, 2:-3] = tensor
        return wide[1:-1, 2:-3]
    return tensor.T.contiguous().T if layout == "transposed" else tensor.contiguous()


def make_linear(
    case: LinearCase,
    seed: int = 0,
    *,
    exact: bool = False,
    base: bool = True,
    dropout: bool = False,
    masters: bool = False,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
) -> LinearInputs:
    """Make inputs in the tested dtype, scaled so that base and branch have like size in every result.

    Args:
        exact: Sparse ternary integers instead: every sum is exact in the dtype.
        base: False makes the weight zero and leaves the bias out, so that the branch stands alone.
        dropout: Gives each client, but the second, a probability of its own, a key and a first row.
        masters: Keeps the factors in float32 where the dtype has 16 bits.
        layout: Of x, weight, both factors and dy; see ``lay_out``.
    """
    random = torch.Generator().manual_seed(seed)
    ranks, M, K, N = case.ranks, sum(case.rows), case.K, case.N
    # Never 1, which would hide a scale that is applied twice.
    scaling = [(2.0, 0.5, 3.0, 0.25)[c % 4] for c in range(len(ranks))]
    std_P1 = torch.tensor([1 / (s * r**0.5) for s, r in zip(scaling, ranks, strict=True) for _ in range(r)])[:, None]
    # The last column of A weighs double: a dropped one must show above the rounding of 16 bits.
    std_K = torch.tensor([1.0] * (K - 1) + [2.0]) * K**-0.5

    def make(*shape: int, std: float | torch.Tensor = 1.0, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        if exact:
            values = torch.randint(-1, 2, shape, generator=random) * torch.randint(0, 2, shape, generator=random)
        else:
            values = torch.randn(shape, generator=random, dtype=torch.float64) * std
        return values.to(device, dtype)

    factor_dtype = torch.float32 if masters and case.dtype.itemsize == 2 else case.dtype
    weight, bias = make(N, K, std=K**-0.5), make(N)
    probabilities = [0.0 if c == 1 else 0.5 if exact else 0.1 + 0.07 * c for c in range(len(ranks))]
    return LinearInputs(
        x=lay_out(make(M, K), layout),
        weight=lay_out(weight if base else torch.zeros_like(weight), layout),
        bias=bias if base else None,
        A=lay_out(make(sum(ranks), K, std=std_K, dtype=factor_dtype), layout),
        B=lay_out(make(sum(ranks), N, std=std_P1, dtype=factor_dtype), layout),
        dy=lay_out(make(M, N), layout),
        tokens=Segments.from_lengths(case.rows),
        ranks=Segments.from_lengths(ranks),
        scaling_C=scaling,
        dropout_C=probabilities if dropout else None,
        dropout_seed_C=[2**61 + 7919 * c for c in range(len(ranks))] if dropout else None,
        row_C=[11 * c for c in range(len(ranks))] if dropout else None,
    )


# Ways to be wrong that a budget must catch, each planted in one client.
LINEAR_FAULTS = (
    "branch missing",
    "scale twice",
    "rows of a neighbour",
    "last k dropped",
    "last rank dropped",
    "last token dropped",
    "one element zeroed",
)
DROPOUT_FAULTS = ("mask one row off", "kept elements not scaled up")


def oracle_linear(
    inputs: LinearInputs, dtype: torch.dtype = torch.float64, fault: str | None = None, client: int = 0
) -> dict[str, torch.Tensor]:
    """y, dx, dA and dB of the dense formula per client, in a dtype, with a fault in one client if one is named."""
    x, A, B = (tensor.detach().to(dtype).requires_grad_() for tensor in (inputs.x, inputs.A, inputs.B))
    weight, outputs = inputs.weight.to(dtype), []
    for c, (rows, bank) in enumerate(zip(inputs.tokens, inputs.ranks, strict=True)):
        y = x[rows] @ weight.T
        if inputs.bias is not None:
            y = y + inputs.bias.to(dtype)
        outputs.append(y + _branch(inputs, c, x[rows], A, B, bank, fault if c == client else None))
    y = torch.cat(outputs)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), inputs.dy.to(dtype), materialize_grads=True)
    results = {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}
    if fault == "one element zeroed":
        for name, result in results.items():
            _zero_one(result[inputs.parts[name][client]])
    return results


def _branch(
    inputs: LinearInputs, c: int, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, bank: slice, fault: str | None
) -> torch.Tensor:
    scale, rows = inputs.scaling_C[c], list(range(bank.start, bank.stop))
    if fault == "rows of a neighbour":
        rows = [(row + 1) % A.shape[0] for row in rows]
    if fault == "last rank dropped":
        rows = rows[:-1]
    A, B = A[rows], B[rows]
    if inputs.dropout_C is not None:
        assert inputs.dropout_seed_C is not None
        assert inputs.row_C is not None
        q = round(65536 * inputs.dropout_C[c])
        first = inputs.row_C[c] + (fault == "mask one row off")
        keep = keep_mask(*x.shape, q, inputs.dropout_seed_C[c], first).to(x.device)
        up = 1.0 if fault == "kept elements not scaled up" else 65536 / (65536 - q)
        x = torch.where(keep, x * up, 0)
    if fault == "last k dropped":
        x, A = x[:, :-1], A[:, :-1]
    y = scale * ((x @ A.T) @ B)
    if fault == "branch missing":
        return 0 * y.detach()
    if fault == "last token dropped":
        return torch.cat([y[:-1], 0 * y[-1:].detach()])
    return scale * y if fault == "scale twice" else y


def _zero_one(result: torch.Tensor) -> None:
    """Zero an element of median size; the smallest would hide in the rounding."""
    values = result.flatten()
    order = values.abs().argsort()[int((values == 0).sum()) :]
    result.view(-1)[order[len(order) // 2]] = 0


def run_linear(inputs: LinearInputs, backend: str = "auto", fuse: str = "auto") -> dict[str, torch.Tensor]:
    """y, dx, dA and dB of ``lora_linear``."""
    x, A, B = (tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.A, inputs.B))
    y = ops.lora_linear(
        x,
        inputs.weight,
        inputs.bias,
        A,
        B,
        inputs.tokens,
        inputs.ranks,
        inputs.scaling_C,
        dropout_C=inputs.dropout_C,
        dropout_seed_C=inputs.dropout_seed_C,
        row_C=inputs.row_C,
        backend=backend,
        fuse=fuse,
    )
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), inputs.dy)
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}


def check_linear(inputs: LinearInputs, out: Results) -> float:
    """Hold results against the oracle, client by client; the worst ratio."""
    return check_budget(out, oracle_linear(inputs), oracle_linear(inputs, inputs.x.dtype), inputs.parts)


@dataclass(frozen=True)
class MergeCase:
    """Shapes of one merge, and why it is there."""

    why: str
    N: int
    K: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def id(self) -> str:
        return f"N{self.N}-K{self.K}-R{','.join(map(str, self.ranks))}-{_NAME_OF[self.dtype]}"


MERGE_SHAPES = (
    MergeCase("mixed ranks, one of them 0", 48, 64, (1, 7, 0, 16)),
    MergeCase("one row, one column of rank", 1, 24, (1,)),
    MergeCase("nothing to add", 16, 16, (0, 0)),
    MergeCase("more rows than one block, and an odd number of columns", 301, 37, (5, 3)),
)

Case = TypeVar("Case", LinearCase, MergeCase)


def in_dtypes(shapes: Iterable[Case], dtypes: Iterable[torch.dtype] = tuple(DTYPES.values())) -> list[Case]:
    """Every shape in every dtype."""
    shapes = list(shapes)
    return [replace(case, dtype=dtype) for dtype in dtypes for case in shapes]


@dataclass
class MergeInputs:
    """What ``stacked_merge_`` takes, and the ranks of the clients in the stack."""

    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    coef: torch.Tensor
    ranks: Segments


def make_merge(
    case: MergeCase, seed: int = 0, *, exact: bool = False, layout: str = "contiguous", update: float = 1.0
) -> MergeInputs:
    """Make a weight in the tested dtype and float32 factors (float64 for a float64 weight).

    ``update`` is the size of the update relative to the weight; ``exact`` gives integers and powers of two.
    """
    random = torch.Generator().manual_seed(seed)
    P, wide = sum(case.ranks), torch.promote_types(case.dtype, torch.float32)

    def make(*shape: int, std: float = 1.0) -> torch.Tensor:
        if exact:
            return torch.randint(-1, 2, shape, generator=random).to(wide)
        return (torch.randn(shape, generator=random, dtype=torch.float64) * std).to(wide)

    weight, A, B = make(case.N, case.K), make(P, case.K), make(P, case.N, std=update * max(P, 1) ** -0.5)
    scales = (2.0, 0.5, 4.0, 0.25) if exact else (1.9, 0.6, 3.7, 0.3)
    coef = [scales[c % 4] for c, rank in enumerate(case.ranks) for _ in range(rank)]
    weight = lay_out(weight.to(case.dtype), layout)
    return MergeInputs(weight, A, B, torch.tensor(coef, dtype=wide), Segments.from_lengths(case.ranks))


MERGE_FAULTS = ("client missing", "scale twice", "rows of a neighbour", "last rank dropped", "last k dropped")


def oracle_merge(inputs: MergeInputs, dtype: torch.dtype = torch.float64, fault: str | None = None) -> torch.Tensor:
    """The merged weight: the clients' products one after another, summed in at least float32, rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    total, A, B, coef = inputs.weight.to(wide, copy=True), inputs.A.to(wide), inputs.B.to(wide), inputs.coef.to(wide)
    for c, bank in enumerate(inputs.ranks):
        wrong = fault if c == len(inputs.ranks) - 1 else None
        rows = list(range(bank.start, bank.stop))[: -1 if wrong == "last rank dropped" else None]
        a = A[[(row + 1) % len(A) for row in rows]] if wrong == "rows of a neighbour" else A[rows]
        product = B[rows].T @ (coef[rows, None] ** (2 if wrong == "scale twice" else 1) * a)
        if wrong == "last k dropped":
            product[:, -1] = 0
        if wrong != "client missing":
            total += product
    return total.to(dtype)
