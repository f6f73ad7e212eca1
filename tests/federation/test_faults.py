"""Faults for real: signals, full and read-only disks, damaged files, clocks that jump, a second process.

Each is met by a whole run, which says what happened, loses a step or a round at most, and ends with the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from flora_core.common.errors import Stopped
from flora_core.common.files import SaveError, locked
from flora_core.runs.folder import RunFolder
from flora_core.training.pause import stopping
from tests.federation.test_kill_resume import CASES, Runner, events_of, left_behind
from tests.support.federations import files, make_clients, make_federation, make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Iterator[Runner]:
    one = Runner(tmp_path_factory.mktemp("runner"))
    yield one
    one.process.communicate()


# SIGTERM.


def terminate_at(step: int, number: int = 1):
    """A callback that has SIGTERM come after a step of a round."""

    def callback(event) -> None:
        if event["event"] == "train_progress" and (event["round"], event["step"]) == (number, step):
            os.kill(os.getpid(), signal.SIGTERM)

    return callback


VARIANTS: dict[str, dict[str, Any]] = {
    "flora": {},
    "three cohorts": {"token_budget": 20, "keep_optimizer": True},
    "zero_pad": {"strategy": "zero_pad", "fraction": 0.7, "schedule": "cosine", "schedule_scope": "run"},
    "rolora": {"strategy": "rolora", "clients": make_clients((3, 3, 3), dropout=0.2)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", [1, 3])
def test_sigterm_finishes_the_step_saves_it_and_the_run_goes_on_there(variant, step, tmp_path):
    changes = {"eval_data": None, "rounds": 2, **VARIANTS[variant]}
    make_federation(tmp_path / "whole", **changes).run()
    out, steps = tmp_path / "out", []
    with pytest.raises(Stopped) as caught:
        make_federation(out, callbacks=[terminate_at(step, 2)], **changes).run()
    assert caught.value.code == 0
    assert "stopped within round 2, as was asked" in str(caught.value)
    assert (out / "paused" / "round.json").is_file()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def note(event) -> None:
        steps.extend([event["step"]] if event["event"] == "train_progress" else [])

    make_federation(out, callbacks=[note], **changes).run()
    assert len(steps) < 1 + max(steps), "what was done is not done again"
    assert step not in steps
    assert left_behind(out) == left_behind(tmp_path / "whole")
    assert events_of(out) == events_of(tmp_path / "whole")
    assert not (out / "paused").exists()


SCRIPT = """
import sys, time
from tests.support.federations import make_federation
def callback(event):
    if event["event"] == "train_progress" and event["round"] == 1 and event["step"] == 2:
        print("training", flush=True)
        time.sleep(float(sys.argv[2]))
make_federation(sys.argv[1], eval_data=None, callbacks=[callback]).run()
print("over", flush=True)
"""


def start(out: Path, seconds: float) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(out), str(seconds)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    return process


@pytest.mark.slow
def test_a_process_that_gets_sigterm_exits_with_0_and_one_that_gets_two_dies(tmp_path):
    process = start(tmp_path / "out", 1.0)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120) == ("", None)
    assert process.returncode == 0
    assert json.loads((tmp_path / "out" / "paused" / "round.json").read_text())["round"] == 1
    process = start(tmp_path / "twice", 60.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_without_a_folder_sigterm_is_left_as_it_is():
    with stopping(False) as stop:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not stop()


@pytest.mark.parametrize("name", ["state.safetensors", "round.json"])
def test_a_damaged_pause_costs_the_round_and_is_told(name, tmp_path):
    make_federation(tmp_path / "whole", eval_data=None).run()
    out, heard = tmp_path / "out", []
    with pytest.raises(Stopped):
        make_federation(out, eval_data=None, callbacks=[terminate_at(2, 2)]).run()
    data = bytearray((out / "paused" / name).read_bytes())
    data[len(data) // 2] ^= 4
    (out / "paused" / name).write_bytes(bytes(data))
    make_federation(out, eval_data=None, callbacks=[heard.append]).run()
    texts = [event["message"] for event in heard if event["event"] == "warning"]
    assert len(texts) == 1
    assert "paused cannot be used" in texts[0]
    assert "doing round 2 from its beginning" in texts[0]
    assert left_behind(out) == left_behind(tmp_path / "whole")


# Disks.


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; skipped where one may not mount (RLIMIT_FSIZE stands for it in test_resume)."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_disk_that_is_full_loses_nothing_and_the_run_goes_on_when_there_is_room(share, tmp_path, monkeypatch):
    changes: dict[str, Any] = dict(eval_data=None, rounds=3, keep_snapshots=3)

    def model():
        return make_model(hidden=64)

    make_federation(tmp_path / "whole", model=model(), **changes).run()
    size = sum(len(data) for data in left_behind(tmp_path / "whole").values())
    # The check before training would refuse at once.
    monkeypatch.setattr(RunFolder, "check_room", lambda *_: None)
    with disk(tmp_path / "disk", f"size={int(share * size)}") as small:
        with pytest.raises(SaveError, match=r"[Nn]o space left|the disk is full"):
            make_federation(small / "out", model=model(), **changes).run()
        assert not list((small / "out").rglob(".tmp-*")), "what was begun is cleaned up, or nobody could go on"
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", small], check=True)
        make_federation(small / "out", model=model(), **changes).run()
        assert left_behind(small / "out") == left_behind(tmp_path / "whole")


def test_an_output_that_is_read_only_is_told_before_training(tmp_path):
    def training(event) -> None:
        raise AssertionError("it began")

    if os.geteuid():
        (tmp_path / "disk").mkdir(mode=0o555)
        with pytest.raises(SaveError, match=r"could not save .*out: .*no permission to write there: choose another"):
            make_federation(tmp_path / "disk" / "out", callbacks=[training]).run()
        return
    with (
        disk(tmp_path / "disk", "ro") as folder,
        pytest.raises(SaveError, match=r"could not save .*out: .*the file system is read-only: choose another place"),
    ):
        make_federation(folder / "out", callbacks=[training]).run()


# Clocks and neighbours.


def test_a_clock_that_jumps_changes_no_byte_and_no_duration(tmp_path, monkeypatch):
    make_federation(tmp_path / "whole").run()
    real, random = time.time, Random("clock")
    monkeypatch.setattr(time, "time", lambda: real() + random.choice([-1e8, 0.0, 1e8]))
    result = make_federation(tmp_path / "out").run()
    assert files(tmp_path / "out", ".safetensors") == files(tmp_path / "whole", ".safetensors")
    assert all(0 <= event.get("seconds", 0) < 600 for event in result.events)


HOLDER = """
import sys
from pathlib import Path
from flora_core.common import locked

