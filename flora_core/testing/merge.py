"""Cases, inputs, oracle and planted faults of the merge.

Letters: K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..common import Segments
from .cases import NAME_OF, lay_out
from .rounding import plain_rounding


@dataclass(frozen=True)
class MergeCase:
    """Shapes of one merge, and why it is there.

    Example:
        >>> from flora_core.testing import MergeCase
        >>> MergeCase("two ranks", N=48, K=64, ranks=(1, 7)).id
        'N48-K64-R1,7-fp32'
    """

    why: str
    N: int
    K: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def id(self) -> str:
        return f"N{self.N}-K{self.K}-R{','.join(map(str, self.ranks))}-{NAME_OF[self.dtype]}"


MERGE_SHAPES = (
    MergeCase("mixed ranks, one of them 0", 48, 64, (1, 7, 0, 16)),
    MergeCase("one row, one column of rank", 1, 24, (1,)),
    MergeCase("nothing to add", 16, 16, (0, 0)),
    MergeCase("more rows than one block, and an odd number of columns", 301, 37, (5, 3)),
)


@dataclass
class MergeInputs:
    """Arguments of ``stacked_merge_``, and the ranks of the clients in the stack.

    Example:
        >>> from flora_core.testing import MERGE_SHAPES, MergeInputs, make_merge
        >>> inputs: MergeInputs = make_merge(MERGE_SHAPES[0])
        >>> flora.stacked_merge_(inputs.weight, inputs.A, inputs.B, inputs.coef)
    """

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

    Example:
        >>> from flora_core.testing import MERGE_SHAPES, make_merge
        >>> make_merge(MERGE_SHAPES[0], exact=True).ranks
        Segments.from_lengths([1, 7, 0, 16])
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
    """The merged weight: the clients' products one after another, summed in at least float32, rounded once.

    The same bits on every processor: see ``plain_rounding``.

    Example:
        >>> from flora_core.testing import MERGE_SHAPES, make_merge, oracle_merge
        >>> inputs = make_merge(MERGE_SHAPES[0], exact=True)
        >>> flora.stacked_merge_(merged := inputs.weight.clone(), inputs.A, inputs.B, inputs.coef)
        >>> torch.equal(merged, oracle_merge(inputs, torch.float32))
        True
    """
    wide = torch.promote_types(dtype, torch.float32)
    total, A, B, coef = inputs.weight.to(wide, copy=True), inputs.A.to(wide), inputs.B.to(wide), inputs.coef.to(wide)
    for c, bank in enumerate(inputs.ranks):
        wrong = fault if c == len(inputs.ranks) - 1 else None
        rows = list(range(bank.start, bank.stop))[: -1 if wrong == "last rank dropped" else None]
        a = A[[(row + 1) % len(A) for row in rows]] if wrong == "rows of a neighbour" else A[rows]
        with plain_rounding():
            product = B[rows].T @ (coef[rows, None] ** (2 if wrong == "scale twice" else 1) * a)
        if wrong == "last k dropped":
            product[:, -1] = 0
        if wrong != "client missing":
            total += product
    return total.to(dtype)
