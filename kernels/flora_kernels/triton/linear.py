"""linear: Y = X W^T + b, and linear_lora: Y = X W^T + b + s_c S_c B_c with the rank tail in the same kernel.

A program owns a BLOCK_M x BLOCK_N tile of Y; tiles lie on M as it is, so that a client's end wastes nothing. The tail
goes first: its registers are free again before the K loop begins (178 against 238 registers on sm_90, rank 64). A tile
on the border of clients takes each of them in turn and keeps its rows alone, by selection and not by a zero: 0 * NaN
would carry one client's fault to another. DESIGN's third way to fuse; arXiv 2106.09685, eq. 3.
Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..reference import Ranges
from .common import Tile, are_aligned, clients, near, on_device, pick

TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, BLOCK_R=32, GROUP_M=8), 8, 3),
    Tile((torch.float32,), dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_R=16, GROUP_M=8), 4, 2),
)
# The selection between clients holds a second accumulator: 128 x 256 spills.
TAIL_TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, BLOCK_R=32, GROUP_M=8), 8, 3),
    Tile((torch.float32,), dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_R=16, GROUP_M=8), 8, 2),
)
# Where rows are not aligned every access has an address of its own, and a tile of such addresses spills.
ODD_TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, BLOCK_R=16, GROUP_M=8), 8, 2),
    Tile((torch.float32,), dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, BLOCK_R=16, GROUP_M=8), 8, 2),
)


@triton.jit
def _tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a program's tile: GROUP_M rows at a time, so that they share W in the L2 cache."""
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    group = program // (GROUP_M * across)
    tall = tl.minimum(down - group * GROUP_M, GROUP_M)
    inside = program % (GROUP_M * across)
    return (group * GROUP_M + inside % tall) * BLOCK_M, inside // tall * BLOCK_N


