"""Merging on disk: adapters into a checkpoint larger than memory, or into one adapter."""

from __future__ import annotations

from .checkpoint import MergeReport, merge_into_checkpoint
from .export import ExportReport, export_adapter

__all__ = ["ExportReport", "MergeReport", "export_adapter", "merge_into_checkpoint"]
