"""Ways to attend within packed sequences, and which one runs: no work and no leak across sequences in any of them.

    flash-attn     the library's variable-length kernel, where it is installed
    varlen         torch's own (2.11 and later)
    flex           torch's flex attention, compiled; for float32 on a GPU
    per sequence   one product per run of equal lengths: on a CPU, and for anything beyond plain attention

Letters: H heads, M packed tokens, D head size, S sequences.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..common import DeviceSegments
from .deterministic import strict_backward

Lengths = tuple[int, ...] | DeviceSegments
_NARROW = (torch.bfloat16, torch.float16)
# The smallest head that flex attention is compiled for (torch 2.11, NotImplementedError below it).
_FLEX_LEAST = 16


class Way(NamedTuple):
    """A way to attend, and why it is this one."""

    name: str
    why: str


@functools.cache
def missing() -> dict[str, str | None]:
    """Way -> None if torch or a library has it here, else what is missing."""
    reasons: dict[str, str | None] = {"flash-attn": None, "varlen": None, "flex": None}
    try:
        importlib.import_module("flash_attn").flash_attn_varlen_func  # noqa: B018 (it may be another package's name)
    except (ImportError, AttributeError) as error:
        reasons["flash-attn"] = f"flash-attn cannot be imported ({error})"
    try:
        known = _parameters(_varlen())
        reasons["varlen"] = None if {"window_size", "scale"} <= known else "torch's varlen_attn needs torch 2.11"
    except ImportError as error:
        reasons["varlen"] = f"torch has no varlen_attn ({error})"
    try:
        importlib.import_module("torch.nn.attention.flex_attention")
    except ImportError as error:
        reasons["flex"] = f"torch has no flex attention ({error})"
    return reasons


def choose(device: str, dtype: torch.dtype, head_size: int, special: Sequence[str] = ()) -> Way:
    """The way for tensors like these; ``special`` names what goes beyond plain attention."""
    if special:
        return Way("per sequence", f"{', '.join(special)}: the model's own function, per sequence")
    if device != "cuda":
        return Way("per sequence", f"on {device} the products of single sequences are fastest")
    reasons, skipped = missing(), []
    for name in ("flash-attn", "varlen", "flex"):
        unfit = reasons[name] or _unfit(name, dtype, head_size)
        if unfit is None:
            return Way(name, "; ".join(skipped) or "the first that is here")
        skipped.append(f"not {name}: {unfit}")
    return Way("per sequence", "; ".join(skipped))


def _unfit(name: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Why a way does not take such tensors."""
    kind = str(dtype).removeprefix("torch.")
    if name == "flex":
        if dtype not in (*_NARROW, torch.float32):
            return f"it does not take {kind}"
        return None if head_size >= _FLEX_LEAST else f"heads of {head_size}, it needs {_FLEX_LEAST}"
    if dtype not in _NARROW:
        return f"it takes 16 bits, not {kind}"
    return None if head_size <= 256 and head_size % 8 == 0 else f"heads of {head_size}"


