"""A clock that a test turns by hand, and benchmarks that run on it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench.harness.protocol import Check, Result, interleave

GREEN = Check(0.5, "exactly")


class Pedantic:
    """The part of pytest-benchmark's fixture that ``interleave`` uses."""

    def pedantic(self, work: Any, setup: Any, rounds: int, **others: Any) -> None:
        assert others["iterations"] == 1
        for _ in range(rounds):
            setup()
            work()


class Clock:
    """Time that goes on only when a contender says so, with noise."""

    def __init__(self, seed: int, noise: float = 0.08):
        self.now, self.random, self.noise = 0.0, random.Random(seed), noise

    def work(self, seconds: float) -> Any:
        def run() -> None:
            self.now += seconds * self.random.lognormvariate(0, self.noise)

        return run


def timed(folder: Path, name: str, seed: int, monkeypatch: pytest.MonkeyPatch, ours: float = 1.0) -> dict[str, Any]:
    """A whole run on a clock of its own: ours at so many seconds against a rival at 1.5."""
    clock = Clock(seed)
    with monkeypatch.context() as patched:
        patched.setattr("bench.harness.protocol.time.perf_counter", lambda: clock.now)
        patched.setattr("bench.harness.protocol.torch.cuda.is_available", lambda: False)
        result = Result(name, "?", {}, folder)
        work = "flora", clock.work(ours)
        rivals = {"PEFT": clock.work(1.5)}
        interleave(Pedantic(), result, work, rivals, check=lambda _: GREEN, seconds=0, least=12, most=12)
        result.conclude("flora", {"PEFT": None})
    return json.loads(result.path.read_text())
