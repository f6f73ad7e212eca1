"""adamw: Adam with decoupled weight decay over flat buffers, every client with its own settings, in one launch.

    p -= lr decay p;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
    p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

A program owns BLOCK elements at an aligned address and selects each element's settings from the ranges that it meets,
mostly one, so loads stay wide whatever the ranges are. Called by ``ops.cohort_adamw_``; arXiv 1711.05101.
Letters: C clients, H hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..reference import Ranges
from .common import Tile, last_at_or_before, offsets, on_device, pick, table

TILES = (
    Tile((torch.float32,), dict(BLOCK=1024), num_warps=4, num_stages=1),
    Tile((torch.float64,), dict(BLOCK=512), num_warps=4, num_stages=1),
)
_COLUMNS = 7


@triton.jit
def _power(base, exponent):
    """base ** exponent for a whole exponent, exact at 1: a power by logarithms would be an ulp off."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result *= tl.where(exponent % 2 == 1, base, 1.0)
        base *= base
        exponent //= 2
    return result


@triton.jit
def _adamw_kernel(
    param_ptr,
    grad_ptr,
    m_ptr,
    v_ptr,
    offsets_ptr,
    owner_ptr,
    hyper_ptr,
    num_ranges,
    numel,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = param_ptr.dtype.element_ty
    start = tl.program_id(0) * BLOCK
    element = start + tl.arange(0, BLOCK)
    real = element < numel
    zero = tl.zeros([BLOCK], dtype=dtype)
    shrunk, to_m, keep_v, to_v, rate, clip = zero, zero, zero, zero, zero, zero
    # Without an active client the step is computed all the same, and discarded: it must not divide by 0.
    root, eps = zero + 1, zero + 1
    active = element < 0
    index = last_at_or_before(offsets_ptr, num_ranges, start, 1)
    first = tl.load(offsets_ptr + index)
    # Not start + BLOCK, which is past 32 bits at the end of the longest buffer.
    while first - start < tl.minimum(BLOCK, numel - start):
        stop = tl.load(offsets_ptr + index + 1)
        hyper = hyper_ptr + tl.load(owner_ptr + index) * COLUMNS
        lr, beta1, beta2 = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2)
        decay, step = tl.load(hyper + 4), tl.load(hyper + 5).to(tl.int32)
        mine = (element >= first) & (element < stop) & (step > 0)
        # The settings are derived in float64, as torch derives them on the host.
        step = tl.maximum(step, 1)
        shrunk = tl.where(mine, (1 - lr * decay).to(dtype), shrunk)
        to_m = tl.where(mine, (1 - beta1).to(dtype), to_m)
        keep_v, to_v = tl.where(mine, beta2.to(dtype), keep_v), tl.where(mine, (1 - beta2).to(dtype), to_v)
        root = tl.where(mine, tl.sqrt(1 - _power(beta2, step)).to(dtype), root)
        eps = tl.where(mine, tl.load(hyper + 3).to(dtype), eps)
        rate = tl.where(mine, (lr / (1 - _power(beta1, step))).to(dtype), rate)
        clip = tl.where(mine, tl.load(hyper + 6).to(dtype), clip)
        active |= mine
        first, index = stop, index + 1
        # Past the last range there is nothing to read.
        index = tl.minimum(index, num_ranges - 1)
    old = tl.load(param_ptr + element, mask=real, other=0.0)
    old_m, old_v = tl.load(m_ptr + element, mask=real, other=0.0), tl.load(v_ptr + element, mask=real, other=0.0)
    grad = tl.load(grad_ptr + element, mask=real, other=0.0) * clip
    m = old_m + to_m * (grad - old_m)
    v = old_v * keep_v + to_v * (grad * grad)
    if dtype == tl.float32:
        # The plain operators are approximate in float32.
        update = tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    else:
        update = m / (tl.sqrt(v) / root + eps)
    # Who sits out gets its own bits back: a mask by range would make every store narrow.
    tl.store(param_ptr + element, tl.where(active, old * shrunk - rate * update, old), mask=real)
    tl.store(m_ptr + element, tl.where(active, m, old_m), mask=real)
    tl.store(v_ptr + element, tl.where(active, v, old_v), mask=real)


def cohort_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Ranges,
    hyper_CH: torch.Tensor,
    owner: Sequence[int],
) -> None:
    """AdamW over flat buffers in place; range i takes row owner[i] of hyper, a step of 0 leaves it untouched."""
    tile, device = pick(TILES, param.dtype), param.device
    numel, buffers = param.numel(), (param, grad, exp_avg, exp_avg_sq)
    tables = (offsets(segments, device), table(owner, torch.int32, device), table(hyper_CH, torch.float64, device))
    with on_device(param):
        _adamw_kernel[(triton.cdiv(numel, tile.sizes["BLOCK"]),)](
            *(*buffers, *tables, len(segments), numel), COLUMNS=_COLUMNS, **tile.options
        )


__all__ = ["cohort_adamw_"]
