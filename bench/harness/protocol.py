"""Check, then time: interleaved rounds, medians with p20 and p80, the machine recorded, JSON written as it goes.

A result holds times and a speed-up only if its check is green. Every suite in this folder goes through here.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness.deadline import OutOfTime
from bench.harness.machine import ROOT, Load, environment, gpu_now, machine_slug
from flora_core.common.files import atomic_write_bytes

# A folder of one's own, so that a trial does not write over results that are committed.
_ELSEWHERE = os.environ.get("FLORA_BENCH_RESULTS")
RESULTS = Path(_ELSEWHERE).resolve() if _ELSEWHERE else ROOT / "bench" / "results"
PARTIAL = "partial"
# A ratio from fewer paired rounds is not published: three rounds on a shared machine were seen to differ by a fifth.
LEAST_ROUNDS = 9
SMOKE = RESULTS / "smoke" if _ELSEWHERE else RESULTS.parent / "smoke"


def machine_folder(top: Path = RESULTS) -> Path:
    """The folder of this machine's results: one per GPU or processor, so that none overwrites another's."""
    return top / ("gpu" if torch.cuda.is_available() else machine_slug())


def latest(name: str, top: Path = RESULTS) -> Path:
    """The newest result of this name, on whichever machine it was taken.

    Raises:
        FileNotFoundError: If no machine has one.
    """
    found = sorted(top.glob(f"*/{name}.json"), key=_started)
    if not found:
        raise FileNotFoundError(f"no machine's folder in {top} has {name}.json; run its benchmark first")
    return found[-1]


def _started(path: Path) -> str:
    return json.loads(path.read_text())["environment"]["started"]


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
        """Time one call: by the clock, or by events on a GPU, which is idle before and after it."""
        start, stop = _events()
        cpu, wall = time.process_time(), time.perf_counter()
        value = work()
        if stop is not None:
            stop.record()
            stop.synchronize()
        self.wall_s.append(time.perf_counter() - wall if stop is None else start.elapsed_time(stop) / 1000)
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


def _events() -> tuple[Any, Any]:
    """A recorded event and one to be recorded on a GPU, or nothing."""
    if not torch.cuda.is_available():
        return None, None
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    return start, stop


class Missing(Exception):  # noqa: N818
    """A contender that cannot take part here; the message is the reason."""


def reason(error: BaseException) -> str:
    """Why a contender does not take part, in a line."""
    text = (" ".join(str(error).split()) or type(error).__name__)[:300]
    if isinstance(error, Missing | OutOfTime):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: {text}"
    return f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Check:
    """Return whether results agree with the oracle: the worst error as a share of its budget, and how it was found."""

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


def tensors_ratio(
    found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor], low: Mapping[str, torch.Tensor]
) -> float:
    """How much of the error budget many tensors use together: any one's largest error is a draw of chance.

    The largest error of each tensor by its own size, as a root mean square over all of them.
    """
    if not found.keys() == exact.keys() == low.keys():
        raise AssertionError(f"other tensors than the oracle's: {sorted(found.keys() ^ exact.keys())[:4]}")
    sizes = {key: exact[key].abs().max().item() for key in exact}

    def error(results: Mapping[str, torch.Tensor]) -> float:
        each = [((results[k].double() - exact[k]).abs().max().item() / sizes[k]) ** 2 for k in exact if sizes[k]]
        return math.sqrt(sum(each) / len(each))

    eps = max(torch.finfo(tensor.dtype).eps for tensor in low.values())
    return error(found) / (2 * (error(low) + eps))


class Result:
    """One question's JSON file, written whenever something is known, so that a stop loses nothing.

    Until it is finished, or known to be wrong, it lies in the folder ``partial``: what an earlier run has found stays
    where it is if this one is stopped.

    Args:
        name: Of the file, without its ending.
        question: What is asked, in a sentence.
        settings: Everything that the numbers depend on.
        folder: ``bench/results`` for a full run, ``bench/smoke`` for a shrunk one.
        command: What runs it again; the pytest command of this process unless given.
    """

    def __init__(self, name: str, question: str, settings: Mapping[str, Any], folder: Path, command: str = ""):
        self._whole, self._partial = folder / f"{name}.json", folder / PARTIAL / f"{name}.json"
        self._load = Load()
        self.data: dict[str, Any] = {
            "name": name,
            "question": question,
            "command": command or _command(),
            "finished": False,
            "environment": environment(),
            "settings": dict(settings),
            "missing": {},
        }
        self.save()

    @property
    def shrunk(self) -> bool:
        """Return whether this is a smoke test's result, which is not published."""
        return SMOKE in self._whole.parents

    @property
    def path(self) -> Path:
        """Where the file lies now."""
        red = "check" in self.data and not self.data["check"]["green"]
        return self._whole if self.data["finished"] or "failed" in self.data or red else self._partial

    def save(self, **fields: Any) -> None:
        """Add fields and write the file whole or not at all."""
        self.data |= fields
        self.data["environment"]["load"] = self._load.since()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self.path, (json.dumps(finite(self.data), indent=1, allow_nan=False) + "\n").encode())
        if self.path == self._whole:
            self._partial.unlink(missing_ok=True)

    def timings(self, times: Mapping[str, Timing]) -> None:
        """Write what was timed so far."""
        self.save(times={name: timing.summary() for name, timing in times.items()})

    def leave_out(self, name: str, error: BaseException) -> None:
        """Note a contender that does not take part any more, and why; the others go on."""
        self.data["missing"][name] = reason(error)
        self.data.get("times", {}).pop(name, None)
        self.save()
        print(f"\n{self.data['name']}: without {name}: {reason(error)}", end="")

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Write why a case failed or was stopped into its file, then let the error go on."""
        try:
            yield
        except (KeyboardInterrupt, OutOfTime) as error:
            self.save(finished=False, stopped=reason(error))
            raise
        except BaseException as error:
            if "check" not in self.data or self.data["check"]["green"]:
                self.save(finished=False, failed=reason(error))
            raise

    def checked(self, check: Check) -> None:
        """Write the check.

        Raises:
            AssertionError: If it is red; the file then says so, and nothing may be timed.
        """
        self.data["environment"] |= gpu_now()
        self.save(check={"green": check.green, "ratio": check.ratio, "how": check.how, **check.details})
        check.require()

    def target(self, what: str, value: float, wanted: float, at_least: bool = True) -> str:
        """Write something that must be shown, and whether it is; give back a line to print."""
        met = value >= wanted if at_least else value <= wanted
        found = {"what": what, "is": value, "target": wanted, "at_least": at_least, "met": met}
        self.save(targets=[*self.data.get("targets", []), found])
        return f"{'met' if met else 'MISSED'}: {what}: {value:.3g}, target {'>=' if at_least else '<='} {wanted:g}"

    def conclude(self, ours: str, rivals: Mapping[str, float | None]) -> str:
        """Write each rival's speed-up against its target; give back a line to print.

        Raises:
            AssertionError: If ours was not checked, or the check is red; the file then holds no speed-up.
        """
        check = self.data.get("check")
        if check is None or not check["green"]:
            raise AssertionError(f"{self.data['name']}: no green check, no speed-up")
        times = self.data["times"]
        speedups = {
            rival: speedup(times[ours], times[rival], target) for rival, target in rivals.items() if rival in times
        }
        self.save(finished=True, ours=ours, speedups=speedups)
        lines = [f"{ours} is {s['times']:.2f} times as fast as {rival}{_told(s)}" for rival, s in speedups.items()]
        return f"{self.data['name']}: " + "; ".join(lines) + f" (check at {check['ratio']:.2f} of its budget)"


def _told(found: Mapping[str, Any]) -> str:
    if found["target"] is None:
        return ""
    return f" ({'met' if found['times'] >= found['target'] else 'MISSED'}, target {found['target']:g})"


def _command() -> str:
    """Command that runs this benchmark again: its own test, where ``flora bench`` runs it among others."""
    test, words = os.environ.get("PYTEST_CURRENT_TEST"), os.environ.get("FLORA_BENCH_WORDS")
    if test is None or words is None:
        return "python -m pytest " + shlex.join(sys.argv[1:])
    return f"python -m pytest {shlex.quote(test.rpartition(' ')[0])} --benchmark-only -s {words}"


def finite(value: Any) -> Any:
    """The same with NaN and infinities as words, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def speedup(ours: Mapping[str, Any], rival: Mapping[str, Any], target: float | None = None) -> dict[str, Any]:
    """The rival's time over ours, paired round by round: the median of the ratios, their p20 and p80, all of them."""
    rounds = [b / a for a, b in zip(ours["wall_s"], rival["wall_s"], strict=True)]
    return {**paired(rounds), "target": target}


