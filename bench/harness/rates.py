"""How fast this machine copies and multiplies, measured in the run whose results are held against it."""

from __future__ import annotations

import functools

import torch

from bench.harness.protocol import Timing


def device() -> torch.device:
    """Where the benchmarks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype(where: torch.device) -> torch.dtype:
    """Dtype of the base: bfloat16 on a GPU; float32 on a CPU, whose 16-bit products are far slower."""
    return torch.bfloat16 if where.type == "cuda" else torch.float32


@functools.cache
def rates(
    where: torch.device, side: int | None = None, size_bytes: int | None = None, turn: int = 0
) -> dict[str, float]:
    """Bytes read and written a second by a large copy, and operations a second of a large square product.

    Both are the best of seven: a limit is what the machine can do, not what it did in a bad moment. They are measured
    once a process, and again for another ``turn``.
    """
    gpu = where.type == "cuda"
    side, size_bytes = side or (8192 if gpu else 2048), size_bytes or (2**31 if gpu else 2**28)
    source = torch.ones(size_bytes, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=where).to(dtype(where))
    out = torch.empty_like(left)
    copies, products = Timing(), Timing()
    for _ in range(8):
        copies.run(lambda: target.copy_(source))
        products.run(lambda: torch.mm(left, left, out=out))
    return {
        "copy_bytes_per_s": 2 * size_bytes / min(copies.wall_s[1:]),
        "matrix_flops_per_s": 2 * side**3 / min(products.wall_s[1:]),
    }


__all__ = ["device", "dtype", "rates"]
