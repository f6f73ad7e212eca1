"""A run that is killed with SIGKILL at random instants, and resumed each time, ends with the bytes of an unkilled one.

Kills come by the clock and at single file operations, so that every step of saving is hit too. Runs are forks of one
process that has imported everything, else most kills would hit the import of torch.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from flora_core.common.errors import Stopped
from flora_core.common.files import SaveError

ROOT = Path(__file__).resolve().parents[2]
# Each needs other parts of the state: nothing; low bits, moments and masks; a global adapter and who was drawn.
CASES: dict[str, dict[str, Any]] = {
    "flora": {},
    "bf16": {"base": "bfloat16", "keep_optimizer": True, "schedule": "linear", "schedule_scope": "run", "dropout": 0.2},
    "zero_pad": {"strategy": "zero_pad", "fraction": 0.7, "eval_every": 2},
}
_FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.listdir"}
_TIMES = {"seconds", "seconds_of", "tokens_per_s", "peak_memory_bytes", "out", "checkpoint"}


def run_once(request: dict[str, Any]) -> int:
    """In a fork: one run; it kills itself before its file operation number ``kill_at``. The number of operations.

    ``largest_file`` is what a full disk is like; ``intact``: nothing is damaged, so that no whole round may be redone.
    """
    import resource

    import torch

    from tests.support.federations import make_clients, make_federation

    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _FILE_OPERATIONS and request["out"] in str(arguments[:2]):
            count += 1
            if count == request.get("kill_at"):
                os.kill(os.getpid(), signal.SIGKILL)

    rounds = len(list(Path(request["out"], "rounds").glob("[0-9]*")))

    def check(event: dict[str, Any]) -> None:
        if event["event"] == "round_start" and request.get("intact") and event["round"] <= rounds:
            raise AssertionError(f"round {event['round']} is redone, though {rounds} rounds are whole")

    sys.addaudithook(watch)
    if request.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], -1))
    changes = {"rounds": 4, **request["changes"]}
    dtype, dropout = getattr(torch, changes.pop("base", "float32")), changes.pop("dropout", 0.0)
    model, tokenizer = load(request["model"], dtype)
    clients = make_clients((4, 2, 3), dropout=dropout)
    changes |= dict(model=model, tokenizer=tokenizer, clients=clients, callbacks=[check])
    make_federation(request["out"], **changes).run()
    return count


def load(folder: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def serve() -> None:
    """Fork for each request on standard input; kill the fork by the clock if asked; answer how it ended."""
    # Nothing but imports: loading or running a model starts threads, and a fork would inherit the locks they hold.
    for name in ("transformers.models.llama.modeling_llama", "flora_core.federation", "tests.support.federations"):
        importlib.import_module(name)
    # Its bars would fill the file of errors, and a run with a largest file would fail at them.
    importlib.import_module("transformers.utils.logging").disable_progress_bar()

    if os.path.isdir("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) == 1, "a fork of a process with threads may hang"
    for line in sys.stdin:
        print(json.dumps(fork_and_wait(json.loads(line))), flush=True)


def fork_and_wait(request: dict[str, Any]) -> tuple[int, float, str]:
    """One fork: how it ended, its seconds and its answer."""
    began = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        try:
            os.write(writing, str(run_once(request)).encode())
        except (Stopped, SaveError) as end:
            os.write(writing, b"0" if isinstance(end, Stopped) else b"-1")
        os._exit(0)
    os.close(writing)
    ended = status = termed = 0
    while not ended:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended and not termed and time.monotonic() - began > (request.get("term_after") or math.inf):
            os.kill(pid, signal.SIGTERM)
            termed = 1
        if not ended and time.monotonic() - began > (request["kill_after"] or math.inf):
            os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0)
        time.sleep(0.001)
    with os.fdopen(reading) as pipe:
        return status, time.monotonic() - began, pipe.read()


class Runner:
    """The process that forks the runs."""

    def __init__(self, folder: Path):
        from tests.support.federations import make_model, make_tokenizer

        self.model, self.errors = folder / "model", folder / "errors.txt"
        make_model().save_pretrained(self.model)
        make_tokenizer().save_pretrained(self.model)
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, str(self.model)],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(self, out: Path, changes: dict[str, Any], **kill: Any) -> tuple[bool, float, int]:
        """One run: whether it was killed, its seconds, its file operations (0: stopped as asked, -1: no room)."""
        request = {"out": str(out), "model": str(self.model), "changes": changes, "kill_after": None, **kill}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        status, seconds, count = json.loads(self.process.stdout.readline())
        # Before a run listens, while it imports and loads, and after it ended, SIGTERM ends a process like any other.
        ends = (0, signal.SIGKILL, signal.SIGTERM) if "term_after" in kill else (0, signal.SIGKILL)
        assert status in ends, self.errors.read_text()
        return status != 0, seconds, int(count or 0)


@pytest.fixture(scope="module")
def runner(request: pytest.FixtureRequest, tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    one = Runner(tmp_path_factory.mktemp("runner"))
    yield one
    one.process.communicate()


def left_behind(out: Path) -> dict[str, bytes]:
    """Adapters of all rounds, snapshots, the final adapter and model; round.json holds times."""
    names = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in ("round.json", ".lock"))
    return {str(path.relative_to(out)): path.read_bytes() for path in names if path.parent != out}


def events_of(out: Path) -> list[dict[str, Any]]:
    """The events of a run without times and without its beginnings, of which a resumed run has several."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [event for event in events if event["event"] != "run_start"]
    return [{key: value for key, value in event.items() if key not in _TIMES} for event in kept]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(case, runner, tmp_path, scale):
    changes, random = CASES[case], Random(f"kills {case}")
    killed, seconds, operations = runner.run(tmp_path / "whole", changes)
    assert not killed
    wanted, out, kills, attempts = left_behind(tmp_path / "whole"), tmp_path / "0", 0, 0
    assert {"model/model.safetensors", "rounds/0004/state.safetensors"} <= set(wanted)
    total = scale(3, 34, "kills")
    while kills < total or killed:
        attempts += 1
        if kills == total:
            kill = {}
        elif attempts % 3:  # most of the time nothing is being saved, so the clock alone would hardly hit it
            kill = {"kill_at": random.randint(1, operations)}
        else:
            kill = {"kill_after": random.uniform(0, seconds)}
        killed, *_ = runner.run(out, changes, intact=True, **kill)
        kills += killed
        if not killed:
            assert left_behind(out) == wanted
            assert events_of(out) == events_of(tmp_path / "whole")
            assert not list(out.rglob(".tmp-*"))
            out = tmp_path / str(attempts)


if __name__ == "__main__":
    serve()
