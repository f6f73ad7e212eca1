"""Strategies that keep a global adapter beside the base, from which every client starts.

The scaling s_k is folded into B on the way up and taken out by the client's own s on the way back, so that effective
products are right when scalings differ (rsLoRA with mixed ranks, or alphas of the clients' own). Shares are
normalised over the clients that adapt a module: one that does not has no say in it.

Letters: K in_features, N out_features, R a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..adapters import Adapters, ClientUpdate, RoundResult
from ..common import generator, require
from .downlink import wire_dtype
from .strategy import Strategy
from .terms import Stack, Term, round_terms

Pair = dict[str, torch.Tensor]


class AdapterStrategy(Strategy):
    """A global adapter in ``state["adapter"]``, module -> {"A", "B"} in float64 with scalings folded into B.

    A subclass says how a module's terms make a new pair. A module that no client adapts in a round keeps the pair that
    it has. A client starts from the first rows of the pair that it can hold.
    """

    def combine(self, terms: Sequence[Term], old: Pair | None, **options: Any) -> Pair:
        """Make a module's new pair of its terms; ``old`` is the one that the clients started from."""
        raise NotImplementedError

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any], **options: Any) -> RoundResult:
        """Make the new pairs."""
        terms = round_terms(updates)
        old = state.get("adapter", {})
        pairs = {module: self.combine(parts, old.get(module), **options) for module, parts in terms.items()}
        dtypes = {module: dtype_name(parts) for module, parts in terms.items()}
        new = {"adapter": {**old, **pairs}, "dtype": {**state.get("dtype", {}), **dtypes}}
        return self.result(updates, {**state, **new})

    def result(
        self, updates: Sequence[ClientUpdate], state: dict[str, Any], base_delta: Mapping[str, Stack] | None = None
    ) -> RoundResult:
        """The round's result with this state."""
        return RoundResult(
            base_delta=dict(base_delta or {}),
            adapter={module: as_stack(**pair) for module, pair in state["adapter"].items()},
            state=state,
            start=partial(self._start, state, {one.client: (one.ranks, one.scaling) for one in updates}),
        )

    def _start(
        self,
        state: Mapping[str, Any],
        seen: Mapping[str, tuple[Mapping[str, int], Mapping[str, float]]],
        client: str,
        ranks: Mapping[str, int] | None = None,
        scaling: Mapping[str, float] | None = None,
    ) -> Adapters | None:
        if ranks is None or scaling is None:
            require(
                client in seen,
                f"client {client!r} sent no update this round: pass its ranks= and scaling= (module -> value)",
            )
        own = seen.get(client, ({}, {}))
        return self.next_adapter(
            state, client, own[0] if ranks is None else ranks, own[1] if scaling is None else scaling
        )

    def next_adapter(
        self, state: Mapping[str, Any], client: str, ranks: Mapping[str, int], scaling: Mapping[str, float]
    ) -> Adapters | None:
        """Give a client the global adapter: the rows that it can hold, with B divided by the client's own scaling.

        Raises:
            ValueError: If the client's rank is not one that the strategy can serve, or its scaling is zero.
        """
        adapters: Adapters = {}
        for module, pair in state.get("adapter", {}).items():
            if ranks.get(module, 0) == 0:
                continue
            require(
                scaling.get(module, 0) != 0,
                f"client {client!r}, module {module!r}: scaling must not be 0, got {scaling.get(module)}",
            )
            A_RK, B_RN = self.fit(state, pair, ranks[module], client, module)
            dtype = getattr(torch, state["dtype"][module])
            adapters[module] = (A_RK.to(dtype, copy=True), (B_RN / scaling[module]).to(dtype))
        return adapters or None

    def fit(
        self, state: Mapping[str, Any], pair: Pair, rank: int, client: str, module: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut or extend a pair to a client's rank: rows beyond it are fresh in A and zero in B."""
        if self.mixed_ranks:
            return extended(pair["A"][:rank], pair["B"][:rank], rank, self.name, client, module)
        require(
            rank == pair["A"].shape[0],
            f"client {client!r}, module {module!r}: strategy {self.name!r} needs rank {pair['A'].shape[0]}, that of the"
            f" global adapter, got {rank}; give the client this rank, or use zero_pad or flora",
        )
        return pair["A"], pair["B"]

    def adapter_bytes(self, state: Mapping[str, Any], update: ClientUpdate, trained: Sequence[str]) -> int:
        """The rows of the client's rank; of a factor that no client trained it has the newest already."""
        size = 0
        for module, rank in update.ranks.items():
            if module in state["adapter"]:
                rows = min(rank, state["adapter"][module]["A"].shape[0])
                item = getattr(torch, state["dtype"][module]).itemsize
                size += rows * item * sum(state["adapter"][module][name].shape[1] for name in trained)
        return size


def extended(A_RK: torch.Tensor, B_RN: torch.Tensor, rank: int, *key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Add rows up to a rank: A uniform within 1 / sqrt(K), as PEFT starts it, and B zero, so that they can learn."""
    more, K = rank - A_RK.shape[0], A_RK.shape[1]
    if more <= 0:
        return A_RK, B_RN
    uniform = torch.rand(more, K, generator=generator(0, *key), dtype=torch.float64)
    fresh = ((2 * uniform - 1) / math.sqrt(K)).to(A_RK)
    return torch.cat([A_RK, fresh]), torch.cat([B_RN, B_RN.new_zeros(more, B_RN.shape[1])])


def averaged(terms: Sequence[Term], weights: Sequence[float]) -> Pair:
    """Sum w_k A_k and w_k s_k B_k in float64 over the largest rank; the rows that a client lacks count as zero.

    The weights are normalised over the terms first.
    """
    rank, total = max(term.A_RK.shape[0] for term in terms), math.fsum(weights)
    first = terms[0]
    A = first.A_RK.new_zeros(rank, first.A_RK.shape[1], dtype=torch.float64)
    B = first.B_RN.new_zeros(rank, first.B_RN.shape[1], dtype=torch.float64)
    for term, weight in zip(terms, weights, strict=True):
        r = term.A_RK.shape[0]
        A[:r].add_(term.A_RK.double(), alpha=weight / total)
        B[:r].add_(term.B_RN.double(), alpha=weight / total * term.scaling)
    return {"A": A, "B": B}


def as_stack(A: torch.Tensor, B: torch.Tensor) -> Stack:
    """A pair as a stack of coefficients 1.

    Example:
        >>> from flora_core.aggregation import as_stack
        >>> A, B, coef = as_stack(torch.ones(2, 8), torch.ones(2, 4))
        >>> coef
        tensor([1., 1.], dtype=torch.float64)
    """
    return A, B, A.new_ones(A.shape[0], dtype=torch.float64)


def dtype_name(terms: Sequence[Term]) -> str:
    """The dtype of the clients' factors, by name."""
    dtype = terms[0].A_RK.dtype
    for term in terms:
        dtype = torch.promote_types(torch.promote_types(dtype, term.A_RK.dtype), term.B_RN.dtype)
    return str(dtype).removeprefix("torch.")


def on_the_wire(pair: Pair, terms: Sequence[Term]) -> Pair:
    """Round a pair to what clients receive, kept in float64: what is taken out of the base must be what they carry."""
    dtype = getattr(torch, dtype_name(terms))
    return {name: factor.to(dtype).double() for name, factor in pair.items()}


def without(stack: Stack, adapter: Stack) -> Stack:
    """A stack less an adapter that was rounded to what travels, in the dtype of what travels."""
    dtype = wire_dtype(*stack[:2])
    A, B = (torch.cat([stack[i].to(dtype), adapter[i].to(dtype)]) for i in (0, 1))
    return A, B, torch.cat([stack[2], -adapter[2]])
