"""The primitives of ``reference`` in C++: same names, same arguments, for any array with ``__dlpack__``, without torch.

torch tensors, NumPy, JAX and CuPy arrays are read where they lie. Beyond the reference's arguments every function takes
``dtype`` ("bfloat16" or "float16": what uint16 arrays hold, as NumPy has no bfloat16), ``threads`` and ``isa``.
Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import Dropout, MergeItem, Ranges


def _why_not(error: ImportError) -> str:
    """Why the compiled module cannot be had."""
    folder = Path(__file__).parent
    note = folder / "not_built.txt"
    if note.exists():
        return note.read_text().strip()
    if not any(folder.glob("_native*.so")):
        return "not built in this checkout; build it with: pip install -e . (needs g++ or clang++)"
    return f"{error}; built for another Python or moved: reinstall flora-core"


try:
    from . import _native  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    raise ImportError(_why_not(error)) from error

_CODES = {"float32": 1, "bfloat16": 2, "float16": 3, "float64": 4, "int16": 5}
_HALVES = {name: _CODES[name] for name in ("bfloat16", "float16")}
_SUMS = {name: _CODES[name] for name in ("float32", "float64")}
_ROUNDINGS = {"nearest": 0, "stochastic": 1}
_DEVICE_CODES = {"cpu": 0, "cuda": 1}
_ISAS = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3}
# Devices that each op's arrays may lie on. The other ops take tables of clients, which on CUDA must lie on the device:
# they are for callers of the C interface.
_MERGES = ("cpu", "cuda") if _native.built_with_cuda else ("cpu",)
DEVICES = {
    **dict.fromkeys(("merge_", "merge_many_"), _MERGES),
    **dict.fromkeys(("shrink", "expand_", "wgrad", "cohort_adamw_"), ("cpu",)),
}


def _name(dtype: Any) -> str:
    """The name of a dtype of any framework: torch.float32 and numpy.dtype("float32") are "float32"."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


@functools.cache
def _code_of(dtype: Any) -> int | None:
    return _CODES.get(_name(dtype))


def _choose(name: str, value: Any, known: dict[str, int]) -> int:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def _torch() -> Any:
    """torch, if anybody has imported it: nobody else can hand us tensors."""
    return sys.modules.get("torch")


def _is_tensor(array: Any) -> bool:
    torch = _torch()
    return torch is not None and isinstance(array, torch.Tensor)


def _shared(name: str, array: Any, devices: tuple[str, ...] = ("cpu",)) -> Any:
    """An array as the compiled module takes it: a tensor as a tuple (20 times as fast as DLPack), else as it is."""
    torch = _torch()
    if torch is None or not isinstance(array, torch.Tensor):
        return array
    if array.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, which this function does not track; call it under torch.no_grad()")
    if array.layout != torch.strided or array.is_conj() or array.is_neg():
        raise ValueError(f"{name} must be a plain strided tensor, got layout {array.layout}; copy it first")
    code, device = _code_of(array.dtype), array.device
    if code is None:
        raise TypeError(f"{name} must be one of {', '.join(_CODES)}, got {_name(array.dtype)}")
    if device.type not in devices:
        raise ValueError(f"{name} must be on {' or '.join(devices)}, got {device}; use another backend")
    return array.data_ptr(), code, _DEVICE_CODES[device.type], device.index or 0, tuple(array.shape), array.stride()


def _stream_of(array: Any) -> int:
    """The CUDA stream that an array's framework works on; 0, the default one, where there is none."""
    if _is_tensor(array):
        return _torch().cuda.current_stream(array.device).cuda_stream if array.device.type == "cuda" else 0
    cupy = sys.modules.get("cupy")
    return int(cupy.cuda.get_current_stream().ptr) if cupy is not None and isinstance(array, cupy.ndarray) else 0


def _call(dtype: str | None, threads: int | None, isa: str, stream: int = 0) -> Any:
    """Where and how the next call runs; torch's number of threads unless one is given."""
    torch = _torch()
    if threads is None:
        threads = 0 if torch is None else int(torch.get_num_threads())
    if threads < 0:
        raise ValueError(f"threads must be at least 0 (0: OpenMP's default), got {threads}")
    bits = (
        0 if dtype is None else _choose("dtype", _name(dtype), {name: _CODES[name] for name in ("bfloat16", "float16")})
    )
    return _native.Call(threads, _choose("isa", isa, _ISAS), stream, bits)


