"""Torch oracle of every primitive: one client's rows at a time, clean in float64.

    shrink   S_c  = drop(X_c) A_c^T                       X_c = rows tokens[c] of X, A_c = rows ranks[c] of A
    expand   Y_c += s_c S_c B_c                           (dropped columns of Y get nothing, kept ones 1 / (1 - q))
    wgrad    dA_c = dS_c^T drop(X_c),   dB_c = s_c S_c^T dY_c
    merge    W   += B^T diag(coef) A
    adamw    Adam with decoupled weight decay over flat buffers

Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
``tokens`` and ``ranks`` hold one slice per client, over M and P. S is ragged and flat: client c's
block of m_c x r_c numbers follows client c-1's. 16-bit inputs are widened to float32 per client, so sums
are always at least float32. Rows of different clients never meet in a sum: a NaN stays with its client.
"""

# torch leaves its _foreach functions out of its stubs.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.optim.adamw import adamw

from .arguments import Dropout, MergeItem, Ranges

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF


def philox4x32(
    counter: Sequence[torch.Tensor], key: tuple[int, int], rounds: int = 7
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four 32-bit words (held in int64) per counter. Salmon et al., SC 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap, which leaves the low 64 bits right; the mask undoes the arithmetic shift.
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _U32) ^ c1 ^ k0, p1 & _U32, ((p0 >> 32) & _U32) ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + _PHILOX_W[0]) & _U32, (k1 + _PHILOX_W[1]) & _U32
    return c0, c1, c2, c3


