"""The structs of ``flora_kernels.h`` for ctypes, and tensors as its arguments.

Letters: K in_features, N out_features, P sum of ranks.
"""

from __future__ import annotations

from ctypes import Structure, c_int32, c_int64, c_size_t, c_void_p, sizeof
from typing import Any

import torch

CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4, torch.int16: 5}


class Exec(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        *((name, c_int32) for name in ("device", "device_index")),
        *((name, c_void_p) for name in ("stream", "workspace")),
        ("workspace_bytes", c_size_t),
        *((name, c_int32) for name in ("num_threads", "isa")),
    )


class Matrix(Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("rows", "columns", "row_stride", "column_stride")),
        *((name, c_int32) for name in ("dtype", "reserved")),
    )


class Vector(Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("size", "stride")),
        *((name, c_int32) for name in ("dtype", "reserved")),
    )


class Clients(Structure):
    _fields_ = (
        ("num_clients", c_int64),
        *((name, c_void_p) for name in ("token_offsets", "rank_offsets", "scaling", "q", "seed", "first_row")),
        *((name, c_int32) for name in ("scaling_dtype", "max_rank")),
    )


class Item(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        *((name, Matrix) for name in ("weight", "A", "B")),
        ("coef", Vector),
        ("low_bits", Matrix),
        ("seed", c_int64),
    )


class Options(Structure):
    _fields_ = (("struct_size", c_size_t), ("rounding", c_int32), ("accumulate", c_int32))


class ShrinkArgs(Structure):
    _fields_ = (("struct_size", c_size_t), ("x", Matrix), ("A", Matrix), ("s", Vector), ("clients", Clients))


class ExpandArgs(Structure):
    _fields_ = (("struct_size", c_size_t), ("y", Matrix), ("s", Vector), ("B", Matrix), ("clients", Clients))


class WgradArgs(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        *(("ds", Vector), ("x", Matrix), ("s", Vector), ("dy", Matrix), ("dA", Matrix), ("dB", Matrix)),
        ("clients", Clients),
    )


class AdamwArgs(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        *((name, c_void_p) for name in ("param", "grad", "exp_avg", "exp_avg_sq")),
        ("numel", c_int64),
        *((name, c_int32) for name in ("dtype", "reserved")),
        ("num_segments", c_int64),
        *((name, c_void_p) for name in ("segment_offsets", "owner")),
        ("hyper", Matrix),
    )


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None or not tensor.numel() else tensor.data_ptr()


def matrix(tensor: torch.Tensor | None) -> Matrix:
    """A tensor of two axes; None as the matrix that is not there."""
    return (
        Matrix() if tensor is None else Matrix(address(tensor), *tensor.shape, *tensor.stride(), CODES[tensor.dtype], 0)
    )


def vector(tensor: torch.Tensor) -> Vector:
    return Vector(address(tensor), tensor.numel(), tensor.stride(0), CODES[tensor.dtype], 0)


def merge_item(weight: Any, A: Any, B: Any, coef: Any, low_bits: Any = None, seed: int = 0) -> Item:
    return Item(sizeof(Item), matrix(weight), matrix(A), matrix(B), vector(coef), matrix(low_bits), seed)
