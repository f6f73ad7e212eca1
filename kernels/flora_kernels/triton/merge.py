"""merge: W += B^T diag(coef) A in place over any number of layers in one launch: one sum, one rounding.

A program owns a BLOCK_N x BLOCK_K tile of one weight, finds it in a table of addresses, sums over P and writes W once:
rounded to nearest, stochastically (counter-based, by row and column), or as an fp32 master in bf16 and 16 low bits.
Memory-bound until P is in the hundreds. Called by ``ops.stacked_merge_many_``; arXiv 2409.05976, eq. 5.
Letters: K in_features, N out_features, P sum of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..reference import MergeItem
from .common import Tile, draws_of, last_at_or_before, on_device

# Three TF32 products lose 2^-22 or so: nothing beside a rounding to 16 bits, too much in an fp32 master.
# 128 x 128 would read the factors less often and spills on sm_80, with stochastic rounding everywhere.
_ROUNDED = Tile((torch.bfloat16, torch.float16), dict(BLOCK_N=64, BLOCK_K=128, BLOCK_P=16), 8, 3)
# IEEE products run on the CUDA cores, their operands in registers.
_MASTER = Tile((torch.float32,), dict(BLOCK_N=64, BLOCK_K=64, BLOCK_P=16), 4, 2)
# Rows that are not aligned need an address for every access.
_ODD_MASTER = Tile((torch.float32,), dict(BLOCK_N=64, BLOCK_K=64, BLOCK_P=16), 8, 2)
_WIDE = Tile((torch.float64,), dict(BLOCK_N=32, BLOCK_K=64, BLOCK_P=1), 4, 1)
TILES = (_ROUNDED, _MASTER, _ODD_MASTER, _WIDE)
_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
# The table of items: five addresses, N, K, P, four pairs of strides, the first tile, the key.
_STRIDES, _FIRST, _SEED, _COLUMNS = 8, 16, 17, 18


@triton.jit
def _product(
    A_ptr,
    B_ptr,
    coef_ptr,
    row_N,
    column_K,
    N,
    K,
    P,
    A_stride_p,
    A_stride_k,
    B_stride_p,
    B_stride_n,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """B^T diag(coef) A of one tile, summed in SUM."""
    rank_P = tl.arange(0, BLOCK_P)
    real_N, real_K = row_N < N, column_K < K
    acc_NK = tl.zeros([BLOCK_N, BLOCK_K], dtype=SUM)
    for p in range(0, P, BLOCK_P):
        row_P = (p + rank_P).to(tl.int64)
        real_P = row_P < P
        A_ptrs = A_ptr + row_P[:, None] * A_stride_p + column_K[None, :] * A_stride_k
        B_ptrs = B_ptr + row_P[None, :] * B_stride_p + row_N[:, None] * B_stride_n
        A_PK = tl.load(A_ptrs, mask=real_P[:, None] & real_K[None, :], other=0.0).to(SUM)
        B_NP = tl.load(B_ptrs, mask=real_P[None, :] & real_N[:, None], other=0.0).to(SUM)
        A_PK *= tl.load(coef_ptr + row_P, mask=real_P, other=0.0).to(SUM)[:, None]
        if BLOCK_P == 1:
            acc_NK += B_NP * A_PK
        else:
            acc_NK = tl.dot(B_NP, A_PK, acc_NK, input_precision=PRECISION)
    return acc_NK


@triton.jit
def _merge_kernel(
    table_ptr,
    num_items,
    COLUMNS: tl.constexpr,
    STRIDES: tl.constexpr,
    FIRST: tl.constexpr,
    SEED: tl.constexpr,
    WEIGHT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    COEF: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
    LOW_BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    item = last_at_or_before(table_ptr + FIRST, num_items, tl.program_id(0), COLUMNS)
    row = table_ptr + item * COLUMNS
    # Every vectorised access needs its address, row stride and edge known to be divisible: 16 where ALIGNED.
    DIVISOR: tl.constexpr = 16 if ALIGNED else 1
    weight_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(WEIGHT)), DIVISOR)
    A_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(A)), DIVISOR)
    B_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(B)), DIVISOR)
    coef_ptr = tl.load(row + 3).to(tl.pointer_type(COEF))
    low_ptr = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(tl.int16)), DIVISOR)
    N, K = tl.multiple_of(tl.load(row + 5), DIVISOR), tl.multiple_of(tl.load(row + 6), DIVISOR)
    P = tl.load(row + 7)
    weight_stride_n = tl.multiple_of(tl.load(row + STRIDES), DIVISOR)
    A_stride_p = tl.multiple_of(tl.load(row + STRIDES + 2), DIVISOR)
    B_stride_p = tl.multiple_of(tl.load(row + STRIDES + 4), DIVISOR)
    low_stride_n = tl.multiple_of(tl.load(row + STRIDES + 6), DIVISOR)
    if ALIGNED:
        weight_stride_k, A_stride_k, B_stride_n, low_stride_k = 1, 1, 1, 1
    else:
        weight_stride_k, A_stride_k = tl.load(row + STRIDES + 1), tl.load(row + STRIDES + 3)
        B_stride_n, low_stride_k = tl.load(row + STRIDES + 5), tl.load(row + STRIDES + 7)
    tile, across = tl.program_id(0) - tl.load(row + FIRST), tl.cdiv(K, BLOCK_K)
    column = tile % across * BLOCK_K
    row_N, column_K = tile // across * BLOCK_N + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_K)
    sum_NK = _product(
        *(A_ptr, B_ptr, coef_ptr, row_N, column_K, N, K, P, A_stride_p, A_stride_k, B_stride_p, B_stride_n),
        *(SUM, PRECISION, BLOCK_N, BLOCK_K, BLOCK_P),
    )
    real_NK = (row_N < N)[:, None] & (column_K < K)[None, :]
    weight_ptrs = weight_ptr + row_N[:, None] * weight_stride_n + column_K[None, :] * weight_stride_k
    weight_NK = tl.load(weight_ptrs, mask=real_NK, other=0.0)
    if LOW_BITS:
        low_ptrs = low_ptr + row_N[:, None] * low_stride_n + column_K[None, :] * low_stride_k
        bits_NK = weight_NK.to(tl.int16, bitcast=True).to(tl.int32) << 16
        bits_NK += tl.load(low_ptrs, mask=real_NK, other=0).to(tl.int32)
        sum_NK += bits_NK.to(tl.float32, bitcast=True).to(SUM)
        bits_NK = sum_NK.to(tl.float32).to(tl.int32, bitcast=True)
        high_NK = (bits_NK + 0x8000) >> 16
        tl.store(weight_ptrs, high_NK.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=real_NK)
        tl.store(low_ptrs, (bits_NK - (high_NK << 16)).to(tl.int16), mask=real_NK)
    elif STOCHASTIC:
        bits_NK = (sum_NK + weight_NK.to(SUM)).to(tl.float32).to(tl.int32, bitcast=True)
        draws_NK = draws_of(row_N, column, tl.load(row + SEED), BLOCK_N, BLOCK_K, 1).to(tl.int32)
        # What is not finite stays: a carry would turn a NaN into something else.
        bits_NK += tl.where((bits_NK & 0x7F800000) != 0x7F800000, draws_NK, 0)
        tl.store(weight_ptrs, (bits_NK >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=real_NK)
    else:
        sum_NK += weight_NK.to(SUM)
        # There is no instruction from float64 to 16 bits.
        tl.store(weight_ptrs, (sum_NK.to(tl.float32) if HALF else sum_NK).to(WEIGHT), mask=real_NK)


def _swapped(item: MergeItem, rounding: str) -> MergeItem:
    """A transposed weight (Conv1D) as its transpose, which is contiguous; draws are counted by row and column."""
    weight, A, B, coef, low_bits = item
    if weight.stride(1) == 1 or weight.stride(0) != 1 or rounding == "stochastic":
        return MergeItem(weight, A, B, coef.contiguous(), low_bits)
    return MergeItem(weight.T, B, A, coef.contiguous(), None if low_bits is None else low_bits.T)


def _is_aligned(item: MergeItem) -> bool:
    """Return whether rows start at multiples of 16 bytes and 16 elements, so that accesses may be wide."""
    tensors = [item.weight, item.A, item.B, *([] if item.low_bits is None else [item.low_bits])]
    return all(size % 16 == 0 for size in item.weight.shape) and all(
        tensor.stride(1) == 1 and tensor.stride(0) % 16 == 0 and tensor.data_ptr() % 16 == 0 for tensor in tensors
    )


def _groups(
    items: Sequence[MergeItem], rounding: str, seed: int
) -> Iterator[tuple[dict[str, Any], list[tuple[MergeItem, int]]]]:
    """Items that one compiled kernel serves, each with its key."""
    groups: dict[tuple[Any, ...], list[tuple[MergeItem, int]]] = defaultdict(list)
    for i, item in enumerate(items):
        if item.weight.numel() and item.A.shape[0]:
            item = _swapped(MergeItem(*item), rounding)
            dtypes = tuple(_TRITON_DTYPE[tensor.dtype] for tensor in item[:4])
            key = (item.weight.device, dtypes, item.low_bits is not None, _is_aligned(item))
            groups[key].append((item, seed + i))
    for (_, dtypes, low_bits, aligned), members in groups.items():
        names = dict(zip(("WEIGHT", "A", "B", "COEF"), dtypes, strict=True))
        yield {**names, "LOW_BITS": low_bits, "ALIGNED": aligned}, members


def _rows(members: Sequence[tuple[MergeItem, int]], sizes: dict[str, int]) -> tuple[list[list[int]], int]:
    """The table of items, and how many tiles they have."""
    rows, tiles = [], 0
    for (weight, A, B, coef, low_bits), key in members:
        pointers = [tensor.data_ptr() for tensor in (weight, A, B, coef)]
        low_strides = (0, 0) if low_bits is None else low_bits.stride()
        row = [*pointers, 0 if low_bits is None else low_bits.data_ptr(), *weight.shape, A.shape[0]]
        row += [*weight.stride(), *A.stride(), *B.stride(), *low_strides, tiles, key]
        rows.append(row)
        tiles += triton.cdiv(weight.shape[0], sizes["BLOCK_N"]) * triton.cdiv(weight.shape[1], sizes["BLOCK_K"])
    return rows, tiles


def merge_many_(
    items: Sequence[MergeItem], *, rounding: str = "nearest", seed: int = 0, accumulate: torch.dtype = torch.float32
) -> None:
    """Merge many weights in place; with stochastic rounding item i uses the key ``seed + i``."""
    for options, members in _groups(items, rounding, seed):
        weight = members[0][0].weight
        wide = torch.float64 if weight.dtype == torch.float64 else accumulate
        half = weight.dtype.itemsize == 2
        tile = _WIDE if wide == torch.float64 else _MASTER
        if tile is _MASTER and half and not options["LOW_BITS"] and torch.version.hip is None:
            tile = _ROUNDED
        if tile is _MASTER and not options["ALIGNED"]:
            tile = _ODD_MASTER
        rows, tiles = _rows(members, tile.sizes)
        with on_device(weight):
            _merge_kernel[(tiles,)](
                torch.tensor(rows, dtype=torch.int64).to(weight.device, non_blocking=True),
                len(rows),
                **dict(COLUMNS=_COLUMNS, STRIDES=_STRIDES, FIRST=_FIRST, SEED=_SEED),
                **options,
                SUM=_TRITON_DTYPE[wide],
                PRECISION="tf32x3" if tile is _ROUNDED else "ieee",
                HALF=half,
                STOCHASTIC=rounding == "stochastic",
                **tile.options,
            )


def merge_(
    weight_NK: torch.Tensor,
    A_PK: torch.Tensor,
    B_PN: torch.Tensor,
    coef_P: torch.Tensor,
    *,
    rounding: str = "nearest",
    low_bits_NK: torch.Tensor | None = None,
    seed: int = 0,
    accumulate: torch.dtype = torch.float32,
) -> None:
    """W += B^T diag(coef) A in place: one sum in ``accumulate``, one rounding."""
    item = MergeItem(weight_NK, A_PK, B_PN, coef_P, low_bits_NK)
    merge_many_([item], rounding=rounding, seed=seed, accumulate=accumulate)


__all__ = ["merge_", "merge_many_"]