with locked(Path(sys.argv[1]), Path(sys.argv[1]), "works in"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_has_the_folder_and_takes_it_over_when_that_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out" / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match=rf"another process \(pid {holder.pid}\) works in .*choose another out"):
        make_federation(tmp_path / "out", rounds=1).run()
    holder.kill()
    holder.communicate()
    make_federation(tmp_path / "out", rounds=1).run()
    with locked(tmp_path / "out" / ".lock", tmp_path / "out", "works in"):
        pass


# Everything, one after another.


def damage(out: Path, random: Random) -> str:
    """Flip a bit of a file of the newest round, or cut it, or tear metrics.jsonl."""
    rounds = sorted((out / "rounds").glob("[0-9]*")) if (out / "rounds").is_dir() else []
    paths = [path for path in (rounds[-1].rglob("*") if len(rounds) > 1 else []) if path.is_file()]
    paths += [path for path in (out / "metrics.jsonl", out / "paused" / "round.json") if path.is_file()]
    if not paths:
        return "nothing there"
    path = random.choice(sorted(paths))
    data = bytearray(path.read_bytes())
    at = random.randrange(len(data)) if data else 0
    if path.name == "metrics.jsonl" or random.random() < 0.5:
        os.truncate(path, at)
    else:
        data[at] ^= 1 << random.randrange(8)
        path.write_bytes(bytes(data))
    return str(path.relative_to(out))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_meets_every_fault_ends_with_the_same_bytes(case, runner, tmp_path, scale):
    """Seeded: killed, asked to stop, without room, with damaged files, in any order; each time it is started again."""
    if case != "flora" and scale(0, 1, "of the cases") == 0:
        pytest.skip("one case is enough at this scale")
    changes, random, log = {**CASES[case], "keep_snapshots": 3}, Random(f"faults {case}"), []
    killed, seconds, operations = runner.run(tmp_path / "whole", changes)
    assert not killed
    out, biggest = tmp_path / "out", max(len(data) for data in left_behind(tmp_path / "whole").values())
    for _ in range(scale(5, 60, "faults")):
        kind = random.choice(["kill_at", "kill_after", "term_after", "largest_file", "damage"])
        value = {
            "kill_at": random.randint(1, operations),
            "kill_after": random.uniform(0, seconds),
            "term_after": random.uniform(0, seconds),
            "largest_file": random.randint(biggest // 2, biggest),
            "damage": None,
        }[kind]
        if kind == "damage":
            log.append(damage(out, random))
            continue
        *_, count = runner.run(out, changes, **{kind: value})
        log.append(f"{kind}={value}: {count}")
        if (out / "model").is_dir():
            assert left_behind(out) == left_behind(tmp_path / "whole"), log
            shutil.rmtree(out)
    killed, *_ = runner.run(out, changes)
    assert not killed
    assert left_behind(out) == left_behind(tmp_path / "whole"), log
    assert not list(out.rglob(".tmp-*")), log
