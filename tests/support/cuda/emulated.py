"""The CUDA kernels as a backend for tests: emulated on the host, or on a GPU, through the C interface's own structs.

``Library`` has the functions of ``flora_kernels.reference`` with the same arguments. ``build_emulated`` compiles the
kernels with the host compiler: every access of theirs is then checked for bounds, races and order. ``build_for_gpu``
needs nvcc and a GPU: ``at_hand`` then gives the tests kernels that run there (and tests/support/cuda/gpu_check.py times
them).
Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int32, c_int64, c_size_t, c_void_p, sizeof
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from flora_core.ops import backends
from flora_kernels.reference import Dropout, MergeItem, Ranges
from tests.support.cuda.abi import (
    CODES,
    AdamwArgs,
    Clients,
    Exec,
    ExpandArgs,
    Item,
    Matrix,
    Options,
    ShrinkArgs,
    Vector,
    WgradArgs,
    address,
    matrix,
    vector,
)

ROOT = Path(__file__).resolve().parents[3]
KEPT = ROOT / ".cache" / "tests"
HOST_FLAGS = ("-x", "c++", "-O1", "-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing", "-DFLORA_HOST_SHIM")


class EmulationError(RuntimeError):
    """Fault of a kernel that the emulation found."""


def _span_bytes(tensor: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


class Library:
    """A built check library, used like a module of kernels; ``order`` is that of threads and blocks if emulated.

    With ``moves`` callers' tensors are on the host: kernels work on copies of the same layout and alignment on the
    device, which are brought back after each call.
    """

    Dropout, MergeItem = Dropout, MergeItem
    __name__ = "tests.support.cuda.emulated"

    def __init__(self, path: Path, device: str = "cpu", moves: bool = False):
        self.device, self.order, self.fault = torch.device("cpu" if moves else device), 0, ("", "")
        self._target = torch.device(device) if moves else None
        self._moved: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Whether results and workspaces are NaN before a call; off where calls are timed.
        self.fill = True
        self._tables: dict[tuple[Any, ...], torch.Tensor] = {}
        self._c = ctypes.CDLL(str(path))
        self._emulated = device == "cpu"
        self._c.flora_check_error.restype = c_char_p
        self._c.flora_check_probe.argtypes = (c_int32, c_void_p, c_void_p, c_void_p)
        self._kept: list[tuple[str, torch.Tensor]] = []
        if self._emulated:
            self._c.flora_shim_sites.restype = c_char_p
            self._c.flora_shim_buffer.argtypes = (c_void_p, c_size_t, c_char_p)

    # What the structs are filled with; every tensor that a kernel may touch passes through here.

    def _keep(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != self.device.type:
            raise ValueError(f"{name} must be on {self.device}, got {tensor.device}")
        tensor = tensor if self._target is None else self._move(tensor)
        self._kept.append((name, tensor))
        return tensor

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the target, as far from a multiple of 256 bytes and with the same strides."""
        if not tensor.numel():
            return tensor
        shift = tensor.data_ptr() % 256 // tensor.itemsize
        flat = tensor.as_strided((_span_bytes(tensor) // tensor.itemsize,), (1,))
        room = torch.empty(shift + flat.numel(), dtype=tensor.dtype, device=self._target)
        room[shift:] = flat
        copy = room.as_strided(tensor.shape, tensor.stride(), shift)
        self._moved.append((tensor, copy))
        return copy

    def _bring_back(self) -> None:
        for tensor, copy in self._moved:
            if 0 not in tensor.stride():
                tensor.copy_(copy)
        self._moved.clear()

    def _matrix(self, name: str, tensor: torch.Tensor | None) -> Matrix:
        return matrix(None if tensor is None else self._keep(name, tensor))

    def _vector(self, name: str, tensor: torch.Tensor) -> Vector:
        return vector(self._keep(name, tensor))

    def _table(self, name: str, values: Any, dtype: torch.dtype) -> int | None:
        if values is None:
            return None
        if not isinstance(values, torch.Tensor):
            key = (*values, dtype)
            if key not in self._tables:
                self._tables[key] = torch.tensor(values, dtype=dtype, device=self.device)
            values = self._tables[key]
        return address(self._keep(name, values.to(self.device, dtype).contiguous()))

    def _fresh(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        fresh = torch.empty(shape, dtype=dtype, device=self.device)
        return fresh.fill_(float("nan")) if self.fill else fresh

    def _clients(
        self, tokens: Ranges, ranks: Ranges, scaling_C: Sequence[float] | torch.Tensor | None, dropout: Dropout | None
    ) -> Clients:
        q, seed, row = dropout or (None, None, None)
        return Clients(
            len(tokens),
            self._table("token_offsets", [0, *(part.stop for part in tokens)], torch.int32),
            self._table("rank_offsets", [0, *(part.stop for part in ranks)], torch.int32),
            self._table("scaling", scaling_C, torch.float64),
            self._table("q", q, torch.int32),
            self._table("seed", seed, torch.int64),
            self._table("first_row", row, torch.int64),
            CODES[torch.float64],
            max((part.stop - part.start for part in ranks), default=0),
        )

    def _call(self, op: str, *arguments: Any) -> None:
        """Ask for the workspace, then run; ``_kept`` is what the kernels may touch."""
        function = getattr(self._c, f"flora_check_{op}")
        stream = None if self._emulated else torch.cuda.current_stream().cuda_stream
        setup, size = Exec(sizeof(Exec), 0 if self._emulated else 1, 0, stream), c_size_t(0)
        try:
            self._require(op, function(byref(setup), *arguments, byref(size)))
            workspace = self._fresh(size.value // 4).to(self._target or self.device)
            setup.workspace, setup.workspace_bytes = address(workspace), size.value
            if self._emulated:
                self._register([*self._kept, ("workspace", workspace)])
            self._require(op, function(byref(setup), *arguments, None))
            self._bring_back()
        finally:
            self._kept.clear()
            self._moved.clear()

    def _register(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._c.flora_shim_reset(self.order)
        self._c.flora_shim_fault(*(text.encode() for text in self.fault))
        known: dict[tuple[int, int], str] = {}
        for name, tensor in tensors:
            if tensor.numel():
                known.setdefault((tensor.data_ptr(), _span_bytes(tensor)), name)
        for (start, size), name in known.items():
            self._c.flora_shim_buffer(start, size, name.encode())

    def _require(self, op: str, status: int) -> None:
        if status:
            raise EmulationError(f"{op}: {self._c.flora_check_error().decode()}")

    def sites(self) -> list[str]:
        """The places of the last emulated call where a fault can be planted."""
        return self._c.flora_shim_sites().decode().split("\n")[:-1]

    def probe(self, which: int, words: torch.Tensor, size: int) -> torch.Tensor:
        """Run one wrapper of ptx.cuh on a warp: int32 words in, ``size`` int32 words out."""
        device = self._target or self.device
        words = words.to(device, torch.int32)
        out = torch.full((size,), -1, dtype=torch.int32, device=device)
        if self._emulated:
            self._register([("in", words), ("out", out)])
        stream = None if self._emulated else torch.cuda.current_stream().cuda_stream
        self._require("probe", self._c.flora_check_probe(which, words.data_ptr(), out.data_ptr(), stream))
        return out.cpu()

    # The functions of flora_kernels.reference.

    def shrink(
        self,
        x_MK: torch.Tensor,
        A_PK: torch.Tensor,
        tokens: Ranges,
        ranks: Ranges,
        scaling_C: Sequence[float] | torch.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> torch.Tensor:
        size = sum((m.stop - m.start) * (p.stop - p.start) for m, p in zip(tokens, ranks, strict=True))
        s_flat = self._fresh(size, dtype=x_MK.dtype)
        arguments = ShrinkArgs(
            sizeof(ShrinkArgs),
            self._matrix("x", x_MK),
            self._matrix("A", A_PK),
            self._vector("s", s_flat),
            self._clients(tokens, ranks, scaling_C, dropout),
        )
        self._call("shrink", byref(arguments))
        return s_flat

    def expand_(
        self,
        y_MN: torch.Tensor,
        s_flat: torch.Tensor,
        B_PN: torch.Tensor,
        tokens: Ranges,
        ranks: Ranges,
        scaling_C: Sequence[float] | torch.Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> torch.Tensor:
        arguments = ExpandArgs(
            sizeof(ExpandArgs),
            self._matrix("y", y_MN),
            self._vector("s", s_flat),
            self._matrix("B", B_PN),
            self._clients(tokens, ranks, scaling_C, dropout),
        )
        self._call("expand", byref(arguments))
        return y_MN

    def wgrad(
        self,
        ds_flat: torch.Tensor,
        x_MK: torch.Tensor,
        s_flat: torch.Tensor,
        dy_MN: torch.Tensor,
        tokens: Ranges,
        ranks: Ranges,
        scaling_C: Sequence[float] | torch.Tensor,
        dtype: torch.dtype,
        dropout: Dropout | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = ranks[len(ranks) - 1].stop if len(ranks) else 0
        dA, dB = (self._fresh(total, data.shape[1], dtype=dtype) for data in (x_MK, dy_MN))
        arguments = WgradArgs(
            sizeof(WgradArgs),
            self._vector("ds", ds_flat),
            self._matrix("x", x_MK),
            self._vector("s", s_flat),
            self._matrix("dy", dy_MN),
            self._matrix("dA", dA),
            self._matrix("dB", dB),
            self._clients(tokens, ranks, scaling_C, dropout),
        )
        self._call("wgrad", byref(arguments))
        return dA, dB

    def merge_many_(
        self,
        items: Sequence[MergeItem],
        *,
        rounding: str = "nearest",
        seed: int = 0,
        accumulate: torch.dtype = torch.float32,
    ) -> None:
        table = (Item * len(items))()
        for i, (weight, A, B, coef, low_bits) in enumerate(items):
            table[i] = Item(
                sizeof(Item),
                self._matrix(f"items[{i}].weight", weight),
                self._matrix(f"items[{i}].A", A),
                self._matrix(f"items[{i}].B", B),
                self._vector(f"items[{i}].coef", coef),
                self._matrix(f"items[{i}].low_bits", low_bits),
                seed + i,
            )
        options = Options(sizeof(Options), int(rounding == "stochastic"), CODES[accumulate])
        self._call("merge", table, c_int64(len(items)), byref(options))

    def merge_(
        self,
        weight_NK: torch.Tensor,
        A_PK: torch.Tensor,
        B_PN: torch.Tensor,
        coef_P: torch.Tensor,
        *,
        low_bits_NK: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        self.merge_many_([MergeItem(weight_NK, A_PK, B_PN, coef_P, low_bits_NK)], **options)

    def cohort_adamw_(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        segments: Ranges,
        hyper_CH: torch.Tensor,
        owner: Sequence[int],
    ) -> None:
        names = ("param", "grad", "exp_avg", "exp_avg_sq")
        buffers = [self._keep(n, t) for n, t in zip(names, (param, grad, exp_avg, exp_avg_sq), strict=True)]
        arguments = AdamwArgs(
            sizeof(AdamwArgs),
            *map(address, buffers),
            param.numel(),
            CODES[param.dtype],
            0,
            len(segments),
            self._table("segment_offsets", [0, *(part.stop for part in segments)], torch.int64),
            self._table("owner", owner, torch.int32),
            self._matrix("hyper", hyper_CH.to(self.device)),
        )
        self._call("adamw", byref(arguments))

    @contextmanager
    def as_backend(self, name: str) -> Iterator[str]:
        """Make the ops of flora_core take this library for ``backend=name``."""
        module = f"flora_kernels_{name}"
        sys.modules[module] = self  # pyright: ignore[reportArgumentType]
        backends._MODULES[name] = module
        backends.availability.cache_clear()
        try:
            yield name
        finally:
            del sys.modules[module], backends._MODULES[name]
            backends.availability.cache_clear()


def host_compiler() -> str | None:
    """The C++ compiler of the host."""
    return shutil.which("g++") or shutil.which("clang++")


def build_emulated(folder: Path, csrc: Path = ROOT / "csrc") -> Path:
    """Compile the kernels for the host."""
    compiler, out = host_compiler(), folder / "emulated.so"
    if compiler is None:
        raise FileNotFoundError("needs g++ or clang++ to build the kernels for the host")
    done = subprocess.run(
        [compiler, *HOST_FLAGS, "-I", str(csrc / "include"), str(csrc / "cuda" / "probes.cu"), "-o", str(out)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return out


def _digest() -> str:
    """The sources, the flags and the compiler that a kept build was made from."""
    version = subprocess.run([str(host_compiler()), "--version"], capture_output=True).stdout
    digest = hashlib.sha256(repr(HOST_FLAGS).encode() + version)
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _emulated() -> Library:
    out = KEPT / f"emulated-{_digest()}.so"
    KEPT.mkdir(parents=True, exist_ok=True)
    # Test processes that run side by side wait for one build instead of making one each.
    with FileLock(KEPT / "emulated.lock"):
        if not out.exists():
            for outdated in KEPT.glob("emulated-*.so"):
                outdated.unlink()
            with tempfile.TemporaryDirectory(dir=KEPT) as folder:
                build_emulated(Path(folder)).replace(out)
    return Library(out)


def fresh_emulated() -> Library:
    """The emulated library, built once per state of the sources, with no fault planted and threads in their order."""
    library = _emulated()
    library.order, library.fault = 0, ("", "")
    return library


def nvcc() -> str | None:
    """CUDA's compiler."""
    return shutil.which("nvcc")


def build_for_gpu(folder: Path, arch: str = "native") -> Path:
    """Compile the kernels for the GPU at hand; FLORA_CHECK_LIBRARY is one that was compiled before."""
    compiler, out, built = nvcc(), folder / "gpu.so", os.environ.get("FLORA_CHECK_LIBRARY")
    if built:
        return Path(built).resolve(strict=True)
    if compiler is None:
        raise FileNotFoundError("needs nvcc to build the kernels for a GPU")
    flags = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-arch={arch}", "-I", str(ROOT / "csrc/include")]
    source = str(ROOT / "csrc" / "cuda" / "probes.cu")
    done = subprocess.run([compiler, *flags, source, "-o", str(out)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return out


@functools.cache
def _on_gpu() -> Library:
    with tempfile.TemporaryDirectory() as folder:
        return Library(build_for_gpu(Path(folder)), "cuda", moves=True)


def at_hand() -> Library:
    """The kernels on the GPU where there is one (and nvcc), else emulated."""
    compiled = nvcc() or os.environ.get("FLORA_CHECK_LIBRARY")
    return _on_gpu() if torch.cuda.is_available() and compiled else fresh_emulated()
