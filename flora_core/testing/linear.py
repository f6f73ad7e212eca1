"""Cases, inputs, oracle and planted faults of the packed LoRA linear.

The oracle is written plainly and shares nothing with the kernels: the dense formula per client, gradients from
autograd.
Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..common import Segments, require
from ..ops import api
from .budget import Results, check_budget
from .cases import NAME_OF, lay_out
from .dropout import keep_mask
from .rounding import plain_rounding


@dataclass(frozen=True)
class LinearCase:
    """Shapes of one packed LoRA linear: each client's tokens and rank, and why the case is there.

    Example:
        >>> from flora_core.testing import LinearCase
        >>> LinearCase("two ranks", rows=(20, 17), K=64, N=48, ranks=(1, 16)).id
        'M37-K64-N48-R1,16-fp32'
    """

    why: str
    rows: tuple[int, ...]
    K: int
    N: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def id(self) -> str:
        ranks = ",".join(map(str, self.ranks))
        return f"M{sum(self.rows)}-K{self.K}-N{self.N}-R{ranks}-{NAME_OF[self.dtype]}"


LINEAR_SHAPES = (
    LinearCase("R=1, and ranks that are no multiple of 16", (20, 5, 12), 64, 48, (1, 7, 16)),
    LinearCase("one token, alone", (1,), 16, 24, (3,)),
    LinearCase("a client without tokens between two that have some", (8, 0, 16), 32, 32, (4, 5, 8)),
    LinearCase("no tokens at all", (0, 0), 16, 8, (4, 2)),
    LinearCase("rank 0 between two clients that adapt", (9, 6, 7), 32, 40, (4, 0, 9)),
    LinearCase("no client adapts this module", (5, 3), 16, 16, (0, 0)),
    LinearCase("K and N that no vector width divides", (11, 17), 53, 35, (5, 2)),
    LinearCase("many clients, and a rank above one tile", (6, 4, 3, 5, 2, 4, 3), 96, 72, (64, 32, 16, 16, 8, 8, 4)),
    LinearCase("tokens above one tile", (150, 3), 24, 16, (6, 4)),
)


@dataclass
class LinearInputs:
    """Arguments of ``lora_linear``, and the upstream gradient dy.

    Example:
        >>> from flora_core.testing import LinearInputs, make_linear, LINEAR_SHAPES
        >>> inputs: LinearInputs = make_linear(LINEAR_SHAPES[0])
        >>> inputs.parts["dA"]
        Segments.from_lengths([1, 7, 16])
    """

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
    Example:
        >>> from flora_core.testing import LINEAR_SHAPES, make_linear
        >>> make_linear(LINEAR_SHAPES[0], seed=1, dropout=True).x.shape
        torch.Size([37, 64])
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
    """y, dx, dA and dB of the dense formula per client, in a dtype, with a fault in one client if one is named.

    The same bits on every processor: see ``plain_rounding``.

    Example:
        >>> from flora_core.testing import LINEAR_SHAPES, make_linear, oracle_linear
        >>> inputs = make_linear(LINEAR_SHAPES[0])
        >>> right, wrong = oracle_linear(inputs), oracle_linear(inputs, fault="scale twice", client=1)
        >>> torch.equal(right["y"][:20], wrong["y"][:20]), torch.equal(right["y"][20:25], wrong["y"][20:25])
        (True, False)
    """
    with plain_rounding():
        return _dense_formula(inputs, dtype, fault, client)


def _dense_formula(inputs: LinearInputs, dtype: torch.dtype, fault: str | None, client: int) -> dict[str, torch.Tensor]:
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
        seed_C, row_C = inputs.dropout_seed_C or [], inputs.row_C or []
        require(len(seed_C) > c < len(row_C), f"dropout_C needs a dropout_seed_C and a row_C of client {c} beside it")
        q = round(65536 * inputs.dropout_C[c])
        first = row_C[c] + (fault == "mask one row off")
        keep = keep_mask(*x.shape, q, seed_C[c], first).to(x.device)
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


def run_linear(inputs: LinearInputs, backend: str = "auto", fuse: str = "separate") -> dict[str, torch.Tensor]:
    """y, dx, dA and dB of ``lora_linear``; with ``fuse="auto"`` times would decide which kernels a GPU runs.

    Example:
        >>> from flora_core.testing import LINEAR_SHAPES, make_linear, run_linear
        >>> list(run_linear(make_linear(LINEAR_SHAPES[0]), backend="reference"))
        ['y', 'dx', 'dA', 'dB']
    """
    x, A, B = (tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.A, inputs.B))
    y = api.lora_linear(
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
    """Hold results against the oracle, client by client; the worst ratio.

    Example:
        >>> from flora_core.testing import LINEAR_SHAPES, check_linear, make_linear, run_linear
        >>> inputs = make_linear(LINEAR_SHAPES[0])
        >>> check_linear(inputs, run_linear(inputs)) <= 1
        True
    """
    return check_budget(out, oracle_linear(inputs), oracle_linear(inputs, inputs.x.dtype), inputs.parts)
