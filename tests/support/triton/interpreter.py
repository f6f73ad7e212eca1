"""Triton's interpreter, right for bfloat16.

The interpreter keeps bfloat16 as its 16 bits in uint16. It multiplies and adds those bits as if they were numbers, and
it cuts float32 off where hardware rounds to nearest even. Here casts round, products widen, and any other arithmetic
on bfloat16 is refused: our kernels compute in float32, and one that does not would be wrong in silence.
Import before the first launch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    """bfloat16 bits as the float32 that they stand for; anything else as it is."""
    if not _is_bf16(handle):
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return Handle(bits.view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


_cast, _dot, _binary, _unary = Builder.cast_impl, Builder.create_dot, Builder.binary_op, Builder.unary_op


def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    if dst_type.scalar == tl.bfloat16 and not _is_bf16(src):
        with np.errstate(over="ignore"):  # beyond float32 is inf in bfloat16 too
            return Handle(_rounded(src.data.astype(np.float32)), tl.bfloat16)
    return _cast(self, _widened(src), dst_type) if dst_type.scalar != tl.bfloat16 else src


def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), *rest)


def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    if _is_bf16(lhs) or _is_bf16(rhs):
        raise NotImplementedError(f"{op.__name__} of bfloat16: widen to float32 first")
    return _binary(self, lhs, rhs, op)


def unary_op(self: Any, arg: Any, op: Any) -> Any:
    if _is_bf16(arg):
        raise NotImplementedError(f"{op.__name__} of bfloat16: widen to float32 first")
    return _unary(self, arg, op)


def install() -> None:
    """Put the four functions in place of the interpreter's own."""
    for function in (cast_impl, create_dot, binary_op, unary_op):
        setattr(Builder, function.__name__, function)


install()


def pytest_configure(config: Any) -> None:
    """Triton 3.6's interpreter itself uses what NumPy 2 has deprecated."""
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
