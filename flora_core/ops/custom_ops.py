"""The public ops as ``torch.library`` ops, for ``torch.compile``, which traces them as they stand: no graph breaks.

They take flat lists where the Python API takes Segments and dataclasses. Numbers are ``host`` lists or, where the
caller has them on a device, tensors; the other is left empty. ``lora_linears`` gives every Y and then every S, which
is there for backward alone and passes no gradient on.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients, H hyper-parameters, T targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..common import Segments, require
from . import dispatch
from .autograd import forward, gradients, without_autocast
from .types import LoraWeights, MergeItem
from .validation import check_adamw, check_merges, check_rows, check_target

Tensors = Sequence[torch.Tensor]
Ints = Sequence[int]
Floats = Sequence[float]


def _pick(host: Sequence[Any], table: torch.Tensor | None) -> Sequence[Any] | torch.Tensor | None:
    """A caller's numbers again: the tensor, the list, or None where there are none."""
    return table if table is not None else list(host) or None


def _rows(host: Sequence[Any], tables: Tensors, count: int, size: int) -> list[Any]:
    """One entry per target: its tensor, or its part of the host list."""
    return list(tables) or [host[i * size : (i + 1) * size] for i in range(count)]


def _plan(x: torch.Tensor, weights: Tensors, biases: Sequence[torch.Tensor | None], A: Tensors, B: Tensors, *rest: Any):
    """The plan of a call of the registered op, checked like an eager one."""
    tokens, ranks, scaling, scalings, dropout, dropouts, seed, seeds, row, rows, backend, fuse = rest
    clients = len(tokens)
    parts = [Segments(part) for part in _rows(ranks, (), len(weights), clients)]
    scales = _rows(scaling, scalings, len(weights), clients)
    targets = [LoraWeights(*parts) for parts in zip(weights, biases, A, B, parts, scales, strict=True)]
    probabilities = _pick(dropout, dropouts)
    keys = _rows(seed, seeds, len(weights), clients) if len(seed) or len(seeds) else None
    return dispatch.plan_linears(x, targets, Segments(tokens), probabilities, keys, _pick(row, rows), backend, fuse)


@torch.library.custom_op("flora::lora_linears", mutates_args=())
def _lora_linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    tokens: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    scalings: Sequence[torch.Tensor],
    dropout: Sequence[float],
    dropouts: torch.Tensor | None,
    seed: Sequence[int],
    seeds: Sequence[torch.Tensor],
    row: Sequence[int],
    rows: torch.Tensor | None,
    backend: str,
    fuse: str,
) -> list[torch.Tensor]:
    plan = _plan(
        *(x, weights, biases, A, B, tokens, ranks, scaling, scalings, dropout, dropouts, seed, seeds, row, rows),
        *(backend, fuse),
    )
    with without_autocast(x):
        outputs, s_flats = forward(plan, x, _by_turns(A, B))
    return [*outputs, *s_flats]


def _by_turns(A: Tensors, B: Tensors) -> list[torch.Tensor]:
    return [factor for pair in zip(A, B, strict=True) for factor in pair]


@_lora_linears.register_fake
def _(x, weights, biases, A, B, tokens, ranks, scaling, scalings, *_):
    clients, count = len(tokens), len(weights)
    check_rows(x, sum(tokens), clients)
    for i, tensors in enumerate(zip(weights, biases, A, B, strict=True)):
        mine = ranks[i * clients : (i + 1) * clients]
        scales = len(scalings[i]) if scalings else len(scaling) // max(count, 1)
        check_target(f"targets[{i}]." if count > 1 else "", x, tensors, sum(mine), (clients, len(mine), scales))
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    sizes = [sum(m * r for m, r in zip(tokens, ranks[i * clients :], strict=False)) for i in range(count)]
    return outputs + [x.new_empty(size) for size in sizes]


