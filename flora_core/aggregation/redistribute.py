"""Strategies that make one product of all updates, decompose it, and give every client the triplets it can hold.

Letters: K in_features, N out_features, P the sum of ranks, R a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..adapters import ClientUpdate, RoundResult
from ..common import check_choice, check_number
from .global_adapter import AdapterStrategy, Pair
from .strategy import register
from .svd import balanced, leading_svd, stack_svd
from .terms import Term, stack_of


@register
class FlexLoRA(AdapterStrategy):
    """Decompose the sum of the products, cut it to each client's rank (arXiv 2402.11505).

    The global adapter has the largest rank that a client has had so far, or ``rank`` if that is given: the certificate
    shows what this cut loses. A client of rank r starts from the first r triplets. ``svd="fast"`` finds them by
    subspace iteration instead of a whole decomposition: the cut may then miss a little more.
    """

    name = "flexlora"
    paper = "FlexLoRA, arXiv 2402.11505"
    # A client that cannot hold all triplets starts from less than the global model, and so does its next update.
    idle_safe = False

    def check_options(self, *, rank: int | None = None, svd: str = "exact") -> None:
        """Check the options."""
        check_choice("svd", svd, ("exact", "fast"))
        if rank is not None:
            check_number("rank", rank, 1, whole=True)

    def aggregate(
        self,
        updates: Sequence[ClientUpdate],
        state: Mapping[str, Any],
        *,
        rank: int | None = None,
        svd: str = "exact",
    ) -> RoundResult:
        """Decompose and cut."""
        return super().aggregate(updates, state, rank=rank, svd=svd)

    def combine(
        self, terms: Sequence[Term], old: Pair | None, *, rank: int | None = None, svd: str = "exact", **options: Any
    ) -> Pair:
        """Decompose the weighted sum and keep the leading triplets."""
        largest = max(old["A"].shape[0] if old else 0, *(term.A_RK.shape[0] for term in terms))
        A_PK, B_PN, _ = stack_of(terms)
        stack, count = (A_PK, B_PN, self.coefficients(terms).to(A_PK.device)), largest if rank is None else rank
        A, B = balanced(leading_svd(stack, count) if svd == "fast" else stack_svd(stack).cut(count))
        return {"A": A, "B": B}

    def coefficients(self, terms: Sequence[Term]) -> torch.Tensor:
        """Of each row of the stack: p_k s_k, with shares normalised over the terms."""
        total = math.fsum(term.share for term in terms)
        coef = [term.share / total * term.scaling for term in terms for _ in range(term.A_RK.shape[0])]
        return torch.tensor(coef, dtype=torch.float64)


@register
class RaFLoRA(FlexLoRA):
    """Weigh each slice of the ranks over the clients that have it, then cut as flexlora (arXiv 2602.13486).

    Row j of client k weighs ``s_k n_k / sum of n_i over the clients with r_i > j``, so that rows which few clients have
    are not thinned out by those that lack them. At equal ranks this is flexlora.
    """

    name = "raflora"
    paper = "raFLoRA, arXiv 2602.13486"

    def coefficients(self, terms: Sequence[Term]) -> torch.Tensor:
        """Of each row j of the stack: p_k s_k, with shares normalised over the terms that have a row j."""
        largest = max(term.A_RK.shape[0] for term in terms)
        totals = [math.fsum(term.share for term in terms if term.A_RK.shape[0] > row) for row in range(largest)]
        coef = [term.share / totals[row] * term.scaling for term in terms for row in range(term.A_RK.shape[0])]
        return torch.tensor(coef, dtype=torch.float64)
