"""Data: records read from files, tokenized, split over clients and laid out in batches."""

from __future__ import annotations

from .layout import Plain
from .pack import PackedBatch, epoch_order, lay_out, micro_batches, pack, pad, passes
from .partition import partition, partition_file
from .records import Record, check_records, load_records, normalise
from .splits import Split, split, split_held_out, split_names
from .template import IGNORE, EncodeReport, Example, encode, encode_prompts, require_examples
from .tokens import check_ids

__all__ = [
    "IGNORE",
    "EncodeReport",
    "Example",
    "PackedBatch",
    "Plain",
    "Record",
    "Split",
    "check_ids",
    "check_records",
    "encode",
    "encode_prompts",
    "epoch_order",
    "lay_out",
    "load_records",
    "micro_batches",
    "normalise",
    "pack",
    "pad",
    "partition",
    "partition_file",
    "passes",
    "require_examples",
    "split",
    "split_held_out",
    "split_names",
]
