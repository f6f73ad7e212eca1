"""Arguments of the kernels' functions besides arrays: plain tuples, without torch."""

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
    """Counter-based dropout of each client.

    Args:
        q_C: Thresholds of 65536, round(65536 p): an element is dropped where its 16-bit draw is below. 0 drops nothing.
        seed_C: Philox keys, 64 bits.
        row_C: The number of the client's first row within the optimizer step; draws are counted by row and column.
    Source: Philox4x32-7, Salmon et al., SC 2011.
    """

    q_C: Sequence[int] | torch.Tensor
    seed_C: Sequence[int] | torch.Tensor
    row_C: Sequence[int] | torch.Tensor


class MergeItem(NamedTuple):
    """One weight with its stack, for ``W += B^T diag(coef) A``.

    Args:
        weight: W (N, K), float32, bfloat16, float16 or float64; updated.
        A: (P, K), any of these dtypes; row p belongs to one rank of one client.
        B: (P, N), stored rank by rank: PEFT's ``lora_B.weight.T``.
        coef: (P), what each rank is multiplied by: its client's weight times scaling.
        low_bits: int16 (N, K); makes a bfloat16 W the upper half of an fp32 master, and is updated too.
    Example:
        >>> item = flora.MergeItem(torch.zeros(2, 2), torch.eye(2), torch.eye(2), coef=torch.tensor([1.0, 0.5]))
        >>> flora.stacked_merge_many_([item])
        >>> item.weight.diagonal()
        tensor([1.0000, 0.5000])
    """

    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    coef: torch.Tensor
    low_bits: torch.Tensor | None = None


__all__ = ["Dropout", "MergeItem", "Ranges"]
