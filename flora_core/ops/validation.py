"""Validation of the public ops' arguments: the one place, for eager calls and registered ops alike.

Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients,
H hyper-parameters. ``tokens`` partitions M and ``ranks`` partitions P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..common import DeviceSegments, Segments, check_choice, check_tensor, require
from .types import HYPER_COLUMNS, LoraWeights, MergeItem

_INT64 = -(2**63), 2**63
_PLAIN = {torch.Tensor, torch.nn.Parameter}


def check_kinds(tokens: Any, targets: Any) -> None:
    """Check that tokens and every target's ranks are segments, and that scales are one number per client."""
    check_segments("tokens", tokens)
    for i, target in enumerate(targets):
        prefix = f"targets[{i}]." if len(targets) > 1 else ""
        if not isinstance(target, LoraWeights):
            raise TypeError(f"targets[{i}] must be a flora_core.LoraWeights, got {type(target).__name__}")
        check_segments(f"{prefix}ranks", target.ranks)
        _check_per_client(f"{prefix}scaling_C", target.scaling_C)


def check_segments(name: str, value: Any) -> None:
    """Check that something is segments."""
    if not isinstance(value, (Segments, DeviceSegments)):
        raise TypeError(f"{name} must be Segments, got {type(value).__name__}; make them by Segments.from_lengths(...)")


def _check_per_client(name: str, values: Any) -> None:
    if not hasattr(values, "__len__") or isinstance(values, str):
        raise TypeError(f"{name} must hold one number per client, got {type(values).__name__}")


def check_rows(x_MK: torch.Tensor, total: int, segments: int) -> None:
    """Check that ``total`` tokens in so many segments are the rows of x."""
    check_tensor("x_MK", x_MK, (None, None))
    if total != x_MK.shape[0]:
        raise ValueError(f"tokens must cover the M={x_MK.shape[0]} rows of x_MK, got {total} in {segments} segments")


def check_target(
    prefix: str,
    x_MK: torch.Tensor,
    tensors: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor],
    p: int,
    lengths: tuple[int, int, int],
) -> None:
    """Check weight, bias, A and B of one target against x, and that there is a rank and a scale for each client.

    ``p`` is the sum of the ranks, ``lengths`` the numbers of token segments, of ranks and of scales.
    """
    (weight, bias, A, B), k, x, dtype = tensors, x_MK.shape[1], ("x_MK", x_MK), x_MK.dtype
    why = f"to match x_MK with K={k} columns"
    n = check_tensor(f"{prefix}weight_NK", weight, (None, k), dtypes=(dtype,), like=x, why=why).shape[0]
    require(not weight.requires_grad, f"{prefix}weight_NK must be frozen; call requires_grad_(False) on it first")
    if bias is not None:
        check_tensor(f"{prefix}bias_N", bias, (n,), dtypes=(dtype,), like=x)
        require(not bias.requires_grad, f"{prefix}bias_N must be frozen; call requires_grad_(False) on it first")
    masters = (dtype,) if dtype in (torch.float32, torch.float64) else (dtype, torch.float32)
    why = f"for ranks that sum to P={p}"
    check_tensor(f"{prefix}A_PK", A, (p, k), dtypes=masters, like=x, why=why)
    check_tensor(f"{prefix}B_PN", B, (p, n), dtypes=masters, like=x, why=why)
    clients, ranks, scales = lengths
    if ranks != clients or scales != clients:
        raise ValueError(
            f"{prefix}ranks and scaling_C must have one entry for each of the {clients} segments of tokens, "
            f"got {ranks} and {scales}"
        )


def is_sound(x_MK: torch.Tensor, target: LoraWeights, clients: int) -> bool:
    """Return whether ``check_target`` has nothing to say and all tensors are plain: quick, since every call pays for
    it.

    ``x_MK`` has passed ``check_rows``. What is not sound here is looked at again, one by one, to say what is wrong.
    """
    weight, bias, ranks, kind = target.weight, target.bias, target.ranks, x_MK.dtype
    if type(weight) not in _PLAIN or weight.dim() != 2 or weight.requires_grad:
        return False
    (N, K), P, device = weight.shape, ranks.total, x_MK.device
    factors = (kind,) if kind is torch.float64 else (kind, torch.float32)
    return (
        x_MK.shape[1] == K
        and len(ranks) == clients == len(target.scaling_C)
        and type(ranks) is Segments
        and _is_plain(x_MK, (kind,), device)
        and _is_plain(weight, (kind,), device)
        and (bias is None or (not bias.requires_grad and bias.shape == (N,) and _is_plain(bias, (kind,), device)))
        and target.A.shape == (P, K)
        and target.B.shape == (P, N)
        and _is_plain(target.A, factors, device)
        and _is_plain(target.B, factors, device)
    )


