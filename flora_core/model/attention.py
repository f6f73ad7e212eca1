"""Attention over a packed cohort: every sequence on its own, no work and no leak across sequences.

Registered with transformers as one more attention implementation and switched on only inside a packed batch.
Letters: H heads, M packed tokens, D head size, L one sequence's length, n sequences of equal length in a row.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional as F

from ..common import DeviceSegments
from .attention_kernels import WAYS, Way, choose
from .deterministic import strict_backward

NAME = "flora_packed"
# Arguments that leave plain scaled dot-product attention what it is.
_PLAIN = {
    "position_ids",
    "use_cache",
    "output_attentions",
    "cache_position",
    "is_causal",
    "output_router_logits",
    "sliding_window",
}
_LENGTHS: weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, ...] | DeviceSegments] = weakref.WeakKeyDictionary()


class UnpackableError(ValueError):
    """A model that packed attention cannot follow, for a reason that is known."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed sequence; (1, H, M, D) in, (1, M, H, D) out.

    ``attention_mask`` is what ``_window_mask`` made: the layer's sliding window, or None. Anything beyond plain
    attention (softcap, sinks) goes through the model's own eager function, per sequence; plain attention on a GPU
    through what ``attention_ways`` chooses. The frozen base's
    attention dropout is off: its random numbers would depend on the cohort.
    """
    lengths: Any = _LENGTHS[module]
    window = _window(attention_mask)
    special = {name: extra[name] for name in extra if name not in _PLAIN and extra[name] is not None}
    way, _ = choose(query.device.type, query.dtype, query.shape[3], tuple(special))
    if way != "per sequence":
        return WAYS[way](query, key, value, lengths, window, scaling)[None], None
    parts, start = [], 0
    for length, group in groupby(lengths):
        rows = slice(start, start + length * len(list(group)))
        start = rows.stop
        q, k, v = (_sequences(t, rows, length) for t in (query, key, value))
        if special:
            mask = _causal(length, window, q.device, torch.zeros((), dtype=q.dtype))
            out = _eager(module)(module, q, k, v, mask, scaling=scaling, dropout=0.0, **special)[0]
        else:
            out = _plain(q, k, v, scaling, length, window).transpose(1, 2)
        parts.append(out.reshape(rows.stop - rows.start, out.shape[2], out.shape[3]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _sequences(t_1HMD: torch.Tensor, rows: slice, length: int) -> torch.Tensor:
    """(n, H, L, D) view of n sequences of one length."""
    part = t_1HMD[0, :, rows]
    return part.reshape(part.shape[0], -1, length, part.shape[2]).transpose(0, 1)


def _plain(q, k, v, scaling: float | None, length: int, window: int | None) -> torch.Tensor:
    mask = None
    if window is not None and window < length:
        mask = _causal(length, window, q.device)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return strict_backward(out, (q, k, v))


def _causal(length: int, window: int | None, device: torch.device, like: torch.Tensor | None = None) -> torch.Tensor:
    """(1, 1, L, L): True where a query may look, or with ``like`` an additive mask of its dtype."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    allowed = (distance >= 0) & (distance < (window or length))
    if like is None:
        return allowed[None, None]
    blocked = torch.finfo(like.dtype).min
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, blocked)[None, None]


def _eager(module: torch.nn.Module) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward


def _window_mask(*_: Any, local_size: int | None = None, **__: Any) -> torch.Tensor | None:
    """Instead of a mask, only how far it would let a layer look back.

    Families differ in whether they also tell the attention function (``sliding_window=``): the mask is what counts.
    """
    return None if local_size is None else torch.tensor(local_size, device="cpu")


def _window(attention_mask: torch.Tensor | None) -> int | None:
    if attention_mask is not None and attention_mask.dim():
        raise UnpackableError("the model makes an attention mask of its own, which a packed batch cannot follow")
    return None if attention_mask is None else int(attention_mask)


def unsupported(model: torch.nn.Module) -> str | None:
    """Why a model's attention cannot be packed, as far as its configuration tells; None if it may be."""
    if not getattr(model, "_supports_attention_backend", False):
        return "the model does not go through transformers' attention interface"
    for config in _configs(model):
        odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if odd:
            return f"layers of type {', '.join(sorted(odd))} mix tokens in other ways than causal attention"
        if getattr(config, "attention_chunk_size", None):
            return "attention is cut into chunks"
        if getattr(config, "is_causal", True) is False or getattr(config, "is_encoder_decoder", False):
            return "attention is not causal"
    return None


def way_of(model: torch.nn.Module, dtype: torch.dtype | None = None) -> Way:
    """The way that plain attention of a model takes, in its own or another dtype; special layers show when they run."""
    parameter = next(model.parameters())
    return choose(parameter.device.type, dtype or parameter.dtype, _head_size(model))


def _head_size(model: torch.nn.Module) -> int:
    """The largest head of the language model's layers, which may differ by layer; other towers do not count."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = [module for module in model.modules() if text is not None and getattr(module, "config", None) is text]
    sizes = [size for module in layers if isinstance(size := getattr(module, "head_dim", None), int)]
    heads = getattr(text, "num_attention_heads", None) or 1
    # Read from the object's own fields: a size that differs by layer is no attribute of the configuration.
    named = getattr(text, "__dict__", {}).get("head_dim")
    return max(sizes, default=0) or named or getattr(text, "hidden_size", 64) // heads


def _configs(model: torch.nn.Module) -> list[Any]:
    """Every configuration object that a module of the model reads."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _window_mask)


@contextmanager
def packed(model: torch.nn.Module, lengths: Iterable[int] | DeviceSegments) -> Iterator[None]:
    """Run the model's attention sequence by sequence over one packed row of tokens."""
    _register()
    lengths, configs = lengths if isinstance(lengths, DeviceSegments) else tuple(lengths), _configs(model)
    before = [config._attn_implementation for config in configs]
    for module in model.modules():
        _LENGTHS[module] = lengths
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        for module in model.modules():
            _LENGTHS.pop(module, None)
