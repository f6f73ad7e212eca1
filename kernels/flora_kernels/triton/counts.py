"""Bytes and operations that each op needs by its shapes alone, and the time that no kernel can beat.

Counted once per tensor that the op must read or write, whatever its tiles read again from the cache.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients; ``size`` is bytes per element of
the activations, the factors' bytes are counted at ``factor`` each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Rates measured on an H200.
BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.3e12, 790e12


@dataclass(frozen=True)
class Count:
    """Bytes and floating-point operations of an op."""

    bytes: int
    flops: int

    @property
    def limit_us(self) -> float:
        """The time at the limit: the slower of memory and tensor cores."""
        return 1e6 * max(self.bytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND)


def _pairs(rows: Sequence[int], ranks: Sequence[int]) -> int:
    """Elements of the ragged S: tokens times rank, client by client."""
    return sum(m * r for m, r in zip(rows, ranks, strict=True))


def shrink(rows: Sequence[int], ranks: Sequence[int], K: int, size: int = 2, factor: int = 4) -> Count:
    """Read X and A, write S."""
    M, pairs = sum(rows), _pairs(rows, ranks)
    return Count(size * (M * K + pairs) + factor * sum(ranks) * K, 2 * pairs * K)


def expand_(rows: Sequence[int], ranks: Sequence[int], N: int, size: int = 2, factor: int = 4) -> Count:
    """Read and write Y, read S and B."""
    M, pairs = sum(rows), _pairs(rows, ranks)
    return Count(size * (2 * M * N + pairs) + factor * sum(ranks) * N, 2 * pairs * N)


def wgrad(rows: Sequence[int], ranks: Sequence[int], K: int, N: int, size: int = 2, factor: int = 4) -> Count:
    """Read X, dY, S and dS, write dA and dB."""
    M, pairs = sum(rows), _pairs(rows, ranks)
    return Count(size * (M * (K + N) + 2 * pairs) + factor * sum(ranks) * (K + N), 2 * pairs * (K + N))


def linear(rows: Sequence[int], K: int, N: int, size: int = 2) -> Count:
    """Read X and W, write Y."""
    M = sum(rows)
    return Count(size * (M * K + N * K + M * N), 2 * M * N * K)


def linear_lora(rows: Sequence[int], ranks: Sequence[int], K: int, N: int, size: int = 2, factor: int = 4) -> Count:
    """As ``linear``, and read S and B."""
    base, pairs = linear(rows, K, N, size), _pairs(rows, ranks)
    return Count(base.bytes + size * pairs + factor * sum(ranks) * N, base.flops + 2 * pairs * N)


def branch_bytes(
    rows: Sequence[int], ranks: Sequence[int], K: int, Ns: Sequence[int], size: int = 2, factor: int = 4
) -> tuple[int, int]:
    """Bytes that targets sharing X move beside their products, forward and backward.

    Forward X and every A once more, and S; backward every dY once for dS and dB, X once for every dA, S, dS, and the
    factors with their gradients. What is added to Y and dX rides on the products.
    """
    M, P, pairs, T = sum(rows), sum(ranks), _pairs(rows, ranks), len(Ns)
    forward = size * (M * K + 2 * T * pairs) + factor * P * (T * K + sum(Ns))
    backward = size * (M * (K + sum(Ns)) + 4 * T * pairs) + 2 * factor * P * (T * K + sum(Ns))
    return forward, backward


def merge_(ranks: Sequence[int], K: int, N: int, size: int = 2, factor: int = 4, low_bits: bool = False) -> Count:
    """Read and write W (and its low bits), read A and B."""
    P = sum(ranks)
    return Count(2 * (size + 2 * low_bits) * N * K + factor * P * (N + K), 2 * P * N * K)


def cohort_adamw_(numel: int, size: int = 4) -> Count:
    """Read the parameter, its gradient and both moments; write all but the gradient."""
    return Count(7 * size * numel, 0)


__all__ = [
    "BYTES_PER_SECOND",
    "FLOPS_PER_SECOND",
    "Count",
    "branch_bytes",
    "cohort_adamw_",
    "expand_",
    "linear",
    "linear_lora",
    "merge_",
    "shrink",
    "wgrad",
]