def _draws(rows: int, columns: int, seed: int, first_row: int, stream: int, device: torch.device) -> torch.Tensor:
    """16-bit draws (rows, columns), held in int64.

    The key is ``seed`` (low word, high word), the counter is (column // 8, row, 0, stream); draw ``column % 8`` is a
    16-bit half of word ``(column % 8) // 2``, the low half first.
    """
    row_M1 = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)[:, None]
    group_1G = torch.arange((columns + 7) // 8, dtype=torch.int64, device=device)[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32((group_1G, row_M1, zero, zero + stream), (seed & _U32, (seed >> 32) & _U32))
    words = [word.expand(rows, group_1G.shape[1]) for word in words]
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return draws.flatten(1)[:, :columns]


def dropout_keep(rows: int, columns: int, q: int, seed: int, first_row: int, device: torch.device) -> torch.Tensor:
    """Bool (rows, columns), True where an element is kept: where its draw is at least q."""
    return _draws(rows, columns, seed, first_row, 0, device) >= q


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _compute_copy(adapter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The adapter as the compute dtype sees it, widened for the sum."""
    return _wide(adapter.to(dtype))


def _clients(tokens: Ranges, ranks: Ranges) -> Iterator[tuple[int, slice, slice, slice]]:
    """Every client that has both tokens and rank: index, rows of X, rows of the bank, range of flat S."""
    start = 0
    for index, (rows, bank) in enumerate(zip(tokens, ranks, strict=True)):
        size = (rows.stop - rows.start) * (bank.stop - bank.start)
        if size:
            yield index, rows, bank, slice(start, start + size)
        start += size


def _keep(dropout: Dropout | None, index: int, rows: slice, columns: int, device: torch.device) -> torch.Tensor | None:
    if dropout is None or dropout.q_C[index] == 0:
        return None
    q, seed, first_row = (int(values[index]) for values in dropout)
    return dropout_keep(rows.stop - rows.start, columns, q, seed, first_row, device)


def _scale_up(dropout: Dropout, index: int) -> float:
    return 65536 / (65536 - int(dropout.q_C[index]))


def _drop(x_mK: torch.Tensor, dropout: Dropout | None, index: int, rows: slice) -> torch.Tensor:
    """drop(x): kept elements scaled by 65536 / (65536 - q), the others exactly zero even where x is NaN."""
    keep = _keep(dropout, index, rows, x_mK.shape[1], x_mK.device)
    if keep is None or dropout is None:
        return x_mK
    return torch.where(keep, x_mK * _scale_up(dropout, index), 0)


def _product_into(
    out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling_C: Sequence[float] | torch.Tensor | None, c: int
) -> None:
    """out = scaling_c left right, rounded once to the dtype of out; without a copy where that is the product's."""
    same = out.dtype == left.dtype == right.dtype
    product = torch.mm(left, right, out=out if same else None)
    if scaling_C is not None:
        product.mul_(float(scaling_C[c]))
    if not same:
        out.copy_(product)


def linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """The frozen product Y = X W^T + b."""
    return torch.nn.functional.linear(x_MK, weight_NK, bias_N)


def shrink(
    x_MK: torch.Tensor,
    A_PK: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Flat S in the dtype of x: S_c = scaling_c drop(X_c) A_c^T. Also dS = s dY B^T, with B for A."""
    size = sum((m.stop - m.start) * (p.stop - p.start) for m, p in zip(tokens, ranks, strict=True))
    s_flat = x_MK.new_empty(size)
    for c, rows, bank, flat in _clients(tokens, ranks):
        a_RK = _compute_copy(A_PK[bank], x_MK.dtype)
        s_mR = s_flat[flat].view(-1, bank.stop - bank.start)
        _product_into(s_mR, _drop(_wide(x_MK[rows]), dropout, c, rows), a_RK.T, scaling_C, c)
    return s_flat


def expand_(
    y_MN: torch.Tensor,
    s_flat: torch.Tensor,
    B_PN: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Y_c += scaling_c S_c B_c in place. Also dX += mask (dS A) / (1 - q), with A for B and the forward's dropout."""
    narrow = y_MN.dtype in (torch.bfloat16, torch.float16)
    for c, rows, bank, flat in _clients(tokens, ranks):
        b_RN = _compute_copy(B_PN[bank], y_MN.dtype)
        s_mR = _wide(s_flat[flat]).view(rows.stop - rows.start, -1)
        scale = 1.0 if scaling_C is None else float(scaling_C[c])
        keep = _keep(dropout, c, rows, y_MN.shape[1], y_MN.device)
        if keep is None and not narrow:
            y_MN[rows].addmm_(s_mR, b_RN, alpha=scale)
            continue
        add_mN = (s_mR @ b_RN).mul_(scale)
        if keep is not None and dropout is not None:
            add_mN = torch.where(keep, add_mN * _scale_up(dropout, c), 0)
        y_MN[rows] = (_wide(y_MN[rows]) + add_mN).to(y_MN.dtype)
    return y_MN


def shrink_many(
    x_MK: torch.Tensor,
    factors: Sequence[torch.Tensor],
    tokens: Ranges,
    ranks: Sequence[Ranges],
    scaling: Sequence[Sequence[float] | torch.Tensor | None],
    dropout: Sequence[Dropout | None],
) -> list[torch.Tensor]:
    """``shrink`` for targets that share x: each with its A, ranks, scales and dropout."""
    targets = zip(factors, ranks, scaling, dropout, strict=True)
    return [shrink(x_MK, A_PK, tokens, rows, scale, drop) for A_PK, rows, scale, drop in targets]


def expand_many_(
    y_MN: torch.Tensor,
    s_flats: Sequence[torch.Tensor],
    factors: Sequence[torch.Tensor],
    tokens: Ranges,
    ranks: Sequence[Ranges],
    scaling: Sequence[Sequence[float] | torch.Tensor | None],
    dropout: Sequence[Dropout | None],
) -> torch.Tensor:
    """``expand_`` of several targets into one Y; 16 bits are summed in float32 and rounded once."""
    narrow = len(factors) > 1 and y_MN.dtype in (torch.bfloat16, torch.float16)
    sum_MN = y_MN.float() if narrow else y_MN
    for s_flat, B_PN, rows, scale, drop in zip(s_flats, factors, ranks, scaling, dropout, strict=True):
        B_PN = B_PN.to(y_MN.dtype).to(sum_MN.dtype) if narrow else B_PN
        expand_(sum_MN, s_flat.to(sum_MN.dtype), B_PN, tokens, rows, scale, drop)
    return y_MN.copy_(sum_MN) if narrow else y_MN


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
    total = ranks[-1].stop if len(ranks) else 0
    dA_PK = torch.empty(total, x_MK.shape[1], dtype=dtype, device=x_MK.device)
    dB_PN = torch.empty(total, dy_MN.shape[1], dtype=dtype, device=x_MK.device)
    for rows, bank in zip(tokens, ranks, strict=True):
        if rows.start == rows.stop:
            dA_PK[bank] = dB_PN[bank] = 0
    for c, rows, bank, flat in _clients(tokens, ranks):
        count = rows.stop - rows.start
        ds_Rm, s_Rm = (_wide(part[flat]).view(count, -1).T for part in (ds_flat, s_flat))
        _product_into(dA_PK[bank], ds_Rm, _drop(_wide(x_MK[rows]), dropout, c, rows), None, c)
        _product_into(dB_PN[bank], s_Rm, _wide(dy_MN[rows]), scaling_C, c)
    return dA_PK, dB_PN


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
    """Y = X W^T + b + scaling_c S_c B_c; S as ``shrink`` gives it."""
    return expand_(linear(x_MK, weight_NK, bias_N), s_flat, B_PN, tokens, ranks, scaling_C)


def place_(
    out_MP: torch.Tensor,
    s_flat: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor,
) -> torch.Tensor:
    """scaling_c S_c into the columns ranks[c] of rows tokens[c], zero everywhere else; columns past P too."""
    out_MP.zero_()
    for c, rows, bank, flat in _clients(tokens, ranks):
        out_MP[rows, bank] = (
            (_wide(s_flat[flat]) * float(scaling_C[c])).view(rows.stop - rows.start, -1).to(out_MP.dtype)
        )
    return out_MP


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An fp32 master as (bf16, int16 low bits): bits(master) = (bits(bf16) << 16) + low.

    The bf16 part is the master rounded to nearest; a tie goes away from zero, so that ``low`` fits 16 bits.
    """
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(weight: torch.Tensor, low_bits: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a bf16 weight and its 16 signed low bits."""
    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + low_bits.to(torch.int32)).view(torch.float32)


def round_stochastic(master: torch.Tensor, dtype: torch.dtype, seed: int, first_row: int) -> torch.Tensor:
    """Round fp32 to bf16 up or down with the odds of its 16 low bits; draws are counted by row and column."""
    rows, columns = master.shape
    draws = _draws(rows, columns, seed, first_row, 1, master.device)
    bits = master.contiguous().view(torch.int32).to(torch.int64)
    rounded = torch.where(torch.isfinite(master), bits + draws, bits) >> 16
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
    """W += B^T diag(coef) A in place: one sum in ``accumulate``, one rounding."""
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
    """Merge many weights in place; with stochastic rounding item i uses the key ``seed + i``."""
    for i, (weight, A, B, coef, low_bits) in enumerate(items):
        merge_(weight, A, B, coef, rounding=rounding, low_bits_NK=low_bits, seed=seed + i, accumulate=accumulate)


def cohort_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Ranges,
    hyper_CH: torch.Tensor,
    owner: Sequence[int],
) -> None:
    """AdamW over flat buffers in place; segment i takes row owner[i] of hyper, a step of 0 leaves it untouched.

    Columns of hyper: lr, beta1, beta2, eps, weight decay, step (1 for the first), clip scale of the gradient.
    """
    by_row: dict[int, list[slice]] = {}
    for segment, row in zip(segments, owner, strict=True):
        by_row.setdefault(row, []).append(segment)
    for row, ranges in by_row.items():
        lr, beta1, beta2, eps, decay, step, clip = hyper_CH[row].tolist()
        if step == 0:
            continue
        p, g, m, v = ([buffer[r] for r in ranges] for buffer in (param, grad, exp_avg, exp_avg_sq))
        # The fused form makes one pass over memory, where single operations make ten.
        adamw(
            p,
            list(torch._foreach_mul(g, clip)) if clip != 1 else g,
            m,
            v,
            [],
            list(torch.full((len(p),), step - 1, dtype=torch.float32, device=param.device).unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=decay,
            eps=eps,
            maximize=False,
        )


__all__ = [
    "Dropout",
    "MergeItem",
    "Ranges",
    "cohort_adamw_",
    "dropout_keep",
    "expand_",
    "expand_many_",
    "join_master",
    "linear",
    "linear_lora",
    "merge_",
    "merge_many_",
    "philox4x32",
    "place_",
    "shrink",
    "shrink_many",
    "split_master",
    "wgrad",
]
