"""Options of the benchmarks: threads, which cases, how far they are shrunk for a smoke test, and for how long."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases.grid import SELECTIONS, cases
from bench.harness.deadline import within
from bench.harness.machine import forget
from bench.harness.outcomes import Outcomes
from bench.harness.protocol import RESULTS, SMOKE, machine_folder

torch.set_num_threads(int(os.environ.get("FLORA_BENCH_THREADS", "2")))
LAYERS = 30


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flora benchmarks")
    group.addoption(
        "--bench-layers",
        type=int,
        default=int(os.environ.get("FLORA_BENCH_LAYERS", LAYERS)),
        help=f"layers of the model; fewer than {LAYERS} is a smoke test, whose results go to bench/smoke",
    )
    group.addoption("--bench-tokens", type=int, default=128, help="tokens of a sequence where they are not real data")
    group.addoption("--bench-seconds", type=float, default=1.0, help="factor on how long each comparison goes on")
    group.addoption(
        "--bench-select", choices=SELECTIONS, default=None, help="which cases of the grid (bench/cases/grid.py)"
    )
    group.addoption("--bench-minutes", type=float, default=None, help="begin no comparison after so many minutes")
    group.addoption("--bench-stop", type=float, default=None, help="stop what runs after so many minutes")


@dataclass(frozen=True)
class Scale:
    """How large the benchmarks are; ``folder`` keeps shrunk results apart from those that are published."""

    layers: int
    tokens: int
    seconds: float
    selection: str = "cpu"

    @property
    def full(self) -> bool:
        whole = (self.layers, self.tokens) == (LAYERS, 128) and self.seconds >= 1
        return whole and self.selection != "quick"

    @property
    def folder(self) -> Path:
        return machine_folder(RESULTS if self.full else SMOKE)

    @property
    def settings(self) -> dict[str, int]:
        return {"layers": self.layers, "tokens": self.tokens}

    def depth(self, layers: int) -> int:
        """So many layers, or the fewer that a smoke test has."""
        return layers if self.full else min(layers, self.layers, 2 if self.selection == "quick" else layers)


def _scale(config: pytest.Config) -> Scale:
    option: Any = config.getoption
    selection = option("--bench-select") or ("gpu" if torch.cuda.is_available() else "cpu")
    return Scale(option("--bench-layers"), option("--bench-tokens"), option("--bench-seconds"), selection)


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    """Scale of the benchmarks by the options."""
    return _scale(request.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that asks for a case those that the selection takes of its question."""
    question = getattr(metafunc.module, "QUESTION", None)
    if "case" in metafunc.fixturenames and question is not None:
        chosen = cases(question, _scale(metafunc.config).selection)
        metafunc.parametrize("case", chosen, ids=[case.id for case in chosen])


def pytest_configure(config: pytest.Config) -> None:
    # A case that fails before it is timed is reported as it is.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    config.stash[_STARTED] = time.monotonic()
    scale = _scale(config)
    config.stash[_OUTCOMES] = Outcomes(scale.folder / "outcomes" / f"{scale.selection}.json")


_STARTED, _OUTCOMES = pytest.StashKey[float](), pytest.StashKey[Outcomes]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes: Any = item.config.getoption("--bench-minutes")
    if minutes is not None and time.monotonic() - item.config.stash[_STARTED] > 60 * minutes:
        pytest.skip(f"out of time: {minutes:g} minutes were over before its turn")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """End a comparison at the end of the run; what it has measured is written, with that reason."""
    stop: Any = item.config.getoption("--bench-stop")
    if stop is None:
        return (yield)
    left = 60 * stop - (time.monotonic() - item.config.stash[_STARTED])
    with within(max(left, 0.001), "the run"):
        return (yield)


def pytest_runtest_logfinish() -> None:
    forget()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Write down how every benchmark ended, so that the page can tell what is missing and why."""
    report: Any = yield
    if "benchmark" in getattr(item, "fixturenames", ()):
        item.config.stash[_OUTCOMES].add(item.nodeid, report)
    return report
