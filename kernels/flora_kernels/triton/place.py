"""place: the scaled S of every client in columns of its own, zero in the others': what a wider X holds beside X.

One launch. A program writes BLOCK_M rows of one client and BLOCK_P columns, all of them, so that nothing need be
cleared before. Called by ``ways.augmented``: [X | S'] [W | B]^T is then X W^T + s_c S_c B_c.
Letters: M packed tokens, P columns (at least the sum of ranks), R one client's rank, C clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..reference import Ranges
from .common import FLOAT_DTYPES, Tile, clients, find_tile, on_device, pick, total

TILES = (Tile(FLOAT_DTYPES, dict(BLOCK_M=64, BLOCK_P=64), num_warps=4, num_stages=1),)


@triton.jit
def _place_kernel(
    out_ptr,
    s_ptr,
    tokens_ptr,
    ranks_ptr,
    scaling_ptr,
    num_clients,
    P,
    out_stride_m,
    out_stride_p,
    CLIENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    client, first, stop, row, bank, rank, s_start, _ = find_tile(
        tokens_ptr, ranks_ptr, num_clients, tl.program_id(0), BLOCK_M, CLIENTS, 0
    )
    if client >= num_clients:
        return
    row_M, column_P = row + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    real_M, mine_P = row_M < stop, (column_P >= bank) & (column_P < bank + rank)
    s_ptrs = s_ptr + s_start + (row_M - first).to(tl.int64)[:, None] * rank + (column_P - bank)[None, :]
    s_MP = tl.load(s_ptrs, mask=real_M[:, None] & mine_P[None, :], other=0.0).to(tl.float32)
    # By selection: a scale that is not finite must not reach the others' columns.
    s_MP = tl.where(mine_P[None, :], s_MP * tl.load(scaling_ptr + client), 0.0)
    out_ptrs = out_ptr + row_M.to(tl.int64)[:, None] * out_stride_m + column_P.to(tl.int64)[None, :] * out_stride_p
    tl.store(out_ptrs, s_MP.to(out_ptr.dtype.element_ty), mask=real_M[:, None] & (column_P < P)[None, :])


def place_(
    out_MP: torch.Tensor,
    s_flat: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor,
) -> torch.Tensor:
    """scaling_c S_c into the columns ranks[c] of rows tokens[c], zero everywhere else; columns past P too."""
    tile, P = pick(TILES, out_MP.dtype), out_MP.shape[1]
    rows = clients(tokens, ranks, scaling_C, None, out_MP.device)
    tall = triton.cdiv(total(tokens), tile.sizes["BLOCK_M"]) + len(tokens)
    with on_device(out_MP):
        _place_kernel[tall, triton.cdiv(P, tile.sizes["BLOCK_P"])](
            *(out_MP, s_flat, rows.tokens, rows.ranks, rows.scaling, rows.count, P, *out_MP.stride()),
            CLIENTS=rows.options["CLIENTS"],
            **tile.options,
        )
    return out_MP


__all__ = ["place_"]
