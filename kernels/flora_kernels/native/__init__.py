"""The primitives of ``reference`` in C++: same names, same arguments, for any array with ``__dlpack__``, without torch.

torch tensors, NumPy, JAX and CuPy arrays are read where they lie, with any strides. Every function also takes

    dtype     what uint16 arrays hold, "bfloat16" or "float16", as NumPy has no bfloat16 (``wgrad``: ``uint16``)
    threads   size of the OpenMP team; None is torch's number, or without torch OpenMP's own. Bits do not depend on it
    isa       "portable", "avx2" or "avx512"; "auto" is what the environment variable FLORA_ISA names, else the best

and raises TypeError or ValueError that names the argument, before anything is written. What is not finite is data: it
goes where the formula takes it, and stays with its client.
Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..types import Dropout, MergeItem, Ranges
from .arguments import (
    CODES,
    choose,
    columns_of,
    flat_size,
    integer,
    key,
    name_of,
    new,
    offsets_of,
    per,
    require_one_each,
    run,
    shared,
    torch_if_imported,
)
from .arguments import stream_of as _stream_of


def _why_not(error: ImportError) -> str:
    """Why the compiled module cannot be had."""
    folder = Path(__file__).parents[1]
    note = folder / "not_built.txt"
    if note.exists():
        return note.read_text().strip()
    if not any(folder.glob("_native*.so")):
        return "not built in this checkout; build it with: pip install -e . (needs g++ or clang++)"
    return f"{error}; built for another Python or moved: reinstall flora-core"


try:
    from .. import _native  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    raise ImportError(_why_not(error)) from error

_HALVES = {name: CODES[name] for name in ("bfloat16", "float16")}
_SUMS = {name: CODES[name] for name in ("float32", "float64")}
_ROUNDINGS = {"nearest": 0, "stochastic": 1}
_ISAS = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3}
_FORCED_ISA = os.environ.get("FLORA_ISA", "auto")
# Devices that each op's arrays may lie on. The other ops take tables of clients, which on CUDA must lie on the device:
# they are for callers of the C interface.
_MERGES = ("cpu", "cuda") if _native.built_with_cuda else ("cpu",)
DEVICES = {
    **dict.fromkeys(("merge_", "merge_many_"), _MERGES),
    **dict.fromkeys(("shrink", "expand_", "wgrad", "cohort_adamw_"), ("cpu",)),
}


def _isa(isa: Any) -> int:
    """The code of an instruction set; "auto" is what FLORA_ISA names, else the processor's best."""
    if isa == "auto":
        return choose("FLORA_ISA", _FORCED_ISA, _ISAS)
    return choose("isa", isa, _ISAS)


def _call(dtype: Any, threads: int | None, isa: str, stream: int = 0) -> Any:
    """Where and how the next call runs; torch's number of threads unless one is given."""
    torch = torch_if_imported()
    if threads is None:
        threads = 0 if torch is None else int(torch.get_num_threads())
    elif not 0 <= integer("threads", threads) <= 4096:
        raise ValueError(f"threads must be at least 0 (0: OpenMP's default) and at most 4096, got {threads}")
    bits = 0 if dtype is None else choose("dtype", name_of(dtype), _HALVES)
    return _native.Call(threads, _isa(isa), stream, bits)


def _clients(tokens: Sequence[int], ranks: Sequence[int], scaling_C: Any, dropout: Dropout | None) -> Any:
    """The clients' tables, from offsets."""
    count = len(tokens) - 1
    require_one_each("client of tokens", "ranks", ranks[1:], count)
    if scaling_C is None:
        scaling_C = ()
    elif isinstance(scaling_C, tuple):
        require_one_each("client of tokens", "scaling_C", scaling_C, count)
    else:
        scaling_C = per("client of tokens", "scaling_C", scaling_C, count, float)
    tables: list[list[int]] = [[], [], []]
    if dropout is not None:
        if not isinstance(dropout, tuple) or len(dropout) != 3:
            raise TypeError(f"dropout must be Dropout(q_C, seed_C, row_C), got {dropout!r:.60}")
        names = "dropout.q_C", "dropout.seed_C", "dropout.row_C"
        makers = operator.index, key, operator.index
        tables = [per("client of tokens", *one[:2], count, one[2]) for one in zip(names, dropout, makers, strict=True)]
    try:
        return _native.Clients(tokens, ranks, scaling_C, *tables)
    except TypeError:
        raise TypeError("scaling_C must hold numbers, and tokens, ranks and dropout integers below 2**31") from None


def _stacked(name: str, item: Any) -> tuple[Any, ...]:
    """An item's five fields."""
    if not isinstance(item, (tuple, list)) or len(item) not in (4, 5):
        size = f" of {len(item)}" if hasattr(item, "__len__") else ""
        kind = type(item).__name__
        raise TypeError(f"{name} must be a MergeItem or a tuple (W, A, B, coef[, low_bits]), got a {kind}{size}")
    return (*item, None) if len(item) == 4 else tuple(item)


