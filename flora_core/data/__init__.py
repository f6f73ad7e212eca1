"""Data: records read from files, tokenized, split over clients and laid out in batches."""

from .pack import Packed, Padded, epoch_order, micro_batches, pack, pad
from .partition import partition, partition_file
from .records import check_records, load_records
from .template import EncodeReport, Example, encode, encode_prompts, require_examples

__all__ = [
    "EncodeReport",
    "Example",
    "Packed",
    "Padded",
    "check_records",
    "encode",
    "encode_prompts",
    "epoch_order",
    "load_records",
    "micro_batches",
    "pack",
    "pad",
    "partition",
    "partition_file",
    "require_examples",
]
