"""Types of arguments of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    ranks: Segments
    scaling_C: Sequence[float] | torch.Tensor
    dropout_seed_C: Sequence[int] | torch.Tensor | None = None


@dataclass(frozen=True)
class MergeItem:
    """One weight of ``stacked_merge_many_`` with its stack, for ``W += B^T diag(coef) A``.

    Args:
        weight: W (N, K), float32, bfloat16, float16 or float64; updated.
        A: (P, K); row p belongs to one rank of one client.
        B: (P, N), stored rank by rank: PEFT's ``lora_B.weight.T``.
        coef: (P), what each rank is multiplied by: its client's weight times scaling.
        low_bits: int16 (N, K); makes a bfloat16 W the upper half of an fp32 master, and is updated too.
    """

    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    coef: torch.Tensor
    low_bits: torch.Tensor | None = None
