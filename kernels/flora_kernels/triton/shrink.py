"""shrink: S_c = s_c drop(X_c) A_c^T, and with B for A the backward's dS = s dY B^T.

One launch for all clients, and for all targets that share X. A program owns BLOCK_M rows of one client and BLOCK_R of
its ranks in every target and sums over K; X is read once for ranks up to BLOCK_R, and each target has a mask of its
own. Called by ``ops.lora_linears`` forward and backward; arXiv 2106.09685, eq. 3.
Letters: M packed tokens, K columns of X, R one client's rank, P sum of ranks, C clients.
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
    rank_block,
    s_numel,
    scale_up,
    total,
)

TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=64, BLOCK_K=64), num_warps=4, num_stages=4),
    Tile((torch.float32,), dict(BLOCK_M=64, BLOCK_K=32), num_warps=8, num_stages=2),
)
# Where rows are not aligned every access has an address of its own: they spill in four warps.
ODD_TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=64, BLOCK_K=64), num_warps=8, num_stages=2),
    Tile((torch.float32,), dict(BLOCK_M=32, BLOCK_K=32), num_warps=8, num_stages=2),
)
# One accumulator per target: twice the warps hold three of them, and no more than 32 of a rank at a time (16 in float32
# and where rows are not aligned). Neither is part of the order of a sum.
_MOST_TARGETS, _SHARED_BLOCK_R, _NARROW_BLOCK_R = 3, 32, 16
SHARED_TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_M=64, BLOCK_K=32), num_warps=8, num_stages=4),
    Tile((torch.float32,), dict(BLOCK_M=32, BLOCK_K=32), num_warps=8, num_stages=2),
)


@triton.jit
def _shrink_kernel(
    x_ptr,
    A_ptrs,
    s_ptrs,
    tokens_ptr,
    ranks_ptrs,
    scaling_ptrs,
    q_ptr,
    seed_ptrs,
    row_ptr,
    num_clients,
    K,
    x_stride_m,
    x_stride_k,
    A_strides_p,
    A_strides_k,
    TARGETS: tl.constexpr,
    CLIENTS: tl.constexpr,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, piece = tl.program_id(0), tl.program_id(1) * BLOCK_R
    client, first, stop, row, banks, ranks, starts, highest = find_tile_of_targets(
        tokens_ptr, ranks_ptrs, num_clients, tile, TARGETS, BLOCK_M, CLIENTS
    )
    if piece >= highest:
        return
    row_M = row + tl.arange(0, BLOCK_M)
    column_R = piece + tl.arange(0, BLOCK_R)
    column_K = tl.arange(0, BLOCK_K)
    real_M = row_M < stop
    x_ptrs = x_ptr + row_M.to(tl.int64)[:, None] * x_stride_m + column_K.to(tl.int64)[None, :] * x_stride_k
    q = 0
    if DROPOUT:
        q, counter_M = tl.load(q_ptr + client), tl.load(row_ptr + client) + (row_M - first)
    sums, factors, seeds = (), (), ()
    for t in tl.static_range(TARGETS):
        bank_R = (banks[t] + column_R).to(tl.int64)
        factors += (A_ptrs[t] + bank_R[None, :] * A_strides_p[t] + column_K.to(tl.int64)[:, None] * A_strides_k[t],)
        sums += (tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32),)
        if DROPOUT:
            seeds += (tl.load(seed_ptrs[t] + client),)
    for k in range(0, K, BLOCK_K):
        real_K = column_K < K - k
        x_MK = tl.load(x_ptrs, mask=real_M[:, None] & real_K[None, :], other=0.0)
        new_sums, new_factors = (), ()
        for t in tl.static_range(TARGETS):
            kept_MK = x_MK
            if DROPOUT:
                # The mask alone goes before the product; scaled up in 16 bits, X would be rounded.
                kept_MK = tl.where(draws_of(counter_M, k, seeds[t], BLOCK_M, BLOCK_K, 0) >= q, x_MK, 0.0)
            real_KR = real_K[:, None] & (column_R < ranks[t])[None, :]
            A_KR = tl.load(factors[t], mask=real_KR, other=0.0).to(x_MK.dtype)
            new_sums += (tl.dot(kept_MK, A_KR, sums[t], input_precision="ieee"),)
            new_factors += (factors[t] + BLOCK_K * A_strides_k[t],)
        sums, factors = new_sums, new_factors
        x_ptrs += BLOCK_K * x_stride_k
    for t in tl.static_range(TARGETS):
        factor = 1.0
        if SCALED:
            factor = tl.load(scaling_ptrs[t] + client)
        if DROPOUT:
            factor *= scale_up(q)
        out_ptrs = s_ptrs[t] + starts[t] + (row_M - first).to(tl.int64)[:, None] * ranks[t] + column_R[None, :]
        real_MR = real_M[:, None] & (column_R < ranks[t])[None, :]
        tl.store(out_ptrs, (sums[t] * factor).to(s_ptrs[t].dtype.element_ty), mask=real_MR)


def shrink_many(
    x_MK: torch.Tensor,
    factors: Sequence[torch.Tensor],
    tokens: Ranges,
    ranks: Sequence[Ranges],
    scaling: Sequence[Sequence[float] | torch.Tensor | None],
    dropout: Sequence[Dropout | None],
) -> list[torch.Tensor]:
    """Flat S of every target that shares x, three to a launch; each with its A, ranks, scales and dropout."""
    if len(factors) > _MOST_TARGETS:
        cuts = slice(None, _MOST_TARGETS), slice(_MOST_TARGETS, None)
        parts = ([each[cut] for each in (factors, ranks, scaling, dropout)] for cut in cuts)
        return [s_flat for mine, *own in parts for s_flat in shrink_many(x_MK, mine, tokens, *own)]
    x_MK, factors = near(x_MK), [near(A) for A in factors]
    s_flats = [x_MK.new_empty(s_numel(tokens, part)) for part in ranks]
    aligned, alone = are_aligned(x_MK, *factors), len(factors) == 1
    tile = pick((TILES if aligned else ODD_TILES) if alone else SHARED_TILES, x_MK.dtype)
    block_r = max(rank_block(part) for part in ranks)
    if not alone:
        block_r = min(block_r, _SHARED_BLOCK_R if aligned and x_MK.dtype.itemsize == 2 else _NARROW_BLOCK_R)
    widest = max((bank.stop - bank.start for part in ranks for bank in part), default=0)
    rows = clients_of_targets(tokens, ranks, scaling, dropout, x_MK.device)
    grid = (triton.cdiv(total(tokens), tile.sizes["BLOCK_M"]) + len(tokens), triton.cdiv(widest, block_r))
    strides = (tuple(A.stride(side) for A in factors) for side in (0, 1))
    with on_device(x_MK):
        _shrink_kernel[grid](
            *(x_MK, tuple(factors), tuple(s_flats), *rows.pointers, x_MK.shape[1], *x_MK.stride(), *strides),
            **rows.options,
            BLOCK_R=block_r,
            **tile.options,
        )
    return s_flats


def shrink(
    x_MK: torch.Tensor,
    A_PK: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Flat S in the dtype of x: S_c = scaling_c drop(X_c) A_c^T."""
    return shrink_many(x_MK, [A_PK], tokens, [ranks], [scaling_C], [dropout])[0]


__all__ = ["shrink", "shrink_many"]