@torch.library.custom_op("flora::lora_linears_backward", mutates_args=())
def _lora_linears_backward(
    dys: Sequence[torch.Tensor],
    s_flats: Sequence[torch.Tensor],
    wants_x: bool,
    wants: Sequence[bool],
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    tokens: Sequence[int],
    ranks: Sequence[int],
    scaling: Sequence[float],
    scalings: Sequence[torch.Tensor],
    dropout: Sequence[float],
    dropouts: torch.Tensor | None,
    seed: Sequence[int],
    seeds: Sequence[torch.Tensor],
    row: Sequence[int],
    rows: torch.Tensor | None,
    backend: str,
    fuse: str,
) -> list[torch.Tensor]:
    plan = _plan(
        *(x, weights, biases, A, B, tokens, ranks, scaling, scalings, dropout, dropouts, seed, seeds, row, rows),
        *(backend, fuse),
    )
    with without_autocast(x):
        dx_MK, factor_grads = gradients(plan, dys, x, s_flats, _by_turns(A, B), wants_x, wants)
    return [grad for grad in (dx_MK, *factor_grads) if grad is not None]


@_lora_linears_backward.register_fake
def _(dys, s_flats, wants_x, wants, x, weights, biases, A, B, *_):
    found = [x.new_empty(x.shape)] if wants_x else []
    for wanted, a, b in zip(wants, A, B, strict=True):
        found += [a.new_empty(a.shape), b.new_empty(b.shape)] if wanted else []
    return found


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, weights, biases, A, B, *ctx.rest = inputs
    ctx.nothing = [_no_gradient(value) for value in inputs]
    ctx.counts = len(weights), sum(bias is not None for bias in biases)
    ctx.has_bias = [bias is not None for bias in biases]
    ctx.save_for_backward(x, *output[len(weights) :], *A, *B, *weights, *(bias for bias in biases if bias is not None))


def _no_gradient(value: Any) -> Any:
    """None for every tensor that autograd sees in an argument: a list counts as one if it holds tensors alone."""
    is_list = isinstance(value, (list, tuple)) and all(isinstance(item, torch.Tensor) for item in value)
    return [None] * len(value) if is_list else None


def _backward(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    (count, num_biases), (x, *saved) = ctx.counts, ctx.saved_tensors
    s_flats, A, B, weights = (saved[i * count : (i + 1) * count] for i in range(4))
    kept = iter(saved[4 * count : 4 * count + num_biases])
    biases = [next(kept) if has else None for has in ctx.has_bias]
    dys = [
        x.new_zeros(x.shape[0], weight.shape[0]) if dy is None else dy
        for dy, weight in zip(grads[:count], weights, strict=True)
    ]
    needs = ctx.needs_input_grad
    wants = [bool(a or b) for a, b in zip(needs[3], needs[4], strict=True)]
    found = iter(
        torch.ops.flora.lora_linears_backward(dys, s_flats, needs[0], wants, x, weights, biases, A, B, *ctx.rest)
    )
    dx = next(found) if needs[0] else None
    pairs = [(next(found), next(found)) if wanted else (None, None) for wanted in wants]
    dA, dB = ([pair[side] for pair in pairs] for side in (0, 1))
    return dx, *ctx.nothing[1:3], dA, dB, *ctx.nothing[5:]


torch.library.register_autograd("flora::lora_linears", _backward, setup_context=_setup)


@torch.library.custom_op("flora::stacked_merge_many_", mutates_args=("weights", "low_bits"))
def _stacked_merge_many_(
    weights: Sequence[torch.Tensor],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    coef: Sequence[torch.Tensor],
    low_bits: Sequence[torch.Tensor],
    low_of: Sequence[int],
    rounding: str,
    seed: int | None,
    accumulate: str,
    backend: str,
) -> None:
    dispatch.merge(_items(weights, A, B, coef, low_bits, low_of), rounding, seed, accumulate, backend)


@_stacked_merge_many_.register_fake
def _(weights, A, B, coef, low_bits, low_of, rounding, seed, accumulate, backend):
    check_merges(_items(weights, A, B, coef, low_bits, low_of), rounding, seed, accumulate)


def _items(weights: Tensors, A: Tensors, B: Tensors, coef: Tensors, low_bits: Tensors, low_of: Ints) -> list[MergeItem]:
    """``low_of`` names the entry of ``low_bits`` that belongs to each weight, or -1."""
    lows = [None if index < 0 else low_bits[index] for index in low_of]
    return [MergeItem(*parts) for parts in zip(weights, A, B, coef, lows, strict=True)]


@torch.library.custom_op("flora::cohort_adamw_", mutates_args=("param", "exp_avg", "exp_avg_sq"))
def _cohort_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Sequence[int],
    hyper_CH: torch.Tensor,
    owner: Sequence[int],
    backend: str,
) -> None:
    dispatch.adamw((param, grad, exp_avg, exp_avg_sq), Segments(segments), hyper_CH, owner, backend)


