"""Merge a stack into bfloat16 weights from NumPy, which has no bfloat16: their bits travel as uint16. No torch."""

import sys

import numpy as np

from flora_kernels import native

random = np.random.default_rng(0)
W = random.standard_normal((64, 96), dtype=np.float32)
A, B = random.standard_normal((16, 96), dtype=np.float32), random.standard_normal((16, 64), dtype=np.float32)
coef = np.full(16, 0.1)

wanted = W + B.T @ (coef[:, None] * A)
bits = (W.view(np.uint32) >> 16).astype(np.uint16)  # the upper half of an fp32 number is its bfloat16, cut off
native.merge_(bits, A, B, coef, dtype="bfloat16")
merged = (bits.astype(np.uint32) << 16).view(np.float32)
native.merge_(W, A, B, coef, accumulate="float64")

print("bfloat16:", np.abs(merged - wanted).max() < 0.05, " float32:", np.abs(W - wanted).max() < 1e-5)
print("torch imported:", "torch" in sys.modules)
