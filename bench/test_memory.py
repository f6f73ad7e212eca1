"""Peak memory of a round against its speed, at several token budgets, each case in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch

from bench.cohorts import RANKS
from bench.protocol import ROOT, Missing, Result

# The whole grid repeats every case in turn; a run that must end in a quarter of an hour cannot.
BATCH_SIZE, STEPS, REPEATS = 1, 2, {"all": 3}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a fresh process.

    Raises:
        RuntimeError: If it ends with an error; the message is its last line, or that the system killed it.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench.memory_case", json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        raise RuntimeError("out of memory: the system killed it" if done.returncode == -9 else last)
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
    cases = {"PEFT, one client after another": {**case, "side": "peft"}}
    for name, tokens in budgets(client, client * len(RANKS)).items():
        cases[f"flora, {name}"] = {**case, "side": "flora", "token_budget": tokens}

    with result.told():
        benchmark.pedantic(lambda: measure(result, cases, REPEATS.get(scale.selection, 1)), rounds=1, iterations=1)
        rows = {row["case"]: row for row in result.data.get("rows", [])}
        for name, row in rows.items():
            print(f"\n{name}: {row['beyond_base_bytes'] / 1e9:.2f} GB, {row['tokens_per_s']:.0f} tokens/s", end="")
        absent = [f"{name} ({why})" for name, why in result.data["missing"].items() if name in list(cases)[:2]]
        assert not absent, f"nothing to compare: without {', '.join(absent)}"
        peft, one = (rows[name]["beyond_base_bytes"] for name in list(cases)[:2])
        result.save(finished=True, one_client_over_peft=one / peft, target=1.0)
    print(f"\nat one client's tokens: {one / peft:.2f} of PEFT's memory")


def measure(result: Result, cases: Mapping[str, Any], repeats: int) -> None:
    """Every case in turn, so that a slow minute of the machine falls on all; one that fails is left out and told."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name in [name for name in cases if name not in result.data["missing"]]:
            try:
                runs[name].append(run_case(cases[name]))
            except RuntimeError as error:
                result.leave_out(name, Missing(str(error)))
            told = {name: of for name, of in runs.items() if of and name not in result.data["missing"]}
            result.save(rows=[typical(name, of) for name, of in told.items()])
