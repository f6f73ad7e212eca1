"""Strategies that add the clients' products to the base and start everybody afresh.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters import ClientUpdate, RoundResult
from ..common import check_number, require
from .downlink import sent
from .strategy import Strategy, register
from .svd import energy_rank, stack_svd
from .terms import Stack, exact_stacks, round_terms


@register
class Flora(Strategy):
    """Stack the factors, add the product to the base; every client starts afresh (arXiv 2409.05976).

    ``base_delta`` is the stack itself, with coef = p_k s_k on the rows of client k, and no state is carried.
    """

    name = "flora"
    paper = "FLoRA, arXiv 2409.05976"
    exact = True

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> RoundResult:
        """Stack what the clients sent."""
        return RoundResult(base_delta=exact_stacks(round_terms(updates)))


@register
class FloraSVD(Strategy):
    """As flora, with the stack cut to the leading singular triplets that hold the energy tau (arXiv 2506.09199).

    Of ``sum_k p_k s_k B_k A_k = U S V`` the smallest number of triplets is kept whose squared singular values make up
    the share ``tau`` of all. tau = 1 (the default) loses nothing: all triplets, at most min(N, K, P). The triplets
    travel in the clients' dtype, float32 at least.
    """

    name = "flora_svd"
    paper = "FLoRIST, arXiv 2506.09199"
    exact = True

    def check_options(self, *, tau: float = 1.0) -> None:
        """Check tau."""
        check_number("tau", tau, 0, 1)
        require(tau > 0, "tau must be above 0 and at most 1, got 0; 1 keeps the whole sum")

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any], *, tau: float = 1.0) -> RoundResult:
        """Decompose each module's stack and keep the energy tau."""
        stacks = exact_stacks(round_terms(updates))
        return RoundResult(base_delta={module: _cut(stack, tau) for module, stack in stacks.items()})


def _cut(stack: Stack, tau: float) -> Stack:
    svd = stack_svd(stack)
    return sent(svd.cut(energy_rank(svd.S_R, tau)), stack)