def _key(seed: int) -> int:
    """A key as a signed 64-bit number."""
    return ((int(seed) + 2**63) & (2**64 - 1)) - 2**63


def merge_many_(
    items: Sequence[MergeItem | tuple[Any, ...]],
    *,
    rounding: str = "nearest",
    seed: int = 0,
    accumulate: Any = "float32",
    dtype: str | None = None,
    threads: int | None = None,
    isa: str = "auto",
) -> int:
    """Merge many weights in place: ``W += B^T diag(coef) A``.

    With stochastic rounding item i uses the key ``seed + i``. On CUDA it is enqueued on the stream that the first
    weight's framework works on, and A and B of an item must have one dtype.

    Args:
        items: ``MergeItem`` or tuples (W (N, K), A (P, K), B (P, N), coef (P)[, low_bits (N, K)]).
        rounding: ``nearest`` or, for bfloat16, ``stochastic``.
        accumulate: ``float32`` or ``float64``: what W's sum is made in, before its one rounding.
    Returns:
        Bytes of workspace that it used: all the memory beyond the arrays themselves.
    Raises:
        ValueError: If sizes do not fit, an output is read-only or overlaps another array; nothing is changed then.
    Deterministic: yes, for any number of threads.
    """
    stacks, devices = [], DEVICES["merge_many_"]
    call = _call(dtype, threads, isa, _stream_of(items[0][0]) if items else 0)
    for i, item in enumerate(items):
        prefix = f"items[{i}]." if len(items) > 1 else ""
        weight, A, B, coef, low_bits = (*item, None) if len(item) == 4 else item
        arrays = {"weight": weight, "A": A, "B": B, "coef": coef, "low_bits": low_bits}
        stacks.append((*(_shared(prefix + name, array, devices) for name, array in arrays.items()), _key(seed + i)))
    sums = _choose("accumulate", _name(accumulate), _SUMS)
    call.merge_many(stacks, _choose("rounding", rounding, _ROUNDINGS), sums)
    return call.workspace_bytes


def merge_(
    weight_NK: Any,
    A_PK: Any,
    B_PN: Any,
    coef_P: Any,
    *,
    rounding: str = "nearest",
    low_bits_NK: Any = None,
    seed: int = 0,
    accumulate: Any = "float32",
    dtype: str | None = None,
    threads: int | None = None,
    isa: str = "auto",
) -> None:
    """W += B^T diag(coef) A in place: one sum in ``accumulate``, one rounding. See ``merge_many_``."""
    item = MergeItem(weight_NK, A_PK, B_PN, coef_P, low_bits_NK)
    options = dict(rounding=rounding, seed=seed, accumulate=accumulate, dtype=dtype, threads=threads, isa=isa)
    merge_many_([item], **options)  # pyright: ignore[reportArgumentType]


def _offsets(ranges: Ranges) -> Sequence[int]:
    """Where ranges begin and end: kept ready by whoever has them, else gathered."""
    known = getattr(ranges, "offsets", None)
    return known if isinstance(known, tuple) else [0, *(part.stop for part in ranges)]


def _clients(tokens: Ranges, ranks: Ranges, scaling_C: Any, dropout: Dropout | None) -> Any:
    if not isinstance(scaling_C, tuple):
        scaling_C = () if scaling_C is None else [float(scale) for scale in scaling_C]
    q, seed, row = ([], [], []) if dropout is None else ([int(value) for value in values] for values in dropout)
    return _native.Clients(_offsets(tokens), _offsets(ranks), scaling_C, q, [_key(value) for value in seed], row)


