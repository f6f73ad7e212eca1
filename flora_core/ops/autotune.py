"""Which way to fuse runs for a shape: fixed by the caller, or measured once on this device and kept.

A choice made by timing changes the last bits of a result, so it is made once: it is kept on disk by device, versions
and shape, written into the run, and taken from there when the run is resumed (``use``).
Letters: M packed tokens, K in_features, N out_features, P sum of ranks.

Example:
    >>> flora.ops.autotune.Shape("forward", M=1000, N=64, K=32, P=20, dtype=torch.float32).key
    'forward M1024 N64 K32 P64 float32'
"""

from __future__ import annotations

import hashlib
import json
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common import atomic_write_json, cache_folder

ROUNDS, FORMAT = 7, 1
Timer = Callable[[Sequence[Callable[[], Any]]], list[float]]


@dataclass(frozen=True)
class Shape:
    """Shape that a choice depends on, besides the device. M counts in powers of two, P in tiles of 64: as it is
    measured."""

    direction: str
    M: int
    N: int
    K: int
    P: int
    dtype: torch.dtype
    dropout: bool = False

    @property
    def key(self) -> str:
        M, P = 1 << max(self.M - 1, 0).bit_length(), -(-self.P // 64) * 64
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.direction} M{M} N{self.N} K{self.K} P{P} {kind}{' dropout' if self.dropout else ''}"


def platform_of(device: torch.device) -> dict[str, str]:
    """Device and versions that a choice is good for."""
    from ..version import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = "none"
    return {"device": name, "torch": torch.__version__, "triton": compiler, "flora_core": __version__}


class Choices:
    """The choices for one device: {key of the shape: {"way": its name, "us": {way: microseconds}}}."""

    def __init__(self, platform: Mapping[str, str], folder: Path | None = None):
        self.platform = dict(platform)
        digest = hashlib.sha256(json.dumps(self.platform, sort_keys=True).encode()).hexdigest()[:12]
        self.path = (folder or cache_folder()) / f"fuse-{digest}.json"
        self.known: dict[str, dict[str, Any]] = self._read()
        self.used: dict[str, dict[str, Any]] = {}

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        try:
            stored = json.loads(self.path.read_text("utf-8"))
            if (stored["format"], stored["platform"]) != (FORMAT, self.platform):
                raise ValueError("it is of another format or device")
            for entry in stored["choices"].values():
                if not isinstance(entry["way"], str) or not isinstance(entry["us"], dict):
                    raise ValueError("an entry has no way or no times")
            return stored["choices"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"{self.path} is damaged ({type(error).__name__}: {error}): ways to fuse are measured again, and the "
                "file is written anew",
                RuntimeWarning,
                stacklevel=3,
            )
            return {}

    def _write(self) -> None:
        # Others may have measured in the meantime: theirs are kept, ours win.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.known = {**self._read(), **self.known}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(self.path, {"format": FORMAT, "platform": self.platform, "choices": self.known})
        except OSError as error:
            # A run does not end for it: it has its choices in run.json.
            warnings.warn(
                f"{self.path} cannot be written ({error}): ways to fuse are measured again by the next process; set "
                "FLORA_CACHE to a folder that can",
                RuntimeWarning,
                stacklevel=3,
            )

    def pick(self, shape: Shape, ways: Mapping[str, Callable[[], Any]], timer: Timer, may_measure: bool = True) -> str:
        """The way for a shape: a known one, else measured; the first of ``ways`` where nothing may be measured now."""
        key, first = shape.key, next(iter(ways))
        entry = self.used.get(key) or self.known.get(key)
        if entry is not None and entry["way"] in ways:
            self.used[key] = entry
            return entry["way"]
        if len(ways) == 1 or not may_measure:
            return first
        times = dict(zip(ways, timer(list(ways.values())), strict=True))
        way = min(times, key=lambda name: times[name])
        self.used[key] = self.known[key] = {"way": way, "us": {name: round(us, 2) for name, us in times.items()}}
        self._write()
        return way

    def use(self, choices: Mapping[str, dict[str, Any]]) -> None:
        """Take a run's choices, which go before everything that was or could be measured."""
        self.used.update(choices)

    def describe(self, N: int, K: int, dtype: torch.dtype, direction: str = "forward") -> str:
        """Describe what is chosen for the products (or merges) of one weight, and why."""
        like = Shape(direction, 1, N, K, 1, dtype).key.split()
        found = []
        for key, entry in {**self.known, **self.used}.items():
            words = key.split()
            if (words[0].partition("-")[0], *words[2:4], words[5]) == (like[0], *like[2:4], like[5]):
                times = sorted(entry["us"].items(), key=lambda pair: pair[1])
                found.append(f"{entry['way']} at {words[1]} ({', '.join(f'{way} {us:.0f} us' for way, us in times)})")
        first = "batch" if direction == "forward" else direction
        return (
            f"measured on {self.platform['device']}: {'; '.join(found)}" if found else f"measured at its first {first}"
        )


_OF_DEVICE: dict[str, Choices] = {}
# What a resumed run brought with it, also for a device that is not here.
_RECORDED: dict[str, dict[str, dict[str, Any]]] = {}


def choices_for(device: torch.device) -> Choices:
    """The one table of a device in this process."""
    name = str(device)
    if name not in _OF_DEVICE:
        _OF_DEVICE[name] = Choices(platform_of(device))
        _OF_DEVICE[name].use(_RECORDED.get(name, {}))
    return _OF_DEVICE[name]


def used() -> dict[str, dict[str, dict[str, Any]]]:
    """Every choice that this process has used, by device; to be written into the run."""
    return {**_RECORDED, **{name: dict(choices.used) for name, choices in _OF_DEVICE.items() if choices.used}}


def use(recorded: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Go on with the choices of a run that is resumed."""
    for name, choices in recorded.items():
        _RECORDED[name] = dict(choices)
        if name in _OF_DEVICE:
            _OF_DEVICE[name].use(choices)


def timer_on(device: torch.device) -> Timer:
    """A timer of calls on a GPU, whichever is the current one: events are recorded on a device's own stream."""

    def timer(calls: Sequence[Callable[[], Any]]) -> list[float]:
        with torch.cuda.device(device):
            return time_on_gpu(calls)

    return timer


def time_on_gpu(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Median microseconds of each call on the current GPU, their rounds interleaved; the first two rounds warm up."""
    rounds: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS + 2):
        for call, times in zip(calls, rounds, strict=True):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            if number >= 2:
                times.append(1000 * start.elapsed_time(stop))
    return [statistics.median(times) for times in rounds]
