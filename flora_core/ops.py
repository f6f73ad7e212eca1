"""Public ops: every check and the one autograd definition over the primitives of ``flora_kernels``.

    Y = X W^T + b + s_c drop(X) A_c^T B_c        for the rows of client c

Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients,
H hyper-parameters. ``tokens`` partitions M and ``ranks`` partitions P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .backends import resolve
from .checks import check_choice, check_tensor, require
from .segments import Segments

HYPER_COLUMNS = ("lr", "beta1", "beta2", "eps", "weight_decay", "step", "clip_scale")


@dataclass(frozen=True)
class LoraWeights:
    """One target of ``lora_linears``: the frozen base, the stacked adapters and their ranges.

    Args:
        weight: Frozen weight (N, K), any strides.
        bias: Frozen bias (N) or None.
        A, B: Stacked factors (P, K) and (P, N).
        ranks: Segments over P.
        scaling_C: Scale s of each client.
        dropout_seed_C: This target's dropout keys; None takes the row that ``lora_linears`` was given.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    ranks: Segments
    scaling_C: Sequence[float] | torch.Tensor
    dropout_seed_C: Sequence[int] | torch.Tensor | None = None


@dataclass(frozen=True)
class _Plan:
    """What the autograd function needs besides tensors that take part in the graph."""

    kernels: ModuleType
    tokens: Segments
    ranks: tuple[Segments, ...]
    scaling: tuple[Sequence[float] | torch.Tensor, ...]
    dropout: tuple[Any, ...]
    bases: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]


def _without_autocast(tensor: torch.Tensor) -> torch.autocast:
    # Autocast would take the widened fp32 sums back to 16 bits.
    return torch.autocast(tensor.device.type, enabled=False)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, x_MK: torch.Tensor, *factors: torch.Tensor):
        k, outputs, saved = plan.kernels, [], [x_MK]
        for i, (weight, bias) in enumerate(plan.bases):
            A, B = factors[2 * i : 2 * i + 2]
            y_MN = torch.nn.functional.linear(x_MK, weight, bias)
            s_flat = k.shrink(x_MK, A, plan.tokens, plan.ranks[i], None, plan.dropout[i])
            outputs.append(k.expand_(y_MN, s_flat, B, plan.tokens, plan.ranks[i], plan.scaling[i]))
            saved += [s_flat, A, B]
        ctx.save_for_backward(*saved)
        ctx.plan = plan
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: torch.Tensor):
        with _without_autocast(grads[0]):
            return None, *_gradients(ctx, grads)


