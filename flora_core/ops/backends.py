"""Which kernels run: reference, triton or native, resolved once, with the reason when one is not to be had."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from ..common import require

_MODULES = {
    "reference": "flora_kernels.reference",
    "triton": "flora_kernels.triton",
    "native": "flora_kernels.native",
}
_TRITON = "flora_kernels.triton"
# The same ops for tensors that were checked and are plain.
_CHECKED = {"flora_kernels.native": "flora_kernels.native.unchecked"}
# What auto took for an op, a dtype and a kind of device, and the reasons it was taken under.
_taken: dict[Any, tuple[dict[str, str | None], tuple[ModuleType, str]]] = {}
# What the kernels are compiled for, and bfloat16 in hardware.
_OLDEST = (8, 0)


def _interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_gpu(module: str) -> str | None:
    """Why a module that needs a GPU is not worth importing here."""
    if module != _TRITON or _interpreted():
        return None
    if not torch.cuda.is_available():
        return "no GPU here and TRITON_INTERPRET is not set"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _OLDEST:
        told = ["{}.{}".format(*pair) for pair in (_OLDEST, capability)]
        return f"it needs a GPU of compute capability {told[0]} or later, {name} has {told[1]}; use backend='reference'"
    return None


@functools.cache
def availability() -> dict[str, str | None]:
    """Backend -> None if it can be used here, else the reason why not.

    Example:
        >>> flora.ops.availability()["reference"] is None
        True
    """
    reasons: dict[str, str | None] = {}
    for name, module in _MODULES.items():
        try:
            reasons[name] = _no_gpu(module)
            if reasons[name] is None:
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name == module
            reasons[name] = f"not part of this version ({module})" if missing else f"needs {error.name}: pip install it"
        except ImportError as error:
            reasons[name] = str(error)
    return reasons


def _unfit(name: str, op: str, tensor: torch.Tensor | None, auto: bool) -> str | None:
    """Why a backend that is here does not take this op for such a tensor."""
    module = importlib.import_module(_MODULES[name])
    if not hasattr(module, op):
        return f"has no {op}; use backend='auto' or 'reference'"
    device = "cpu" if tensor is None else tensor.device.type
    # The interpreter checks kernels and is far too slow to be chosen for anybody.
    if _MODULES[name] == _TRITON and device != "cuda" and (auto or (tensor is not None and not _interpreted())):
        return f"runs on a GPU, the tensors are on {device}; move them with .to('cuda')"
    devices = getattr(module, "DEVICES", {}).get(op, (device,))
    if device not in devices:
        return f"runs on {', '.join(devices)}, the tensors are on {device}; use backend='auto'"
    dtypes = getattr(module, "DTYPES", {}).get(op)
    if tensor is not None and dtypes is not None and tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"takes {names} in {op}, got {str(tensor.dtype).removeprefix('torch.')}; use backend='reference'"
    return None


def able(op: str, tensor: torch.Tensor | None = None) -> list[str]:
    """The backends that ``auto`` may take for an op on a tensor, the one to prefer first."""
    return list(_able(op, tensor))


def _able(op: str, tensor: torch.Tensor | None) -> Iterator[str]:
    on_gpu = tensor is not None and tensor.device.type == "cuda"
    order = ("triton", "native", "reference") if on_gpu else ("native", "triton", "reference")
    reasons = availability()
    return (name for name in order if reasons.get(name, "") is None and _unfit(name, op, tensor, auto=True) is None)


def _automatic(op: str, tensor: torch.Tensor | None, reasons: dict[str, str | None]) -> tuple[ModuleType, str]:
    for name in _able(op, tensor):
        skipped = "; ".join(f"{other}: {reasons[other]}" for other in reasons if reasons[other])
        return importlib.import_module(_MODULES[name]), f"{name} (auto{'; ' + skipped if skipped else ''})"
    available = ", ".join(name for name, reason in reasons.items() if reason is None)
    raise ValueError(f"no backend has {op} here; available: {available}")


@functools.cache
def without_checks(kernels: ModuleType) -> ModuleType:
    """The kernels of a linear for tensors that were checked and are plain: less host time, where there are such."""
    name = _CHECKED.get(kernels.__name__)
    return kernels if name is None else importlib.import_module(name)


def resolve(backend: str, op: str, tensor: torch.Tensor | None = None) -> tuple[ModuleType, str]:
    """Pick the kernel module for an op, and say why.

    ``auto`` takes the first that ``able`` names: native on a CPU, Triton on a GPU, else the reference; a named backend
    runs or raises. (Merges on a GPU are chosen by measurement: ``merge_ways``.)

    Raises:
        ValueError: If a named backend is unknown, is not here (with the reason) or lacks the op.
    Example:
        >>> kernels, reason = flora.ops.resolve("reference", "shrink")
        >>> reason
        'reference (named)'
    """
    reasons = availability()
    if backend == "auto":
        key = op, None if tensor is None else (tensor.dtype, tensor.device.type)
        under, found = _taken.get(key, (None, None))
        if under is not reasons or found is None:
            _taken[key] = reasons, (found := _automatic(op, tensor, reasons))
        return found
    available = [name for name, reason in reasons.items() if reason is None]
    require(backend in reasons, f"backend must be one of auto, {', '.join(reasons)}, got {backend!r}")
    require(
        backend in available,
        f"backend={backend!r} is not to be had here ({reasons.get(backend)}); available: {', '.join(available)}",
    )
    unfit = _unfit(backend, op, tensor, auto=False)
    require(unfit is None, f"backend={backend!r} {unfit}")
    return importlib.import_module(_MODULES[backend]), f"{backend} (named)"
