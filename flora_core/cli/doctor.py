"""Tell what this machine has: `flora doctor`, the device a run takes, and how much memory it used."""

from __future__ import annotations

import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..common import extras, memory_bytes, usable_cores
from ..version import __version__

# Extras that `flora run` works without, and what needs them.
_OPTIONAL = {
    "data": "reading parquet and arrow",
    "privacy": "differential privacy",
    "flower": "a run between machines",
}


def doctor() -> dict[str, Any]:
    """Return what this machine has, as plain JSON values.

    Returns:
        flora_core, python, platform, cores, memory_bytes, torch, devices, backends {name: reason why not, or None},
        native (the compiled library in a line, or None),
        packages {extra: {name: version or None}}, product_gflops {dtype: speed}, cache, advice [sentences].
    """
    from ..common import cache_folder
    from ..ops import availability
    from ..runs import is_ready

    cache = cache_folder()
    facts: dict[str, Any] = {
        "flora_core": f"{__version__} ({Path(__file__).parents[1]})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "torch": {"version": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.version.cuda},
        "devices": [_cuda_device(index) for index in range(torch.cuda.device_count())],
        "backends": availability(),
        "native": _native_library(),
        "packages": {extra: extras.versions(extra) for extra in extras.EXTRAS},
        "product_gflops": {name: _product_gflops(getattr(torch, name)) for name in ("float32", "bfloat16")},
        "cache": {"folder": str(cache), "free_bytes": _free_bytes(cache), "demo_model": is_ready(cache)},
    }
    facts["advice"] = _advice(facts)
    return facts


def doctor_text(facts: dict[str, Any]) -> str:
    """Lay out the facts of `doctor` for people."""
    from ..common import show_bytes

    torch_facts, cache = facts["torch"], facts["cache"]
    rows = [
        ("flora-core", facts["flora_core"]),
        ("python", facts["python"]),
        ("platform", facts["platform"]),
        ("cpu", f"{facts['cores']} usable cores, {show_bytes(facts['memory_bytes'])} of memory"),
        ("torch", f"{torch_facts['version']}, {torch_facts['threads']} threads, CUDA {torch_facts['cuda'] or 'none'}"),
        *((d["name"], f"{show_bytes(d['memory_bytes'])}, sm_{d['capability']}") for d in facts["devices"]),
        ("products", ", ".join(f"{name} {speed:.1f} GFLOP/s" for name, speed in facts["product_gflops"].items())),
        *((f"backend {name}", reason or "runs") for name, reason in facts["backends"].items()),
        *([("native library", facts["native"])] if facts["native"] else []),
        *((f"extra {extra}", _package_text(facts, extra)) for extra in facts["packages"]),
        ("cache", f"{cache['folder']}, {show_bytes(cache['free_bytes'])} free"),
        ("demo model", "ready" if cache["demo_model"] else "made on first use"),
    ]
    lines = [f"{name:<18} {text}" for name, text in rows]
    return "\n".join(lines + [f"advice: {sentence}" for sentence in facts["advice"]])


def _advice(facts: dict[str, Any]) -> list[str]:
    advice = []
    lacking = [one for extra in extras.EXTRAS if extra not in _OPTIONAL for one in _lacking(facts, extra)]
    if lacking:
        advice.append(f"flora run needs more packages: {extras.install_command(lacking)}")
    speed = facts["product_gflops"]
    if speed["bfloat16"] < speed["float32"] / 4:
        advice.append("bfloat16 products are slow on this CPU: train with dtype=float32 (dtype=auto does)")
    if (facts["cache"]["free_bytes"] or 0) < 2e9:
        advice.append(f"less than 2 GB free in {facts['cache']['folder']}: set FLORA_CACHE to another disk")
    return advice


def _lacking(facts: dict[str, Any], extra: str) -> list[str]:
    """Return the requirements of an extra that the facts have no version of."""
    found = facts["packages"][extra]
    return [requirement for requirement in extras.EXTRAS[extra] if found[extras.name_of(requirement)] is None]


def _package_text(facts: dict[str, Any], extra: str) -> str:
    lacking, found = _lacking(facts, extra), facts["packages"][extra]
    if lacking and extra in _OPTIONAL:
        return f"not installed; {_OPTIONAL[extra]} needs it: {extras.install_command(lacking)}"
    return ", ".join(f"{name} {version or 'MISSING'}" for name, version in found.items())


def _native_library() -> str | None:
    try:
        from flora_kernels import native
    except ImportError:
        return None
    return native.describe()


def _cuda_device(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    return {"name": found.name, "memory_bytes": found.total_memory, "capability": f"{found.major}{found.minor}"}


def _free_bytes(folder: Path) -> int | None:
    there = next((part for part in (folder, *folder.parents) if part.exists()), None)
    return shutil.disk_usage(there).free if there else None


def _product_gflops(dtype: torch.dtype, size: int = 256) -> float:
    """Time one small product on the CPU; the first call is not counted."""
    a = torch.ones(size, size, dtype=dtype)
    torch.mm(a, a)
    began = time.perf_counter()
    torch.mm(a, a)
    return round(2 * size**3 / (time.perf_counter() - began) / 1e9, 2)
