"""Strategies that average A and B separately: cheap, and not the average of the products.

    A = sum_k w_k A_k,   B = sum_k w_k s_k B_k,   client c starts from (A, B / s_c)

Letters: K in_features, N out_features, R a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..adapters import ClientUpdate, RoundResult, TailPenalty
from ..common import check_choice, check_number, require
from .certificate import norm
from .downlink import sent
from .global_adapter import AdapterStrategy, Pair, averaged, on_the_wire, without
from .strategy import register
from .svd import stack_svd
from .terms import Term, exact_stacks, round_terms


@register
class FedIT(AdapterStrategy):
    """Average A and B separately; equal ranks only; the base never changes (arXiv 2305.05644)."""

    name = "fedit"
    paper = "FedIT, arXiv 2305.05644"
    mixed_ranks = False
    shared_start = True

    def combine(self, terms: Sequence[Term], old: Pair | None, **options: Any) -> Pair:
        """Average by the clients' shares."""
        return averaged(terms, [term.share for term in terms])


@register
class ZeroPad(FedIT):
    """Pad every adapter with zero rows to the largest rank, then average as fedit (a baseline of arXiv 2409.05976).

    A client of larger rank than any so far gets, beyond the global adapter's rows, fresh rows of A with zero rows of
    B: its effective model is the global one, and the rows can learn.
    """

    name = "zero_pad"
    paper = "the zero-padding baseline of arXiv 2409.05976"
    mixed_ranks = True
    # The rows that only the larger clients have shrink by those clients' share, in A and in B, every round.
    idle_safe = False