def merge_many_(
    items: Iterable[MergeItem | tuple[Any, ...]],
    *,
    rounding: str = "nearest",
    seed: int = 0,
    accumulate: Any = "float32",
    dtype: str | None = None,
    threads: int | None = None,
    isa: str = "auto",
) -> int:
    """Merge many weights in place: ``W += B^T diag(coef) A``, each with one sum and one rounding.

    On CUDA it is enqueued on the stream that the first weight's framework works on, and A and B of an item must have
    one dtype.

    Args:
        items: ``MergeItem`` or tuples (W (N, K), A (P, K), B (P, N), coef (P)[, low_bits (N, K)]). W, A, B and coef
            are float32, bfloat16, float16 or float64, each of its own. low_bits are int16 and make a bfloat16 W the
            upper half of a float32 master: bits(master) = (bits(W) << 16) + low; start with zeros.
        rounding: ``nearest``, ties to even, or, for bfloat16 without low_bits, ``stochastic``.
        seed: Of stochastic rounding; item i uses the key ``seed + i``, modulo 2^64.
        accumulate: ``float32`` or ``float64``: what W's sum is made in (always float64 for a float64 W).
        dtype, threads, isa: See the top of this module.
    Returns:
        Bytes of workspace that it used: all the memory beyond the arrays themselves.
    Raises:
        TypeError: If something is no array of floats.
        ValueError: If shapes do not fit, an output is read-only, needs grad or overlaps another array, or arrays lie
            on two devices; nothing is changed then.
        RuntimeError: If the GPU cannot be used.
    Deterministic: yes, for any number of threads. Source: arXiv 2409.05976, eq. 5.
    """
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(f"items must be a sequence of MergeItem or tuples, got {items!r:.60}")
    stacked = [_stacked(f"items[{i}]", item) for i, item in enumerate(items)]
    stacks, devices, seed = [], DEVICES["merge_many_"], integer("seed", seed)
    call = _call(dtype, threads, isa, _stream_of(stacked[0][0]) if stacked else 0)
    for i, (*arrays, low_bits) in enumerate(stacked):
        prefix = f"items[{i}]." if len(stacked) > 1 else ""
        named = zip(("weight", "A", "B", "coef"), arrays, strict=True)
        stack = [shared(prefix + name, array, devices) for name, array in named]
        stack.append(None if low_bits is None else shared(prefix + "low_bits", low_bits, devices))
        stacks.append((*stack, key(seed + i)))
    sums = choose("accumulate", name_of(accumulate), _SUMS)
    run(call.merge_many, stacks, choose("rounding", rounding, _ROUNDINGS), sums)
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
    """Merge one weight in place: ``W += B^T diag(coef) A``, one sum in ``accumulate``, one rounding.

    Args:
        weight_NK, A_PK, B_PN, coef_P, low_bits_NK: The fields of an item of ``merge_many_``; B is stored rank by rank,
            PEFT's ``lora_B.weight.T``.
        rounding, seed, accumulate, dtype, threads, isa: As there.
    Raises:
        TypeError, ValueError, RuntimeError: As there; nothing is changed then.
    Deterministic: yes, for any number of threads. Source: arXiv 2409.05976, eq. 5.
    """
    item = MergeItem(weight_NK, A_PK, B_PN, coef_P, low_bits_NK)
    options = dict(rounding=rounding, seed=seed, accumulate=accumulate, dtype=dtype, threads=threads, isa=isa)
    merge_many_([item], **options)  # pyright: ignore[reportArgumentType]


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
    """Project each client's rows onto its ranks: ``S_c = scaling_c drop(X_c) A_c^T``. Also dS = s dY B^T, with B for A.

    Args:
        x_MK: float32, bfloat16, float16 or float64.
        A_PK: The clients' stacked rows, in the dtype of x or a float32 master of 16-bit x.
        tokens, ranks: One slice per client over M and over P, each from where the one before ends; empty ones too.
        scaling_C: One number per client; None is 1.
        dropout: Threshold of 65536, key and first row of each client's mask; None for no dropout.
        out: Where S goes, contiguous, sum of m_c r_c elements in the dtype of x; None makes it (torch, NumPy, CuPy).
        dtype, threads, isa: See the top of this module.
    Returns:
        Flat S in the dtype of x, client by client, summed in float32 (float64 for float64).
    Raises:
        TypeError, ValueError: If something does not fit, before anything is written.
    Deterministic: yes. Source: arXiv 2106.09685 (LoRA); segments as in arXiv 2310.18547 (Punica).
    """
    bank, rows = offsets_of("ranks", ranks), None
    if out is None:
        columns_of("x_MK", x_MK)
        rows = x_MK.shape[0]
    offsets = offsets_of("tokens", tokens, rows)
    clients = _clients(offsets, bank, scaling_C, dropout)
    s_flat = new(x_MK, (flat_size(offsets, bank),)) if out is None else out
    arrays = shared("x_MK", x_MK), shared("A_PK", A_PK), shared("out", s_flat)
    run(_call(dtype, threads, isa).shrink, *arrays, clients, x="x_MK", A="A_PK", s="out")
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
    """Add each client's branch to its rows in place: ``Y_c += scaling_c mask_c(S_c B_c)``. Also dX += mask(dS A).

    Args:
        y_MN: float32, bfloat16, float16 or float64; updated. Clients without rank keep their rows.
        s_flat: S as ``shrink`` gives it, in the dtype of y.
        B_PN: The clients' stacked rows, in the dtype of y or a float32 master of 16-bit y.
        tokens, ranks, scaling_C, dtype, threads, isa: As in ``shrink``.
        dropout: Dropped elements of Y get nothing, kept ones are scaled up: the backward of the input's dropout.
    Returns:
        y_MN, rounded once.
    Raises:
        TypeError, ValueError: If something does not fit; y is unchanged then.
    Deterministic: yes. Source: as ``shrink``.
    """
    clients = _clients(offsets_of("tokens", tokens), offsets_of("ranks", ranks), scaling_C, dropout)
    arrays = shared("y_MN", y_MN), shared("s_flat", s_flat), shared("B_PN", B_PN)
    run(_call(dtype, threads, isa).expand, *arrays, clients, y="y_MN", s="s_flat", B="B_PN")
    return y_MN


