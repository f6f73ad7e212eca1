"""Strategies that average A and B apart: cheap, and not the average of the products.

The scaling s_k is folded into B before averaging and taken out by the client's own s on the way back, so that
the effective products are right when scalings differ (rsLoRA with mixed ranks, or alphas of the clients' own):

    A = sum_k p_k A_k,   B = sum_k p_k s_k B_k,   client c starts from (A, B / s_c)

A client that does not adapt a module adds zero to both sums.

Letters: K in_features, N out_features, R a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..checks import require
from ..seeds import generator
from ..update import Adapters, ClientUpdate, RoundResult
from .inputs import Term, round_terms
from .strategy import Strategy, register


@register
class FedIT(Strategy):
    """Average A and B apart; equal ranks only; the base never changes (arXiv 2305.05644).

    The global adapter lives in ``state["adapter"]`` as module -> {"A", "B"}, float64, scaling folded into B. A
    module that nobody adapts this round keeps the global adapter that it has.
    """

    name = "fedit"
    mixed_ranks = False
    shared_start = True

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> RoundResult:
        """Average the factors of the round; each client is sent the rows of the average that it can hold."""
        terms = round_terms(updates)
        averages = {module: _average(parts) for module, parts in terms.items()}
        dtypes = {module: _dtype_name(parts) for module, parts in terms.items()}
        new_state = {
            "strategy": self.name,
            "adapter": {**state.get("adapter", {}), **averages},
            "dtype": {**state.get("dtype", {}), **dtypes},
        }
        return RoundResult(
            base_delta={},
            delta={module: _as_stack(**pair) for module, pair in new_state["adapter"].items()},
            state=new_state,
            start=partial(self._start, new_state, {one.client: (one.ranks, one.scaling) for one in updates}),
            bytes_down=sum(update.size_bytes for update in updates),
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
        """Give a client the global adapter: its first rows, with B divided by the client's own scaling.

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
            A_RK, B_RN = self._fit(pair["A"], pair["B"], ranks[module], client, module)
            dtype = getattr(torch, state["dtype"][module])
            adapters[module] = (A_RK.to(dtype, copy=True), (B_RN / scaling[module]).to(dtype))
        return adapters or None

    def _fit(
        self, A_RK: torch.Tensor, B_RN: torch.Tensor, rank: int, client: str, module: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        require(
            rank == A_RK.shape[0],
            f"client {client!r}, module {module!r}: strategy {self.name!r} needs rank {A_RK.shape[0]}, that of the"
            f" global adapter, got {rank}; give the client this rank, or use zero_pad or flora",
        )
        return A_RK, B_RN


@register
class ZeroPad(FedIT):
    """Pad every adapter with zero rows to the largest rank, then average as fedit.

    A client of rank r starts from the first r rows. One of larger rank than any so far gets, beyond the global
    adapter's rows, fresh rows of A (uniform within 1 / sqrt(K), as PEFT starts them) with zero rows of B: its
    effective model is the global one, and the rows can learn.
    """

    name = "zero_pad"
    mixed_ranks = True
    # The rows that only the larger clients have shrink by those clients' share, in A and in B, every round.
    idle_safe = False

    def _fit(
        self, A_RK: torch.Tensor, B_RN: torch.Tensor, rank: int, client: str, module: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        more = rank - A_RK.shape[0]
        if more <= 0:
            return A_RK[:rank], B_RN[:rank]
        K = A_RK.shape[1]
        uniform = torch.rand(more, K, generator=generator(0, "zero_pad", client, module), dtype=torch.float64)
        fresh = ((2 * uniform - 1) / math.sqrt(K)).to(A_RK)
        return torch.cat([A_RK, fresh]), torch.cat([B_RN, B_RN.new_zeros(more, B_RN.shape[1])])


def _average(terms: Sequence[Term]) -> dict[str, torch.Tensor]:
    """Sum p_k A_k and p_k s_k B_k in float64 over the largest rank; the rows that a client lacks count as zero."""
    rank = max(term.A_RK.shape[0] for term in terms)
    first = terms[0]
    A = first.A_RK.new_zeros(rank, first.A_RK.shape[1], dtype=torch.float64)
    B = first.B_RN.new_zeros(rank, first.B_RN.shape[1], dtype=torch.float64)
    for term in terms:
        r = term.A_RK.shape[0]
        A[:r].add_(term.A_RK.double(), alpha=term.share)
        B[:r].add_(term.B_RN.double(), alpha=term.share * term.scaling)
    return {"A": A, "B": B}


def _as_stack(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return A, B, A.new_ones(A.shape[0])


def _dtype_name(terms: Sequence[Term]) -> str:
    dtype = terms[0].A_RK.dtype
    for term in terms:
        dtype = torch.promote_types(torch.promote_types(dtype, term.A_RK.dtype), term.B_RN.dtype)
    return str(dtype).removeprefix("torch.")
