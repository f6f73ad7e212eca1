"""Strategies in which the clients train one factor while the other is frozen and common: the average is exact then.

    sum_k p_k s_k B_k A = (sum_k p_k s_k B_k) A          A frozen
    sum_k p_k s_k B_k A_k = B (sum_k p_k A_k)            s_k B_k = B frozen

Letters: K in_features, N out_features, R a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..adapters import ClientUpdate, RoundResult
from ..common import require
from .global_adapter import AdapterStrategy, Pair, averaged
from .strategy import register
from .terms import Term, round_terms


class _Frozen(AdapterStrategy):
    exact = True
    mixed_ranks = False
    mixed_modules = False
    shared_start = True

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> RoundResult:
        """Average the trained factor, after checking that the other one is common."""
        trained = self.trainable(state)[0]
        for module, terms in round_terms(updates).items():
            for term in terms:
                self._check_frozen(module, terms[0], term, trained)
        return super().aggregate(updates, state, trained=trained)

    def _check_frozen(self, module: str, first: Term, term: Term, trained: str) -> None:
        """A client's frozen factor may differ from the common one by the rounding of B / s alone."""
        mine, common = (one.A_RK if trained == "B" else one.scaling * one.B_RN.double() for one in (term, first))
        eps = torch.finfo(term.B_RN.dtype).eps if trained == "A" else 0.0
        frozen = "A" if trained == "B" else "s B"
        require(
            float((mine.double() - common.double()).norm()) <= 4 * eps * float(common.double().norm()),
            f"client {term.client!r}, module {module!r}: strategy {self.name!r} trains {trained} alone in this round, "
            f"and {frozen} differs from that of client {first.client!r}; freeze it (trainable={(trained,)!r})",
        )

    def combine(self, terms: Sequence[Term], old: Pair | None, *, trained: str = "B", **options: Any) -> Pair:
        """Average by the clients' shares; a common A stays bit for bit."""
        pair = averaged(terms, [term.share for term in terms])
        return pair if trained == "A" else {**pair, "A": terms[0].A_RK.double()}


@register
class FFA(_Frozen):
    """Freeze one common A, train and average B with p_k s_k folded in; equal ranks only (arXiv 2403.12313).

    Only B travels: A follows from a seed that all share.
    """

    name = "ffa"
    paper = "FFA-LoRA, arXiv 2403.12313"

    def trainable(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Always B alone."""
        return ("B",)


@register
class RoLoRA(_Frozen):
    """Train and average B in one round, A in the next, the other one frozen; equal ranks only (arXiv 2502.01755).

    B goes first: it starts at zero, where A has no gradient. Only the factor that was trained travels.
    """

    name = "rolora"
    paper = "RoLoRA, arXiv 2502.01755"

    def trainable(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """B in the first of all rounds that were applied, then A, then B again."""
        return ("A",) if state.get("rounds", 0) % 2 else ("B",)

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> RoundResult:
        """Average the factor whose turn it is, and take turns."""
        result = super().aggregate(updates, state)
        result.state["rounds"] = state.get("rounds", 0) + 1
        return result
