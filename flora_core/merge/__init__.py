"""Merging on disk: adapters into a checkpoint larger than memory, or into one adapter."""

from __future__ import annotations

from .checkpoint import MergeReport, front_matter, merge_into_checkpoint
from .export import LAYOUTS, VLLM_RANKS, ExportReport, export_adapter, of_one_rank
from .in_place import adapter_stack, apply_base_delta_, merge_adapter_, new_low_bits
from .sharded import apply_to_parts_

__all__ = [
    "LAYOUTS",
    "VLLM_RANKS",
    "ExportReport",
    "MergeReport",
    "adapter_stack",
    "apply_base_delta_",
    "apply_to_parts_",
    "export_adapter",
    "front_matter",
    "merge_adapter_",
    "merge_into_checkpoint",
    "new_low_bits",
    "of_one_rank",
]
