"""wgrad: dA_c = dS_c^T drop(X_c) with the mask drawn again, and dB_c = s_c S_c^T dY_c, in one grouped launch.

A program owns a tile of one client's dA or dB and sums over its tokens. A client with more than CHUNK tokens is cut
into chunks of that size, counted from its own first token; their float32 parts are summed in order by a second launch.
So no atomics are needed, and a client's bits do not depend on its cohort. Called by ``ops.lora_linear`` backward.
Letters: M packed tokens, T tokens of one step of the sum, D columns of X or dY, K and N, R one client's rank,
P sum of ranks, C clients.
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
    clients,
    draws_of,
    find_tile,
    highest,
    lengths_known,
    on_device,
    pick,
    rank_block,
    scale_up,
    total,
)

TILES = (
    Tile((torch.bfloat16, torch.float16), dict(BLOCK_D=128, BLOCK_T=32), num_warps=8, num_stages=4),
    Tile((torch.float32,), dict(BLOCK_D=64, BLOCK_T=32), num_warps=8, num_stages=2),
)
# Where rows are not aligned every access has an address of its own, and dropout's draws beside them spill.
ODD_TILES = (TILES[0], Tile((torch.float32,), dict(BLOCK_D=32, BLOCK_T=32), num_warps=8, num_stages=2))
# A chunk's part costs 8 R D bytes against the 2 T D that it reads: 1/8 at rank 64 in 16 bits.
CHUNK = 2048
_SUM_BLOCK = 1024


@triton.jit
def _tile_sum(
    left_ptr,
    data_ptr,
    first,
    start,
    stop,
    rank,
    piece,
    column,
    D,
    stride_m,
    stride_d,
    q,
    seed,
    counter,
    DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """drop(data)^T left over the tokens start..stop, float32 (BLOCK_D, BLOCK_R)."""
    column_R = piece + tl.arange(0, BLOCK_R)
    column_D = column + tl.arange(0, BLOCK_D)
    real_R, real_D = column_R < rank, column_D < D
    acc_DR = tl.zeros([BLOCK_D, BLOCK_R], dtype=tl.float32)
    for t in range(start, stop, BLOCK_T):
        token_T = t + tl.arange(0, BLOCK_T)
        real_T, row_T = token_T < stop, token_T.to(tl.int64)
        data_ptrs = data_ptr + row_T[:, None] * stride_m + column_D.to(tl.int64)[None, :] * stride_d
        data_TD = tl.load(data_ptrs, mask=real_T[:, None] & real_D[None, :], other=0.0)
        if DROPOUT:
            keep_TD = draws_of(counter + (token_T - first), column, seed, BLOCK_T, BLOCK_D, 0) >= q
            data_TD = tl.where(keep_TD, data_TD, 0.0)
        left_ptrs = left_ptr + (row_T - first)[:, None] * rank + column_R[None, :]
        left_TR = tl.load(left_ptrs, mask=real_T[:, None] & real_R[None, :], other=0.0)
        # D goes where the tensor core wants its 64 rows; the rank may be as small as 16.
        acc_DR = tl.dot(tl.trans(data_TD), left_TR, acc_DR, input_precision="ieee")
    return acc_DR


@triton.jit
def _store_tile(
    acc_DR,
    out_ptr,
    part_ptr,
    bank,
    part,
    rank,
    piece,
    column,
    D,
    split,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Into the result where the client is one chunk, else into the chunk's own rows of the workspace."""
    column_R = piece + tl.arange(0, BLOCK_R)
    column_D = column + tl.arange(0, BLOCK_D)
    real_DR = (column_D < D)[:, None] & (column_R < rank)[None, :]
    if split:
        part_ptrs = part_ptr + (part + column_R)[None, :] * D + column_D[:, None]
        tl.store(part_ptrs, acc_DR, mask=real_DR)
    else:
        out_ptrs = out_ptr + (bank + column_R).to(tl.int64)[None, :] * D + column_D[:, None]
        tl.store(out_ptrs, acc_DR.to(out_ptr.dtype.element_ty), mask=real_DR)


@triton.jit
def _wgrad_kernel(
    ds_ptr,
    x_ptr,
    s_ptr,
    dy_ptr,
    dA_ptr,
    dB_ptr,
    partA_ptr,
    partB_ptr,
    tokens_ptr,
    ranks_ptr,
    scaling_ptr,
    q_ptr,
    seed_ptr,
    row_ptr,
    num_clients,
    K,
    N,
    x_stride_m,
    x_stride_k,
    dy_stride_m,
    dy_stride_n,
    CLIENTS: tl.constexpr,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    across_K = tl.cdiv(K, BLOCK_D)
    across = across_K + tl.cdiv(N, BLOCK_D)
    slot, column, piece = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1) * BLOCK_R
    client, first, stop, start, bank, rank, s_start, part = find_tile(
        tokens_ptr, ranks_ptr, num_clients, slot, CHUNK, CLIENTS, 1
    )
    if piece >= rank:
        return
    split = stop - first > CHUNK
    stop = tl.minimum(stop, start + CHUNK)
    part += (start - first) // CHUNK * rank
    if column < across_K:
        column *= BLOCK_D
        q, seed, counter, factor = 0, 0, 0, 1.0
        if DROPOUT:
            q, seed, counter = tl.load(q_ptr + client), tl.load(seed_ptr + client), tl.load(row_ptr + client)
            factor = scale_up(q)
        acc_DR = _tile_sum(
            *(ds_ptr + s_start, x_ptr, first, start, stop, rank, piece, column, K, x_stride_m, x_stride_k),
            *(q, seed, counter, DROPOUT, BLOCK_R, BLOCK_D, BLOCK_T),
        )
        _store_tile(*(acc_DR * factor, dA_ptr, partA_ptr, bank, part, rank, piece, column, K, split, BLOCK_R, BLOCK_D))
    else:
        column = (column - across_K) * BLOCK_D
        acc_DR = _tile_sum(
            *(s_ptr + s_start, dy_ptr, first, start, stop, rank, piece, column, N, dy_stride_m, dy_stride_n),
            *(0, 0, 0, False, BLOCK_R, BLOCK_D, BLOCK_T),
        )
        # Without tokens there is no product to scale: 0 * NaN would be NaN.
        factor = tl.where(stop > start, tl.load(scaling_ptr + client), 0.0)
        _store_tile(*(acc_DR * factor, dB_ptr, partB_ptr, bank, part, rank, piece, column, N, split, BLOCK_R, BLOCK_D))


