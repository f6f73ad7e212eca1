"""Check, then time: interleaved rounds, medians with p20 and p80, the machine recorded, JSON written as it goes.

A result holds a speed-up only if its check is green. Every suite in this folder goes through here.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flora_core.files import atomic_write_bytes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
SMOKE = Path(__file__).resolve().parent / "smoke"
PACKAGES = ("torch", "transformers", "peft", "numpy", "pytest-benchmark")


def quantile(values: list[float], share: float) -> float:
    """The value below which this share lies, between neighbours by straight line."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass
class Timing:
    """Wall and processor seconds of one contender, round by round."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def run(self, work: Callable[[], Any]) -> Any:
        """Time one call."""
        cpu, wall = time.process_time(), time.perf_counter()
        value = work()
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)
        return value

    def summary(self) -> dict[str, Any]:
        """Median, p20 and p80, processor seconds per wall second, and every round."""
        if not self.wall_s:
            return {"rounds": 0}
        return {
            "median_s": statistics.median(self.wall_s),
            "p20_s": quantile(self.wall_s, 0.2),
            "p80_s": quantile(self.wall_s, 0.8),
            "rounds": len(self.wall_s),
            "busy_cores": sum(self.cpu_s) / sum(self.wall_s),
            "wall_s": list(self.wall_s),
            "cpu_s": list(self.cpu_s),
        }


@dataclass(frozen=True)
class Check:
    """Whether results agree with the oracle: the worst error as a share of its budget, and how it was found."""

    ratio: float
    how: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def green(self) -> bool:
        """A NaN compares as false, so the good case is the one to ask for."""
        return self.ratio <= 1

    def require(self) -> None:
        """Raise AssertionError if the check is red."""
        if not self.green:
            raise AssertionError(f"check is red, no speed-up: error / budget = {self.ratio:.3g} ({self.how})")


class Result:
    """One question's JSON file, written whenever something is known, so that a stop loses nothing.

    Args:
        name: Of the file, without its ending.
        question: What is asked, in a sentence.
        settings: Everything that the numbers depend on.
        folder: ``bench/results`` for a full run, ``bench/smoke`` for a shrunk one.
        command: What runs it again; the pytest command of this process unless given.
    """

    def __init__(self, name: str, question: str, settings: Mapping[str, Any], folder: Path, command: str = ""):
        self.path = folder / f"{name}.json"
        self._load = Load()
        self.data: dict[str, Any] = {
            "name": name,
            "question": question,
            "command": command or "python -m pytest " + shlex.join(sys.argv[1:]),
            "finished": False,
            "environment": environment(),
            "settings": dict(settings),
        }
        self.save()

    def save(self, **fields: Any) -> None:
        """Add fields and write the file whole or not at all."""
        self.data |= fields
        self.data["environment"]["load"] = self._load.since()
        atomic_write_bytes(self.path, (json.dumps(self.data, indent=1, allow_nan=True) + "\n").encode())

    def timings(self, times: Mapping[str, Timing]) -> None:
        """Write what was timed so far."""
        self.save(times={name: timing.summary() for name, timing in times.items()})

    def conclude(self, check: Check, ours: str, rivals: Mapping[str, float | None]) -> str:
        """Write the check and, if it is green, each rival's speed-up against its target; give back a line to print.

        Raises:
            AssertionError: If the check is red; the file then says so and holds no speed-up.
        """
        self.save(finished=True, check={"green": check.green, "ratio": check.ratio, "how": check.how, **check.details})
        check.require()
        times = self.data["times"]
        speedups = {
            rival: {
                "times": times[rival]["median_s"] / times[ours]["median_s"],
                "rounds": [b / a for a, b in zip(times[ours]["wall_s"], times[rival]["wall_s"], strict=True)],
                "target": target,
            }
            for rival, target in rivals.items()
        }
        self.save(speedups=speedups)
        lines = [f"{ours} is {s['times']:.2f} times as fast as {rival}" for rival, s in speedups.items()]
        return f"{self.data['name']}: " + "; ".join(lines) + f" (check at {check.ratio:.2f} of its budget)"


def interleave(
    benchmark: Any,
    result: Result,
    ours: tuple[str, Callable[[], Any]],
    rivals: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    least: int,
    most: int,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Any]]:
    """Run every contender once to warm up, then time rounds of all of them in turn.

    Args:
        benchmark: pytest-benchmark's fixture, which times ``ours``.
        result: Where timings go, after each.
        ours, rivals: Name and work of each contender.
        seconds: Rounds go on for about so long, at least ``least`` and at most ``most`` of them.
        before: Called with the contender's name before each run, untimed.
    Returns:
        What every call gave, the warm-up first.
    """
    name, work = ours
    times, values = {key: Timing() for key in (name, *rivals)}, {key: [] for key in (name, *rivals)}

    def turn(key: str, do: Callable[[], Any]) -> None:
        values[key].append(times[key].run(do))
        result.timings(times)

    def others() -> None:
        for key, do in rivals.items():
            before(key)
            turn(key, do)
        before(name)

    others()
    turn(name, work)
    once = sum(timing.wall_s.pop() for timing in times.values())
    for timing in times.values():
        timing.cpu_s.clear()
    rounds = max(least, min(most, int(seconds / once)))
    benchmark.pedantic(lambda: turn(name, work), setup=others, rounds=rounds, iterations=1, warmup_rounds=0)
    return values


class Load:
    """Who else used the processors: load averages, and busy time of the machine that was not this process's."""

    def __init__(self) -> None:
        self.average, self.wall, self.own, self.busy = _average(), time.perf_counter(), time.process_time(), _busy_s()

    def since(self) -> dict[str, Any]:
        """Cores that this process and others kept busy since the start; None where the system does not tell."""
        wall, busy = time.perf_counter() - self.wall, _busy_s()
        own = time.process_time() - self.own
        others = None if busy is None or self.busy is None or wall < 1 else max(0.0, busy - self.busy - own) / wall
        return {
            "average_start": self.average,
            "average_now": _average(),
            "seconds": wall,
            "own_cores": own / wall if wall else 0.0,
            "other_cores": others,
        }


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


def environment() -> dict[str, Any]:
    """Commit, processor, threads and versions."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": [line[3:] for line in _git("status", "--porcelain", "--untracked-files=no").splitlines()],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.rstrip() if done.returncode == 0 else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
