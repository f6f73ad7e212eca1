"""Options of the benchmarks: how many threads, and how far they are shrunk for a smoke test."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.protocol import RESULTS, SMOKE

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


@dataclass(frozen=True)
class Scale:
    """How large the benchmarks are; ``folder`` keeps shrunk results apart from those that are published."""

    layers: int
    tokens: int
    seconds: float

    @property
    def full(self) -> bool:
        return (self.layers, self.tokens) == (LAYERS, 128) and self.seconds >= 1

    @property
    def folder(self) -> Path:
        return RESULTS if self.full else SMOKE

    @property
    def settings(self) -> dict[str, int]:
        return {"layers": self.layers, "tokens": self.tokens}


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    """What the options say."""
    option: Any = request.config.getoption
    return Scale(option("--bench-layers"), option("--bench-tokens"), option("--bench-seconds"))
