"""The demo as a newcomer runs it: what ten clients gain in three rounds, by seed, and how long it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.harness.protocol import ROOT, Result


def run_demo(out: Path, seed: int, short: list[str]) -> tuple[list[dict[str, Any]], float]:
    """``flora run quickstart`` in a process of its own: its events, and seconds from start to end."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "flora_core.cli", "run", "quickstart", f"seed={seed}", *short, "--out", str(out)]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], time.perf_counter() - began


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bench_demo(benchmark: Any, scale: Any, seed: int, tmp_path: Path):
    short = [] if scale.full else ["federation.rounds=1", "data.per_client=4", "data.test_items=10"]
    result = Result(
        f"demo_seed{seed}",
        f"The demo with seed {seed}: ten clients, three rounds, held-out data before and after each round",
        {"seed": seed, "overrides": short},
        scale.folder,
    )
    events, seconds = benchmark.pedantic(lambda: run_demo(tmp_path / "run", seed, short), rounds=1, iterations=1)
    rows = [
        {key: event[key] for key in ("round", "loss", "exact_match", "examples")}
        for event in events
        if event["event"] == "evaluated"
    ]
    errors = [event["aggregation_error"] for event in events if event["event"] == "aggregated"]
    assert max(errors) < 1e-6, f"seed {seed}: the rounds' sums are {errors} off"
    assert rows[-1]["loss"] < rows[0]["loss"], f"seed {seed} learnt nothing: {rows}"
    result.save(rows=rows, seconds=seconds, target_seconds=300, finished=True)
    for row in rows:
        print(
            f"\nseed {seed}, after round {row['round']}: loss {row['loss']:.2f}, exact {row['exact_match']:.0%}", end=""
        )
