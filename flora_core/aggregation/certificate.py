"""How far a round is from the exact sum: in what the strategy applied, and in what the write left in the weights.

Distances are Frobenius norms in float64. A stack's norm comes from the P x P core of QR factorisations of both
sides: like Gram matrices it needs no N x K matrix, but it does not square the error, so that a strategy which is
exact by another route shows 1e-15 and not 1e-8. Where P is so large that the N x K sum costs less, that is used.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters import ClientUpdate, RoundResult
from .terms import Stack, join_stacks, round_terms, stack_of

_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Deviation:
    """The norms ``||applied - exact||`` and ``||exact||``; the latter is None where it was not needed.

    Example:
        >>> from flora_core.aggregation import Deviation
        >>> Deviation(difference=0.5, exact=2.0).relative
        0.25
    """

    difference: float
    exact: float | None

    @property
    def relative(self) -> float:
        """Their ratio: 0 if there is no difference, infinity if only the exact value is zero."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.exact if self.exact else math.inf


def total(deviations: Iterable[Deviation]) -> Deviation:
    """Take several modules as one long vector.

    Example:
        >>> from flora_core.aggregation import Deviation, total
        >>> total([Deviation(3.0, 6.0), Deviation(4.0, 8.0)])
        Deviation(difference=5.0, exact=10.0)
    """
    parts = list(deviations)
    exact = None if any(part.exact is None for part in parts) else math.hypot(*(part.exact or 0.0 for part in parts))
    return Deviation(math.hypot(*(part.difference for part in parts)), exact)


@dataclass(frozen=True)
class Certificate:
    """A round's two errors, each relative to the exact sum.

    Args:
        aggregation: Module -> what the strategy applied against the exact sum of p_k s_k B_k A_k.
        application: Module -> ``(W_after - W_before)`` against the stack that was to be written.
        rows: Rows of each weight that ``application`` looked at, None for all.
    Example:
        >>> from flora_core.aggregation import Certificate, Deviation
        >>> Certificate({"q_proj": Deviation(0.3, 4.0), "v_proj": Deviation(0.4, 3.0)}).aggregation_error
        0.1
    """

    aggregation: Mapping[str, Deviation]
    application: Mapping[str, Deviation] = field(default_factory=dict)
    rows: int | None = None

    @property
    def aggregation_error(self) -> float:
        """Relative error of the strategy over all modules."""
        return total(self.aggregation.values()).relative

    @property
    def application_error(self) -> float | None:
        """Relative error of the write over all modules, None before anything was written."""
        return total(self.application.values()).relative if self.application else None

    def to_json(self) -> dict[str, Any]:
        """Give both errors, over all modules and for each, as JSON values; an infinite error becomes None."""
        return {
            "aggregation_error": _json(self.aggregation_error),
            "aggregation_error_by_module": {m: _json(d.relative) for m, d in self.aggregation.items()},
            "application_error": _json(self.application_error),
            "application_error_by_module": {m: _json(d.relative) for m, d in self.application.items()},
            "application_rows": self.rows,
        }


