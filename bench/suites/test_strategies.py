"""A server's cost of each strategy: 1,000 clients of ranks 4 to 64, a tenth of them a round, Llama-7B's q and v.

Each case is a process of its own and a file of its own, so that it can be run alone (``-k flexlora``) and a stop loses
nothing. Where 64 modules would take many minutes a few are measured: every module costs the same, so time and bytes
are scaled to 64, and the file says how many were measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from bench.cases.strategies import CLIENTS, EQUAL_RANK, FRACTION, MODULES, RANKS, WIDTH
from bench.harness.protocol import ROOT, Result, latest
from flora_core.common.formatting import show_bytes, show_seconds

# Name -> strategy, measured modules, options.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "flora": ("flora", 64, {}),
    "flora_warm": ("flora_warm", 64, {"floor": 4}),
    "flora_svd": ("flora_svd", 16, {"tau": 0.9}),
    "fedit": ("fedit", 16, {}),
    "zero_pad": ("zero_pad", 16, {}),
    "hetlora": ("hetlora", 8, {}),
    "ffa": ("ffa", 16, {}),
    "rolora": ("rolora", 16, {}),
    "fedex": ("fedex", 64, {}),
    "flexlora": ("flexlora", 8, {}),
    "flexlora_fast": ("flexlora", 16, {"svd": "fast"}),
    "raflora": ("raflora", 8, {}),
    "raflora_fast": ("raflora", 16, {"svd": "fast"}),
}


def run_case(name: str, modules: int, options: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a fresh process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench.cases.strategies", name, str(modules), json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def whole_round(found: dict[str, Any]) -> dict[str, Any]:
    """Scale what a few modules took to all of them: what is held grows with them, what is in work does not."""
    rest = MODULES / found["modules"]
    held = found["update_bytes"] + found["result_bytes"]
    return {
        "seconds": rest * found["seconds"],
        "seconds_of": {part: rest * spent for part, spent in found["seconds_of"].items()},
        "peak_bytes": found["peak_bytes"] + (rest - 1) * held,
        "up_bytes_per_client": rest * found["bytes_up"] / found["clients"],
        "down_bytes_per_client": rest * found["bytes_down"] / found["clients"],
    }


@pytest.mark.parametrize("case", CASES)
def test_bench_strategy(case: str, benchmark: Any, scale: Any):
    name, modules, options = CASES[case]
    result = Result(
        f"strategies_{case}",
        f"One round of {name} with its certificate: {int(CLIENTS * FRACTION)} of {CLIENTS} clients, "
        f"ranks {RANKS[0]} to {RANKS[-1]} (or {EQUAL_RANK} for all), {MODULES} modules of {WIDTH} x {WIDTH}",
        {
            "clients": CLIENTS,
            "fraction": FRACTION,
            "ranks": RANKS,
            "modules": MODULES,
            "width": WIDTH,
            "dtype": "float32",
        },
        scale.folder,
    )
    found: dict[str, Any] = {}
    benchmark.pedantic(
        lambda: found.update(run_case(name, 1 if result.shrunk else modules, options)), rounds=1, iterations=1
    )
    result.save(measured=found, whole_round=whole_round(found), finished=True)
    print(f"\n{case}: {json.dumps(whole_round(found))}")


def publish() -> None:
    """Write the table of docs/strategies.md from the results that are there."""
    names = ("case", "measured modules", "aggregate", "certify", "peak memory", "up, a client", "down, a client")
    rows = ["| " + " | ".join([*names, "form", "error"]) + " |", "|" + " --- |" * (len(names) + 2)]
    whole = {case: json.loads(latest(f"strategies_{case}").read_text()) for case in CASES}
    for case, data in sorted(whole.items(), key=lambda item: item[1]["whole_round"]["seconds_of"]["aggregate"]):
        total, measured = data["whole_round"], data["measured"]
        times = [show_seconds(total["seconds_of"][part]) for part in ("aggregate", "certify")]
        sizes = [show_bytes(total[part]) for part in ("peak_bytes", "up_bytes_per_client", "down_bytes_per_client")]
        cells = [f"`{case}`", str(measured["modules"]), *times, *sizes, ", ".join(measured["forms"]) or "adapter"]
        rows.append("| " + " | ".join([*cells, f"{measured['aggregation_error']:.1e}"]) + " |")
    path = ROOT / "docs" / "strategies.md"
    before, rest = path.read_text().split("<!-- scale:start -->")
    after = rest.split("<!-- scale:end -->")[1]
    path.write_text("\n".join([before + "<!-- scale:start -->", *rows, "<!-- scale:end -->"]) + after)


if __name__ == "__main__":
    publish()
