"""Fusions: orders in which a client's branch and the frozen product are put together, forward and backward.

    Y  = X W^T + b + s_c S_c B_c        forward, one target
    dX = sum over targets of dY W + mask (dS A) / (1 - q)        backward, all targets that share X

    separate    the library's product, then the branch added to it
    prewrite    the branch first, then the library's product added to it (beta = 1)
    kernel      one kernel, the rank as a tail of its product; backward for one target without dropout, whose mask must
                not touch the base's product
    augmented   the library's product over [X | S'] and [W | B], S' zero but in the columns of a token's own client;
                backward as ``prewrite``

Which one is fastest depends on shape and device: ``autotune`` measures. Isolation holds in each: the augmented
product would carry a NaN in one client's B to everybody (0 * NaN), so that client's columns are taken out.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from ..common import Segments
from .autotune import Shape, choices_for, timer_on

# Library products want their inner size in whole vectors and tiles.
_PAD = 64
Numbers = Sequence[float] | torch.Tensor
Tensors = Sequence[torch.Tensor]


@dataclass(slots=True)
class Plan:
    """Arguments of forward and gradients that are no tensors of the graph; one entry per target."""

    kernels: ModuleType
    tokens: Segments
    ranks: tuple[Segments, ...]
    scaling: tuple[Numbers, ...]
    dropout: tuple[Any, ...]
    bases: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    fuse: str = "separate"


# Forward, of target i.


def _separate(plan: Plan, i: int, x_MK: torch.Tensor, s_flat: torch.Tensor, B_PN: torch.Tensor) -> torch.Tensor:
    y_MN = F.linear(x_MK, *plan.bases[i])
    return plan.kernels.expand_(y_MN, s_flat, B_PN, plan.tokens, plan.ranks[i], plan.scaling[i])


def _prewrite(plan: Plan, i: int, x_MK: torch.Tensor, s_flat: torch.Tensor, B_PN: torch.Tensor) -> torch.Tensor:
    weight, bias = plan.bases[i]
    shape = x_MK.shape[0], weight.shape[0]
    y_MN = x_MK.new_zeros(shape) if bias is None else bias.expand(shape).clone(memory_format=torch.contiguous_format)
    y_MN = plan.kernels.expand_(y_MN, s_flat, B_PN, plan.tokens, plan.ranks[i], plan.scaling[i])
    return y_MN.addmm_(x_MK, weight.T)


def _kernel(plan: Plan, i: int, x_MK: torch.Tensor, s_flat: torch.Tensor, B_PN: torch.Tensor) -> torch.Tensor:
    rest = s_flat, B_PN, plan.tokens, plan.ranks[i], plan.scaling[i]
    return plan.kernels.linear_lora(x_MK, *plan.bases[i], *rest)


def _augmented(plan: Plan, i: int, x_MK: torch.Tensor, s_flat: torch.Tensor, B_PN: torch.Tensor) -> torch.Tensor:
    """One library product over X and W with the branch as extra columns; what writes the wider X and W is included."""
    weight, bias = plan.bases[i]
    (M, K), N, P = x_MK.shape, weight.shape[0], plan.ranks[i].total
    extra = -(-P // _PAD) * _PAD
    B_NP, scaling_C = _without_nonfinite_clients(B_PN.to(x_MK.dtype), plan.ranks[i], plan.scaling[i])
    wide_x, wide_w = x_MK.new_empty(M, K + extra), weight.new_empty(N, K + extra)
    wide_x[:, :K], wide_w[:, :K], wide_w[:, K : K + P], wide_w[:, K + P :] = x_MK, weight, B_NP, 0
    plan.kernels.place_(wide_x[:, K:], s_flat, plan.tokens, plan.ranks[i], scaling_C)
    return F.linear(wide_x, wide_w, bias)


@functools.lru_cache(maxsize=256)
def _copied(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Host numbers on a device, copied once: a graph that is captured may not wait for a copy."""
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _without_nonfinite_clients(
    B_PN: torch.Tensor, ranks: Segments, scaling_C: Numbers
) -> tuple[torch.Tensor, torch.Tensor]:
    """B^T without the columns of clients in whose B something is not finite, and NaN for their scale.

    Their own rows become NaN as a whole; no other client's are touched. Nothing is read back from the device.
    """
    device, wide = B_PN.device, torch.promote_types(B_PN.dtype, torch.float32)
    offsets = ranks.offsets_on(device).long()
    # A running count tells which clients have rows that are not finite; it is the same at every run.
    sick_P = F.pad((~B_PN.isfinite().all(1)).long().cumsum(0), (1, 0))
    finite_C = sick_P[offsets[1:]] == sick_P[offsets[:-1]]
    owner_P = torch.bucketize(torch.arange(ranks.total, device=device), offsets[1:], right=True)
    scaling = scaling_C if isinstance(scaling_C, torch.Tensor) else _copied(tuple(scaling_C), device)
    scaling = scaling.to(device, wide)
    return torch.where(finite_C[owner_P], B_PN.T, 0), torch.where(finite_C, scaling, float("nan"))