@triton.jit
def _tail(
    s_ptr,
    B_ptr,
    tokens_ptr,
    ranks_ptr,
    scaling_ptr,
    num_clients,
    row,
    row_M,
    last,
    column_N,
    N,
    B_stride_p,
    B_stride_n,
    dtype: tl.constexpr,
    CLIENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s_c S_c B_c of a tile, every row by its own client."""
    ids = tl.arange(0, CLIENTS)
    real = ids < num_clients
    starts = tl.load(tokens_ptr + ids, mask=real, other=0)
    stops = tl.load(tokens_ptr + ids + 1, mask=real, other=0)
    banks = tl.load(ranks_ptr + ids, mask=real, other=0)
    ranks = tl.load(ranks_ptr + ids + 1, mask=real, other=0) - banks
    sizes = (stops - starts).to(tl.int64) * ranks
    from_client = tl.sum((real & (stops <= row)).to(tl.int32), 0)
    to_client = tl.sum((real & (starts <= last)).to(tl.int32), 0)
    column_R, real_N = tl.arange(0, BLOCK_R), column_N < N
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    scale_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    for client in range(from_client, to_client):
        mine = ids == client
        first, stop = tl.sum(tl.where(mine, starts, 0), 0), tl.sum(tl.where(mine, stops, 0), 0)
        bank, rank = tl.sum(tl.where(mine, banks, 0), 0), tl.sum(tl.where(mine, ranks, 0), 0)
        s_start = tl.sum(tl.where(ids < client, sizes, 0), 0)
        mine_M = (row_M >= first) & (row_M < stop)
        scale_M = tl.where(mine_M, tl.load(scaling_ptr + client), scale_M)
        s_ptrs = s_ptr + s_start + (row_M - first).to(tl.int64)[:, None] * rank + column_R[None, :]
        B_ptrs = B_ptr + (bank + column_R).to(tl.int64)[:, None] * B_stride_p
        B_ptrs += column_N.to(tl.int64)[None, :] * B_stride_n
        for r in range(0, rank, BLOCK_R):
            real_R = column_R < rank - r
            s_MR = tl.load(s_ptrs + r, mask=mine_M[:, None] & real_R[None, :], other=0.0)
            B_RN = tl.load(B_ptrs, mask=real_R[:, None] & real_N[None, :], other=0.0).to(dtype)
            acc_MN = tl.where(mine_M[:, None], tl.dot(s_MR, B_RN, acc_MN, input_precision="ieee"), acc_MN)
            B_ptrs += BLOCK_R * B_stride_p
    return acc_MN * scale_M[:, None]


@triton.jit
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    s_ptr,
    B_ptr,
    tokens_ptr,
    ranks_ptr,
    scaling_ptr,
    num_clients,
    M,
    N,
    K,
    x_stride_m,
    x_stride_k,
    weight_stride_n,
    weight_stride_k,
    B_stride_p,
    B_stride_n,
    BIAS: tl.constexpr,
    TAIL: tl.constexpr,
    CLIENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row, column = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row_M, column_N, column_K = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    real_M, real_N = row_M < M, column_N < N
    if TAIL:
        acc_MN = _tail(
            *(s_ptr, B_ptr, tokens_ptr, ranks_ptr, scaling_ptr, num_clients),
            *(row, row_M, tl.minimum(row + BLOCK_M, M) - 1, column_N, N, B_stride_p, B_stride_n),
            *(x_ptr.dtype.element_ty, CLIENTS, BLOCK_M, BLOCK_N, BLOCK_R),
        )
    else:
        acc_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    x_ptrs = x_ptr + row_M.to(tl.int64)[:, None] * x_stride_m + column_K.to(tl.int64)[None, :] * x_stride_k
    weight_ptrs = weight_ptr + column_N.to(tl.int64)[None, :] * weight_stride_n
    weight_ptrs += column_K.to(tl.int64)[:, None] * weight_stride_k
    for k in range(0, K, BLOCK_K):
        real_K = column_K < K - k
        x_MK = tl.load(x_ptrs, mask=real_M[:, None] & real_K[None, :], other=0.0)
        weight_KN = tl.load(weight_ptrs, mask=real_K[:, None] & real_N[None, :], other=0.0)
        acc_MN = tl.dot(x_MK, weight_KN, acc_MN, input_precision="ieee")
        x_ptrs += BLOCK_K * x_stride_k
        weight_ptrs += BLOCK_K * weight_stride_k
    if BIAS:
        acc_MN += tl.load(bias_ptr + column_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + row_M.to(tl.int64)[:, None] * N + column_N[None, :]
    tl.store(y_ptrs, acc_MN.to(y_ptr.dtype.element_ty), mask=real_M[:, None] & real_N[None, :])


def _launch(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, *tail: Any, **options: Any):
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    s_flat, B_PN, tables = tail
    x_MK, weight_NK, B_PN = near(x_MK), near(weight_NK), B_PN if B_PN is None else near(B_PN)
    tiles = TAIL_TILES if options["TAIL"] else TILES
    y_MN = x_MK.new_empty(M, N)
    rows = x_MK, weight_NK, y_MN, *(() if B_PN is None else (B_PN,))
    tile = pick(tiles if are_aligned(*rows) else ODD_TILES, x_MK.dtype)
    strides = (*x_MK.stride(), *weight_NK.stride(), *((0, 0) if B_PN is None else B_PN.stride()))
    grid = (triton.cdiv(M, tile.sizes["BLOCK_M"]) * triton.cdiv(N, tile.sizes["BLOCK_N"]),)
    with on_device(x_MK):
        _linear_kernel[grid](
            *(x_MK, weight_NK, bias_N, y_MN, s_flat, B_PN, *tables, M, N, K, *strides),
            BIAS=bias_N is not None,
            **options,
            **tile.options,
        )
    return y_MN


def linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """The frozen product Y = X W^T + b."""
    bias_N = None if bias_N is None else bias_N.contiguous()
    return _launch(x_MK, weight_NK, bias_N, None, None, (None, None, None, 0), TAIL=False, CLIENTS=1)


def linear_lora(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    s_flat: torch.Tensor,
    B_PN: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor,
) -> torch.Tensor:
    """Y = X W^T + b + scaling_c S_c B_c in one kernel; S as ``shrink`` gives it."""
    rows = clients(tokens, ranks, scaling_C, None, x_MK.device)
    tables = (rows.tokens, rows.ranks, rows.scaling, rows.count)
    bias_N = None if bias_N is None else bias_N.contiguous()
    return _launch(*(x_MK, weight_NK, bias_N, s_flat, B_PN, tables), TAIL=True, CLIENTS=rows.options["CLIENTS"])


__all__ = ["linear", "linear_lora"]
