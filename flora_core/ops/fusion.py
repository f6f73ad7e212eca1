"""The ways to put a client's branch and the frozen product together; every one gives Y = X W^T + b + s_c S_c B_c.

    separate    the library's product, then the branch added to it
    prewrite    the branch first, then the library's product added to it (beta = 1)
    kernel      one kernel, the rank as a tail of its product
    augmented   the library's product over [X | S'] and [W | B], S' zero but in the columns of a token's own client

Which one is fastest depends on the shape and the device: ``tuning`` measures. Isolation holds in each: the augmented
product would carry a NaN in one client's B to everybody (0 * NaN), so that client's columns are taken out.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from ..common import Segments

# Library products want their inner size in whole vectors and tiles.
_PAD = 64
Numbers = Sequence[float] | torch.Tensor


def separate(k: Any, x_MK, weight, bias, s_flat, B_PN, tokens, ranks, scaling_C) -> torch.Tensor:
    """The library's product, then the branch added to it."""
    return k.expand_(F.linear(x_MK, weight, bias), s_flat, B_PN, tokens, ranks, scaling_C)


def prewrite(k: Any, x_MK, weight, bias, s_flat, B_PN, tokens, ranks, scaling_C) -> torch.Tensor:
    """The branch first, then the library's product added to it."""
    shape = x_MK.shape[0], weight.shape[0]
    y_MN = x_MK.new_zeros(shape) if bias is None else bias.expand(shape).clone(memory_format=torch.contiguous_format)
    return k.expand_(y_MN, s_flat, B_PN, tokens, ranks, scaling_C).addmm_(x_MK, weight.T)


def kernel(k: Any, x_MK, weight, bias, s_flat, B_PN, tokens, ranks, scaling_C) -> torch.Tensor:
    """One kernel."""
    return k.linear_lora(x_MK, weight, bias, s_flat, B_PN, tokens, ranks, scaling_C)


def augmented(k: Any, x_MK, weight, bias, s_flat, B_PN, tokens, ranks, scaling_C) -> torch.Tensor:
    """One library product over X and W with the branch as extra columns; what writes the wider X and W is included."""
    (M, K), N, P = x_MK.shape, weight.shape[0], ranks.total
    extra = -(-P // _PAD) * _PAD
    B_NP, scaling_C = _without_nonfinite_clients(B_PN.to(x_MK.dtype), ranks, scaling_C)
    wide_x, wide_w = x_MK.new_empty(M, K + extra), weight.new_empty(N, K + extra)
    wide_x[:, :K], wide_w[:, :K], wide_w[:, K : K + P], wide_w[:, K + P :] = x_MK, weight, B_NP, 0
    k.place_(wide_x[:, K:], s_flat, tokens, ranks, scaling_C)
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


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "separate": separate,
    "prewrite": prewrite,
    "kernel": kernel,
    "augmented": augmented,
}
# What each way needs of the kernels besides shrink, expand_ and wgrad.
NEEDS = {"kernel": "linear_lora", "augmented": "place_"}


def possible(kernels: ModuleType) -> tuple[str, ...]:
    """The ways that a backend's kernels have."""
    return tuple(way for way in WAYS if hasattr(kernels, NEEDS.get(way, "expand_")))
