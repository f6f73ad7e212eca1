"""What the kernels' functions take besides arrays: plain tuples, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class Ranges(Protocol):
    """Consecutive slices that cut one axis, one per client: ``flora_core.Segments``, or a plain sequence of slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> slice: ...

    def __iter__(self) -> Iterator[slice]: ...


class Dropout(NamedTuple):
    """Counter-based dropout: per client the threshold q of 65536, the Philox key and the first row."""

    q_C: Sequence[int] | torch.Tensor
    seed_C: Sequence[int] | torch.Tensor
    row_C: Sequence[int] | torch.Tensor


class MergeItem(NamedTuple):
    """One weight with its stack: W (N, K), A (P, K), B (P, N), coef (P) and, for an fp32 master, its low bits."""

    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    coef: torch.Tensor
    low_bits: torch.Tensor | None = None


__all__ = ["Dropout", "MergeItem", "Ranges"]
