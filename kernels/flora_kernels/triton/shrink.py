"""shrink: S_c = s_c drop(X_c) A_c^T, and with B for A the backward's dS = s dY B^T.

One launch for all clients. A program owns BLOCK_M rows of one client and BLOCK_R of its ranks and sums over K; X is
read once for ranks up to BLOCK_R. Called by ``ops.lora_linear`` forward and backward; arXiv 2106.09685, eq. 3.
Letters: M packed tokens, K columns of X, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..reference import Dropout, Ranges
from .common import Tile, clients, draws_of, find_tile, on_device, pick, rank_block, s_numel, scale_up, total

TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=64, BLOCK_K=64), num_warps=4, num_stages=4),
    Tile((torch.float32,), dict(BLOCK_M=64, BLOCK_K=32), num_warps=8, num_stages=2),
)


@triton.jit
def _shrink_kernel(
    x_ptr,
    A_ptr,
    s_ptr,
    tokens_ptr,
    ranks_ptr,
    scaling_ptr,
    q_ptr,
    seed_ptr,
    row_ptr,
    num_clients,
    K,
    x_stride_m,
    x_stride_k,
    A_stride_p,
    A_stride_k,
    CLIENTS: tl.constexpr,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, piece = tl.program_id(0), tl.program_id(1) * BLOCK_R
    client, first, stop, row, bank, rank, s_start, _ = find_tile(
        tokens_ptr, ranks_ptr, num_clients, tile, BLOCK_M, CLIENTS, 0
    )
    if piece >= rank:
        return
    row_M = row + tl.arange(0, BLOCK_M)
    column_R = piece + tl.arange(0, BLOCK_R)
    column_K = tl.arange(0, BLOCK_K)
    real_M, real_R = row_M < stop, column_R < rank
    x_ptrs = x_ptr + row_M.to(tl.int64)[:, None] * x_stride_m + column_K.to(tl.int64)[None, :] * x_stride_k
    A_ptrs = A_ptr + (bank + column_R).to(tl.int64)[None, :] * A_stride_p + column_K.to(tl.int64)[:, None] * A_stride_k
    factor = 1.0
    if SCALED:
        factor = tl.load(scaling_ptr + client)
    if DROPOUT:
        q, seed = tl.load(q_ptr + client), tl.load(seed_ptr + client)
        counter_M = tl.load(row_ptr + client) + (row_M - first)
        # The mask alone goes before the product; scaled up in 16 bits, X would be rounded.
        factor *= scale_up(q)
    acc_MR = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        real_K = column_K < K - k
        x_MK = tl.load(x_ptrs, mask=real_M[:, None] & real_K[None, :], other=0.0)
        if DROPOUT:
            x_MK = tl.where(draws_of(counter_M, k, seed, BLOCK_M, BLOCK_K, 0) >= q, x_MK, 0.0)
        A_KR = tl.load(A_ptrs, mask=real_K[:, None] & real_R[None, :], other=0.0).to(x_MK.dtype)
        acc_MR = tl.dot(x_MK, A_KR, acc_MR, input_precision="ieee")
        x_ptrs += BLOCK_K * x_stride_k
        A_ptrs += BLOCK_K * A_stride_k
    s_ptrs = s_ptr + s_start + (row_M - first).to(tl.int64)[:, None] * rank + column_R[None, :]
    tl.store(s_ptrs, (acc_MR * factor).to(s_ptr.dtype.element_ty), mask=real_M[:, None] & real_R[None, :])


def shrink(
    x_MK: torch.Tensor,
    A_PK: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Flat S in the dtype of x: S_c = scaling_c drop(X_c) A_c^T."""
    s_flat = x_MK.new_empty(s_numel(tokens, ranks))
    tile, block_r = pick(TILES, x_MK.dtype), rank_block(ranks)
    rows = clients(tokens, ranks, scaling_C, dropout, x_MK.device)
    widest = max((bank.stop - bank.start for bank in ranks), default=0)
    grid = (triton.cdiv(total(tokens), tile.sizes["BLOCK_M"]) + len(tokens), triton.cdiv(widest, block_r))
    with on_device(x_MK):
        _shrink_kernel[grid](
            *(x_MK, A_PK, s_flat, *rows.pointers, x_MK.shape[1], *x_MK.stride(), *A_PK.stride()),
            **rows.options,
            BLOCK_R=block_r,
            **tile.options,
        )
    return s_flat


__all__ = ["shrink"]
