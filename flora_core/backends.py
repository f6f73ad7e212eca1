"""Which kernels run: reference, triton or native, resolved once, with the reason when one is not to be had."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from .checks import require

_MODULES = {
    "reference": "flora_kernels.reference",
    "triton": "flora_kernels.triton",
    "native": "flora_kernels.native",
}


@functools.cache
def availability() -> dict[str, str | None]:
    """Backend -> None if it can be used here, else the reason why not."""
    reasons: dict[str, str | None] = {}
    for name, module in _MODULES.items():
        try:
            importlib.import_module(module)
            reasons[name] = None
        except ModuleNotFoundError as error:
            missing = error.name == module
            reasons[name] = f"not part of this version ({module})" if missing else f"needs {error.name}: pip install it"
        except ImportError as error:
            reasons[name] = str(error)
    return reasons


def resolve(backend: str, op: str) -> tuple[ModuleType, str]:
    """Pick the kernel module for an op, and say why.

    ``auto`` takes the first of native, triton, reference that has the op; a named backend runs or raises.
    """
    reasons = availability()
    available = [name for name, reason in reasons.items() if reason is None]
    if backend == "auto":
        for name in ("native", "triton", "reference"):
            if name in available and hasattr(importlib.import_module(_MODULES[name]), op):
                skipped = "; ".join(f"{other}: {reasons[other]}" for other in reasons if reasons[other])
                return importlib.import_module(_MODULES[name]), f"{name} (auto{'; ' + skipped if skipped else ''})"
        raise ValueError(f"no backend has {op} here; available: {', '.join(available)}")
    require(backend in reasons, f"backend must be one of auto, {', '.join(reasons)}, got {backend!r}")
    require(
        backend in available,
        f"backend={backend!r} is not to be had here ({reasons.get(backend)}); available: {', '.join(available)}",
    )
    module = importlib.import_module(_MODULES[backend])
    require(hasattr(module, op), f"backend={backend!r} has no {op}; use backend='auto' or 'reference'")
    return module, f"{backend} (named)"


__all__ = ["availability", "resolve"]
