"""expand: Y_c += s_c S_c B_c in place, and with A for B the backward's dX += mask (dS A) / (1 - q).

One launch for all clients. A program owns a BLOCK_M x BLOCK_N tile of Y in the rows of one client and goes through
its rank in pieces. Called by ``ops.lora_linear`` forward and backward; arXiv 2106.09685, eq. 3.
Letters: M packed tokens, N columns of Y, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..reference import Dropout, Ranges
from .common import Tile, clients, draws_of, find_tile, on_device, pick, scale_up, total

# BLOCK_R is part of the order of the sum: one size for all cohorts.
TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=64, BLOCK_N=128, BLOCK_R=16), num_warps=4, num_stages=2),
    Tile((torch.float32,), dict(BLOCK_M=64, BLOCK_N=64, BLOCK_R=16), num_warps=4, num_stages=2),
)


@triton.jit
def _expand_kernel(
    y_ptr,
    s_ptr,
    B_ptr,
    tokens_ptr,
    ranks_ptr,
    scaling_ptr,
    q_ptr,
    seed_ptr,
    row_ptr,
    num_clients,
    N,
    y_stride_m,
    y_stride_n,
    B_stride_p,
    B_stride_n,
    CLIENTS: tl.constexpr,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across * BLOCK_N
    client, first, stop, row, bank, rank, s_start, _ = find_tile(
        tokens_ptr, ranks_ptr, num_clients, tile, BLOCK_M, CLIENTS, 0
    )
    if rank == 0:
        return
    row_M = row + tl.arange(0, BLOCK_M)
    column_N = column + tl.arange(0, BLOCK_N)
    column_R = tl.arange(0, BLOCK_R)
    real_M, real_N = row_M < stop, column_N < N
    y_ptrs = y_ptr + row_M.to(tl.int64)[:, None] * y_stride_m + column_N.to(tl.int64)[None, :] * y_stride_n
    s_ptrs = s_ptr + s_start + (row_M - first).to(tl.int64)[:, None] * rank + column_R[None, :]
    B_ptrs = B_ptr + (bank + column_R).to(tl.int64)[:, None] * B_stride_p + column_N.to(tl.int64)[None, :] * B_stride_n
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r in range(0, rank, BLOCK_R):
        real_R = column_R < rank - r
        s_MR = tl.load(s_ptrs, mask=real_M[:, None] & real_R[None, :], other=0.0)
        B_RN = tl.load(B_ptrs, mask=real_R[:, None] & real_N[None, :], other=0.0).to(s_MR.dtype)
        acc_MN = tl.dot(s_MR, B_RN, acc_MN, input_precision="ieee")
        s_ptrs += BLOCK_R
        B_ptrs += BLOCK_R * B_stride_p
    if SCALED:
        acc_MN *= tl.load(scaling_ptr + client)
    if DROPOUT:
        q, counter_M = tl.load(q_ptr + client), tl.load(row_ptr + client) + (row_M - first)
        keep_MN = draws_of(counter_M, column, tl.load(seed_ptr + client), BLOCK_M, BLOCK_N, 0) >= q
        acc_MN = tl.where(keep_MN, acc_MN * scale_up(q), 0.0)
    real_MN = real_M[:, None] & real_N[None, :]
    y_MN = tl.load(y_ptrs, mask=real_MN, other=0.0).to(tl.float32) + acc_MN
    tl.store(y_ptrs, y_MN.to(y_ptr.dtype.element_ty), mask=real_MN)


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
    tile = pick(TILES, y_MN.dtype)
    rows = clients(tokens, ranks, scaling_C, dropout, y_MN.device)
    tall = triton.cdiv(total(tokens), tile.sizes["BLOCK_M"]) + len(tokens)
    grid = (tall * triton.cdiv(y_MN.shape[1], tile.sizes["BLOCK_N"]),)
    with on_device(y_MN):
        _expand_kernel[grid](
            *(y_MN, s_flat, B_PN, *rows.pointers, y_MN.shape[1], *y_MN.stride(), *B_PN.stride()),
            **rows.options,
            **tile.options,
        )
    return y_MN


__all__ = ["expand_"]