_WGRAD = {name: f"{name}_{axes}" for name, axes in dict(ds="flat", x="MK", s="flat", dy="MN", dA="PK", dB="PN").items()}


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
    """Sum the adapters' gradients: ``dA_c = dS_c^T drop(X_c)``, ``dB_c = scaling_c S_c^T dY_c``.

    Args:
        ds_flat, s_flat: dS and S as ``shrink`` gives them.
        x_MK, dy_MN: Input and output's gradient. All four have one dtype, any that ``shrink`` takes.
        tokens, ranks, scaling_C, dropout, threads, isa: As in ``shrink``.
        dtype: Of dA and dB, in the arrays' framework: that of x, or float32.
        out: Where dA (P, K) and dB (P, N) go; None makes them (torch, NumPy, CuPy).
        uint16: What uint16 arrays hold, "bfloat16" or "float16".
    Returns:
        dA_PK and dB_PN; a client without tokens gets zeros.
    Raises:
        TypeError, ValueError: If something does not fit; ``out`` is unchanged then.
    Deterministic: yes. Source: as ``shrink``.
    """
    bank = offsets_of("ranks", ranks)
    clients = _clients(offsets_of("tokens", tokens), bank, scaling_C, dropout)
    if out is None:
        columns = columns_of("x_MK", x_MK), columns_of("dy_MN", dy_MN)
        dA_PK, dB_PN = (new(x_MK, (bank[-1], count), dtype) for count in columns)
    elif isinstance(out, (tuple, list)) and len(out) == 2:
        dA_PK, dB_PN = out
    else:
        raise TypeError(f"out must be a tuple (dA_PK, dB_PN), got {type(out).__name__}")
    arrays = zip(_WGRAD.values(), (ds_flat, x_MK, s_flat, dy_MN, dA_PK, dB_PN), strict=True)
    call = _call(uint16, threads, isa)
    run(call.wgrad, *(shared(name, array) for name, array in arrays), clients, **_WGRAD)
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
    """Step AdamW over flat buffers in place, each client with its own settings, as ``torch.optim.AdamW`` computes it.

    Args:
        param, grad, exp_avg, exp_avg_sq: Contiguous, of one size and dtype, float32 or float64; all but grad updated.
        segments: Slices of the buffers, each from where the one before ends.
        hyper_CH: Rows of lr, beta1, beta2, eps, weight decay, step (1 for the first; 0 leaves a segment untouched),
            scale of the gradient; float32 or float64.
        owner: Segment i takes row owner[i] of hyper.
        threads, isa: See the top of this module.
    Raises:
        TypeError, ValueError: If something does not fit, before anything is written.
    Deterministic: yes. Source: arXiv 1711.05101 (AdamW).
    """
    offsets = offsets_of("segments", segments)
    rows = per("segment", "owner", owner, len(offsets) - 1, operator.index)
    arrays = dict(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, hyper_CH=hyper_CH)
    call = _call(None, threads, isa)
    run(call.adamw, *(shared(name, array) for name, array in arrays.items()), offsets, rows)


def describe() -> str:
    """The library in a line: version, instruction set, threads, CUDA or why not."""
    isa = {code: name for name, code in _ISAS.items()}[_isa("auto") or _native.cpu_isa()]
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
