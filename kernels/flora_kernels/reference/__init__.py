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

Arguments that many functions share:
    x_MK, y_MN, dy_MN: Activations, outputs, gradients: float64, float32, bfloat16 or float16, one dtype a call.
    A_PK, B_PN: The clients' stacked rows, in that dtype or as masters, which are rounded to it first.
    tokens, ranks: One slice per client over M and over P, in order and without gaps; some may be empty.
    scaling_C: One number per client; None, where it may be, is 1.
    dropout: ``Dropout(q_C, seed_C, row_C)``: threshold of 65536, Philox key and first row of each client's mask.
Nothing is checked here: ``flora_core.ops`` does, and torch's own errors say the rest. Everything is deterministic as
far as torch's products are. Sources: LoRA, arXiv 2106.09685; the stacked merge, arXiv 2409.05976, eq. 5.
"""

# torch leaves its _foreach functions out of its stubs.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.optim.adamw import adamw

from ..types import Dropout, MergeItem, Ranges
from .draws import dropout_keep, philox4x32
from .merge import join_master, merge_, merge_many_, round_stochastic, split_master


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
    """Multiply by the frozen weight: Y = X W^T + b.

    Args:
        x_MK, weight_NK, bias_N: Of one dtype; the bias may be None.
    Returns:
        y_MN in that dtype.
    """
    return torch.nn.functional.linear(x_MK, weight_NK, bias_N)


def shrink(
    x_MK: torch.Tensor,
    A_PK: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Project each client's rows onto its ranks: S_c = scaling_c drop(X_c) A_c^T. Also dS = s dY B^T, with B for A.

    Args:
        x_MK, A_PK, tokens, ranks, scaling_C, dropout: See the top of this file.
    Returns:
        Flat S, sum of m_c r_c elements in the dtype of x, rounded once.
    """
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
    """Add each client's branch in place: Y_c += scaling_c S_c B_c. Also dX += mask (dS A) / (1 - q), with A for B.

    Args:
        y_MN: Updated; rows of clients without rank stay as they are.
        s_flat: S as ``shrink`` gives it, in the dtype of y.
        B_PN, tokens, ranks, scaling_C: See the top of this file.
        dropout: The forward's; dropped elements of Y get nothing, kept ones are scaled up.
    Returns:
        y_MN.
    """
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
    """Shrink once for each target that shares x.

    Args:
        x_MK, tokens: Of all targets.
        factors, ranks, scaling, dropout: Each target's A, ranks, scaling_C and dropout, as ``shrink`` takes them.
    Returns:
        Each target's flat S.
    """
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
    """Expand several targets into one Y in place; 16 bits are summed in float32 and rounded once.

    Args:
        y_MN, tokens: Of all targets.
        s_flats, factors, ranks, scaling, dropout: Each target's S, B, ranks, scaling_C and dropout.
    Returns:
        y_MN.
    """
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
    """Sum the adapters' gradients: dA_c = dS_c^T drop(X_c), dB_c = scaling_c S_c^T dY_c.

    Args:
        ds_flat, s_flat: dS and S as ``shrink`` gives them.
        x_MK, dy_MN, tokens, ranks, scaling_C, dropout: See the top of this file.
        dtype: Of the gradients.
    Returns:
        dA_PK and dB_PN, rounded once; clients without tokens get zeros.
    """
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
    """Multiply by the frozen weight and add the branch: Y = X W^T + b + scaling_c S_c B_c.

    Args:
        x_MK, weight_NK, bias_N: As ``linear`` takes them.
        s_flat, B_PN, tokens, ranks, scaling_C: As ``expand_`` takes them.
    Returns:
        y_MN in the dtype of x.
    """
    return expand_(linear(x_MK, weight_NK, bias_N), s_flat, B_PN, tokens, ranks, scaling_C)


def place_(
    out_MP: torch.Tensor,
    s_flat: torch.Tensor,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor,
) -> torch.Tensor:
    """Put scaling_c S_c into the columns ranks[c] of rows tokens[c], zero everywhere else; columns past P too.

    Args:
        out_MP: Overwritten; at least P columns, any float dtype.
        s_flat, tokens, ranks, scaling_C: As ``expand_`` takes them.
    Returns:
        out_MP.
    """
    out_MP.zero_()
    for c, rows, bank, flat in _clients(tokens, ranks):
        out_MP[rows, bank] = (
            (_wide(s_flat[flat]) * float(scaling_C[c])).view(rows.stop - rows.start, -1).to(out_MP.dtype)
        )
    return out_MP


def cohort_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Ranges,
    hyper_CH: torch.Tensor,
    owner: Sequence[int],
) -> None:
    """Step AdamW over flat buffers in place, each client with its own settings.

    Args:
        param, grad, exp_avg, exp_avg_sq: Flat, of one size and dtype, float64 or float32; all but grad are updated.
        segments: Slices of the buffers, in order and without gaps.
        hyper_CH: Rows of lr, beta1, beta2, eps, weight decay, step (1 for the first; 0 leaves a segment untouched),
            scale of the gradient.
        owner: Segment i takes row owner[i] of hyper.
    Source: arXiv 1711.05101 (AdamW), as ``torch.optim.AdamW``.
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
    "round_stochastic",
    "shrink",
    "shrink_many",
    "split_master",
    "wgrad",
]