def _is_plain(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.dtype in dtypes
        and tensor.device == device
        and tensor.layout is torch.strided
        and not tensor.is_neg()
    )


def _check_whole(name: str, values: Any, low: int, high: int) -> None:
    """Check that numbers are whole and, where the host knows them, that low <= number < high."""
    if isinstance(values, torch.Tensor):
        whole, known = not (values.is_floating_point() or values.is_complex()), values.tolist() if values.is_cpu else []
    else:
        # A sum of whole numbers is one; any other makes it what it is.
        try:
            whole, known = hasattr(sum(values), "__index__"), values
        except TypeError:
            whole = False
    if not whole:
        raise TypeError(f"{name} must hold whole numbers, got {values}")
    if len(known):
        least, most = min(known), max(known)
        require(low <= least and most < high, f"{name} must lie from {low} to {high - 1}, got {least} to {most}")


def check_merges(items: Sequence[MergeItem], rounding: str, seed: int | None, accumulate: str) -> None:
    """Check all items and options of a merge before the first weight is changed."""
    check_choice("rounding", rounding, ("nearest", "stochastic"))
    check_choice("accumulate", accumulate, ("float32", "float64"))
    require(rounding == "nearest" or seed is not None, "seed must be given for rounding='stochastic'")
    if seed is not None:
        _check_whole("seed", [seed], *_INT64)
    for i, item in enumerate(items):
        if not isinstance(item, MergeItem):
            raise TypeError(f"items[{i}] must be a flora_core.MergeItem, got {type(item).__name__}")
        _check_merge(f"items[{i}]." if len(items) > 1 else "", item, rounding)


def _check_merge(prefix: str, item: MergeItem, rounding: str) -> None:
    weight = check_tensor(f"{prefix}weight_NK", item.weight, (None, None))
    n, k = weight.shape
    w = (f"{prefix}weight_NK", weight)
    A = check_tensor(f"{prefix}A_PK", item.A, (None, k), like=w, why=f"to match weight_NK with K={k}")
    p = A.shape[0]
    check_tensor(f"{prefix}B_PN", item.B, (p, n), like=w, why=f"to match A_PK with P={p} and weight_NK with N={n}")
    check_tensor(f"{prefix}coef_P", item.coef, (p,), like=w, why=f"to match A_PK with P={p}")
    if item.low_bits is not None:
        check_tensor(f"{prefix}low_bits_NK", item.low_bits, (n, k), dtypes=[torch.int16], like=w)
        require(
            weight.dtype == torch.bfloat16,
            f"{prefix}low_bits_NK belongs to a bfloat16 weight, got {weight.dtype}; leave it out",
        )
        require(rounding == "nearest", "rounding must be 'nearest' with low_bits_NK, which loses nothing")
    require(
        rounding == "nearest" or weight.dtype == torch.bfloat16,
        f"rounding='stochastic' is for bfloat16 weights, {prefix}weight_NK is {weight.dtype}; use 'nearest'",
    )


def check_adamw(
    buffers: Sequence[torch.Tensor], total: int, ranges: int, hyper_CH: torch.Tensor, owner: Sequence[int] | None
) -> None:
    """Check param, grad and both moments, the ranges over them, and who owns each range."""
    param, kinds = buffers[0], (torch.float32, torch.float64)
    check_tensor("param", param, (None,), dtypes=kinds)
    for name, buffer in zip(("param", "grad", "exp_avg", "exp_avg_sq"), buffers, strict=True):
        check_tensor(name, buffer, tuple(param.shape), dtypes=[param.dtype], like=("param", param))
        remedy = "pass grad.contiguous()" if name == "grad" else "pass a contiguous copy and copy it back"
        require(buffer.is_contiguous(), f"{name} must be contiguous, got stride {buffer.stride(0)}; {remedy}")
    require(total == param.numel(), f"segments must cover the {param.numel()} elements of param, got {total}")
    owner = range(ranges) if owner is None else owner
    require(len(owner) == ranges, f"owner must name a row for each of {ranges} ranges, got {len(owner)}")
    check_tensor("hyper_CH", hyper_CH, (None, len(HYPER_COLUMNS)), dtypes=kinds)
    require(
        not len(owner) or (min(owner) >= 0 and max(owner) < hyper_CH.shape[0]),
        f"hyper_CH must have a row for each client, got {hyper_CH.shape[0]} rows and clients {sorted(set(owner))}",
    )
