"""Whose kernels merge: a named backend's, or on a CPU the first, on a GPU the faster of Triton's and the native ones.

The faster is measured once for what a merge depends on, on copies, and kept like the ways to fuse (``tuning``).
Letters: K in_features, N out_features, P sum of ranks.

Example:
    >>> flora.ops.merging.describe(torch.zeros(4, 4)).partition(" ")[2]
    '(nothing is measured on a CPU)'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from .autotune import Choices, Shape, Timer, choices_for, timer_on
from .backends import able, resolve
from .types import MergeItem

OP = "merge_many_"
# What is measured works on copies of the first weights, up to so many bytes.
SAMPLE_BYTES = 1 << 29


def merge_kernels(items: Sequence[MergeItem], backend: str, **options: Any) -> ModuleType:
    """The module whose ``merge_many_`` does these merges; ``options`` are what it will be called with."""
    weight = items[0].weight
    if backend != "auto" or weight.device.type != "cuda":
        return resolve(backend, OP, weight)[0]
    may_measure = not torch.cuda.is_current_stream_capturing()
    name = pick(items, contenders(items), choices_for(weight.device), timer_on(weight.device), may_measure, **options)
    return resolve(name, OP, weight)[0]


def contenders(items: Sequence[MergeItem]) -> list[str]:
    """The backends that can do these merges on a GPU; the reference only where there is no other."""
    names = able(OP, items[0].weight)
    # The CUDA kernels are compiled for one dtype of both factors.
    if any(item.A.dtype != item.B.dtype for item in items):
        names = [name for name in names if name != "native"]
    return [name for name in names if name != "reference"] or names


def pick(
    items: Sequence[MergeItem],
    names: Sequence[str],
    choices: Choices,
    timer: Timer,
    may_measure: bool = True,
    **options: Any,
) -> str:
    """The one of these backends that is known or measured to be the fastest."""
    copies: list[MergeItem] = []

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            if not copies:
                copies.extend(_copies(items))
            resolve(name, OP, items[0].weight)[0].merge_many_(copies, **options)

        return run

    return choices.pick(_shape(items, **options), {name: call(name) for name in names}, timer, may_measure)


def _shape(items: Sequence[MergeItem], rounding: str, accumulate: torch.dtype, **_: Any) -> Shape:
    """Key of a choice: the number of weights for M, the largest sizes, how it is summed and rounded."""
    kind = "low_bits" if items[0].low_bits is not None else rounding
    N, K = (max(item.weight.shape[axis] for item in items) for axis in (0, 1))
    P = max(item.A.shape[0] for item in items)
    direction = f"merge-{kind}-{str(accumulate).removeprefix('torch.')}"
    return Shape(direction, len(items), N, K, P, items[0].weight.dtype)


def _copies(items: Sequence[MergeItem]) -> list[MergeItem]:
    """The first items with copies of what is written."""
    found, held = [], 0
    for item in items:
        held += item.weight.nbytes
        if found and held > SAMPLE_BYTES:
            break
        low_bits = None if item.low_bits is None else item.low_bits.clone()
        found.append(MergeItem(item.weight.clone(), item.A, item.B, item.coef, low_bits))
    return found


def describe(weight: torch.Tensor) -> str:
    """Whose kernels merge into a weight under ``auto``, and why, for people."""
    names = able(OP, weight)
    if weight.device.type != "cuda":
        return f"{names[0]} (nothing is measured on a {weight.device.type.upper()})"
    if len(names) > 1 and names[1] == "native":
        N, K = weight.shape
        return choices_for(weight.device).describe(N, K, weight.dtype, "merge")
    return f"{names[0]} (the only one that is here)"
