"""Tensors that share memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

Named = Sequence[tuple[str, torch.Tensor]]


def check_disjoint(written: Named, read: Named = ()) -> None:
    """Check that what is written has a place for each element, and shares none with what is read or written beside it.

    A kernel would give one of several answers.
    """
    for name, tensor in written:
        if not tensor.is_contiguous() and _shares_places(tensor):
            steps = " and ".join(map(str, tensor.stride()))
            raise ValueError(f"{name} must have a place for each element, got strides {steps}; pass its clone()")
    places: dict[int, list[tuple[int, bool, str, torch.Tensor]]] = defaultdict(list)
    for is_written, group in ((True, written), (False, read)):
        for name, tensor in group:
            if tensor.numel():
                places[tensor.untyped_storage().data_ptr()].append((tensor.data_ptr(), is_written, name, tensor))
    for sharing in places.values():
        if len(sharing) > 1 and any(one[1] for one in sharing):
            _check_disjoint_in_storage(sorted(sharing, key=lambda one: one[:3]))


def _check_disjoint_in_storage(sharing: Sequence[tuple[int, bool, str, torch.Tensor]]) -> None:
    """As ``check_disjoint``, for tensors of one storage in the order of their addresses."""
    for i, (start, is_written, name, tensor) in enumerate(sharing):
        stop = start + _reach(tensor)
        for other_start, other_written, other, beside in sharing[i + 1 :]:
            if other_start >= stop:
                break
            if (is_written or other_written) and not _are_columns_disjoint(tensor, beside, other_start - start):
                names = (name, other) if is_written else (other, name)
                raise ValueError("{} is written and must share no memory with {}; pass its clone()".format(*names))


def _shares_places(tensor: torch.Tensor) -> bool:
    """Return whether two elements may lie in one place: an axis must step over all that the smaller steps reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _are_columns_disjoint(one: torch.Tensor, other: torch.Tensor, ahead: int) -> bool:
    """Return whether two tensors, the other so many bytes ahead, are ranges of columns of one matrix, without a common
    one."""
    if one.dim() != 2 or other.dim() != 2 or one.dtype != other.dtype or one.stride() != other.stride():
        return False
    (pitch, step), size = one.stride(), one.element_size()
    ahead %= max(pitch * size, 1)
    return step == 1 and one.shape[1] * size <= ahead and ahead + other.shape[1] * size <= pitch * size
