"""expand: Y_c += s_c S_c B_c in place, and with A for B the backward's dX += mask (dS A) / (1 - q).

One launch for all clients, and for all targets that add to the same Y (dX, where they share X). A program owns a
BLOCK_M x BLOCK_N tile of Y in the rows of one client, goes through every target's rank in pieces, and reads and writes
Y once. Called by ``ops.lora_linears`` forward and backward; arXiv 2106.09685, eq. 3.
Letters: M packed tokens, N columns of Y, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..reference import Dropout, Ranges
from .common import (
    Tile,
    are_aligned,
    clients_of_targets,
    draws_of,
    find_tile_of_targets,
    near,
    on_device,
    pick,
    scale_up,
    total,
)

# BLOCK_R is part of the order of the sum: one size for all cohorts.
TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=64, BLOCK_N=128, BLOCK_R=16), num_warps=4, num_stages=2),
    Tile((torch.float32,), dict(BLOCK_M=64, BLOCK_N=64, BLOCK_R=16), num_warps=4, num_stages=2),
)
# Where rows are not aligned every access has an address of its own: they spill in four warps.
ODD_TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=64, BLOCK_N=128, BLOCK_R=16), num_warps=8, num_stages=2),
    Tile((torch.float32,), dict(BLOCK_M=64, BLOCK_N=64, BLOCK_R=16), num_warps=8, num_stages=2),
)
# A second sum of the tile beside each target's own: twice the warps hold them.
SHARED_TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=64, BLOCK_N=128, BLOCK_R=16), num_warps=8, num_stages=2),
    Tile((torch.float32,), dict(BLOCK_M=64, BLOCK_N=64, BLOCK_R=16), num_warps=8, num_stages=2),
)


@triton.jit
def _product(
    s_ptrs,
    B_ptrs,
    rank,
    real_M,
    real_N,
    B_stride_p,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """S B of one tile, over the rank in pieces."""
    column_R = tl.arange(0, BLOCK_R)
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r in range(0, rank, BLOCK_R):
        real_R = column_R < rank - r
        s_MR = tl.load(s_ptrs, mask=real_M[:, None] & real_R[None, :], other=0.0)
        B_RN = tl.load(B_ptrs, mask=real_R[:, None] & real_N[None, :], other=0.0).to(s_MR.dtype)
        acc_MN = tl.dot(s_MR, B_RN, acc_MN, input_precision="ieee")
        s_ptrs += BLOCK_R
        B_ptrs += BLOCK_R * B_stride_p
    return acc_MN


@triton.jit
def _expand_kernel(
    y_ptr,
    s_ptrs,
    B_ptrs,
    tokens_ptr,
    ranks_ptrs,
    scaling_ptrs,
    q_ptr,
    seed_ptrs,
    row_ptr,
    num_clients,
    N,
    y_stride_m,
    y_stride_n,
    B_strides_p,
    B_strides_n,
    TARGETS: tl.constexpr,
    CLIENTS: tl.constexpr,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across * BLOCK_N
    client, first, stop, row, banks, ranks, starts, highest = find_tile_of_targets(
        tokens_ptr, ranks_ptrs, num_clients, tile, TARGETS, BLOCK_M, CLIENTS
    )
    if highest == 0:
        return
    row_M, column_N, column_R = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    real_M, real_N = row_M < stop, column_N < N
    q = 0
    if DROPOUT:
        q, counter_M = tl.load(q_ptr + client), tl.load(row_ptr + client) + (row_M - first)
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for t in tl.static_range(TARGETS):
        s_MR_ptrs = s_ptrs[t] + starts[t] + (row_M - first).to(tl.int64)[:, None] * ranks[t] + column_R[None, :]
        bank_R = (banks[t] + column_R).to(tl.int64)
        B_RN_ptrs = B_ptrs[t] + bank_R[:, None] * B_strides_p[t] + column_N.to(tl.int64)[None, :] * B_strides_n[t]
        acc_MN = _product(s_MR_ptrs, B_RN_ptrs, ranks[t], real_M, real_N, B_strides_p[t], BLOCK_M, BLOCK_N, BLOCK_R)
        if SCALED:
            acc_MN *= tl.load(scaling_ptrs[t] + client)
        if DROPOUT:
            keep_MN = draws_of(counter_M, column, tl.load(seed_ptrs[t] + client), BLOCK_M, BLOCK_N, 0) >= q
            acc_MN = tl.where(keep_MN, acc_MN * scale_up(q), 0.0)
        sum_MN += acc_MN
    y_ptrs = y_ptr + row_M.to(tl.int64)[:, None] * y_stride_m + column_N.to(tl.int64)[None, :] * y_stride_n
    real_MN = real_M[:, None] & real_N[None, :]
    y_MN = tl.load(y_ptrs, mask=real_MN, other=0.0).to(tl.float32) + sum_MN
    tl.store(y_ptrs, y_MN.to(y_ptr.dtype.element_ty), mask=real_MN)


def expand_many_(
    y_MN: torch.Tensor,
    s_flats: Sequence[torch.Tensor],
    factors: Sequence[torch.Tensor],
    tokens: Ranges,
    ranks: Sequence[Ranges],
    scaling: Sequence[Sequence[float] | torch.Tensor | None],
    dropout: Sequence[Dropout | None],
) -> torch.Tensor:
    """Y_c += the scaled and masked S_c B_c of every target, in one launch and with one rounding."""
    factors = [near(B) for B in factors]
    alone = TILES if are_aligned(y_MN, *factors) else ODD_TILES
    tile = pick(alone if len(factors) == 1 else SHARED_TILES, y_MN.dtype)
    rows = clients_of_targets(tokens, ranks, scaling, dropout, y_MN.device)
    tall = triton.cdiv(total(tokens), tile.sizes["BLOCK_M"]) + len(tokens)
    grid = (tall * triton.cdiv(y_MN.shape[1], tile.sizes["BLOCK_N"]),)
    strides = (tuple(B.stride(side) for B in factors) for side in (0, 1))
    with on_device(y_MN):
        _expand_kernel[grid](
            *(y_MN, tuple(s_flats), tuple(factors), *rows.pointers, y_MN.shape[1], *y_MN.stride(), *strides),
            **rows.options,
            **tile.options,
        )
    return y_MN


def expand_(
    y_MN: torch.Tensor,
    s_flat: torch.Tensor,
    B_PN: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Y_c += scaling_c S_c B_c in place."""
    return expand_many_(y_MN, [s_flat], [B_PN], tokens, [ranks], [scaling_C], [dropout])


__all__ = ["expand_", "expand_many_"]
