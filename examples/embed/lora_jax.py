"""A LoRA layer of two clients under jit and grad, and a merge into a donated weight, from JAX on the CPU."""

import sys
from functools import partial

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np

from flora_kernels import jax_ffi

jax_ffi.build(sys.argv[1] if sys.argv[1:] else ".")
random = np.random.default_rng(0)
shapes = [(8, 24), (16, 24), (6, 24), (6, 16)]
x, W, A, B = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)
clients = (0, 5, 8), (0, 4, 6), (2.0, 0.5)


def plain(x, A, B):
    parts = [(slice(0, 5), slice(0, 4), 2.0), (slice(5, 8), slice(4, 6), 0.5)]
    return x @ W.T + jnp.concatenate([s * (x[m] @ A[p].T) @ B[p] for m, p, s in parts])


def loss(layer, *arrays):
    return (layer(*arrays) ** 2).mean()


ours = jax.jit(jax.grad(partial(loss, lambda x, A, B: jax_ffi.lora_linear(x, W, A, B, *clients)), argnums=(0, 1, 2)))
right = jax.grad(partial(loss, plain), argnums=(0, 1, 2))
print("gradients:", all(jnp.allclose(a, b, atol=1e-4) for a, b in zip(ours(x, A, B), right(x, A, B))))
merge, wanted = jax.jit(jax_ffi.merge, donate_argnums=0), W + B.T @ (0.1 * A)
print("merged:", bool(jnp.allclose(merge(W + 0, A, B, jnp.full(6, 0.1)), wanted, atol=1e-5)))
