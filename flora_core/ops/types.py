"""Types of arguments of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flora_kernels.types import MergeItem as MergeItem

from ..common import Segments

HYPER_COLUMNS = ("lr", "beta1", "beta2", "eps", "weight_decay", "step", "clip_scale")
Numbers = Sequence[float] | torch.Tensor


@dataclass(frozen=True)
class LoraWeights:
    """One target of ``lora_linears``: the frozen base, the stacked adapters and their ranges.

    Args:
        weight: Frozen weight (N, K), any strides.
        bias: Frozen bias (N) or None.
        A, B: Stacked factors (P, K) and (P, N).
        ranks: Segments over P.
        scaling_C: Scale s of each client.
        dropout_seed_C: This target's dropout keys; None takes the row that ``lora_linears`` was given.
    Example:
        >>> ranks = flora.Segments.from_lengths([2, 1])
        >>> target = flora.LoraWeights(torch.zeros(4, 8), None, torch.ones(3, 8), torch.ones(3, 4), ranks, [1.0, 0.5])
        >>> [y] = flora.lora_linears(torch.ones(5, 8), [target], flora.Segments.from_lengths([3, 2]))
        >>> y.shape
        torch.Size([5, 4])
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    ranks: Segments
    scaling_C: Sequence[float] | torch.Tensor
    dropout_seed_C: Sequence[int] | torch.Tensor | None = None
