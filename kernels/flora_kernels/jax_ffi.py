"""The native kernels under ``jax.jit`` and ``jax.grad`` on the CPU, through XLA's FFI.

The handlers are compiled once against the headers of the installed JAX: ``build`` needs g++ or clang++.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks.
"""

from __future__ import annotations

import ctypes
import operator
import os
import shlex
import subprocess
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np

from . import native

_OPS = ("merge", "shrink", "expand", "wgrad")


def build(folder: str | os.PathLike[str]) -> Path:
    """Compile the handlers into a folder and register them with JAX; what is there already is only registered.

    Args:
        folder: Where the compiled handlers are kept, by JAX's version; made if it is not there.
    Returns:
        The path of the shared library.
    Raises:
        RuntimeError: If there is no compiler (g++, or what CXX names) or it fails, with what it says.
    """
    home, folder = native.prefix(), Path(folder)
    source = home / "include/flora_ffi.cpp"
    # A handler is linked to the library where it lies.
    tag = sha256(str(home).encode() + source.read_bytes()).hexdigest()[:8]
    made = folder / f"flora_ffi-{tag}-jax{jax.__version__}.so"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{home}/include", f"-I{jax.ffi.include_dir()}"]
        link = [f"-L{home}/lib", "-lflora_kernels", f"-Wl,-rpath,{home}/lib"]
        compiler, flags = shlex.split(os.environ.get("CXX", "g++")), ["-O2", "-std=c++17", "-shared", "-fPIC"]
        _compile([*compiler, *flags, str(source), *includes, *link, "-o", str(made)])
    _register(made.resolve())
    return made


_registered: list[Path] = []


def _register(made: Path) -> None:
    """Tell JAX of the handlers, once: it takes no name twice in a process."""
    if _registered:
        return
    library = ctypes.CDLL(str(made))
    for op in _OPS:
        jax.ffi.register_ffi_target(f"flora_{op}", jax.ffi.pycapsule(library[f"flora_xla_{op}"]), platform="cpu")
    _registered.append(made)


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(
            f"the XLA handlers need a C++ compiler, got {command[0]!r}; install g++ or set CXX"
        ) from None
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


def _call(op: str, like: Any, *arrays: Any, **attributes: Any) -> Any:
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), like)
    aliases = {0: 0} if op in ("merge", "expand") else None
    # Under vmap one call follows another: a handler knows no axis of batches.
    call = jax.ffi.ffi_call(f"flora_{op}", shapes, input_output_aliases=aliases, vmap_method="sequential")
    return call(*arrays, **attributes)


def _array(name: str, value: Any, axes: int, dtypes: tuple[Any, ...] = ()) -> jax.Array:
    """The argument as an array of JAX; refused by name if it does not have these axes or none of these dtypes."""
    if not hasattr(value, "dtype"):
        raise TypeError(f"{name} must be an array of JAX or NumPy, got {type(value).__name__}")
    array = jnp.asarray(value)
    if array.ndim != axes:
        raise ValueError(f"{name} must have {axes} axes, got {array.ndim}; reshape it")
    wanted = dtypes or tuple(map(jnp.dtype, ("float32", "bfloat16", "float16", "float64")))
    if array.dtype not in wanted:
        raise TypeError(f"{name} must be {' or '.join(map(str, wanted))}, got {array.dtype}; convert it")
    return array


def merge(weight_NK: Any, A_PK: Any, B_PN: Any, coef_P: Any, *, accumulate: str = "float32") -> Any:
    """Return W + B^T diag(coef) A; in place where W is donated to the jitted function around it.

    Args:
        weight_NK, A_PK, B_PN, coef_P: float32, bfloat16, float16 or float64, each of its own; B is stored P x N.
        accumulate: ``float32`` or ``float64``: what the sum is made in, before its one rounding.
    Returns:
        The new weight, in the dtype of the old.
    Raises:
        TypeError, ValueError: If something is no such array or accumulate neither.
        jax.errors.JaxRuntimeError: If shapes do not fit each other, with the library's message.
    No gradient is defined. Deterministic: yes. Source: arXiv 2409.05976, eq. 5.
    """
    if accumulate not in ("float32", "float64"):
        raise ValueError(f"accumulate must be float32 or float64, got {accumulate!r}")
    matrices = dict(weight_NK=weight_NK, A_PK=A_PK, B_PN=B_PN)
    weight_NK, A_PK, B_PN = (_array(name, value, 2) for name, value in matrices.items())
    coef_P = _array("coef_P", coef_P, 1)
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
    """Return X W^T + s_c X_c A_c^T B_c, differentiable once, in reverse, in x, A and B; W's gradient is zero.

    Args:
        x_MK, weight_NK: Activations and the frozen weight, of one dtype: float32, bfloat16, float16 or float64.
        A_PK, B_PN: The clients' stacked factors, in that dtype or as float32 masters.
        tokens, ranks: Offsets of the clients' rows of x and of the factors: C + 1 numbers from 0 on.
        scaling_C: Each client's scale. Tables are numbers, known when the function is traced.
    Returns:
        y_MN in the dtype of x.
    Raises:
        TypeError, ValueError: If an argument is no such array, or the tables do not fit.
        jax.errors.JaxRuntimeError: If shapes do not fit each other, with the library's message.
    Deterministic: yes. Source: as ``native.shrink``.
    """
    x_MK = _array("x_MK", x_MK, 2)
    weight_NK = _array("weight_NK", weight_NK, 2, (x_MK.dtype,))
    if weight_NK.shape[1] != x_MK.shape[1]:
        raise ValueError(f"weight_NK must have K={x_MK.shape[1]} columns, as x_MK has, got {weight_NK.shape}")
    narrow = x_MK.dtype.itemsize == 2
    A_PK = _array("A_PK", A_PK, 2, (x_MK.dtype, jnp.dtype("float32")) if narrow else (x_MK.dtype,))
    B_PN = _array("B_PN", B_PN, 2, (A_PK.dtype,))
    clients = _offsets("tokens", tokens), _offsets("ranks", ranks), _scales(scaling_C)
    offsets, banks, scales = map(len, clients)
    if banks != offsets or scales != offsets - 1:
        raise ValueError(
            f"ranks must have {offsets} offsets and scaling_C {offsets - 1} numbers for the {offsets - 1} clients of "
            f"tokens, got {banks} and {scales}"
        )
    return _lora_linear(x_MK, weight_NK, A_PK, B_PN, clients)


def _offsets(name: str, offsets: Sequence[int]) -> tuple[int, ...]:
    try:
        numbers = tuple(operator.index(offset) for offset in offsets)
    except TypeError:  # a traced number is one, too
        raise TypeError(f"{name} must be integers known when tracing, got {offsets!r:.60}") from None
    if not numbers or numbers[0] != 0 or any(a > b for a, b in pairwise(numbers)):
        raise ValueError(f"{name} must be offsets that start at 0 and never fall, got {numbers}")
    return numbers


def _scales(scaling_C: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(float(scale) for scale in scaling_C)
    except TypeError:
        raise TypeError(f"scaling_C must be numbers known when tracing, got {scaling_C!r:.60}") from None


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