def _gradients(ctx: Any, grads: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """dX, then dA and dB of every target."""
    plan: _Plan = ctx.plan
    k, (x_MK, *saved) = plan.kernels, ctx.saved_tensors
    dx_MK = None
    factor_grads: list[torch.Tensor | None] = []
    for i, (weight, _) in enumerate(plan.bases):
        s_flat, A, B = saved[3 * i : 3 * i + 3]
        dy_MN, ranks, scaling, dropout = grads[i], plan.ranks[i], plan.scaling[i], plan.dropout[i]
        ds_flat = k.shrink(dy_MN, B, plan.tokens, ranks, scaling)
        if ctx.needs_input_grad[1]:
            dx_MK = torch.mm(dy_MN, weight) if dx_MK is None else dx_MK.addmm_(dy_MN, weight)
            k.expand_(dx_MK, ds_flat, A, plan.tokens, ranks, None, dropout)
        if any(ctx.needs_input_grad[2 + 2 * i : 4 + 2 * i]):
            factor_grads += k.wgrad(ds_flat, x_MK, s_flat, dy_MN, plan.tokens, ranks, scaling, A.dtype, dropout)
        else:
            factor_grads += [None, None]
    return [dx_MK, *factor_grads]


def lora_linear(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    A_PK: torch.Tensor,
    B_PN: torch.Tensor,
    tokens: Segments,
    ranks: Segments,
    scaling_C: Sequence[float] | torch.Tensor,
    *,
    dropout_C: Sequence[float] | torch.Tensor | None = None,
    dropout_seed_C: Sequence[int] | torch.Tensor | None = None,
    row_C: Sequence[int] | torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Apply a frozen linear layer and each token's own LoRA adapter.

    ``y[tokens[c]] = x W^T + b + s_c drop(x) A_c^T B_c``

    Args:
        x_MK: Packed activations, float32, bfloat16, float16 or float64.
        weight_NK: Frozen weight in the dtype of x_MK, any strides.
        bias_N: Frozen bias, or None.
        A_PK, B_PN: Stacked factors: fp32 masters (or the dtype of x_MK); computed in the dtype of x_MK.
        tokens: Segments over M; must cover 0..M.
        ranks: Segments over P; must cover 0..P.
        scaling_C: Scale of each client.
        dropout_C: Dropout probability of each client; needs ``dropout_seed_C``.
        dropout_seed_C: Philox key of each client, int64. See ``flora_kernels.reference.dropout_keep``.
        row_C: Index of each client's first token within its optimizer step; 0 unless given.
        backend: auto, reference, triton or native.
    Returns:
        y_MN in the dtype of x_MK; differentiable in x_MK, A_PK and B_PN, gradients of the factors in their dtype.
    Raises:
        ValueError: If a shape, a partition or a device does not fit; TypeError for a dtype.
    Deterministic: yes. Source: arXiv 2106.09685, eq. 3; mixed ranks by arXiv 2409.05976.
    """
    target = LoraWeights(weight_NK, bias_N, A_PK, B_PN, ranks, scaling_C, dropout_seed_C)
    return lora_linears(x_MK, [target], tokens, dropout_C=dropout_C, row_C=row_C, backend=backend)[0]


def lora_linears(
    x_MK: torch.Tensor,
    targets: Sequence[LoraWeights],
    tokens: Segments,
    *,
    dropout_C: Sequence[float] | torch.Tensor | None = None,
    dropout_seed_C: Sequence[Sequence[int]] | torch.Tensor | None = None,
    row_C: Sequence[int] | torch.Tensor | None = None,
    backend: str = "auto",
) -> list[torch.Tensor]:
    """Apply several LoRA targets that share their input (q, k, v; gate, up).

    Args:
        x_MK: Packed activations.
        targets: One ``LoraWeights`` per target.
        tokens: Segments over M; must cover 0..M.
        dropout_C: Dropout probability of each client, the same for every target.
        dropout_seed_C: Keys, one row of C per target; a target's own ``dropout_seed_C`` goes first.
        row_C: Index of each client's first token within its optimizer step; 0 unless given.
        backend: auto, reference, triton or native.
    Returns:
        One y_MN per target, as ``lora_linear`` gives it.
    Raises:
        ValueError: If a shape, a partition or a device does not fit; TypeError for a dtype.
    Deterministic: yes.
    """
    check_tensor("x_MK", x_MK, (None, None))
    kernels, _ = resolve(backend, "shrink", x_MK)
    require(len(targets) > 0, "targets must hold at least one LoraWeights, got none")
    require(
        tokens.total == x_MK.shape[0],
        f"tokens must cover the M={x_MK.shape[0]} rows of x_MK, got {tokens.total} in {len(tokens)} segments",
    )
    keys = [None] * len(targets) if dropout_seed_C is None else dropout_seed_C
    require(
        len(keys) == len(targets),
        f"dropout_seed_C must have one row for each of {len(targets)} targets, got {len(keys)}",
    )
    dropouts = []
    for i, target in enumerate(targets):
        _check_target(f"targets[{i}]." if len(targets) > 1 else "", x_MK, target, tokens)
        seed_C = keys[i] if target.dropout_seed_C is None else target.dropout_seed_C
        dropouts.append(_dropout(kernels, dropout_C, seed_C, row_C, len(tokens)))
    plan = _Plan(
        kernels,
        tokens,
        tuple(target.ranks for target in targets),
        tuple(target.scaling_C for target in targets),
        tuple(dropouts),
        tuple((target.weight.detach(), target.bias) for target in targets),
    )
    factors = [factor for target in targets for factor in (target.A, target.B)]
    with _without_autocast(x_MK):
        return list(_LoraLinears.apply(plan, x_MK, *factors))  # pyright: ignore[reportGeneralTypeIssues]


def _check_target(prefix: str, x_MK: torch.Tensor, target: LoraWeights, tokens: Segments) -> None:
    k, clients, p = x_MK.shape[1], len(tokens), target.ranks.total
    x, why = ("x_MK", x_MK), f"to match x_MK with K={k} columns"
    weight = check_tensor(f"{prefix}weight_NK", target.weight, (None, k), dtypes=[x_MK.dtype], like=x, why=why)
    n = weight.shape[0]
    require(not weight.requires_grad, f"{prefix}weight_NK must be frozen; call requires_grad_(False) on it first")
    if target.bias is not None:
        check_tensor(f"{prefix}bias_N", target.bias, (n,), dtypes=[x_MK.dtype], like=x)
        require(not target.bias.requires_grad, f"{prefix}bias_N must be frozen; call requires_grad_(False) on it first")
    masters = [x_MK.dtype] if x_MK.dtype in (torch.float32, torch.float64) else [x_MK.dtype, torch.float32]
    why = f"for ranks that sum to P={p}"
    check_tensor(f"{prefix}A_PK", target.A, (p, k), dtypes=masters, like=x, why=why)
    check_tensor(f"{prefix}B_PN", target.B, (p, n), dtypes=masters, like=x, why=why)
    require(
        len(target.ranks) == clients and len(target.scaling_C) == clients,
        f"{prefix}ranks and scaling_C must have one entry for each of the {clients} segments of tokens, "
        f"got {len(target.ranks)} and {len(target.scaling_C)}",
    )


def dropout_threshold(probability: float) -> int:
    """q = round(65536 p): an element is kept where its 16-bit draw is at least q.

    Raises:
        ValueError: If p is not in [0, 1), or so near 1 that nothing would be kept.
    """
    q = round(65536 * probability) if 0 <= probability < 1 else 65536
    require(q < 65536, f"dropout must be at least 0 and below 1 - 2**-17, got {probability}")
    return q


def _thresholds(dropout_C: Sequence[float] | torch.Tensor) -> list[int] | torch.Tensor:
    """q of each client; a table on a GPU stays there, unread: p = 1 then drops everything."""
    if isinstance(dropout_C, torch.Tensor) and dropout_C.device.type != "cpu":
        return (dropout_C.double() * 65536).round().to(torch.int32)
    return [dropout_threshold(float(p)) for p in dropout_C]


def _dropout(kernels: ModuleType, dropout_C: Any, seed_C: Any, row_C: Any, clients: int) -> Any:
    if dropout_C is None:
        return None
    require(len(dropout_C) == clients, f"dropout_C must have {clients} entries, one per client, got {len(dropout_C)}")
    q_C = _thresholds(dropout_C)
    if isinstance(q_C, list) and not any(q_C):
        return None
    require(seed_C is not None, "dropout_seed_C must be given where dropout_C is above 0; see flora_core.seeds")
    row_C = [0] * clients if row_C is None else row_C
    require(len(seed_C) == clients, f"dropout_seed_C must have {clients} entries, one per client, got {len(seed_C)}")
    require(len(row_C) == clients, f"row_C must have {clients} entries, one per client, got {len(row_C)}")
    return kernels.Dropout(q_C, seed_C, row_C)


@dataclass(frozen=True)
class MergeItem:
    """One weight of ``stacked_merge_many_`` with its stack."""

    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    coef: torch.Tensor
    low_bits: torch.Tensor | None = None


def stacked_merge_(
    weight_NK: torch.Tensor,
    A_PK: torch.Tensor,
    B_PN: torch.Tensor,
    coef_P: torch.Tensor,
    *,
    rounding: str = "nearest",
    low_bits_NK: torch.Tensor | None = None,
    seed: int | None = None,
    accumulate: str = "float32",
    backend: str = "auto",
) -> None:
    """Add a stack's product to a weight in place, rounded once: ``W += B^T diag(coef) A``.

    Args:
        weight_NK: Weight, float32, bfloat16, float16 or float64, any strides (a Conv1D passes its transpose).
        A_PK, B_PN, coef_P: The stack and one coefficient per rank row.
        rounding: ``nearest`` or, for bfloat16, ``stochastic`` (unbiased; needs ``seed``).
        low_bits_NK: int16 low bits of a bfloat16 weight: both together are an fp32 master, which is updated.
        seed: Key of the stochastic rounding.
        accumulate: ``float32`` for speed, or ``float64``: the result is then the exact sum rounded once, also where
            terms cancel.
        backend: auto, reference, triton or native.
    Raises:
        ValueError: If a shape, a device or an option does not fit; nothing is changed then.
    Deterministic: yes. Source: arXiv 2409.05976, eq. 5.
    """
    item = MergeItem(weight_NK, A_PK, B_PN, coef_P, low_bits_NK)
    stacked_merge_many_([item], rounding=rounding, seed=seed, accumulate=accumulate, backend=backend)


def stacked_merge_many_(
    items: Sequence[MergeItem],
    *,
    rounding: str = "nearest",
    seed: int | None = None,
    accumulate: str = "float32",
    backend: str = "auto",
) -> None:
    """Merge many weights, checked all together before the first is changed. See ``stacked_merge_``.

    With stochastic rounding, item i uses the key ``seed + i``.
    """
    check_choice("rounding", rounding, ("nearest", "stochastic"))
    check_choice("accumulate", accumulate, ("float32", "float64"))
    require(rounding == "nearest" or seed is not None, "seed must be given for rounding='stochastic'")
    for i, item in enumerate(items):
        _check_merge(f"items[{i}]." if len(items) > 1 else "", item, rounding)
    if not items:
        return
    kernels, _ = resolve(backend, "merge_many_", items[0].weight)
    stacks = [kernels.MergeItem(item.weight, item.A, item.B, item.coef, item.low_bits) for item in items]
    with torch.no_grad(), _without_autocast(items[0].weight):
        kernels.merge_many_(stacks, rounding=rounding, seed=seed or 0, accumulate=getattr(torch, accumulate))


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


def cohort_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Segments,
    hyper_CH: torch.Tensor,
    *,
    owner: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """Take one AdamW step over flat buffers, each client with its own hyper-parameters, in place.

    Args:
        param, grad, exp_avg, exp_avg_sq: Contiguous 1-D buffers of one length and dtype (float32 or float64).
        segments: Ranges over the buffers, one per client, or several with ``owner``.
        hyper_CH: (C, 7): lr, beta1, beta2, eps, weight decay, step (1 for the first; 0 leaves the client's ranges
            untouched), scale on the gradient from clipping.
        owner: The row of hyper_CH of each range; range i takes row i unless given.
        backend: auto, reference, triton or native.
    Raises:
        ValueError: If lengths do not fit or a buffer is not contiguous.
    Deterministic: yes. Source: arXiv 1711.05101, as ``torch.optim.AdamW`` computes it.
    """
    kinds = (torch.float32, torch.float64)
    check_tensor("param", param, (None,), dtypes=kinds)
    kernels, _ = resolve(backend, "cohort_adamw_", param)
    for name, buffer in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_tensor(name, buffer, tuple(param.shape), dtypes=[param.dtype], like=("param", param))
    for name, buffer in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        remedy = "pass a contiguous copy and copy it back" if name != "grad" else "pass grad.contiguous()"
        require(buffer.is_contiguous(), f"{name} must be contiguous, got stride {buffer.stride(0)}; {remedy}")
    require(
        segments.total == param.numel(),
        f"segments must cover the {param.numel()} elements of param, got {segments.total}",
    )
    owner = range(len(segments)) if owner is None else owner
    require(len(owner) == len(segments), f"owner must name a row for each of {len(segments)} ranges, got {len(owner)}")
    check_tensor("hyper_CH", hyper_CH, (None, len(HYPER_COLUMNS)), dtypes=kinds)
    require(
        not len(owner) or (min(owner) >= 0 and max(owner) < hyper_CH.shape[0]),
        f"hyper_CH must have a row for each client, got {hyper_CH.shape[0]} rows and clients {sorted(set(owner))}",
    )
    with torch.no_grad():
        kernels.cohort_adamw_(param, grad, exp_avg, exp_avg_sq, segments, hyper_CH, owner)


__all__: list[str] = [
    "HYPER_COLUMNS",
    "LoraWeights",
    "MergeItem",
    "cohort_adamw_",
    "lora_linear",
    "lora_linears",
    "stacked_merge_",
    "stacked_merge_many_",
]
