"""The primitives of ``reference`` as Triton kernels: same names, same arguments, for NVIDIA and AMD GPUs.

With TRITON_INTERPRET=1 they run on the CPU, slowly, to be checked.
"""

from __future__ import annotations

import torch

from ..reference import Dropout, MergeItem
from .adamw import cohort_adamw_
from .common import FLOAT_DTYPES, pick
from .expand import SHARED_TILES as _EXPAND_SHARED
from .expand import TILES as _EXPAND
from .expand import expand_, expand_many_
from .linear import TAIL_TILES as _LINEAR_LORA
from .linear import linear, linear_lora
from .merge import merge_, merge_many_
from .place import place_
from .shrink import SHARED_TILES as _SHRINK_SHARED
from .shrink import TILES as _SHRINK
from .shrink import shrink, shrink_many
from .wgrad import TILES as _WGRAD
from .wgrad import wgrad

_MERGED = (*FLOAT_DTYPES, torch.float64)
# What each op takes; what is not here goes to another backend, or is refused by name.
DTYPES = {
    "shrink": FLOAT_DTYPES,
    "shrink_many": FLOAT_DTYPES,
    "expand_": FLOAT_DTYPES,
    "expand_many_": FLOAT_DTYPES,
    "wgrad": FLOAT_DTYPES,
    "linear": FLOAT_DTYPES,
    "linear_lora": FLOAT_DTYPES,
    "place_": FLOAT_DTYPES,
    "merge_": _MERGED,
    "merge_many_": _MERGED,
    "cohort_adamw_": (torch.float32, torch.float64),
}


def tiles(dtype: torch.dtype, targets: int = 1) -> dict[str, str]:
    """Which tile configuration each kernel of a LoRA linear takes, and why, for so many targets that share their x."""
    found = {
        "shrink": _SHRINK_SHARED if targets > 1 else _SHRINK,
        "expand_": _EXPAND,
        "expand_ into dX": _EXPAND_SHARED if targets > 1 else _EXPAND,
        "wgrad": _WGRAD,
        "linear_lora": _LINEAR_LORA,
    }
    return {op: str(pick(table, dtype)) for op, table in found.items()}


__all__ = [
    "DTYPES",
    "Dropout",
    "MergeItem",
    "cohort_adamw_",
    "expand_",
    "expand_many_",
    "linear",
    "linear_lora",
    "merge_",
    "merge_many_",
    "place_",
    "shrink",
    "shrink_many",
    "tiles",
    "wgrad",
]
