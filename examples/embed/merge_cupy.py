"""Merge a stack into CuPy weights on a GPU."""

import cupy as cp  # pyright: ignore[reportMissingImports]

from flora_kernels import native

W = cp.random.standard_normal((1024, 2048), dtype=cp.float32)
A, B = (
    cp.random.standard_normal((160, 2048), dtype=cp.float32),
    cp.random.standard_normal((160, 1024), dtype=cp.float32),
)
coef = cp.full(160, 0.01, dtype=cp.float32)
wanted = W + B.T @ (coef[:, None] * A)
native.merge_(W, A, B, coef)
print("merged:", bool(cp.abs(W - wanted).max() < 1e-3))
