"""Shared by the cases of all ops: dtypes and their names, backends, memory layouts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..ops import availability, resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
Case = TypeVar("Case", bound=Any)


def backends(op: str) -> list[str]:
    """The backends that run a primitive here.

    Example:
        >>> from flora_core.testing import backends
        >>> "reference" in backends("shrink")
        True
    """

    def runs(name: str) -> bool:
        try:
            return bool(resolve(name, op))
        except ValueError:
            return False

    return [name for name in availability() if runs(name)]


def in_dtypes(shapes: Iterable[Case], dtypes: Iterable[torch.dtype] = tuple(DTYPES.values())) -> list[Case]:
    """Every shape in every dtype.

    Example:
        >>> from flora_core.testing import MERGE_SHAPES, in_dtypes
        >>> [case.id for case in in_dtypes(MERGE_SHAPES[:1], [torch.float32, torch.bfloat16])]
        ['N48-K64-R1,7,0,16-fp32', 'N48-K64-R1,7,0,16-bf16']
    """
    shapes = list(shapes)
    return [replace(case, dtype=dtype) for dtype in dtypes for case in shapes]


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same 2-D values: contiguous | padded (within wider rows, NaN around them) | transposed.

    Example:
        >>> from flora_core.testing import lay_out
        >>> [lay_out(torch.ones(2, 3), layout).stride() for layout in ("contiguous", "padded", "transposed")]
        [(3, 1), (8, 1), (1, 2)]
    """
    if layout == "padded":
        wide = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 5), float("nan")).to(tensor)
        wide[1:-1, 2:-3] = tensor
        return wide[1:-1, 2:-3]
    return tensor.T.contiguous().T if layout == "transposed" else tensor.contiguous()