@register
class HetLoRA(ZeroPad):
    """Pad with zero rows, average A and B weighted by the norm of each product, cut to each rank (arXiv 2401.06432).

    Client k weighs ``||s_k B_k A_k||_F / sum_j ||s_j B_j A_j||_F`` in a module, whatever its number of examples;
    ``weigh="norm_and_share"`` multiplies the norm by the share, ``weigh="share"`` is zero_pad.

    Rank self-pruning (option ``prune``, the paper's gamma, below 1; None prunes nothing): the tail of a client's
    adapter are its rows from floor(gamma r) on. Where training left ``||A_tail|| ||B_tail||`` smaller than the client
    had received, the client keeps floor(gamma r) rows from then on, at least 1. Rows given up are sent as zeros, which
    have zero gradients, so they stay zero and the shapes stay as configured. ``penalty`` (the paper's lambda) times
    this product, summed over modules, is added to the client's loss: the tail shrinks where the data do not need it.
    """

    name = "hetlora"
    paper = "HetLoRA, arXiv 2401.06432"

    def check_options(self, *, weigh: str = "norm", prune: float | None = None, penalty: float = 0.0) -> None:
        """Check the three options."""
        check_choice("weigh", weigh, ("norm", "norm_and_share", "share"))
        if prune is not None:
            check_number("prune", prune, 0, 1)
            require(0 < prune < 1, f"prune must lie between 0 and 1, got {prune}; None prunes nothing")
        check_number("penalty", penalty, 0)
        require(not penalty or prune is not None, f"penalty={penalty} is on the tail that prune cuts off: give prune=")

    def aggregate(
        self,
        updates: Sequence[ClientUpdate],
        state: Mapping[str, Any],
        *,
        weigh: str = "norm",
        prune: float | None = None,
        penalty: float = 0.0,
    ) -> RoundResult:
        """Average, after deciding whose rank shrinks; the penalty is a matter of local training."""
        kept = self._pruned(updates, state, prune) if prune else state.get("kept", {})
        return super().aggregate(updates, {**state, "kept": kept}, weigh=weigh)

    def combine(self, terms: Sequence[Term], old: Pair | None, *, weigh: str = "norm", **options: Any) -> Pair:
        """Average by the norms of the products; a module whose products are all zero by the shares."""
        sizes = [_product_norm(term) if weigh != "share" else 1.0 for term in terms]
        if not any(sizes):
            return averaged(terms, [term.share for term in terms])
        shares = [term.share if weigh != "norm" else 1.0 for term in terms]
        return averaged(terms, [size * share for size, share in zip(sizes, shares, strict=True)])

    def _pruned(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any], gamma: float) -> dict[str, Any]:
        """Client -> module -> rows kept, after this round."""
        kept = {client: dict(rows) for client, rows in state.get("kept", {}).items()}
        for update in updates:
            sent = self.next_adapter(state, update.client, update.ranks, update.scaling) or {}
            for module, now in update.adapters.items():
                rank = kept.get(update.client, {}).get(module, now[0].shape[0])
                first = _cut(rank, gamma)
                if module in sent and first < rank and _tail(now, first) < _tail(sent[module], first):
                    kept.setdefault(update.client, {})[module] = first
        return kept

    def penalty(
        self,
        state: Mapping[str, Any],
        client: str,
        ranks: Mapping[str, int],
        *,
        prune: float | None = None,
        penalty: float = 0.0,
        **options: Any,
    ) -> TailPenalty | None:
        """On the tail that could be given up next."""
        if not penalty or prune is None:
            return None
        left = {**ranks, **state.get("kept", {}).get(client, {})}
        return TailPenalty(penalty, {module: _cut(rank, prune) for module, rank in left.items() if rank})

    def fit(
        self, state: Mapping[str, Any], pair: Pair, rank: int, client: str, module: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The client's rows, those that it gave up as zeros."""
        A_RK, B_RN = super().fit(state, pair, rank, client, module)
        rows = state.get("kept", {}).get(client, {}).get(module, rank)
        if rows < rank:
            A_RK, B_RN = A_RK.clone(), B_RN.clone()
            A_RK[rows:], B_RN[rows:] = 0, 0
        return A_RK, B_RN


def _cut(rank: int, gamma: float) -> int:
    """Where the tail of a rank begins."""
    return max(1, math.floor(gamma * rank))


def _tail(pair: tuple[torch.Tensor, torch.Tensor], first: int) -> float:
    A_RK, B_RN = pair
    return float(A_RK[first:].double().norm() * B_RN[first:].double().norm())


def _product_norm(term: Term) -> float:
    return norm((term.A_RK, term.B_RN, term.A_RK.new_full((term.A_RK.shape[0],), term.scaling, dtype=torch.float64)))


@register
class FedEx(AdapterStrategy):
    """Average as fedit and add what that misses to the base: the sum is exact; equal ranks only (arXiv 2410.09432).

    The base gets the residual ``sum_k p_k s_k B_k A_k - B A`` (the paper's equations 12 to 16), as the clients' stack
    with the averaged pair taken out. The pair is rounded first to what the clients receive, so that the base makes up
    for that too. ``residual_rank`` keeps that many leading singular triplets of it (equations 17 and 18): less to send,
    no longer exact, and no other change of this rank is nearer to the sum.
    """

    name = "fedex"
    paper = "FedEx-LoRA, arXiv 2410.09432"
    exact = True
    mixed_ranks = False
    mixed_modules = False
    shared_start = True

    def check_options(self, *, residual_rank: int | None = None) -> None:
        """Check the rank."""
        if residual_rank is not None:
            check_number("residual_rank", residual_rank, 0, whole=True)

    def combine(self, terms: Sequence[Term], old: Pair | None, **options: Any) -> Pair:
        """Average by the clients' shares."""
        return on_the_wire(averaged(terms, [term.share for term in terms]), terms)

    def aggregate(
        self, updates: Sequence[ClientUpdate], state: Mapping[str, Any], *, residual_rank: int | None = None
    ) -> RoundResult:
        """Average, and leave the residual to the base, or its leading triplets."""
        result = super().aggregate(updates, state)
        for module, stack in exact_stacks(round_terms(updates)).items():
            rest = without(stack, result.adapter[module])
            whole = residual_rank is None
            result.base_delta[module] = rest if whole else sent(stack_svd(rest).cut(residual_rank), rest)
        return result
