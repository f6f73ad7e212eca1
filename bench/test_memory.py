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

BATCH_SIZE, STEPS = 2, 2


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

    def measure() -> None:
        rows.append({"case": "PEFT, one client after another", **run_case({**case, "side": "peft"})})
        result.save(rows=rows)
        for name, tokens in budgets(client, client * len(RANKS)).items():
            rows.append({"case": f"flora, {name}", **run_case({**case, "side": "flora", "token_budget": tokens})})
            result.save(rows=rows)

    benchmark.pedantic(measure, rounds=1, iterations=1)
    peft, one = rows[0]["beyond_base_bytes"], rows[1]["beyond_base_bytes"]
    result.save(finished=True, one_client_over_peft=one / peft, target=1.0)
    for row in rows:
        print(f"\n{row['case']}: {row['beyond_base_bytes'] / 1e9:.2f} GB, {row['tokens_per_s']:.0f} tokens/s", end="")
    print(f"\nat one client's tokens: {one / peft:.2f} of PEFT's memory")
