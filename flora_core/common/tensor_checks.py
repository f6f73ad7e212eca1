"""One wording for every error about types, shapes, dtypes and devices of tensors: name, expected, got, remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fits(got: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(got) == len(wanted) and all(w is None or w == g for w, g in zip(wanted, got, strict=True))


def check_tensor(
    name: str,
    tensor: Any,
    shape: Sequence[int | None] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    like: tuple[str, torch.Tensor] | None = None,
    why: str = "",
) -> torch.Tensor:
    """Check type, shape (None matches any size), dtype and that it lies on the device of ``like``."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if shape is not None and tensor.shape != shape and not _fits(tensor.shape, shape):
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise ValueError(f"{name} must have shape {wanted}{why and ' ' + why}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be one of {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if like is not None and tensor.device != like[1].device:
        raise ValueError(f"{name} must be on {like[1].device} with {like[0]}, got {tensor.device}; move it with .to()")
    return tensor
