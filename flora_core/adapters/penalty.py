"""Penalty on its clients' local losses that a strategy may add: HetLoRA's on the tail of the ranks (arXiv 2401.06432).

    weight * sum over modules of ||A[first:]||_F ||B[first:]||_F

It keeps what a client learns in the first rows of its adapter, so that the rest can be given up.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TailPenalty:
    """One client's penalty.

    Args:
        weight: Its factor, the paper's lambda.
        first: Module -> where the tail begins; a module that is not in it has none.
    """

    weight: float
    first: Mapping[str, int]

    def add_gradients_(self, adapters: Mapping[str, Pair], grads: Mapping[str, Pair]) -> None:
        """Add the penalty's gradients in place; no value leaves the device.

        Args:
            adapters: Module -> (A_RK, B_RN).
            grads: Module -> (dA_RK, dB_RN), with the gradients of the loss.
        """
        for module, first in self.first.items():
            (A, B), (dA, dB) = ([factor[first:] for factor in pairs[module]] for pairs in (adapters, grads))
            a, b = A.norm(), B.norm()
            # Where a norm is zero its factor is, and 0 is a subgradient. Divided last, zeros would meet an infinity.
            tiny = torch.finfo(A.dtype).tiny
            dA += A / a.clamp_min(tiny) * (self.weight * b)
            dB += B / b.clamp_min(tiny) * (self.weight * a)
