"""Peak memory of a round against its speed, at several token budgets, each case in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from bench.cohorts import RANKS
from bench.protocol import ROOT, Result

# The whole grid repeats every case in turn; a run that must end in a quarter of an hour cannot.
BATCH_SIZE, STEPS, REPEATS = 1, 2, {"all": 3}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a fresh process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench.memory_case", json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def budgets(client_tokens: int, all_tokens: int) -> dict[str, int]:
    """One client's tokens, powers of two times 256 between, and everybody's."""
    between = {str(n): n for n in (256, 512, 1024, 2048) if client_tokens < n < all_tokens}
    return {"one client": client_tokens, **between, "all": all_tokens}


def typical(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median speed, with the largest peak of all runs and every speed."""
    ordered = sorted(runs, key=lambda run: run["tokens_per_s"])
    peak = max(run["beyond_base_bytes"] for run in runs)
    speeds = [run["tokens_per_s"] for run in ordered]
    return {"case": name, **ordered[len(ordered) // 2], "beyond_base_bytes": peak, "all_tokens_per_s": speeds}


def test_bench_memory(benchmark: Any, scale: Any):
    client = BATCH_SIZE * scale.tokens
    sizes = {**scale.settings, "batch_size": BATCH_SIZE, "steps": STEPS}
    result = Result(
        "memory",
        f"Peak memory beyond the base, and speed, of a round of {STEPS} steps of ten clients, "
        f"{scale.tokens} tokens x batch {BATCH_SIZE} each, all linears, at several token budgets",
        {**sizes, "ranks": RANKS, "dtype": "float32"},
        scale.folder,
    )
    case = {**sizes, "threads": torch.get_num_threads()}
    rows: list[dict[str, Any]] = []

    cases = {"PEFT, one client after another": {**case, "side": "peft"}}
    for name, tokens in budgets(client, client * len(RANKS)).items():
        cases[f"flora, {name}"] = {**case, "side": "flora", "token_budget": tokens}

    def measure() -> None:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
        for _ in range(
            REPEATS.get(scale.selection, 1)
        ):  # in turn, so that a slow minute of the machine falls on all of them
            for name, one in cases.items():
                runs[name].append(run_case(one))
        rows.extend(typical(name, of) for name, of in runs.items())
        result.save(rows=rows)

    benchmark.pedantic(measure, rounds=1, iterations=1)
    peft, one = rows[0]["beyond_base_bytes"], rows[1]["beyond_base_bytes"]
    result.save(finished=True, one_client_over_peft=one / peft, target=1.0)
    for row in rows:
        print(f"\n{row['case']}: {row['beyond_base_bytes'] / 1e9:.2f} GB, {row['tokens_per_s']:.0f} tokens/s", end="")
    print(f"\nat one client's tokens: {one / peft:.2f} of PEFT's memory")
