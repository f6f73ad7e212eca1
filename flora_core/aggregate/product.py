"""Strategies that keep the clients' products whole.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..update import ClientUpdate, RoundResult
from .inputs import Stack, exact_stacks, round_terms
from .strategy import Strategy, register


@register
class Flora(Strategy):
    """Stack the factors, add the product to the base; every client starts afresh (arXiv 2409.05976).

    ``base_delta`` is the stack itself, with coef = p_k s_k on the rows of client k, and no state is carried.
    """

    name = "flora"
    exact = True

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> RoundResult:
        """Stack what the clients sent; per module the smaller of stack and dense change goes down to each."""
        stacks = exact_stacks(round_terms(updates))
        return RoundResult(base_delta=stacks, bytes_down=len(updates) * sum(map(payload_bytes, stacks.values())))


def payload_bytes(stack: Stack) -> int:
    """Bytes of the smaller exact form of a module's change: its stack (coef folded into B) or the N x K matrix."""
    A_PK, B_PN, _ = stack
    (P, K), N = A_PK.shape, B_PN.shape[1]
    return min(P * (K + N), N * K) * torch.promote_types(A_PK.dtype, B_PN.dtype).itemsize
