"""Options and fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Tests may run beside others on a small machine: two OpenMP teams on two cores cost more than they give.
torch.set_num_threads(int(os.environ.get("FLORA_TEST_THREADS", "1")))

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--scale", default="1", help="1: the size of make test; full: the full size of every number that is asked for"
    )


class Scale:
    """How large a run is: ``scale(small, full)`` picks a number and remembers what was scaled down."""

    reduced: dict[str, str] = {}  # noqa: RUF012 (shared by design: the terminal summary prints it)

    def __init__(self, full: bool, test: str):
        self.full, self.test = full, test

    def __call__(self, small: int, full: int, what: str = "cases") -> int:
        if self.full:
            return full
        if small < full:
            self.reduced[f"{self.test} {what}"] = f"{small} of {full} {what}"
        return small


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    """``scale(small, full, what)``: ``small`` in make test, ``full`` in make test-all."""
    return Scale(request.config.getoption("--scale") == "full", request.node.nodeid.split("[")[0])


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data; the test is skipped where it is not at hand."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real data sets beside the checkout (../shared/data)")
    return SHARED_DATA


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name long bytes by their argument: what gzip packs holds the time, and workers must collect the same names."""
    return argname if isinstance(val, bytes) and len(val) > 40 else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["reduced"] = Scale.reduced


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Take over what a worker of pytest-xdist scaled down; a worker that crashed left nothing."""
    Scale.reduced.update(getattr(node, "workeroutput", {}).get("reduced", {}))


def pytest_terminal_summary(terminalreporter) -> None:
    if Scale.reduced:
        terminalreporter.section("scaled down (make test-all runs the full size)")
        for test, text in sorted(Scale.reduced.items()):
            terminalreporter.line(f"{test.split(' ')[0]}: {text}")
