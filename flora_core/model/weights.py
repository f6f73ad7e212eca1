"""The weight of a linear layer as (out_features, in_features)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's Conv1D, which stores its weight K x N."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_view(module: Any) -> torch.Tensor:
    """The detached weight of a Linear or Conv1D as N x K; writing to it changes the module."""
    weight = module.weight.detach()
    return weight.T if is_conv1d(module) else weight
