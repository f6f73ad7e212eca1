"""Differentiable ops over the clients of a packed batch, for models and frameworks of one's own.

Example:
    >>> flora.ops.HYPER_COLUMNS[:3]
    ('lr', 'beta1', 'beta2')
    >>> flora.ops.lora_linear is flora.lora_linear
    True
"""

from __future__ import annotations

from . import api, autotune, merging
from .api import cohort_adamw_, lora_linear, lora_linears, stacked_merge_, stacked_merge_many_
from .backends import availability, resolve
from .dispatch import check_fuse
from .dropout import dropout_threshold
from .types import HYPER_COLUMNS, LoraWeights, MergeItem

__all__ = [
    "HYPER_COLUMNS",
    "LoraWeights",
    "MergeItem",
    "api",
    "autotune",
    "availability",
    "check_fuse",
    "cohort_adamw_",
    "dropout_threshold",
    "lora_linear",
    "lora_linears",
    "merging",
    "resolve",
    "stacked_merge_",
    "stacked_merge_many_",
]