@_cohort_adamw_.register_fake
def _(param, grad, exp_avg, exp_avg_sq, segments, hyper_CH, owner, backend):
    check_adamw((param, grad, exp_avg, exp_avg_sq), sum(segments), len(segments), hyper_CH, owner)


def _flat(values: Sequence[Any], device: torch.device) -> tuple[list[Any], list[torch.Tensor]]:
    """The numbers of all targets as one host list, or as one tensor each if any of them is a tensor."""
    if any(isinstance(value, torch.Tensor) for value in values):
        return [], [v if isinstance(v, torch.Tensor) else torch.tensor(v, device=device) for v in values]
    return [number for value in values for number in value], []


def _one(values: Any) -> tuple[list[Any], torch.Tensor | None]:
    if values is None:
        return [], None
    return ([], values) if isinstance(values, torch.Tensor) else (list(values), None)


def lora_linears(
    x_MK: torch.Tensor,
    targets: Sequence[LoraWeights],
    tokens: Segments,
    dropout_C: Any,
    dropout_seed_C: Any,
    row_C: Any,
    backend: str,
    fuse: str,
) -> list[torch.Tensor]:
    """``ops.lora_linears`` as one traced op."""
    require(len(targets) > 0, "targets must hold at least one LoraWeights, got none")
    keys = [None] * len(targets) if dropout_seed_C is None else dropout_seed_C
    keys = [key if t.dropout_seed_C is None else t.dropout_seed_C for t, key in zip(targets, keys, strict=True)]
    found = torch.ops.flora.lora_linears(
        x_MK,
        [t.weight for t in targets],
        [t.bias for t in targets],
        [t.A for t in targets],
        [t.B for t in targets],
        list(tokens.lengths),
        [rank for t in targets for rank in t.ranks.lengths],
        *_flat([t.scaling_C for t in targets], x_MK.device),
        *_one(dropout_C),
        *(([], []) if dropout_C is None or keys[0] is None else _flat(keys, x_MK.device)),
        *_one(row_C),
        backend,
        fuse,
    )
    return found[: len(targets)]


def stacked_merge_many_(
    items: Sequence[MergeItem], rounding: str, seed: int | None, accumulate: str, backend: str
) -> None:
    """``ops.stacked_merge_many_`` as one traced op."""
    low_bits, low_of = [], []
    for item in items:
        low_of.append(-1 if item.low_bits is None else len(low_bits))
        low_bits += [] if item.low_bits is None else [item.low_bits]
    columns = [[getattr(item, name) for item in items] for name in ("weight", "A", "B", "coef")]
    torch.ops.flora.stacked_merge_many_(*columns, low_bits, low_of, rounding, seed, accumulate, backend)


def cohort_adamw_(
    buffers: Sequence[torch.Tensor], segments: Segments, hyper_CH: torch.Tensor, owner: Any, backend: str
) -> None:
    """``ops.cohort_adamw_`` as one traced op."""
    owner = range(len(segments)) if owner is None else owner
    torch.ops.flora.cohort_adamw_(*buffers, list(segments.lengths), hyper_CH, list(owner), backend)
