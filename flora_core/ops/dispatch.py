"""A call of a public op, eager or registered: validate, dispatch to a backend, run.

Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients, H hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from ..common import Segments, check_choice, check_tensor, require
from .aliasing import check_disjoint
from .autograd import without_autocast
from .backends import resolve, without_checks
from .dropout import dropout_of
from .fusion import FUSIONS, Plan, possible
from .merging import merge_kernels
from .types import LoraWeights, MergeItem
from .validation import check_adamw, check_kinds, check_merges, check_rows, check_segments, check_target, is_sound


def plan_linears(
    x_MK: torch.Tensor,
    targets: Sequence[LoraWeights],
    tokens: Segments,
    dropout_C: Any = None,
    dropout_seed_C: Any = None,
    row_C: Any = None,
    backend: str = "auto",
    fuse: str = "auto",
) -> Plan:
    """Check what ``lora_linears`` was given; what its forward and gradients need."""
    check_kinds(tokens, targets)
    check_rows(x_MK, tokens.total, len(tokens))
    kernels, _ = resolve(backend, "shrink", x_MK)
    check_fuse(fuse, kernels)
    require(len(targets) > 0, "targets must hold at least one LoraWeights, got none")
    keys = [None] * len(targets) if dropout_seed_C is None else dropout_seed_C
    if len(keys) != len(targets):
        raise ValueError(f"dropout_seed_C must have one row for each of {len(targets)} targets, got {len(keys)}")
    dropouts, clients, sound = [], len(tokens), type(tokens) is Segments
    for i, target in enumerate(targets):
        if not is_sound(x_MK, target, clients):
            sound = False
            _check_one(f"targets[{i}]." if len(targets) > 1 else "", x_MK, target, clients)
        seed_C = keys[i] if target.dropout_seed_C is None else target.dropout_seed_C
        dropouts.append(dropout_of(kernels, dropout_C, seed_C, row_C, clients))
    return Plan(
        without_checks(kernels) if sound else kernels,
        tokens,
        tuple(target.ranks for target in targets),
        tuple(target.scaling_C for target in targets),
        tuple(dropouts),
        tuple((target.weight, target.bias) for target in targets),
        fuse,
    )


def _check_one(prefix: str, x_MK: torch.Tensor, target: LoraWeights, clients: int) -> None:
    tensors = target.weight, target.bias, target.A, target.B
    check_target(prefix, x_MK, tensors, target.ranks.total, (clients, len(target.ranks), len(target.scaling_C)))


def check_fuse(fuse: str, kernels: ModuleType) -> None:
    """Check that a fusion is known and that the kernels have what it needs.

    Example:
        >>> kernels, _ = flora.ops.resolve("reference", "shrink")
        >>> flora.ops.check_fuse("separate", kernels)
        >>> flora.ops.check_fuse("both", kernels)
        Traceback (most recent call last):
        ValueError: fuse must be one of ...
    """
    if fuse == "auto":
        return
    check_choice("fuse", fuse, ("auto", *FUSIONS))
    ways = possible(kernels)
    name = kernels.__name__.rsplit(".", 1)[-1]
    require(
        fuse in ways, f"fuse={fuse!r} is not among the fusions of backend {name!r}; it has: auto, {', '.join(ways)}"
    )


def merge(items: Sequence[MergeItem], rounding: str, seed: int | None, accumulate: str, backend: str) -> None:
    """Check all items, then merge them in place."""
    check_merges(items, rounding, seed, accumulate)
    if not items:
        return
    check_disjoint(*_merged(items))
    options: dict[str, Any] = dict(rounding=rounding, seed=seed or 0, accumulate=getattr(torch, accumulate))
    with torch.no_grad(), without_autocast(items[0].weight):
        merge_kernels(items, backend, **options).merge_many_(items, **options)


def _merged(items: Sequence[MergeItem]) -> tuple[list[tuple[str, torch.Tensor]], list[tuple[str, torch.Tensor]]]:
    """List the tensors that a merge writes and those that it reads, by the arguments' names."""
    written, read = [], []
    for i, item in enumerate(items):
        prefix = f"items[{i}]." if len(items) > 1 else ""
        written.append((f"{prefix}weight_NK", item.weight))
        if item.low_bits is not None:
            written.append((f"{prefix}low_bits_NK", item.low_bits))
        read += [(f"{prefix}A_PK", item.A), (f"{prefix}B_PN", item.B), (f"{prefix}coef_P", item.coef)]
    return written, read


def adamw(
    buffers: Sequence[torch.Tensor],
    segments: Segments,
    hyper_CH: torch.Tensor,
    owner: Sequence[int] | None,
    backend: str,
) -> None:
    """Check, then take a step over param, grad and both moments."""
    check_tensor("param", buffers[0], (None,), dtypes=(torch.float32, torch.float64))
    check_segments("segments", segments)
    kernels, _ = resolve(backend, "cohort_adamw_", buffers[0])
    check_adamw(buffers, segments.total, len(segments), hyper_CH, owner)
    param, grad, exp_avg, exp_avg_sq = buffers
    check_disjoint([("param", param), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)], [("grad", grad)])
    owner = range(len(segments)) if owner is None else owner
    with torch.no_grad():
        kernels.cohort_adamw_(*buffers, segments, hyper_CH, owner)
