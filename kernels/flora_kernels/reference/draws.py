"""The random bits of dropout and of stochastic rounding: counter-based, the same on every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF


def philox4x32(
    counter: Sequence[torch.Tensor], key: tuple[int, int], rounds: int = 7
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw four 32-bit words for each counter.

    Args:
        counter: Four int64 tensors of one shape, each element a 32-bit word.
        key: Two 32-bit words.
        rounds: 7 here; 10 is the algorithm's usual number.
    Returns:
        Four int64 tensors of that shape, of 32-bit words.
    Source: Salmon et al., SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap, which leaves the low 64 bits right; the mask undoes the arithmetic shift.
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _U32) ^ c1 ^ k0, p1 & _U32, ((p0 >> 32) & _U32) ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + _PHILOX_W[0]) & _U32, (k1 + _PHILOX_W[1]) & _U32
    return c0, c1, c2, c3


def draws(rows: int, columns: int, seed: int, first_row: int, stream: int, device: torch.device) -> torch.Tensor:
    """16-bit draws (rows, columns), held in int64.

    The key is ``seed`` (low word, high word), the counter is (column // 8, row, 0, stream); draw ``column % 8`` is a
    16-bit half of word ``(column % 8) // 2``, the low half first.
    """
    row_M1 = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)[:, None]
    group_1G = torch.arange((columns + 7) // 8, dtype=torch.int64, device=device)[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32((group_1G, row_M1, zero, zero + stream), (seed & _U32, (seed >> 32) & _U32))
    words = [word.expand(rows, group_1G.shape[1]) for word in words]
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return halves.flatten(1)[:, :columns]


def dropout_keep(rows: int, columns: int, q: int, seed: int, first_row: int, device: torch.device) -> torch.Tensor:
    """Make one client's dropout mask: an element is kept where its 16-bit draw is at least q.

    Args:
        rows, columns: The mask's shape.
        q: round(65536 p), 0 to 65536.
        seed: The client's key, 64 bits.
        first_row: The number of the first row within the optimizer step.
        device: Where the mask lies.
    Returns:
        Bool (rows, columns), True where kept.
    """
    return draws(rows, columns, seed, first_row, 0, device) >= q


__all__ = ["draws", "dropout_keep", "philox4x32"]
