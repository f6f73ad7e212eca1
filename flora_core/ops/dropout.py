"""Arguments of dropout, as the kernels take them."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from ..common import require
from .types import Numbers
from .validation import _INT64, _check_per_client, _check_whole


def dropout_threshold(probability: float) -> int:
    """q = round(65536 p): an element is kept where its 16-bit draw is at least q.

    Raises:
        ValueError: If p is not in [0, 1), or so near 1 that nothing would be kept.
    Example:
        >>> flora.ops.dropout_threshold(0.1)
        6554
    """
    q = round(65536 * probability) if 0 <= probability < 1 else 65536
    require(q < 65536, f"dropout must be at least 0 and below 1 - 2**-17, got {probability}")
    return q


@functools.lru_cache(maxsize=256)
def _host_thresholds(dropout_C: tuple[float, ...]) -> tuple[int, ...] | None:
    """q of each client; None where no client drops anything."""
    q_C = tuple(dropout_threshold(p) for p in dropout_C)
    return q_C if any(q_C) else None


def _thresholds(dropout_C: Numbers) -> tuple[int, ...] | torch.Tensor | None:
    """As ``_host_thresholds``; a GPU's stays there, unread: p = 1 then drops everything. int32 are q itself."""
    if isinstance(dropout_C, torch.Tensor) and dropout_C.dtype == torch.int32:
        return dropout_C
    if not isinstance(dropout_C, torch.Tensor):
        return _host_thresholds(tuple(dropout_C))
    if dropout_C.device.type != "cpu":
        return (dropout_C.double() * 65536).round().to(torch.int32)
    return _host_thresholds(tuple(dropout_C.tolist()))


def dropout_of(kernels: ModuleType, dropout_C: Any, seed_C: Any, row_C: Any, clients: int) -> Any:
    """The kernels' description of a target's dropout; None where no client drops anything."""
    if dropout_C is None:
        return None
    _check_per_client("dropout_C", dropout_C)
    require(len(dropout_C) == clients, f"dropout_C must have {clients} entries, one per client, got {len(dropout_C)}")
    q_C = _thresholds(dropout_C)
    if q_C is None:
        return None
    require(seed_C is not None, "dropout_seed_C must be given where dropout_C is above 0; see flora_core.common.seeds")
    row_C = [0] * clients if row_C is None else row_C
    for name, values, low, high in (("dropout_seed_C", seed_C, *_INT64), ("row_C", row_C, 0, 2**31)):
        _check_per_client(name, values)
        require(len(values) == clients, f"{name} must have {clients} entries, one per client, got {len(values)}")
        _check_whole(name, values, low, high)
    return kernels.Dropout(q_C, seed_C, row_C)
