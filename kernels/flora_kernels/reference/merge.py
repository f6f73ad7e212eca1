"""Torch oracle of the merge ``W += B^T diag(coef) A`` and of its roundings, clean in float64.

Letters: K in_features, N out_features, P sum of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..types import MergeItem
from .draws import draws


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split an fp32 master into bf16 and low bits: bits(master) = (bits(bf16) << 16) + low.

    Args:
        master: float32, any shape.
    Returns:
        The master rounded to bfloat16, to nearest (a tie goes away from zero, so that ``low`` fits 16 bits), and low
        in int16.
    """
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(weight: torch.Tensor, low_bits: torch.Tensor) -> torch.Tensor:
    """Join a bf16 weight and its 16 signed low bits into the fp32 master; undoes ``split_master``.

    Args:
        weight, low_bits: bfloat16 and int16 of one shape.
    Returns:
        float32 of that shape.
    """
    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + low_bits.to(torch.int32)).view(torch.float32)


def round_stochastic(master: torch.Tensor, dtype: torch.dtype, seed: int, first_row: int) -> torch.Tensor:
    """Round fp32 to bf16 up or down with the odds of its 16 low bits.

    Args:
        master: float32 (rows, columns).
        dtype: Of the result, bfloat16 or wider.
        seed: The key of the draws, 64 bits.
        first_row: The number of the first row; draws are counted by row and column.
    Returns:
        The rounded numbers in ``dtype``; what is not finite is cut without a draw.
    """
    rows, columns = master.shape
    drawn = draws(rows, columns, seed, first_row, 1, master.device)
    bits = master.contiguous().view(torch.int32).to(torch.int64)
    rounded = torch.where(torch.isfinite(master), bits + drawn, bits) >> 16
    return rounded.to(torch.int16).view(torch.bfloat16).to(dtype)


# Rows of W handled at a time: a float64 block of 64 x 4096 is 2 MB and stays in cache.
_MERGE_ROWS = 256


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
    """Merge a stack in place: W += B^T diag(coef) A, one sum in ``accumulate``, one rounding.

    Args:
        weight_NK, A_PK, B_PN, coef_P: float64, float32, bfloat16 or float16, each of its own.
        rounding: "nearest", or "stochastic" for a bfloat16 weight.
        low_bits_NK: int16; makes a bfloat16 weight the upper half of an fp32 master, and is updated too.
        seed: Of stochastic rounding.
        accumulate: float32 or float64; a float64 weight is always summed in float64.
    """
    if weight_NK.stride(-1) != 1 and weight_NK.stride(0) == 1 and rounding == "nearest" and low_bits_NK is None:
        # A transposed weight (Conv1D): merge the transpose, which is contiguous.
        return merge_(weight_NK.T, B_PN, A_PK, coef_P, accumulate=accumulate)
    wide = torch.promote_types(accumulate, torch.float64 if weight_NK.dtype == torch.float64 else torch.float32)
    a_PK = A_PK.to(wide)
    b_NP = B_PN.to(wide).T * coef_P.to(wide)
    if weight_NK.dtype == wide:
        weight_NK.addmm_(b_NP, a_PK)
        return None
    for start in range(0, weight_NK.shape[0], _MERGE_ROWS):
        rows = slice(start, start + _MERGE_ROWS)
        w_nK = weight_NK[rows]
        master = w_nK if low_bits_NK is None else join_master(w_nK, low_bits_NK[rows])
        summed = torch.addmm(master.to(wide), b_NP[rows], a_PK)
        if low_bits_NK is not None:
            w_nK[:], low_bits_NK[rows] = split_master(summed.float())
        elif rounding == "stochastic":
            w_nK[:] = round_stochastic(summed.float(), w_nK.dtype, seed, start)
        else:
            w_nK[:] = summed.to(w_nK.dtype)
    return None


def merge_many_(
    items: Sequence[MergeItem], *, rounding: str = "nearest", seed: int = 0, accumulate: torch.dtype = torch.float32
) -> None:
    """Merge many weights in place, one after another.

    Args:
        items: Each a weight with its stack, as ``merge_`` takes them.
        rounding, accumulate: As in ``merge_``.
        seed: Of stochastic rounding; item i uses the key ``seed + i``.
    """
    for i, (weight, A, B, coef, low_bits) in enumerate(items):
        merge_(weight, A, B, coef, rounding=rounding, low_bits_NK=low_bits, seed=seed + i, accumulate=accumulate)


__all__ = ["join_master", "merge_", "merge_many_", "round_stochastic", "split_master"]