# Backward.


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
    dx_MK = torch.mm(dys[0], plan.bases[0][0])
    for dy_MN, (weight, _) in zip(dys[1:], plan.bases[1:], strict=True):
        dx_MK.addmm_(dy_MN, weight)
    _expand_into_dx(plan, dx_MK, ds_flats, A)
    return dx_MK


def _dx_prewrite(plan: Plan, dys: Tensors, ds_flats: Tensors, A: Tensors) -> torch.Tensor:
    dx_MK = dys[0].new_zeros(dys[0].shape[0], A[0].shape[1])
    _expand_into_dx(plan, dx_MK, ds_flats, A)
    for dy_MN, (weight, _) in zip(dys, plan.bases, strict=True):
        dx_MK.addmm_(dy_MN, weight)
    return dx_MK


def _dx_kernel(plan: Plan, dys: Tensors, ds_flats: Tensors, A: Tensors) -> torch.Tensor:
    ones_C = (1.0,) * len(plan.tokens)
    weight = plan.bases[0][0]
    return plan.kernels.linear_lora(dys[0], weight.T, None, ds_flats[0], A[0], plan.tokens, plan.ranks[0], ones_C)


@dataclass(frozen=True)
class Fusion:
    """One order, forward and backward.

    Args:
        forward: (plan, i, x_MK, s_flat, B_PN) -> y_MN of target i.
        backward: (plan, dys, ds_flats, A) -> dx_MK of all targets.
        needs: What it needs of the kernels besides shrink, expand_ and wgrad.
        single: Its backward takes one target without dropout; others' is that of ``prewrite``.
    """

    forward: Callable[..., torch.Tensor]
    backward: Callable[..., torch.Tensor]
    needs: str = "expand_"
    single: bool = False


FUSIONS: dict[str, Fusion] = {
    "separate": Fusion(_separate, _dx_separate),
    "prewrite": Fusion(_prewrite, _dx_prewrite),
    "kernel": Fusion(_kernel, _dx_kernel, needs="linear_lora", single=True),
    "augmented": Fusion(_augmented, _dx_prewrite, needs="place_"),
}


def possible(kernels: ModuleType) -> tuple[str, ...]:
    """Names of the fusions that a backend's kernels have."""
    return tuple(name for name, fusion in FUSIONS.items() if hasattr(kernels, fusion.needs))


def fused_forward(plan: Plan, i: int, x_MK: torch.Tensor, s_flat: torch.Tensor, B_PN: torch.Tensor) -> torch.Tensor:
    """Y of target i, in the order that the caller named, or the fastest for its shape on a GPU."""
    arguments = plan, i, x_MK, s_flat, B_PN
    if plan.fuse != "auto" or x_MK.device.type != "cuda":
        return FUSIONS["separate" if plan.fuse == "auto" else plan.fuse].forward(*arguments)
    N, K = plan.bases[i][0].shape
    shape = Shape("forward", x_MK.shape[0], N, K, plan.ranks[i].total, x_MK.dtype)
    calls = {name: functools.partial(FUSIONS[name].forward, *arguments) for name in possible(plan.kernels)}
    return _fastest(shape, calls, x_MK.device)


def fused_backward(plan: Plan, dys: Tensors, ds_flats: Tensors, A: Tensors) -> torch.Tensor:
    """dX of all targets, in the order of their forward where that can be, or the fastest on a GPU."""
    dropping = any(dropout is not None for dropout in plan.dropout)
    has_single = len(dys) == 1 and not dropping and hasattr(plan.kernels, "linear_lora")
    able = {name: f.backward for name, f in FUSIONS.items() if has_single or not f.single}
    arguments = plan, dys, ds_flats, A
    if plan.fuse != "auto" or dys[0].device.type != "cuda":
        return able.get("separate" if plan.fuse == "auto" else plan.fuse, _dx_prewrite)(*arguments)
    N, P = sum(dy.shape[1] for dy in dys), sum(ranks.total for ranks in plan.ranks)
    shape = Shape("backward", dys[0].shape[0], N, A[0].shape[1], P, dys[0].dtype, dropping)
    # Each order once, under the first fusion that has it.
    named = {backward: name for name, backward in reversed(able.items())}
    calls = {name: functools.partial(able[name], *arguments) for name in able if name in named.values()}
    return _fastest(shape, calls, dys[0].device)


def _fastest(shape: Shape, calls: Mapping[str, Callable[[], torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Run the order that was measured to be the fastest for a shape, or measure now where no graph is captured."""
    may_measure = not torch.cuda.is_current_stream_capturing()
    return calls[choices_for(device).pick(shape, calls, timer_on(device), may_measure)]()
