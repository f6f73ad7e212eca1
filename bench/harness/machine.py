"""Environment of a measurement: commit, processor or GPU with driver and clocks, versions, and what else ran."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# Local changes are changes of code: results and the pages made of them change with every run.
CODE = (".", ":!bench/results", ":!docs", ":!README.md")
PACKAGES = ("torch", "transformers", "peft", "numpy", "pytest-benchmark", "triton", "unsloth", "liger_kernel")


class Load:
    """Other use of the processors: load averages, and busy time of the machine that was not this process's."""

    def __init__(self) -> None:
        self.average, self.wall, self.own, self.busy = _average(), time.perf_counter(), _own_s(), _busy_s()

    def since(self) -> dict[str, Any]:
        """Cores that this process and others kept busy since the start; None where the system does not tell."""
        wall, busy = time.perf_counter() - self.wall, _busy_s()
        own = _own_s() - self.own
        others = None if busy is None or self.busy is None or wall < 1 else max(0.0, busy - self.busy - own) / wall
        return {
            "average_start": self.average,
            "average_now": _average(),
            "seconds": wall,
            "own_cores": own / wall if wall else 0.0,
            "other_cores": others,
        }


def _own_s() -> float:
    """Processor seconds of this process and of the children that it has waited for: cases run in processes too."""
    return sum(os.times()[:4])


def _average() -> list[float] | None:
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _busy_s() -> float | None:
    """Processor seconds that the whole machine has spent on anything, as Linux counts them."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq = map(int, first[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


# Microarchitectures behind names that several share: (vendor, family, model) as Linux numbers them, from the vendor's
# revision guides.
_GENERATIONS = {
    ("AuthenticAMD", 23, 49): "Zen 2",
    ("AuthenticAMD", 25, 1): "Zen 3",
    ("AuthenticAMD", 25, 17): "Zen 4",
    ("AuthenticAMD", 25, 160): "Zen 4c",
    ("AuthenticAMD", 26, 2): "Zen 5",
}
_INSTRUCTIONS = {"AVX512": "AVX-512", "AVX2": "AVX2", "DEFAULT": "no AVX2"}
# What holds torch, its two product libraries and our own kernels to fewer instructions than the processor has.
HOLDS = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "FLORA_ISA")


def machine_label(env: dict[str, Any]) -> str:
    """A result's processor as a table names it: model, generation, instructions, and whether it was held to them."""
    name = re.sub(r"\((R|TM)\)|\b(Processor|CPU)\b|@", " ", env["processor"])
    name = " ".join([*name.split(), *([env["generation"]] if env.get("generation") else [])])
    instructions = _INSTRUCTIONS.get(env["capability"], env["capability"])
    held = "held to " if env.get("held") else ""
    return f"{name}, {held}{instructions}"


def machine_slug(env: dict[str, Any] | None = None) -> str:
    """The label as a folder's name; of this machine unless an environment is given."""
    return re.sub(r"[^a-z0-9.]+", "-", machine_label(env or _processor_facts()).lower()).strip("-")


def _processor_facts() -> dict[str, Any]:
    """Model, generation, instructions in use and what holds them back."""
    fields = _cpuinfo()
    numbers = [fields.get(key, "") for key in ("cpu family", "model")]
    family, model = (int(number) if number.isdigit() else -1 for number in numbers)
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "generation": _GENERATIONS.get((fields.get("vendor_id", ""), family, model)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "held": {name: os.environ[name] for name in HOLDS if name in os.environ},
    }


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's fields, as Linux lists them; none on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def environment() -> dict[str, Any]:
    """Commit, processor, threads and versions."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": [line[3:] for line in _git("status", "--porcelain", "-uno", "--", *CODE).splitlines()],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **_processor_facts(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "system": platform.platform(),
        "python": platform.python_version(),
        **_gpu(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


@functools.cache
def _gpu() -> dict[str, Any]:
    """The GPU, its driver, clocks, power and what keeps it busy before this process does; nothing where there is none.

    PendingClients once, before the first measurement: later it would be our own work that keeps it busy.
    """
    if not torch.cuda.is_available():
        return {}
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found | _nvidia_smi("driver_version", "clocks.max.sm", "power.limit", "utilization.gpu")


def gpu_now() -> dict[str, Any]:
    """The GPU's clocks while it works, and the memory that others hold on it; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    # Some hundred megabytes are this process's own context and kernels.
    others = {"other_gpu_memory_bytes": total - free - torch.cuda.memory_reserved()}
    return others | _nvidia_smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def _nvidia_smi(*fields: str) -> dict[str, Any]:
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"{type(error).__name__}: {error}"[:300]}
    first = (answer.splitlines() or [""])[0]
    return dict(zip(fields, (part.strip() for part in first.split(",")), strict=False))


def forget() -> None:
    """Give back what a finished case held: an error's frames hold its tensors, and the next case needs the room."""
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            delattr(sys, name)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@functools.cache
def _git(*arguments: str) -> str:
    """Output of git; empty in a tree without its history, or where git is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.rstrip() if done.returncode == 0 else ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


__all__ = ["HOLDS", "ROOT", "Load", "environment", "forget", "gpu_now", "machine_label", "machine_slug"]
