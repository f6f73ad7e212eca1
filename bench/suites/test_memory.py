"""Peak memory of a round against its speed, at several token budgets, beside PEFT's one client after another.

On a CPU each case has a process of its own, whose resident set is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch

from bench.cases import memory
from bench.cases.grid import Case
from bench.cases.steps import Step
from bench.harness.protocol import ROOT, Missing, Result
from bench.harness.rates import device, dtype

QUESTION = "memory"
# The whole grid repeats every case in turn; a run that must end in a quarter of an hour cannot. On a GPU the first turn
# compiles kernels. Steps there: two that are called, one that is captured, one that is replayed.
REPEATS = {"all": 3, "gpu": 2}
STEPS = {"cpu": 2, "cuda": 4}
# Of PEFT's peak beyond the base, per token in flight, with dropout and a base of 16 bits.
PER_TOKEN = {"PEFT": 0.45, "PEFT bf16": 0.65}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case: here on a GPU, else in a fresh process.

    Raises:
        Missing: If that ends with an error; the message is its last line, or that the system killed it.
    """
    if torch.cuda.is_available():
        return memory.run(case)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench.cases.memory", json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        raise Missing("out of memory: the system killed it" if done.returncode == -9 else last)
    return json.loads(done.stdout.splitlines()[-1])


def budgets(client_tokens: int, all_tokens: int) -> dict[str, int]:
    """One client's tokens, powers of two times 256 between, and everybody's; at most six."""
    between = {str(n): n for n in (256, 512, 1024, 2048, 4096) if client_tokens < n < all_tokens}
    return {"one client": client_tokens, **between, "all": all_tokens}


def typical(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median speed, with the largest peak of all runs and every speed."""
    ordered = sorted(runs, key=lambda run: run["tokens_per_s"])
    peak = max(run["beyond_base_bytes"] for run in runs)
    speeds = [run["tokens_per_s"] for run in ordered]
    return {"case": name, **ordered[len(ordered) // 2], "beyond_base_bytes": peak, "all_tokens_per_s": speeds}


def contenders(case: Case, layers: int) -> dict[str, dict[str, Any]]:
    """Name -> arguments of ``bench.cases.memory``."""
    where, clients = device(), len(case.ranks)
    common: dict[str, Any] = {
        **{key: getattr(case, key) for key in ("model", "mix", "tokens", "dropout", "targets")},
        "layers": layers,
        "steps": STEPS[where.type],
        "threads": torch.get_num_threads(),
        "tokens_in_flight": case.tokens,
    }
    peft = ["PEFT", *["PEFT bf16"] * (dtype(where).itemsize == 2)]
    found = {f"{name}, one client after another": {**common, "side": name.lower()} for name in peft}
    for name, tokens in budgets(case.tokens, case.tokens * clients).items():
        found[f"flora, {name}"] = {**common, "side": "flora", "token_budget": tokens, "tokens_in_flight": tokens}
    return found


def test_bench_memory(benchmark: Any, scale: Any, case: Case):
    layers, clients = scale.depth(case.shapes.layers), len(case.ranks)
    result = Result(
        "memory" if case == Case() else f"memory_{case.id}",
        f"Peak memory beyond the base, and speed, of a round of {STEPS[device().type]} steps of {clients} clients, "
        f"{case.model}, {case.tokens} tokens each, {case.targets} targets, dropout {case.dropout:g}, by token budget",
        {**case.settings, "layers": layers, "steps": STEPS[device().type], "dtype": str(dtype(device()))},
        scale.folder,
    )
    with result.reported():
        result.checked(Step(case, min(2, layers), cuda_graphs=False).check((0, clients // 2, clients - 1)))
        cases = contenders(case, layers)
        try:
            repeats = REPEATS.get(scale.selection, 1)
            benchmark.pedantic(lambda: measure(result, cases, repeats), rounds=1, iterations=1)
        finally:
            memory.base_model.cache_clear()
        for row in result.data.get("rows", []):
            size, speed = row["beyond_base_bytes"] / 1e9, row["tokens_per_s"]
            print(f"\n{row['case']}: {size:.2f} GB, {speed:.0f} tokens/s", end="")
        print("\n" + "\n".join(conclude(result)))
    benchmark.extra_info |= {"json": result.path.name}


def measure(result: Result, cases: Mapping[str, Any], repeats: int) -> None:
    """Every case in turn, so that a slow minute of the machine falls on all; one that fails is left out and told."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name in [name for name in cases if name not in result.data["missing"]]:
            try:
                runs[name].append(run_case(cases[name]))
            except Exception as error:  # out of memory, most likely: the reason to go on without it
                result.leave_out(name, error)
            told = {name: of for name, of in runs.items() if of and name not in result.data["missing"]}
            result.save(rows=[typical(name, of) for name, of in told.items()])


def conclude(result: Result) -> list[str]:
    """Hold ours to PEFT's memory: in all at one client's tokens, and per token in flight where there is a target.

    Raises:
        AssertionError: If there is nothing to compare.
    """
    rows = {row["case"]: row for row in result.data.get("rows", [])}
    peft = {name: row for name in PER_TOKEN for case, row in rows.items() if case.startswith(f"{name}, ")}
    one, everybody = rows.get("flora, one client"), rows.get("flora, all")
    if one is None or not peft:
        absent = "; ".join(f"{name} ({why})" for name, why in result.data["missing"].items())
        raise AssertionError(f"nothing to compare: without {absent}")
    lines = []
    for name, row in peft.items():
        share = one["beyond_base_bytes"] / row["beyond_base_bytes"]
        lines.append(result.target(f"memory beyond the base at one client's tokens, of {name}'s", share, 1.0, False))
        if everybody and result.data["settings"].get("dropout") and "PEFT bf16" in peft:
            share = _per_token(everybody) / _per_token(row)
            what = f"memory beyond the base per token in flight, of {name}'s"
            lines.append(result.target(what, share, PER_TOKEN[name], False))
    first = next(iter(peft.values()))
    ratio = one["beyond_base_bytes"] / first["beyond_base_bytes"]
    result.save(finished=True, one_client_over_peft=ratio, target=1.0)
    return lines


def _per_token(row: Mapping[str, Any]) -> float:
    return row["beyond_base_bytes"] / row["tokens_in_flight"]
