"""The downlink: the smallest exact form of each module's change, and catching up on missed rounds.

Forms of a change of a module's weight, N x K, counted in numbers that travel:

    none           0          nothing changed
    stack          P (N + K)  the clients' factors as they came, coef folded in
    recompressed   R (N + K)  fewer rows with the same product, in float64, where the stack's rank R is below P
    dense          N K        the weight itself after the change

A client that applies a stack repeats the server's own sum; a dense weight is the server's own. Recompressing can only
win where rows depend on each other (idle clients, shared factors): above P = NK / (N + K) dense is smaller even than
the min(N, K) rows of full rank.

Letters: K in_features, N out_features, P the sum of ranks, R a rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .svd import Svd, balanced, full_rank, is_smaller_than_dense, stack_svd
from .terms import Stack


class Form(NamedTuple):
    """How a module's change travels, and its bytes."""

    kind: str
    size_bytes: int


def wire_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype in which factors that the server made travel: that of the clients' factors, float32 at least.

    Example:
        >>> from flora_core.aggregation import wire_dtype
        >>> wire_dtype(torch.ones(1, dtype=torch.bfloat16)), wire_dtype(torch.ones(1, dtype=torch.float64))
        (torch.float32, torch.float64)
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def sent(svd: Svd, stack: Stack) -> Stack:
    """Triplets of a stack, rounded to the dtype in which they travel: the change that is applied."""
    A, B = (factor.to(wire_dtype(*stack[:2])) for factor in balanced(svd))
    return A, B, torch.ones(A.shape[0], dtype=torch.float64, device=A.device)


def smallest_form(stack: Stack) -> tuple[Stack, Form]:
    """Choose the smallest exact form of a change.

    Returns:
        The stack to apply, so that the server applies what it sends, and its form.
    """
    stack = _without_idle_rows(stack)
    (P, K), N = stack[0].shape, stack[1].shape[1]
    item = torch.promote_types(stack[0].dtype, stack[1].dtype).itemsize
    if P == 0:
        return stack, Form("none", 0)
    best, form = stack, Form("stack", P * (N + K) * item)
    # In float64 a rank above `most` does not pay. Where a rows of A and b of B are independent, the product's rank is
    # at least a + b - P (Sylvester), so this many of each prove that it is above.
    most = P * item // torch.float64.itemsize
    enough = (P + most) // 2 + 1
    if is_smaller_than_dense(stack) and not all(full_rank(rows[:enough]) for rows in stack[:2]):
        found = _recompressed(stack)
        size = found[0].shape[0] * (N + K) * found[0].element_size()
        if size < form.size_bytes:
            best, form = found, Form("recompressed" if size else "none", size)
    if N * K * item <= form.size_bytes:
        return stack, Form("dense", N * K * item)
    return best, form


def _without_idle_rows(stack: Stack) -> Stack:
    """Drop rows whose product is zero; the same tensors where there are none."""
    A_PK, B_PN, coef_P = stack
    # Trained rows have no zero in their first column, so that most stacks need not be read.
    live = coef_P.bool() & A_PK[:, :1].any(1) & B_PN[:, :1].any(1)
    if not bool(live.all()):
        live = coef_P.bool() & A_PK.any(1) & B_PN.any(1)
    return stack if bool(live.all()) else (A_PK[live], B_PN[live], coef_P[live])


def _recompressed(stack: Stack) -> Stack:
    # In float64, 8 bytes a number: in float32 the server's own rounding would make the exact sum inexact.
    A, B = balanced(stack_svd(stack))
    return A, B, A.new_ones(A.shape[0])


@dataclass
class DeltaLog:
    """Log of what each round sent down and which round each client has, so that a client that missed rounds catches up
    exactly.

    A client catches up by the rounds it missed or by a snapshot of the weights, whichever is smaller. Once the rounds
    since some point weigh as much as a snapshot, the older ones are not needed any more and are dropped.

    Args:
        snapshot_bytes: Bytes of all weights that rounds change.
        sizes: Round -> bytes of its change.
        have: Client -> the newest round whose change it has; 0 is the base that everybody starts with.
        forgotten: The newest round that is not kept any more.
        deltas: Round -> module or tensor name -> what to apply, of rounds that were recorded with it.
    Example:
        >>> from flora_core.aggregation import DeltaLog
        >>> log = DeltaLog(snapshot_bytes=100)
        >>> log.record(1, 40, ["a"])
        >>> log.record(2, 30, ["a", "b"])
        >>> log.missed("a"), log.missed("c")
        (('none', 0, []), ('log', 70, [1, 2]))
    """

    snapshot_bytes: int
    sizes: dict[int, int] = field(default_factory=dict)
    have: dict[str, int] = field(default_factory=dict)
    forgotten: int = 0
    deltas: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def record(
        self, number: int, size_bytes: int, clients: Iterable[str], delta: Mapping[str, Any] | None = None
    ) -> None:
        """Note a round that was applied, its bytes, and who has its change already."""
        self.sizes[number] = size_bytes
        if delta is not None:
            self.deltas[number] = delta
        self.have.update(dict.fromkeys(clients, number))
        while sum(self.sizes.values()) - self.sizes[min(self.sizes)] >= self.snapshot_bytes:
            self.forgotten = min(self.sizes)
            del self.sizes[self.forgotten]
            self.deltas.pop(self.forgotten, None)

    def missed(self, client: str) -> tuple[str, int, list[int]]:
        """Tell how a client gets to the newest state.

        Returns:
            ``none``, ``log`` or ``snapshot``, its bytes, and for a log the rounds to apply in this order.
        """
        since = self.have.get(client, 0)
        rounds = [number for number in sorted(self.sizes) if number > since]
        size = sum(self.sizes[number] for number in rounds)
        if since < self.forgotten or size > self.snapshot_bytes:
            return "snapshot", self.snapshot_bytes, []
        return ("log", size, rounds) if rounds else ("none", 0, [])

    @property
    def changed(self) -> int:
        """The newest round that changed the base; 0 if none has."""
        return max((number for number, size in self.sizes.items() if size), default=self.forgotten)

    def saved(self) -> dict[str, Any]:
        """Everything but the deltas, as JSON values."""
        sizes = {str(number): size for number, size in self.sizes.items()}
        return {"sizes": sizes, "have": dict(self.have), "forgotten": self.forgotten}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go back to what ``saved`` gave."""
        self.sizes = {int(number): size for number, size in saved["sizes"].items()}
        self.have, self.forgotten = dict(saved["have"]), saved["forgotten"]
