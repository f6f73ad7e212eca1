"""The device, dtype and threads to compute with, and peak memory."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch

from .checks import require


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


def memory_bytes() -> int | None:
    """Return the memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


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
