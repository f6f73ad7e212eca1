"""shrink, expand_ and wgrad of ``native`` with less host time, for torch tensors that the caller has looked at.

They must be plain strided CPU tensors of a float type, out of autograd's sight, beside ``flora_core.Segments`` and
valid numbers; callers with anything else use ``native``, which refuses it by name. Sizes, strides, dtypes and
overlaps are still checked by the C interface, before anything is written.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _native  # pyright: ignore[reportAttributeAccessIssue]
from ..types import Dropout
from . import _isa

if TYPE_CHECKING:
    from flora_core.common.segments import Segments

_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
# Of this process: what FLORA_ISA names, else the processor's best.
_ISA = _isa("auto")
Scales = Sequence[float] | torch.Tensor | None


def _call() -> Any:
    """A call with torch's number of threads."""
    return _native.Call(torch.get_num_threads(), _ISA, 0, 0)


def _shared(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A tensor as the compiled module takes it."""
    return tensor.data_ptr(), _CODES[tensor.dtype], 0, 0, tensor.shape, tensor.stride()


def _listed(numbers: Any) -> Any:
    return numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers


@functools.lru_cache(maxsize=256)
def _plain_clients(tokens: tuple[int, ...], ranks: tuple[int, ...], scaling_C: tuple[float, ...]) -> Any:
    """The clients' tables without dropout: all layers of a step have the same ones."""
    return _native.Clients(tokens, ranks, scaling_C, (), (), ())


def _clients(tokens: Segments, ranks: Segments, scaling_C: Scales, dropout: Dropout | None) -> Any:
    scaling = () if scaling_C is None else tuple(_listed(scaling_C))
    if dropout is None:
        return _plain_clients(tokens.offsets, ranks.offsets, scaling)
    return _native.Clients(tokens.offsets, ranks.offsets, scaling, *map(_listed, dropout))


@functools.lru_cache(maxsize=256)
def _flat_size(tokens: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """Elements of flat S, by lengths."""
    return sum(map(int.__mul__, tokens, ranks))


def shrink(
    x_MK: torch.Tensor,
    A_PK: torch.Tensor,
    tokens: Segments,
    ranks: Segments,
    scaling_C: Scales = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Flat S in the dtype of x: S_c = scaling_c drop(X_c) A_c^T."""
    s_flat = x_MK.new_empty(_flat_size(tokens.lengths, ranks.lengths))
    clients = _clients(tokens, ranks, scaling_C, dropout)
    _call().shrink(_shared(x_MK), _shared(A_PK), _shared(s_flat), clients)
    return s_flat


def expand_(
    y_MN: torch.Tensor,
    s_flat: torch.Tensor,
    B_PN: torch.Tensor,
    tokens: Segments,
    ranks: Segments,
    scaling_C: Scales = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Y_c += scaling_c S_c B_c in place, dropped columns left alone and kept ones scaled up."""
    clients = _clients(tokens, ranks, scaling_C, dropout)
    _call().expand(_shared(y_MN), _shared(s_flat), _shared(B_PN), clients)
    return y_MN


def wgrad(
    ds_flat: torch.Tensor,
    x_MK: torch.Tensor,
    s_flat: torch.Tensor,
    dy_MN: torch.Tensor,
    tokens: Segments,
    ranks: Segments,
    scaling_C: Scales,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dA_PK = dS^T drop(X) and dB_PN = s S^T dY in ``dtype``."""
    dA_PK = x_MK.new_empty((ranks.total, x_MK.shape[1]), dtype=dtype)
    dB_PN = x_MK.new_empty((ranks.total, dy_MN.shape[1]), dtype=dtype)
    arrays = ds_flat, x_MK, s_flat, dy_MN, dA_PK, dB_PN
    _call().wgrad(*map(_shared, arrays), _clients(tokens, ranks, scaling_C, dropout))
    return dA_PK, dB_PN


__all__ = ["expand_", "shrink", "wgrad"]
