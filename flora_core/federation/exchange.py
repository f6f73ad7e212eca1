"""Exchange of a round's updates between processes: every adapter to every process, or one sum a module.

Bytes on all wires together, for W processes, factors of b bytes a number, and a ring that adds in float64:

    gather   (W - 1) P (N + K) b     every process gets what the others trained
    reduce   2 (W - 1) N K 8         sum_k p_k s_k B_k A_k, of which every process makes its own clients' part

Letters: K in_features, N out_features, P the sum of the clients' ranks, W processes of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..adapters import ClientUpdate
from ..aggregation import Stack, round_terms, stack_of
from ..config import FederationConfig
from ..distributed import World
from ..ops import autotune

_SUM_BYTES = torch.float64.itemsize


@dataclass(frozen=True)
class Way:
    """How a round's updates move.

    Args:
        reduced: The modules of which only sums move.
        reason: Why these, or why none.
        gather_bytes: What gathering all of them would move.
        moved_bytes: What this moves, both without names and numbers beside the tensors.
    """

    reduced: tuple[str, ...]
    reason: str
    gather_bytes: int
    moved_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Facts of the exchange for its event."""
        return {"reduced": len(self.reduced), "reason": self.reason, "gather_bytes": self.gather_bytes}


def why_gather(config: FederationConfig, strategy: str, sharded: bool) -> str | None:
    """Say what needs every client's factors in every process; None if their sum is enough."""
    if sharded:
        return "each process writes its own rows of a sharded base"
    if strategy != "flora":
        return f"strategy {strategy!r} looks at single clients' factors"
    for name in ("clip_update", "outlier_factor"):
        if getattr(config, name) is not None:
            return f"{name} compares the clients' updates"
    if config.out is not None and config.save_adapters:
        return "save_adapters keeps every client's adapter"
    return None


def choose(expected: Sequence[ClientUpdate], processes: int, why: str | None) -> Way:
    """Choose for each module what moves fewer bytes.

    Args:
        expected: What the round's clients will send; only shapes are looked at.
        processes: How many there are.
        why: Why sums are not enough; None if they are.
    """
    gathered: dict[str, int] = {}
    summed: dict[str, int] = {}
    for update in expected:
        for module, (A_RK, B_RN) in update.adapters.items():
            size = A_RK.numel() * A_RK.element_size() + B_RN.numel() * B_RN.element_size()
            gathered[module] = gathered.get(module, 0) + (processes - 1) * size
            summed[module] = 2 * (processes - 1) * A_RK.shape[1] * B_RN.shape[1] * _SUM_BYTES
    smaller = tuple(module for module in gathered if summed[module] < gathered[module])
    reduced = smaller if why is None else ()
    reason = why or f"sums are smaller than adapters in {len(smaller)} of {len(gathered)} modules"
    moved = sum(summed[module] if module in reduced else size for module, size in gathered.items())
    return Way(reduced, reason, sum(gathered.values()), moved)


def without_factors(update: ClientUpdate, reduced: Iterable[str]) -> ClientUpdate:
    """An update without the factors that do not move."""
    moving = [module for module in update.adapters if module not in set(reduced)]
    parts = {name: {m: getattr(update, name)[m] for m in moving} for name in ("adapters", "scaling")}
    return replace(update, **parts)


def whole(update: ClientUpdate, expected: ClientUpdate) -> ClientUpdate:
    """An update with shapes alone in the place of factors that did not move."""
    adapters = {module: update.adapters.get(module, shapes) for module, shapes in expected.adapters.items()}
    return replace(update, adapters=adapters, scaling=expected.scaling)


def share_choices(world: World, device: torch.device) -> None:
    """Let all processes fuse as was measured in any of them: the first process's choice counts before the others'.

    A client's last bits must not depend on the process that trains it.
    """
    merged: dict[str, Any] = {}
    for used in world.exchange([autotune.used()]):
        for choices in used[0].values():
            merged = {**choices, **merged}
    if merged:
        autotune.use({str(device): merged})


def partial_sum(module: str, updates: Sequence[ClientUpdate], mine: Iterable[str], like: torch.Tensor) -> torch.Tensor:
    """This process's part of ``sum_k p_k s_k B_k A_k`` in float64.

    Args:
        module: Whose sum.
        updates: All good updates of the round, for p_k.
        mine: Clients whose factors are here.
        like: The module's weight (N, K).
    """
    total_NK = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
    own = set(mine)
    terms = [term for term in round_terms(updates).get(module, []) if term.client in own]
    if terms:
        A_PK, B_PN, coef_P = stack_of(terms)
        total_NK.addmm_(B_PN.double().T * coef_P, A_PK.double())
    return total_NK


def dense_stack(sum_NK: torch.Tensor) -> Stack:
    """A sum as a stack: its rows or columns, whichever are fewer, beside unit vectors."""
    N, K = sum_NK.shape
    unit = torch.eye(min(N, K), dtype=sum_NK.dtype, device=sum_NK.device)
    ones = torch.ones(min(N, K), dtype=torch.float64, device=sum_NK.device)
    return (sum_NK, unit, ones) if N <= K else (unit, sum_NK.T.contiguous(), ones)
