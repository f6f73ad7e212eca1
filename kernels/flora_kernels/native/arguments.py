"""Arguments of ``native`` as the compiled module takes them; unfit ones are refused by name.

Letters: C clients.
"""

from __future__ import annotations

import functools
import operator
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from ..types import Ranges

CODES = {"float32": 1, "bfloat16": 2, "float16": 3, "float64": 4, "int16": 5}
_DEVICE_CODES = {"cpu": 0, "cuda": 1}
# What the C interface calls something, and we do; each function adds its own arrays.
_OURS = {
    "clients.token_offsets": "tokens",
    "clients.rank_offsets": "ranks",
    "clients.q": "dropout.q_C",
    "clients.first_row": "dropout.row_C",
    "segment_offsets": "segments",
    "hyper": "hyper_CH",
    "dtype": "param.dtype",
    "options.rounding": "rounding",
    "FLORA_NEAREST": "'nearest'",
    "exec.isa": "isa",
    "FLORA_ISA_AUTO": "'auto'",
}


def name_of(dtype: Any) -> str:
    """The name of a dtype of any framework: torch.float32 and numpy.dtype("float32") are "float32"."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


@functools.cache
def _code_of(dtype: Any) -> int | None:
    return CODES.get(name_of(dtype))


def choose(name: str, value: Any, known: dict[str, int]) -> int:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r:.40}") from None


def key(seed: Any) -> int:
    """A key as a signed 64-bit number."""
    return ((operator.index(seed) + 2**63) & (2**64 - 1)) - 2**63


def torch_if_imported() -> Any:
    """torch, if it has been imported: without it there are no tensors."""
    return sys.modules.get("torch")


def is_tensor(array: Any) -> bool:
    torch = torch_if_imported()
    return torch is not None and isinstance(array, torch.Tensor)


def shared(name: str, array: Any, devices: tuple[str, ...] = ("cpu",)) -> Any:
    """An array as the compiled module takes it: a tensor as a tuple (20 times as fast as DLPack), else as it is."""
    torch = torch_if_imported()
    if torch is None or not isinstance(array, torch.Tensor):
        if not hasattr(array, "__dlpack__"):
            kind = type(array).__name__
            raise TypeError(f"{name} must be an array with __dlpack__ (torch, NumPy, JAX, CuPy), got {kind}")
        return array
    if array.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, which this function does not track; call it under torch.no_grad()")
    if array.is_conj() or array.is_neg():
        raise ValueError(f"{name} is conjugated or negated when read; call resolve_conj() or resolve_neg() first")
    if array.layout != torch.strided or array.is_nested:
        layout = "nested" if array.is_nested else array.layout
        raise ValueError(f"{name} must be a plain strided tensor, got layout {layout}; copy it first")
    code, device = _code_of(array.dtype), array.device
    if code is None:
        raise TypeError(f"{name} must be one of {', '.join(CODES)}, got {name_of(array.dtype)}; convert it")
    if device.type not in devices:
        raise ValueError(f"{name} must be on {' or '.join(devices)}, got {device}; use another backend")
    try:
        address = array.data_ptr()
    except RuntimeError:
        kind = type(array).__name__
        raise TypeError(f"{name} is a {kind} without memory (under vmap or tracing); pass the plain tensor") from None
    return address, code, _DEVICE_CODES[device.type], device.index or 0, tuple(array.shape), array.stride()


def stream_of(array: Any) -> int:
    """The CUDA stream that an array's framework works on; 0, the default one, where there is none."""
    if is_tensor(array):
        return torch_if_imported().cuda.current_stream(array.device).cuda_stream if array.device.type == "cuda" else 0
    cupy = sys.modules.get("cupy")
    return int(cupy.cuda.get_current_stream().ptr) if cupy is not None and isinstance(array, cupy.ndarray) else 0


def new(like: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """A fresh array of the framework of another one; NumPy's where that has no way to make one in place."""
    family = type(like).__module__.partition(".")[0]
    if not is_tensor(like) and family not in ("numpy", "cupy"):
        raise TypeError(f"out must be given for arrays of {family}, which this function cannot make; pass NumPy's")
    try:
        if is_tensor(like):
            return like.new_empty(shape, dtype=dtype)
        return sys.modules[family].empty(shape, dtype=like.dtype if dtype is None else dtype)
    except TypeError:
        raise TypeError(f"dtype must be a dtype of {family}, as the arrays are, got {dtype!r}") from None


def columns_of(name: str, array: Any) -> int:
    shape = tuple(getattr(array, "shape", ()))
    if len(shape) != 2:
        raise ValueError(f"{name} must have 2 axes, got {len(shape)}")
    return shape[1]


def offsets_of(name: str, ranges: Ranges, total: int | None = None) -> Sequence[int]:
    """Where ranges begin and end: kept ready by the caller, else gathered; ``total`` is where they must end."""
    offsets = getattr(ranges, "offsets", None)
    if not isinstance(offsets, tuple):
        offsets = [0]
        for i, part in enumerate(_each(name, ranges)):
            if not isinstance(part, slice) or part.step not in (None, 1):
                raise TypeError(f"{name}[{i}] must be a slice such as slice(0, 3), got {part!r:.40}")
            stop = integer(f"{name}[{i}].stop", part.stop)
            if part.start != offsets[-1] or stop < offsets[-1]:
                raise ValueError(f"{name}[{i}] must go on from {offsets[-1]}, where the one before ends, got {part}")
            offsets.append(stop)
    if total is not None and offsets[-1] != total:
        raise ValueError(f"{name} must end at {total}, the length of its axis, got {offsets[-1]}")
    return offsets


def _each(name: str, values: Any) -> Iterable[Any]:
    try:
        return values.tolist() if hasattr(values, "tolist") else iter(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence, got {values!r:.40}") from None


def per(owner: str, name: str, values: Any, count: int, convert: Callable[[Any], Any]) -> list[Any]:
    """One number for each of ``count`` owners."""
    try:
        numbers = [convert(value) for value in _each(name, values)]
    except (TypeError, ValueError):
        kind = "number" if convert is float else "integer"
        raise TypeError(f"{name} must hold one {kind} for each {owner}, got {values!r:.60}") from None
    require_one_each(owner, name, numbers, count)
    return numbers


def require_one_each(owner: str, name: str, numbers: Sequence[Any], count: int) -> None:
    if len(numbers) != count:
        raise ValueError(f"{name} must have one entry for each {owner}, {count}, got {len(numbers)}")


def flat_size(tokens: Sequence[int], ranks: Sequence[int]) -> int:
    """Elements of flat S, by offsets."""
    return sum((m1 - m0) * (r1 - r0) for (m0, m1), (r0, r1) in zip(pairwise(tokens), pairwise(ranks), strict=True))


def run(function: Callable[..., None], *arguments: Any, **names: str) -> None:
    """Call the compiled module; errors of the C interface are reported in the names of ``native``."""
    try:
        function(*arguments)
    except ValueError as error:
        ours = {**_OURS, **names}

        def renamed(word: re.Match[str]) -> str:
            head, dot, field = word[0].partition(".")
            return ours.get(word[0]) or ours.get(head, head) + dot + field

        raise ValueError(re.sub(r"(?<![\w.\]])(?:\w+\.)?\w+", renamed, str(error))) from None
