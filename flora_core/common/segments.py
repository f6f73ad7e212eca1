"""Segments: one axis cut into consecutive ranges, one per client; their lengths on the host, or on a device alone."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import torch

from .checks import require


class Segments:
    """A partition of one axis into C consecutive ranges, some perhaps empty.

    Ranges live on the host as ints; ``offsets_on`` gives the same numbers as an int32 device table,
    copied once per device.

    Args:
        lengths: Each client's number of rows, in order, at least 0 each and below 2**31 together.
    Raises:
        TypeError: If a length is no integer.
        ValueError: If one is negative or the sum too large.
    Example:
        >>> tokens = flora.Segments.from_lengths([3, 0, 5])
        >>> tokens.total, tokens.offsets, tokens[2]
        (8, (0, 3, 3, 8), slice(3, 8, None))
    """

    __slots__ = ("_slices", "_tables", "lengths", "offsets")

    lengths: tuple[int, ...]
    offsets: tuple[int, ...]

    def __init__(self, lengths: Iterable[int]):
        self.lengths = tuple(operator.index(length) for length in lengths)
        for index, length in enumerate(self.lengths):
            require(length >= 0, f"segment {index} must have a length of at least 0, got {length}")
        offsets = [0]
        for length in self.lengths:
            offsets.append(offsets[-1] + length)
        require(offsets[-1] < 2**31, f"segments must cover fewer than 2**31 rows, got {offsets[-1]}; split the batch")
        self.offsets = tuple(offsets)
        # Every kernel goes through them several times a layer.
        self._slices = tuple(map(slice, offsets[:-1], offsets[1:]))
        self._tables: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def from_lengths(cls, lengths: Iterable[int]) -> Segments:
        """Cut an axis into ranges of these lengths, in order; what the class itself takes and refuses."""
        return cls(lengths)

    @property
    def total(self) -> int:
        """The length of the whole axis."""
        return self.offsets[-1]

    def offsets_on(self, device: torch.device | str) -> torch.Tensor:
        """Offsets (C + 1 entries, the first is 0) as an int32 tensor on a device."""
        device = torch.device(device)
        if device not in self._tables:
            self._tables[device] = torch.tensor(self.offsets, dtype=torch.int32, device=device)
        return self._tables[device]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> slice:
        return self._slices[index]

    def __iter__(self) -> Iterator[slice]:
        return iter(self._slices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segments) and self.lengths == other.lengths

    def __hash__(self) -> int:
        return hash(self.lengths)

    def __repr__(self) -> str:
        return f"Segments.from_lengths({list(self.lengths)})"


def to_device(values: torch.Tensor, into: torch.Tensor) -> None:
    """Copy host numbers into a tensor in place, without waiting for the device."""
    # Pinned memory is given out again only when the copy is done.
    values = values.pin_memory() if into.is_cuda else values
    into.copy_(values, non_blocking=True)


class DeviceSegments:
    """Segments whose lengths the device alone knows, so that a captured CUDA graph may be replayed with others.

    The host knows their number, their total and a bound on the longest. Asking for a range raises an error that says
    so.

    Args:
        offsets: C + 1 entries in int32; the first is 0, the last is ``total``.
        total: The length of the whole axis.
        longest: No segment is longer.
    """

    lengths = None

    def __init__(self, offsets: torch.Tensor, total: int, longest: int | None = None):
        self.offsets, self.total, self.longest = offsets, total, total if longest is None else longest

    def offsets_on(self, device: torch.device | str) -> torch.Tensor:
        """The offsets; they stay where they are."""
        return self.offsets

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __getitem__(self, index: int) -> slice:
        raise RuntimeError("these segments' lengths are known to the device alone, and the host was asked for them")

    def __iter__(self) -> Iterator[slice]:
        return iter([self[0]])