def _new(like: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """A fresh array of the framework of another one; NumPy's where that has no way to make one in place."""
    if _is_tensor(like):
        return like.new_empty(shape, dtype=dtype)
    if type(like).__module__.partition(".")[0] not in ("numpy", "cupy"):
        raise TypeError(f"out must be given for arrays of {type(like).__module__}, which this function cannot make")
    module = sys.modules[type(like).__module__.partition(".")[0]]
    return module.empty(shape, dtype=like.dtype if dtype is None else dtype)


def _flat_size(tokens: Ranges, ranks: Ranges) -> int:
    return sum((m.stop - m.start) * (p.stop - p.start) for m, p in zip(tokens, ranks, strict=True))


def shrink(
    x_MK: Any,
    A_PK: Any,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Any = None,
    dropout: Dropout | None = None,
    *,
    out: Any = None,
    dtype: str | None = None,
    threads: int | None = None,
    isa: str = "auto",
) -> Any:
    """Flat S in the dtype of x, into ``out`` if given: S_c = scaling_c drop(X_c) A_c^T."""
    s_flat = _new(x_MK, (_flat_size(tokens, ranks),)) if out is None else out
    _call(dtype, threads, isa).shrink(
        _shared("x_MK", x_MK),
        _shared("A_PK", A_PK),
        _shared("out", s_flat),
        _clients(tokens, ranks, scaling_C, dropout),
    )
    return s_flat


def expand_(
    y_MN: Any,
    s_flat: Any,
    B_PN: Any,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Any = None,
    dropout: Dropout | None = None,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    isa: str = "auto",
) -> Any:
    """Y_c += scaling_c S_c B_c in place, dropped columns left alone and kept ones scaled up."""
    _call(dtype, threads, isa).expand(
        _shared("y_MN", y_MN),
        _shared("s_flat", s_flat),
        _shared("B_PN", B_PN),
        _clients(tokens, ranks, scaling_C, dropout),
    )
    return y_MN


def wgrad(
    ds_flat: Any,
    x_MK: Any,
    s_flat: Any,
    dy_MN: Any,
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Any,
    dtype: Any,
    dropout: Dropout | None = None,
    *,
    out: tuple[Any, Any] | None = None,
    uint16: str | None = None,
    threads: int | None = None,
    isa: str = "auto",
) -> tuple[Any, Any]:
    """dA_PK = dS^T drop(X) and dB_PN = s S^T dY in ``dtype``; ``uint16`` says what uint16 arrays hold."""
    total = ranks[-1].stop if len(ranks) else 0
    shapes = (total, x_MK.shape[1]), (total, dy_MN.shape[1])
    dA_PK, dB_PN = (_new(x_MK, shape, dtype) for shape in shapes) if out is None else out
    arrays = dict(ds_flat=ds_flat, x_MK=x_MK, s_flat=s_flat, dy_MN=dy_MN, dA_PK=dA_PK, dB_PN=dB_PN)
    _call(uint16, threads, isa).wgrad(
        *(_shared(name, array) for name, array in arrays.items()), _clients(tokens, ranks, scaling_C, dropout)
    )
    return dA_PK, dB_PN


def cohort_adamw_(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    segments: Ranges,
    hyper_CH: Any,
    owner: Sequence[int],
    *,
    threads: int | None = None,
    isa: str = "auto",
) -> None:
    """AdamW over flat buffers in place; segment i takes row owner[i] of hyper, a step of 0 leaves it untouched.

    Columns of hyper: lr, beta1, beta2, eps, weight decay, step (1 for the first), clip scale of the gradient.
    """
    arrays = dict(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, hyper_CH=hyper_CH)
    _call(None, threads, isa).adamw(
        *(_shared(name, array) for name, array in arrays.items()), _offsets(segments), list(owner)
    )


def describe() -> str:
    """The library in a line: version, instruction set, threads, CUDA."""
    isa = {code: name for name, code in _ISAS.items()}[_native.cpu_isa()]
    cuda = _native.why_not_cuda() or "here"
    return f"{_native.version()}, {isa}, {_native.cpu_threads()} threads, CUDA: {cuda}"


def prefix() -> Path:
    """The folder that holds include/flora_kernels.h, lib/libflora_kernels.so and the CMake and pkg-config files."""
    return Path(_native.__file__).parent


def __getattr__(name: str) -> Any:
    """``DTYPES``: what each op takes, as torch's dtypes."""
    if name != "DTYPES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ops = dict.fromkeys(("merge_", "merge_many_", "shrink", "expand_", "wgrad"), floats)
    found = {**ops, "cohort_adamw_": (torch.float32, torch.float64)}
    globals()[name] = found  # asked for at every call of an op
    return found


__all__ = [
    "DEVICES",
    "Dropout",
    "MergeItem",
    "cohort_adamw_",
    "describe",
    "expand_",
    "merge_",
    "merge_many_",
    "prefix",
    "shrink",
    "wgrad",
]
