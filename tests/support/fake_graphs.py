"""A stand-in for a GPU, to try training steps of static shape without one.

``FakeGraphs`` is the executor of graphs over a device whose captures are the functions themselves. ``varlen_attn``
computes what torch's does from offsets in a tensor, so that no length need be on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from flora_core.training.cuda_graphs import Graphs


class FakeGraphs(Graphs):
    """Counts as ``Graphs`` does; every call is a plain one."""

    def __init__(self):
        super().__init__(self)

    def call(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Causal attention within each range of the rows (M, H, D); empty ranges are passed over."""
    assert window_size == (-1, 0), "the stand-in knows no window"
    bounds, parts = cu_seq_q.tolist(), []
    assert bounds[-1] == len(query)
    for start, stop in itertools.pairwise(bounds):
        assert stop - start <= max_q
        q, k, v = (t[start:stop].transpose(0, 1)[None] for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def attend_by_offsets(patch: Any) -> None:
    """Have packed attention take the way of ``varlen_attn`` on a CPU."""
    from flora_core.model import attention, attention_kernels

    patch.setattr(attention_kernels, "_varlen", lambda: varlen_attn)
    patch.setattr(attention, "choose", lambda *_: attention_kernels.Way("varlen", "a stand-in"))


__all__ = ["FakeGraphs", "attend_by_offsets", "varlen_attn"]
