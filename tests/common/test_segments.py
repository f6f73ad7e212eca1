"""Segments: one axis cut into consecutive ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flora_core import Segments


def test_ranges_follow_one_another():
    segments = Segments.from_lengths([3, 0, 5])
    assert segments.lengths == (3, 0, 5)
    assert segments.offsets == (0, 3, 3, 8)
    assert (segments.total, len(segments)) == (8, 3)
    assert list(segments) == [slice(0, 3), slice(3, 3), slice(3, 8)]
    assert [segments[c] for c in range(3)] == list(segments)
    assert segments[-1] == slice(3, 8)
    assert torch.equal(torch.cat([torch.arange(8)[rows] for rows in segments]), torch.arange(8))


def test_nobody_is_a_partition_of_nothing():
    segments = Segments.from_lengths([])
    assert (segments.total, len(segments), segments.offsets, list(segments)) == (0, 0, (0,), [])
    assert segments.offsets_on("cpu").tolist() == [0]


def test_any_iterable_of_whole_numbers_will_do():
    assert Segments.from_lengths(n for n in (1, 2)) == Segments.from_lengths(np.array([1, 2])) == Segments([1, 2])
    assert isinstance(Segments.from_lengths(np.array([1, 2])).lengths[0], int)


def test_the_device_table_is_int32_and_made_once():
    segments = Segments.from_lengths([3, 0, 5])
    table = segments.offsets_on("cpu")
    assert (table.dtype, table.tolist()) == (torch.int32, [0, 3, 3, 8])
    assert segments.offsets_on(torch.device("cpu")) is table
    assert segments.offsets_on("meta").device.type == "meta"


def test_segments_are_values():
    one, same, other = Segments([1, 2]), Segments([1, 2]), Segments([2, 1])
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != (1, 2)
    assert repr(one) == "Segments.from_lengths([1, 2])"
    assert eval(repr(one), {"Segments": Segments}) == one  # noqa: S307


def test_an_index_beyond_the_last_is_an_index_error():
    segments = Segments.from_lengths([3, 0, 5])
    for index in (3, -4):
        with pytest.raises(IndexError):
            segments[index]


def test_errors_name_the_segment():
    with pytest.raises(ValueError, match="segment 1 must have a length of at least 0, got -2"):
        Segments.from_lengths([3, -2])
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 rows, got 2147483648; split the batch"):
        Segments.from_lengths([2**30, 2**30])
    with pytest.raises(TypeError, match="integer"):
        Segments.from_lengths([1.5])  # pyright: ignore[reportArgumentType]
    assert Segments.from_lengths([2**31 - 1]).offsets_on("cpu")[1] == 2**31 - 1