@triton.jit
def _wgrad_sum_kernel(
    dA_ptr,
    dB_ptr,
    partA_ptr,
    partB_ptr,
    tokens_ptr,
    ranks_ptr,
    num_clients,
    K,
    N,
    CLIENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the chunks of one bank row in order."""
    across_K = tl.cdiv(K, BLOCK_D)
    bank_row, column = tl.program_id(0), tl.program_id(1)
    ids = tl.arange(0, CLIENTS)
    real = ids < num_clients
    length = tl.load(tokens_ptr + ids + 1, mask=real, other=0) - tl.load(tokens_ptr + ids, mask=real, other=0)
    bank = tl.load(ranks_ptr + ids, mask=real, other=0)
    end = tl.load(ranks_ptr + ids + 1, mask=real, other=0)
    chunks = tl.where(length > CHUNK, tl.cdiv(length, CHUNK), 0)
    mine = (bank <= bank_row) & (bank_row < end)
    count = tl.sum(tl.where(mine, chunks, 0), 0)
    if count == 0:
        return
    rank = tl.sum(tl.where(mine, end - bank, 0), 0)
    before = real & (end <= bank_row)
    part = tl.sum(tl.where(before, chunks.to(tl.int64) * (end - bank), 0), 0)
    part += bank_row - tl.sum(tl.where(mine, bank, 0), 0)
    D, out_ptr, part_ptr = K, dA_ptr, partA_ptr
    if column >= across_K:
        D, out_ptr, part_ptr = N, dB_ptr, partB_ptr
        column -= across_K
    column_D = column * BLOCK_D + tl.arange(0, BLOCK_D)
    real_D = column_D < D
    acc_D = tl.zeros([BLOCK_D], dtype=tl.float32)
    for chunk in range(count):
        acc_D += tl.load(part_ptr + (part + chunk * rank) * D + column_D, mask=real_D, other=0.0)
    out_ptrs = out_ptr + bank_row.to(tl.int64) * D + column_D
    tl.store(out_ptrs, acc_D.to(out_ptr.dtype.element_ty), mask=real_D)


def _part_rows(tokens: Ranges, ranks: Ranges) -> int:
    """Workspace rows: one per rank and chunk of every client that is cut, or the most that there can be."""
    if not lengths_known(tokens):
        # A client that is cut has at most twice its whole chunks.
        return 2 * (total(tokens) // CHUNK) * highest(ranks)
    sizes = [(m.stop - m.start, p.stop - p.start) for m, p in zip(tokens, ranks, strict=True)]
    return sum(triton.cdiv(length, CHUNK) * rank for length, rank in sizes if length > CHUNK)


def wgrad(
    ds_flat: torch.Tensor,
    x_MK: torch.Tensor,
    s_flat: torch.Tensor,
    dy_MN: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dA_PK = dS^T drop(X) and dB_PN = s S^T dY in ``dtype``; clients without tokens get zeros."""
    K, N, P, device = x_MK.shape[1], dy_MN.shape[1], total(ranks), x_MK.device
    tile = pick(TILES if are_aligned(x_MK, dy_MN) else ODD_TILES, x_MK.dtype)
    block_r = rank_block(ranks)
    rows = clients(tokens, ranks, scaling_C, dropout, device)
    results = [torch.empty(P, D, dtype=dtype, device=device) for D in (K, N)]
    parts = [torch.empty(_part_rows(tokens, ranks), D, device=device) for D in (K, N)]
    across = sum(triton.cdiv(D, tile.sizes["BLOCK_D"]) for D in (K, N))
    slots = triton.cdiv(total(tokens), CHUNK) + len(tokens)
    widest = max((bank.stop - bank.start for bank in ranks), default=0)
    with on_device(x_MK):
        _wgrad_kernel[slots * across, triton.cdiv(widest, block_r)](
            *(ds_flat, x_MK, s_flat, dy_MN, *results, *parts, *rows.pointers, K, N, *x_MK.stride(), *dy_MN.stride()),
            **rows.options,
            CHUNK=CHUNK,
            BLOCK_R=block_r,
            **tile.options,
        )
        if parts[0].shape[0]:
            _wgrad_sum_kernel[P, sum(triton.cdiv(D, _SUM_BLOCK) for D in (K, N))](
                *(*results, *parts, rows.tokens, rows.ranks, rows.count, K, N),
                CLIENTS=rows.options["CLIENTS"],
                CHUNK=CHUNK,
                BLOCK_D=_SUM_BLOCK,
            )
    return results[0], results[1]


__all__ = ["wgrad"]