def paired(rounds: list[float]) -> dict[str, Any]:
    """Median, p20 and p80 of a ratio's rounds, and the rounds themselves.

    Each ratio is of two neighbours in time, so a drift of the machine's speed cancels; in a ratio of two medians, which
    may come from different rounds, it does not.
    """
    return {
        "times": statistics.median(rounds),
        "rounds": rounds,
        "p20": quantile(rounds, 0.2),
        "p80": quantile(rounds, 0.8),
    }


def interleave(
    benchmark: Any,
    result: Result,
    ours: tuple[str, Callable[[], Any]],
    rivals: Mapping[str, Callable[[], Any]],
    *,
    check: Callable[[dict[str, list[Any]]], Check],
    seconds: float,
    most: int,
    least: int = LEAST_ROUNDS,
    before: Callable[[str], None] = lambda name: None,
    warm_ups: int = 1,
) -> dict[str, list[Any]]:
    """Warm every contender up, hold ours to the oracle, and only then time rounds of all of them in turn.

    Args:
        benchmark: pytest-benchmark's fixture, which times ``ours``.
        result: Where timings go, after each.
        ours, rivals: Name and work of each contender.
        check: From what every call gave so far to a verdict on ours; if it is red, nothing is timed.
        seconds: Rounds go on for about so long.
        most, least: Bounds on the number of rounds; a shrunk run, which publishes nothing, takes two at least.
        before: Called with the contender's name before each run, untimed.
        warm_ups: Turns that are not timed, for a check that needs more than one.
    Returns:
        What every call gave, warming up first. A rival that fails is left out from then on, with its reason.

    Raises:
        AssertionError: If the check is red.
    """
    name, work = ours
    times, values = {key: Timing() for key in (name, *rivals)}, {key: [] for key in (name, *rivals)}

    def turn(key: str, do: Callable[[], Any]) -> None:
        values[key].append(times[key].run(do))

    def others() -> None:
        # Not in our own turn: pytest-benchmark would time the write of the file.
        if "check" in result.data:
            result.timings(times)
        for key, do in [(key, do) for key, do in rivals.items() if key in times]:
            try:
                before(key)
                turn(key, do)
                if "check" in result.data:
                    result.timings(times)
            except OutOfTime:
                raise  # the run's own end
            except Exception as error:  # whatever a rival raises is the reason to go on without it
                del times[key], values[key]
                result.leave_out(key, error)
        before(name)

    for _ in range(warm_ups):
        others()
        turn(name, work)
    once = sum(timing.wall_s[-1] for timing in times.values())
    for timing in times.values():
        timing.wall_s.clear()
        timing.cpu_s.clear()
    result.checked(check(values))
    rounds = max(min(least, 2) if result.shrunk else least, min(most, int(seconds / once)))
    benchmark.pedantic(lambda: turn(name, work), setup=others, rounds=rounds, iterations=1, warmup_rounds=0)
    result.timings(times)
    return values


__all__ = [
    "LEAST_ROUNDS",
    "PARTIAL",
    "RESULTS",
    "ROOT",
    "SMOKE",
    "Check",
    "Load",
    "Missing",
    "Result",
    "Timing",
    "environment",
    "finite",
    "interleave",
    "latest",
    "machine_folder",
    "paired",
    "quantile",
    "reason",
    "speedup",
    "tensors_ratio",
]
