"""LoRA linears over the primitives of ``flora_kernels``: forward, gradients, and the one autograd function.

    Y = X W^T + b + s_c drop(X) A_c^T B_c        for the rows of client c

Nothing is checked here; ``ops`` is for callers. Saved for backward: X once for all targets, S, A and B of each.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..common import Segments
from .autotune import Shape, choices_for, timer_on
from .fusion import WAYS, possible

Tensors = Sequence[torch.Tensor]


@dataclass(slots=True)
class Plan:
    """Arguments of forward and gradients that are no tensors of the graph; one entry per target."""

    kernels: ModuleType
    tokens: Segments
    ranks: tuple[Segments, ...]
    scaling: tuple[Sequence[float] | torch.Tensor, ...]
    dropout: tuple[Any, ...]
    bases: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    fuse: str = "separate"


def forward(
    plan: Plan, x_MK: torch.Tensor, factors: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Y and S of every target; ``factors`` are A and B by turns."""
    outputs, s_flats = [], _shrink(plan, x_MK, factors[::2])
    for i, (weight, bias) in enumerate(plan.bases):
        arguments = x_MK, weight, bias, s_flats[i], factors[2 * i + 1], plan.tokens, plan.ranks[i], plan.scaling[i]
        outputs.append(WAYS[_way_forward(plan, arguments)](plan.kernels, *arguments))
    return outputs, s_flats


def _way_forward(plan: Plan, arguments: tuple[Any, ...]) -> str:
    """The way of one target's product: the caller's, or the one that is fastest for its shape on a GPU."""
    x_MK, weight = arguments[:2]
    if plan.fuse != "auto" or x_MK.device.type != "cuda":
        return "separate" if plan.fuse == "auto" else plan.fuse
    N, K = weight.shape
    shape = Shape("forward", x_MK.shape[0], N, K, arguments[6].total, x_MK.dtype)
    calls = {way: functools.partial(WAYS[way], plan.kernels, *arguments) for way in possible(plan.kernels)}
    may_measure = not torch.cuda.is_current_stream_capturing()
    return choices_for(x_MK.device).pick(shape, calls, timer_on(x_MK.device), may_measure)


def _shrink(plan: Plan, x_MK: torch.Tensor, A: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """S of every target, x read once where the kernels can."""
    k, none = plan.kernels, (None,) * len(A)
    if len(A) > 1 and hasattr(k, "shrink_many"):
        return k.shrink_many(x_MK, A, plan.tokens, plan.ranks, none, plan.dropout)
    each = zip(A, plan.ranks, plan.dropout, strict=True)
    return [k.shrink(x_MK, A_PK, plan.tokens, ranks, None, dropout) for A_PK, ranks, dropout in each]


def _expand_into_dx(
    plan: Plan, dx_MK: torch.Tensor, ds_flats: Sequence[torch.Tensor], A: Sequence[torch.Tensor]
) -> None:
    """dX += mask (dS A) / (1 - q) of every target, dX read and written once where the kernels can."""
    k, none = plan.kernels, (None,) * len(A)
    if len(A) > 1 and hasattr(k, "expand_many_"):
        k.expand_many_(dx_MK, ds_flats, A, plan.tokens, plan.ranks, none, plan.dropout)
        return
    for ds_flat, A_PK, ranks, dropout in zip(ds_flats, A, plan.ranks, plan.dropout, strict=True):
        k.expand_(dx_MK, ds_flat, A_PK, plan.tokens, ranks, None, dropout)


def _dx_separate(plan: Plan, dys: Tensors, ds_flats: Tensors, A: Tensors) -> torch.Tensor:
    """The library's products, then the branches added to their sum."""
    dx_MK = torch.mm(dys[0], plan.bases[0][0])
    for dy_MN, (weight, _) in zip(dys[1:], plan.bases[1:], strict=True):
        dx_MK.addmm_(dy_MN, weight)
    _expand_into_dx(plan, dx_MK, ds_flats, A)
    return dx_MK


def _dx_prewrite(plan: Plan, dys: Tensors, ds_flats: Tensors, A: Tensors) -> torch.Tensor:
    """The branches first, then the library's products added to them."""
    dx_MK = dys[0].new_zeros(dys[0].shape[0], A[0].shape[1])
    _expand_into_dx(plan, dx_MK, ds_flats, A)
    for dy_MN, (weight, _) in zip(dys, plan.bases, strict=True):
        dx_MK.addmm_(dy_MN, weight)
    return dx_MK


def _dx_kernel(plan: Plan, dys: Tensors, ds_flats: Tensors, A: Tensors) -> torch.Tensor:
    """One kernel, for one target without dropout: dropout's mask must not touch the base's product."""
    ones_C = (1.0,) * len(plan.tokens)
    weight = plan.bases[0][0]
    return plan.kernels.linear_lora(dys[0], weight.T, None, ds_flats[0], A[0], plan.tokens, plan.ranks[0], ones_C)


_WAYS_BACK = {"separate": _dx_separate, "prewrite": _dx_prewrite, "kernel": _dx_kernel}


def _way_back(plan: Plan, dys: Tensors, ds_flats: Tensors, A: Tensors) -> str:
    """The way of dX: as forward where it can be, else the branches first; on a GPU the fastest unless it is fixed."""
    dropping = any(dropout is not None for dropout in plan.dropout)
    has_kernel = len(dys) == 1 and not dropping and hasattr(plan.kernels, "linear_lora")
    if plan.fuse != "auto" or dys[0].device.type != "cuda":
        named = {"auto": "separate", "separate": "separate", "kernel": "kernel" if has_kernel else "prewrite"}
        return named.get(plan.fuse, "prewrite")
    ways = [way for way in _WAYS_BACK if way != "kernel" or has_kernel]
    N, P = sum(dy.shape[1] for dy in dys), sum(ranks.total for ranks in plan.ranks)
    shape = Shape("backward", dys[0].shape[0], N, A[0].shape[1], P, dys[0].dtype, dropping)
    calls = {way: functools.partial(_WAYS_BACK[way], plan, dys, ds_flats, A) for way in ways}
    device, may_measure = dys[0].device, not torch.cuda.is_current_stream_capturing()
    return choices_for(device).pick(shape, calls, timer_on(device), may_measure)


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
        dx_MK = _WAYS_BACK[_way_back(plan, dys, ds_flats, A)](plan, dys, ds_flats, A)
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
