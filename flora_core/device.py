"""Tell what this machine has: `flora doctor`, the device a run takes, and how much memory it used."""

from __future__ import annotations

import math
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import __version__, extras
from .checks import require

# Extras that `flora run` works without, and what needs them.
_OPTIONAL = {
    "data": "reading parquet and arrow",
    "privacy": "differential privacy",
    "flower": "a run between machines",
}


def pick_device(wanted: str = "auto") -> torch.device:
    """Return the device to run on: `auto` takes CUDA where there is one; each process of torchrun has its own GPU.

    Raises:
        ValueError: If the device is unknown, not supported or not here, or several processes would share one GPU.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    local = os.environ.get("LOCAL_RANK", "0")
    if wanted.startswith("cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        require(
            wanted == "cuda", f"device={wanted!r} would put all processes on one GPU; use device=cuda under torchrun"
        )
        require(
            not torch.cuda.is_available() or int(local) < torch.cuda.device_count(),
            f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} here); start as many "
            "processes as there are GPUs (torchrun --nproc-per-node), or use device=cpu",
        )
        wanted = f"cuda:{local}"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {wanted!r}") from None
    require(
        device.type in ("cpu", "cuda"),
        f"device={wanted!r} is not supported: rounds are summed in float64, by kernels for CPUs and CUDA alone; "
        "use device=cpu",
    )
    require(device.type != "cpu" or not device.index, f"device={wanted!r} is not here: there is one; use device=cpu")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"device={wanted!r} is not here ({torch.cuda.device_count()} CUDA devices); use device=cpu")
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the base's dtype: `auto` is bfloat16 on CUDA and float32 on a CPU, whose bfloat16 products are slow."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]


def peak_memory_bytes(device: torch.device | str = "cpu") -> int | None:
    """Return the most memory that this process held: allocated by torch on CUDA, resident set on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_cores() -> int:
    """Return how many cores this process may use: of the machine's, its affinity's and its container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cgroup_cores())))


def _cgroup_cores(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Read the processor time a second that Linux grants this process's control groups; infinite without a bound."""
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text("utf-8").splitlines()]
    except OSError:
        return math.inf
    bounds = [math.inf]
    for controllers, name in groups:
        unified = controllers == ""
        if unified or "cpu" in controllers.split(","):
            home = root if unified else root / controllers
            group = Path(name.lstrip("/"))
            # A container sees its own group as the root, whatever its name is outside.
            bounds += [_quota(home / part, unified) for part in (group, *group.parents)]
    return min(bounds)


def _quota(group: Path, unified: bool) -> float:
    try:
        if unified:
            quota, period = (group / "cpu.max").read_text("utf-8").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text("utf-8").strip() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such group, or no bound: "max"
        return math.inf


def limit_threads(wanted: int | None) -> None:
    """Give torch the threads that a recipe asks for; without one, no more than the cores that this process may use.

    More threads than cores wait for each other: a step was seen to take twenty times as long.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif "OMP_NUM_THREADS" not in os.environ and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())


def doctor() -> dict[str, Any]:
    """Return what this machine has, as plain JSON values.

    Returns:
        flora_core, python, platform, cores, memory_bytes, torch, devices, backends {name: reason why not, or None},
        native (the compiled library in a line, or None),
        packages {extra: {name: version or None}}, product_gflops {dtype: speed}, cache, advice [sentences].
    """
    from .backends import availability
    from .demo_model import is_ready
    from .files import cache_folder

    cache = cache_folder()
    facts: dict[str, Any] = {
        "flora_core": f"{__version__} ({Path(__file__).parent})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cores": usable_cores(),
        "memory_bytes": _memory_bytes(),
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
    from .history import show_bytes

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


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


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