def _json(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def certify(updates: Sequence[ClientUpdate], result: RoundResult) -> Certificate:
    """Compare the change of the global model with the exact sum, for every module that a client of the round adapts.

    Example:
        >>> from flora_core.aggregation import certify
        >>> certify(updates, flora.aggregate(updates, "flora")).aggregation_error
        0.0
    """
    terms, change = round_terms(updates), result.change()
    # One module's stack at a time: where it is no view of a bank it is a copy.
    found = {module: _deviation(change.get(module, []), stack_of(parts)) for module, parts in terms.items()}
    if any(one.difference for one in found.values()):
        # ||exact|| costs as much as the difference, and 0 / ||exact|| does not need it.
        unknown = [module for module, one in found.items() if one.exact is None]
        found |= {m: Deviation(found[m].difference, norm(stack_of(terms[m]))) for m in unknown}
    return Certificate(found)


def _deviation(applied: Sequence[Stack], exact: Stack) -> Deviation:
    """Compare stacks whose sum was applied with the exact one."""
    left = _left_after_cancelling(applied, exact)
    if left is not None:
        return Deviation(norm(left), None)
    joined = join_stacks([*applied, (exact[0], exact[1], -exact[2])])
    if not _dense_is_cheaper(joined):
        return Deviation(norm(joined), None)
    # One N x K product serves both norms.
    want = _dense(exact)
    got = _dense(join_stacks(applied)) if applied else torch.zeros_like(want)
    return Deviation(float(torch.linalg.matrix_norm(got - want)), float(torch.linalg.matrix_norm(want)))


def _left_after_cancelling(applied: Sequence[Stack], exact: Stack) -> Stack | None:
    """Simplify applied - exact if it begins with the rows of exact: those cancel exactly, as do equal pairs."""
    rows = exact[0].shape[0]
    if not applied or not _same_rows([part[:rows] for part in applied[0]], exact):
        return None
    (A, B, coef), *more = applied
    change = coef[:rows].double() - exact[2]
    rest = A[rows:], B[rows:], coef[rows:]
    changed = change.bool()
    parts = [(exact[0][changed], exact[1][changed], change[changed])]
    if len(more) != 1 or not _same_rows(rest, more[0]) or (rest[2] + more[0][2]).any():
        parts += [rest, *more]
    return join_stacks(parts)


def _same_rows(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(mine.to(theirs.dtype), theirs) for mine, theirs in zip(one[:2], other[:2], strict=True))


def _dense_is_cheaper(stack: Stack) -> bool:
    """Two QR factorisations take 2 P^2 (N + K) operations, several times slower ones than the 2 N K P of a product."""
    (P, K), N = stack[0].shape, stack[1].shape[1]
    return N * K <= 4 * P * (N + K)


def _dense(stack: Stack) -> torch.Tensor:
    A_PK, B_PN, coef_P = (tensor.double() for tensor in stack)
    return (B_PN.T * coef_P) @ A_PK


def norm(stack: Stack) -> float:
    """Frobenius norm of ``B_PN.T @ diag(coef_P) @ A_PK`` in float64.

    Example:
        >>> from flora_core.aggregation import norm
        >>> round(norm((torch.eye(2), torch.eye(2), torch.tensor([3.0, 4.0]))), 6)
        5.0
    """
    A_PK, B_PN, coef_P = (tensor.double() for tensor in stack)
    if not bool(coef_P.any()):
        return 0.0
    left, right = B_PN.T * coef_P, A_PK
    if not _dense_is_cheaper((A_PK, B_PN, coef_P)):
        left = torch.linalg.qr(left, mode="r").R
        right = torch.linalg.qr(right.T, mode="r").R.T
    return float(torch.linalg.matrix_norm(left @ right))


def sample_rows(num_rows: int, count: int | None, device: torch.device | str = "cpu") -> torch.Tensor:
    """Choose ``count`` evenly spaced row indices, all of them for None or where there are fewer.

    Example:
        >>> from flora_core.aggregation import sample_rows
        >>> sample_rows(10, 4)
        tensor([0, 2, 5, 7])
    """
    if count is None or count >= num_rows:
        return torch.arange(num_rows, device=device)
    return torch.arange(count, device=device) * num_rows // count


def write_deviation(
    before_SK: torch.Tensor, after_SK: torch.Tensor, stack: Stack, rows_S: torch.Tensor | None = None
) -> Deviation:
    """Compare what a write changed with the stack that it was to add.

    Args:
        before_SK: The weight before (the fp32 master where there are low bits), all rows or those of ``rows_S``.
        after_SK: The same rows after.
        stack: (A_PK, B_PN, coef_P) that was to be added.
        rows_S: Which rows of the weight they are; None for all.
    Returns:
        ``||(after - before) - exact||`` and ``||exact||`` over these rows, in float64, 1024 rows at a time.
    Example:
        >>> from flora_core.aggregation import write_deviation
        >>> before, after = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.5]])
        >>> write_deviation(before, after, (torch.eye(2), torch.eye(2), torch.ones(2))).difference
        0.5
    """
    A_PK, B_PN, coef_P = stack
    A_PK, B_PS = A_PK.double(), B_PN if rows_S is None else B_PN[:, rows_S]
    deviations = []
    for first in range(0, before_SK.shape[0], _CHUNK_ROWS):
        rows = slice(first, first + _CHUNK_ROWS)
        exact = (B_PS[:, rows].double() * coef_P.double()[:, None]).T @ A_PK
        lost = after_SK[rows].double() - before_SK[rows] - exact
        deviations.append(Deviation(float(lost.norm()), float(exact.norm())))
    return total(deviations)
