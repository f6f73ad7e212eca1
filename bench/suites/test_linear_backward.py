"""LoRA linear, backward: a packed cohort against the frozen linear, PEFT, addmm_ and torch's grouped product."""

from __future__ import annotations

from typing import Any

from bench.cases.grid import Case
from bench.cases.linears import compare

QUESTION = "linear_backward"


def test_bench_linear_backward(benchmark: Any, scale: Any, case: Case):
    compare(benchmark, scale, case, "backward")