@functools.cache
def _parameters(attend: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters, which torch's versions differ in; reading a signature takes 20 us."""
    return frozenset(inspect.signature(attend).parameters)


def _varlen() -> Any:
    return importlib.import_module("torch.nn.attention.varlen").varlen_attn


@functools.lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return torch.tensor(starts, dtype=torch.int32, device=device)


def _bounds(lengths: Lengths, device: torch.device) -> tuple[torch.Tensor, int]:
    """Where the sequences begin and end, and a bound on the longest."""
    if isinstance(lengths, DeviceSegments):
        return lengths.offsets, lengths.longest
    return _offsets(lengths, device), max(lengths)


def _rows(t_1HMD: torch.Tensor) -> torch.Tensor:
    return t_1HMD[0].transpose(0, 1)


def flash(q, k, v, lengths: Lengths, window: int | None, scaling: float | None) -> torch.Tensor:
    """flash-attn over (1, H, M, D); (M, H, D)."""
    offsets, longest = _bounds(lengths, q.device)
    return importlib.import_module("flash_attn").flash_attn_varlen_func(
        *(_rows(q), _rows(k), _rows(v), offsets, offsets, longest, longest),
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@functools.cache
def _takes_fewer_heads(
    attend: Callable[..., Any], device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> bool:
    """Return whether a function that does not say so takes fewer heads of K and V than of Q; ``sizes``: both, and of a
    head.

    Repeating K and V costs their bytes several times over. So it is tried once on a few rows: output and gradients
    must be those over repeated K and V.
    """
    heads, fewer, size = sizes
    random = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(37, h, size, generator=random).to(device, dtype) for h in (heads, fewer, fewer, heads)
    )
    offsets = torch.tensor([0, 16, 37], dtype=torch.int32, device=device)

    def results(repeat: int) -> list[torch.Tensor]:
        with torch.enable_grad():
            leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
            wide = [leaves[0], *(t.repeat_interleave(repeat, dim=1) for t in leaves[1:])]
            out = attend(*wide, offsets, offsets, 21, 21, scale=None, window_size=(-1, 0))
            return [out, *torch.autograd.grad(out, leaves, upstream)]

    try:
        found, right = results(1), results(heads // fewer)
    except Exception:  # whatever it raises: it does not take them
        return False
    return all(
        one.shape == other.shape and (one - other).abs().max() <= 8 * torch.finfo(dtype).eps * other.abs().max()
        for one, other in zip(found, right, strict=True)
    )


def varlen(q, k, v, lengths: Lengths, window: int | None, scaling: float | None) -> torch.Tensor:
    """torch's variable-length attention over (1, H, M, D); (M, H, D)."""
    attend, (offsets, longest) = _varlen(), _bounds(lengths, q.device)
    known, options = _parameters(attend), {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        elif not _takes_fewer_heads(attend, q.device, q.dtype, (q.shape[1], k.shape[1], q.shape[3])):
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    if "num_splits" in known:
        # Else the order of a sequence's sums would depend on the others in the batch.
        options["num_splits"] = 1
    out = attend(
        *(_rows(q), _rows(k), _rows(v), offsets, offsets, longest, longest),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return strict_backward(out, (q, k, v))


@functools.lru_cache(maxsize=64)
def _owner(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The sequence of each packed token."""
    ids = torch.arange(len(lengths), device=device)
    return torch.repeat_interleave(ids, torch.tensor(lengths, device=device), output_size=sum(lengths))


@functools.lru_cache(maxsize=8)
def block_mask(lengths: tuple[int, ...], window: int | None, device: torch.device) -> Any:
    """flex attention's mask: a query looks back within its own sequence; blocks without such pairs are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    owner_M, reach = _owner(lengths, device), window or sum(lengths)

    def allowed(batch, head, query, key):  # flex attention gives index tensors
        return (owner_M[query] == owner_M[key]) & (query >= key) & (query - key < reach)

    return create_block_mask(allowed, None, None, sum(lengths), sum(lengths), device=str(device))


@functools.cache
def _compiled_flex() -> Any:
    """Not compiled, it would hold all M x M scores."""
    return torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=True)


def flex(q, k, v, lengths: tuple[int, ...], window: int | None, scaling: float | None, attend: Any = None):
    """flex attention over (1, H, M, D); (M, H, D). ``attend`` stands in for the compiled function."""
    attend = attend or _compiled_flex()
    mask, grouped = block_mask(lengths, window, q.device), q.shape[1] != k.shape[1]

    def masked(q, k, v):
        return attend(q, k, v, block_mask=mask, scale=scaling, enable_gqa=grouped)

    return _rows(isolated(masked, q, k, v, _owner(lengths, q.device), len(lengths)))


def isolated(attend: Callable[..., torch.Tensor], q, k, v, owner_M: torch.Tensor, count: int) -> torch.Tensor:
    """Attend under a mask, with every sequence that is not finite taken out and given back as NaN, both ways.

    A masked product alone would not do: 0 * NaN is NaN, in a block that two sequences share.
    """
    nonfinite = torch.zeros(count, dtype=torch.bool, device=q.device)
    q, k, v = _Enter.apply(nonfinite, owner_M, q, k, v)  # pyright: ignore[reportGeneralTypeIssues]
    return _Leave.apply(nonfinite, owner_M, attend(q, k, v))  # pyright: ignore[reportReturnType]


def _mark(nonfinite: torch.Tensor, owner_M: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add the sequences with something that is not finite to ``nonfinite``; where their tokens are, (M, 1)."""
    for t_1HMD in tensors:
        bad_M = ~t_1HMD.isfinite().all(3).all(1)[0]
        nonfinite |= torch.zeros_like(nonfinite, dtype=torch.int32).index_add_(0, owner_M, bad_M.int()) > 0
    return nonfinite[owner_M][:, None]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, nonfinite: torch.Tensor, owner_M: torch.Tensor, *qkv: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.nonfinite, ctx.owner_M = nonfinite, owner_M
        bad_M1 = _mark(nonfinite, owner_M, qkv)
        return tuple(torch.where(bad_M1, 0, t) for t in qkv)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        bad_M1 = ctx.nonfinite[ctx.owner_M][:, None]
        return None, None, *(torch.where(bad_M1, float("nan"), grad) for grad in grads)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nonfinite: torch.Tensor, owner_M: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        ctx.nonfinite, ctx.owner_M = nonfinite, owner_M
        return torch.where(nonfinite[owner_M][:, None], float("nan"), out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A sequence whose gradient is not finite is taken out too; ``_Enter`` gives it NaN.
        return None, None, torch.where(_mark(ctx.nonfinite, ctx.owner_M, [grad]), 0, grad)


WAYS: dict[str, Callable[..., torch.Tensor]] = {"flash-attn": flash, "varlen": varlen, "flex": flex}
