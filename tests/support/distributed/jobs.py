"""Jobs that torchrun's processes do one after another, their launch, and the same in this process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flora_core.testing import budget_ratio
from tests.support.distributed.worker import arguments
from tests.support.federations import make_federation, make_model, make_records, make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
# One client a cohort: what a client computes then depends on nothing but itself.
ALONE: dict[str, Any] = {"token_budget": 1}
# Cases whose bytes must be those of one process: what each carries from round to round differs.
SAME: dict[str, dict[str, Any]] = {
    "flora": {"ranks": [4, 2, 3, 8]},
    "bf16": {"base": "bfloat16", "keep_optimizer": True, "schedule": "linear", "schedule_scope": "run", "dropout": 0.2},
    "zero_pad": {"strategy": "zero_pad", "fraction": 0.7, "ranks": [4, 2, 3, 5, 2], "rounds": 3},
    "flora_warm": {"strategy": "flora_warm", "eval_every": 2},
    "poisoned": {"poisoned": "b"},
    "one client": {"ranks": [4]},
    "no folder": {"out": None},
}
# More rank than 2 N K 8 / ((N + K) 4) = 32 in 16 x 16 modules, and nobody who asks for single adapters.
MANY: dict[str, Any] = {"ranks": [16, 12, 16, 8], "save_adapters": False, "base": "float64"}
JOBS: dict[str, dict[str, Any]] = {
    **{name: {"changes": {**ALONE, **changes}} for name, changes in SAME.items()},
    "packed": {"changes": {"base": "float64", "ranks": [4, 2, 3, 8]}},
    "reduced": {"changes": MANY},
    "reduced in part": {"changes": {**MANY, "own_targets": ["q_proj"], "poisoned": "b"}},
    "reduced by none": {"changes": {**MANY, "clip_update": 0.5}},
    "from one": {"changes": {**ALONE, "rounds": 3, "keep_optimizer": True}},
    "to one": {"changes": {**ALONE, "rounds": 3, "keep_optimizer": True}, "fault": "stop_after_round_1"},
    "finished": {"changes": {**ALONE, "rounds": 1}},
    "paused by 0": {"changes": {**ALONE, "keep_optimizer": True}, "fault": "term_to_process_0"},
    "paused by 1": {"changes": {**ALONE, "keep_optimizer": True}, "fault": "term_to_process_1"},
    "no memory": {"changes": {"base": "float64", "ranks": [4, 2, 3, 8]}, "fault": "no_memory"},
    "rounds otherwise": {"changes": ALONE, "fault": "rounds_otherwise"},
    **{
        name: {"changes": {}, "fault": name}
        for name in ("missing_data", "other_rate", "other_weights", "other_version", "fails_in_round_1")
    },
    "a file": {"changes": {}},
    "privacy": {"changes": {"private": True}},
    "remote": {"changes": {"elsewhere": True}},
}
AGAIN = {f"{name} again": {**JOBS[name], "at": name, "fault": None} for name in ("paused by 0", "paused by 1")}


def torchrun(count: int, arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start processes as a user would; what they say comes out of one pipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(port)]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *launcher, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def end(process: subprocess.Popen[str]) -> None:
    """End a launcher that still runs, which ends its processes when it is asked to, and only then."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
    process.kill()


@dataclass
class Launch:
    """Results of one launch's processes: results of every job by process, and the jobs' folders."""

    folder: Path
    size: int
    said: str
    code: int

    def of(self, name: str) -> list[dict[str, Any]]:
        return [
            json.loads((self.folder / "results" / f"{name}-{process}.json").read_text()) for process in range(self.size)
        ]

    def out(self, name: str) -> Path:
        return self.folder / name


def launch(folder: Path, size: int, jobs: dict[str, dict[str, Any]], seconds: float = 600) -> Launch:
    """Run jobs on so many processes."""
    (folder / "results").mkdir(parents=True)
    listed = []
    for name, job in jobs.items():
        changes = {"out": str(folder / job.get("at", name)), **job["changes"]}
        listed.append({**job, "name": name, "out": changes.pop("out"), "changes": changes})
    (folder / "jobs.json").write_text(json.dumps(listed))
    worker = str(ROOT / "tests" / "support" / "distributed" / "worker.py")
    process = torchrun(size, [worker, str(folder / "jobs.json"), str(folder / "results")])
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        end(process)
    return Launch(folder, size, said, process.returncode)


def alone(out: Path | None, job: dict[str, Any]) -> Any:
    """The same job in this process."""
    changes = {"out": out, **arguments(job)}
    return make_federation(changes.pop("out"), **changes).run()


def without_processes(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events in an order of their own, but for those that speak of processes; who shares a cohort depends on them."""
    kept = [event for event in events if "processes share" not in event.get("message", "")]
    kept = [event for event in kept if event["event"] != "exchanged"]
    kept = [{key: value for key, value in event.items() if key != "shares"} for event in kept]
    return sorted(kept, key=lambda event: json.dumps(event, sort_keys=True))


def check_weights(out: Path, whole: Path) -> None:
    """Check that two runs' changes of a float64 base agree within the budget, module by module."""
    state = Path("rounds") / "0002" / "state.safetensors"
    got, wanted = load_file(out / state), load_file(whole / state)
    assert got.keys() == wanted.keys()
    before = make_model(torch.float64)
    for key, weight in wanted.items():
        start = before.get_submodule(key.removeprefix("server/weights/")).weight
        assert budget_ratio(got[key] - start, weight - start, weight - start) <= 1, key


def aggregations(events: list[dict[str, Any]]) -> list[Any]:
    """Who was refused, how many were aggregated, and the bytes of each client: what sums do not show by themselves."""
    names = ("client", "refused", "clients", "up", "down", "forms", "aggregation_error")
    kept = [event for event in events if event["event"] in ("client_done", "aggregated")]
    return [{name: event.get(name) for name in names} for event in kept]


def wait_for(what: Callable[[], Any], seconds: float = 120) -> Any:
    """Return a function's result as soon as it is not empty."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def write_recipe(folder: Path, rounds: int) -> Path:
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    paths = {}
    for name in "abc":
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(record) + "\n" for record in make_records(name, 6)))
    recipe = {"model": str(folder / "base"), "device": "cpu", "threads": 1, "federation": {"rounds": rounds}}
    recipe |= {"data": {"path": paths}, "clients": {"ranks": [4, 2, 3]}}
    recipe |= {"train": {"lr": 1e-2, "batch_size": 2, "max_length": 32, "token_budget": 1}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"
