"""The native kernels under ``jax.jit`` and ``jax.grad`` on the CPU, through XLA's FFI.

The handlers are compiled once against the headers of the installed JAX: ``build`` needs g++ or clang++.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np

from . import native

_OPS = ("merge", "shrink", "expand", "wgrad")


def build(folder: str | os.PathLike[str]) -> Path:
    """Compile the handlers into a folder and register them with JAX; what is there already is only registered.

    Raises:
        RuntimeError: If the compiler fails, with what it says.
    """
    home = native.prefix()
    made = Path(folder) / f"flora_ffi-jax{jax.__version__}.so"
    if not made.exists():
        includes = [f"-I{home}/include", f"-I{jax.ffi.include_dir()}"]
        link = [f"-L{home}/lib", "-lflora_kernels", f"-Wl,-rpath,{home}/lib"]
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        source, flags = str(home / "include/flora_ffi.cpp"), ["-O2", "-std=c++17", "-shared", "-fPIC"]
        command = [*compiler, *flags, source, *includes, *link, "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    library = ctypes.CDLL(str(made.resolve()))
    for op in _OPS:
        jax.ffi.register_ffi_target(f"flora_{op}", jax.ffi.pycapsule(library[f"flora_xla_{op}"]), platform="cpu")
    return made


def _call(op: str, like: Any, *arrays: Any, **attributes: Any) -> Any:
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), like)
    aliases = {0: 0} if op in ("merge", "expand") else None
    return jax.ffi.ffi_call(f"flora_{op}", shapes, input_output_aliases=aliases)(*arrays, **attributes)


def merge(weight_NK: Any, A_PK: Any, B_PN: Any, coef_P: Any, *, accumulate: str = "float32") -> Any:
    """W + B^T diag(coef) A; in place where W is donated to the jitted function around it."""
    return _call("merge", weight_NK, weight_NK, A_PK, B_PN, coef_P, wide=accumulate == "float64")


def lora_linear(
    x_MK: Any,
    weight_NK: Any,
    A_PK: Any,
    B_PN: Any,
    tokens: Sequence[int],
    ranks: Sequence[int],
    scaling_C: Sequence[float],
) -> Any:
    """X W^T + s_c X_c A_c^T B_c, differentiable in x, A and B.

    Args:
        x_MK, weight_NK: Activations and the frozen weight, of one dtype.
        A_PK, B_PN: The clients' stacked factors.
        tokens, ranks: Offsets of the clients' rows of x and of the factors: C + 1 numbers from 0 on.
        scaling_C: Each client's scale.
    """
    return _lora_linear(x_MK, weight_NK, A_PK, B_PN, (tuple(tokens), tuple(ranks), tuple(scaling_C)))


def _tables(clients: tuple[Any, ...], scaled: bool = True) -> dict[str, np.ndarray]:
    tokens, ranks, scaling = clients
    offsets = {"tokens": np.array(tokens, np.int32), "ranks": np.array(ranks, np.int32)}
    return {**offsets, "scaling": np.array(scaling if scaled else (), np.float64)}


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _lora_linear(x, weight, A, B, clients):
    return _forward(x, weight, A, B, clients)[0]


def _forward(x, weight, A, B, clients):
    tokens, ranks, _ = clients
    size = int(np.diff(tokens) @ np.diff(ranks))
    s = _call("shrink", jax.ShapeDtypeStruct((size,), x.dtype), x, A, **_tables(clients, scaled=False))
    y = x @ weight.T
    return _call("expand", y, y, s, B, **_tables(clients)), (x, weight, A, B, s)


def _backward(clients, saved, dy):
    x, weight, A, B, s = saved
    ds = _call("shrink", s, dy, B, **_tables(clients))
    dx = _call("expand", x, dy @ weight, ds, A, **_tables(clients, scaled=False))
    dA, dB = _call("wgrad", (A, B), ds, x, s, dy, **_tables(clients))
    return dx, jnp.zeros_like(weight), dA, dB


_lora_linear.defvjp(_forward, _backward)

__all__ = ["build", "lora_linear", "merge"]
