"""LoRA linears over the primitives of ``flora_kernels``: forward, gradients, and the one autograd function.

    Y = X W^T + b + s_c drop(X) A_c^T B_c        for the rows of client c

Nothing is checked here; ``ops`` is for callers. Saved for backward: X once for all targets, S, A and B of each.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .fusion import Plan, fused_backward, fused_forward


def forward(
    plan: Plan, x_MK: torch.Tensor, factors: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Y and S of every target; ``factors`` are A and B by turns."""
    s_flats = _shrink(plan, x_MK, factors[::2])
    pairs = zip(s_flats, factors[1::2], strict=True)
    return [fused_forward(plan, i, x_MK, s_flat, B_PN) for i, (s_flat, B_PN) in enumerate(pairs)], s_flats


def _shrink(plan: Plan, x_MK: torch.Tensor, A: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """S of every target, x read once where the kernels can."""
    k, none = plan.kernels, (None,) * len(A)
    if len(A) > 1 and hasattr(k, "shrink_many"):
        return k.shrink_many(x_MK, A, plan.tokens, plan.ranks, none, plan.dropout)
    each = zip(A, plan.ranks, plan.dropout, strict=True)
    return [k.shrink(x_MK, A_PK, plan.tokens, ranks, None, dropout) for A_PK, ranks, dropout in each]


def gradients(
    plan: Plan,
    dys: Sequence[torch.Tensor],
    x_MK: torch.Tensor,
    s_flats: Sequence[torch.Tensor],
    factors: Sequence[torch.Tensor],
    wants_x: bool,
    wants: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """dX, then dA and dB of every target whose factors want them."""
    k, tokens, A, B = plan.kernels, plan.tokens, factors[::2], factors[1::2]
    dx_MK, factor_grads = None, []
    ds_flats = [
        k.shrink(dy, B_PN, tokens, *own) for dy, B_PN, *own in zip(dys, B, plan.ranks, plan.scaling, strict=True)
    ]
    if wants_x:
        dx_MK = fused_backward(plan, dys, ds_flats, A)
    for i, wanted in enumerate(wants):
        rest = tokens, plan.ranks[i], plan.scaling[i], A[i].dtype, plan.dropout[i]
        factor_grads += k.wgrad(ds_flats[i], x_MK, s_flats[i], dys[i], *rest) if wanted else (None, None)
    return dx_MK, factor_grads


class without_autocast:  # noqa: N801 (a context manager, used like torch.no_grad)
    """Keep autocast from taking the widened fp32 sums back to 16 bits; free where it is off."""

    def __init__(self, tensor: torch.Tensor):
        device = tensor.device.type
        self._inner = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else None

    def __enter__(self) -> None:
        if self._inner is not None:
            self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._inner is not None:
            self._inner.__exit__(*error)


class LoraLinears(torch.autograd.Function):
    """``forward`` and ``gradients`` for autograd. ``apply(plan, x_MK, A, B, A, B, ...) -> (y, ...)``."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x_MK: torch.Tensor, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, s_flats = forward(plan, x_MK, factors)
        ctx.save_for_backward(x_MK, *s_flats, *factors)
        ctx.plan = plan
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MK, *saved = ctx.saved_tensors
        count, needs = len(dys), ctx.needs_input_grad
        wants = [any(needs[2 + 2 * i : 4 + 2 * i]) for i in range(count)]
        # A view that is negated when it is read is not what kernels find at its address.
        dys = tuple(dy.resolve_neg() for dy in dys)
        with without_autocast(x_MK):
            dx_MK, factor_grads = gradients(ctx.plan, dys, x_MK, saved[:count], saved[count:], needs[1], wants)
        return None, dx_MK, *factor_grads
