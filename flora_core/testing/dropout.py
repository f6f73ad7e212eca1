"""Dropout's mask, drawn one element at a time in Python ints, independent of the kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


def philox4x32(counter: Sequence[int], key: Sequence[int], rounds: int = 7) -> tuple[int, int, int, int]:
    """Philox4x32 as Salmon et al. (SC 2011) print it, in Python ints.

    Example:
        >>> from flora_core.testing import philox4x32
        >>> [f"{word:08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
        ['5f6fb709', '0d893f64', '4f121f81', '4f730a48']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right % 2**32, (left >> 32) ^ c3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=256)
def keep_mask(rows: int, columns: int, q: int, seed: int, first_row: int = 0) -> torch.Tensor:
    """Which elements dropout keeps, bool (rows, columns), drawn one by one.

    Example:
        >>> from flora_core.testing import keep_mask
        >>> keep_mask(1, 8, q=32768, seed=1).int()
        tensor([[1, 1, 1, 0, 1, 0, 0, 0]], dtype=torch.int32)
    """
    kept = torch.empty(rows, columns, dtype=torch.bool)
    for row in range(rows):
        for group in range(0, columns, 8):
            words = philox4x32((group // 8, first_row + row, 0, 0), (seed % 2**32, seed >> 32))
            draws = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
            for column in range(group, min(group + 8, columns)):
                kept[row, column] = draws[column - group] >= q
    return kept
