"""The calls for a GPU that is lent for minutes: their files, their limits, and all of them without a GPU.

Letters: M packed tokens, K in_features, N out_features.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("peft")

from bench.gpu.record import Record, file_name
from bench.harness import machine

ROOT = Path(__file__).resolve().parents[2]
# What other tests run already, or what the interpreter takes minutes for, is replaced.
DRY = """
import sys
from bench.gpu import call, times

call.step.check = lambda device: {"green": False, "error / budget": 2.0}
call.step.check_graphs = lambda device: {"green": True}
call.unit_tests = lambda record: lambda found: found.update(call.tool([sys.executable, "-c", "print(7)"],
                                                                             record.folder / "tests.txt", 60))
times.Targets.contenders = lambda self: [
    ("frozen", self.frozen), ("flora separate", lambda: self.flora("separate")), ("PEFT bf16", lambda: 1 / 0)]
sys.exit(call.main(["--call", "a,b,c", "--dry", "--out", sys.argv[1], "--minutes", "8"]))
"""


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def members(folder: Path, name: str) -> set[str]:
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        return {member.name for member in archive.getmembers()}


def test_every_step_is_written_before_the_next_begins(tmp_path):
    record = Record(tmp_path, "gpu_x", minutes=1)

    def leaves_a_log(found: dict) -> None:
        (record.folder / "log.txt").write_text("words")
        found["value"] = 7.0

    record.step("first", leaves_a_log)
    assert read(tmp_path, "gpu_x")["steps"]["first"]["value"] == 7.0
    assert "gpu_x/log.txt" in members(tmp_path, "gpu_x")
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_x.json", "gpu_x.tar.gz"}
    assert record.close()
    assert not record.folder.exists()


def test_a_step_that_fails_keeps_what_it_found_and_the_next_one_runs(tmp_path):
    record = Record(tmp_path, "gpu_x", minutes=1)

    def fails(found: dict) -> None:
        found["rows"] = {"one": 1}
        raise RuntimeError("no kernel")

    record.step("red", fails)
    record.step("after", lambda found: found.update(green=True))
    steps = read(tmp_path, "gpu_x")["steps"]
    assert steps["red"]["rows"] == {"one": 1}
    assert steps["red"]["error"] == "RuntimeError: no kernel"
    assert steps["after"]["green"]
    assert "gpu_x/red.error.txt" in members(tmp_path, "gpu_x")
    assert not record.close()


@pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="needs timers")
def test_a_step_that_is_too_slow_is_stopped_and_none_begins_after_the_end(tmp_path):
    record = Record(tmp_path, "gpu_x", minutes=1)

    def slow(found: dict) -> None:
        found["rows"] = {"one": 1}
        time.sleep(60)

    record.step("slow", slow, seconds=2.0)
    record.end = time.monotonic() + 0.5
    record.step("late", slow)
    steps = read(tmp_path, "gpu_x")["steps"]
    assert "out of time: slow was stopped" in steps["slow"]["error"]
    assert steps["slow"]["rows"] == {"one": 1}
    assert steps["late"]["not begun"] == "out of time"
    record.close()


def test_names_of_steps_become_names_of_files():
    assert file_name("7b 4096->4096+256 M8192") == "7b-4096--4096-256-M8192"


def test_a_tree_without_git_has_no_commit(monkeypatch):
    machine._git.cache_clear()
    monkeypatch.setenv("PATH", "")
    found = machine.environment()
    assert (found["commit"], found["changed_files"]) == ("", [])
    machine._git.cache_clear()


def run(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # As on a machine where nothing is installed: the tree alone.
    variables = {**os.environ, "PYTHONPATH": ".:kernels", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=500
    )


def test_all_calls_run_without_a_gpu(tmp_path):
    """A red check is in it, which keeps no time back but its own."""
    done = run(DRY, str(tmp_path))
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {f"gpu_{c}.{e}" for c in "abc" for e in ("json", "tar.gz")}
    kernels, linears, steps = (read(tmp_path, f"gpu_{call}")["steps"] for call in "abc")
    assert not kernels["training step"]["green"]
    assert kernels["warm"]["shrink"] == 0
    assert len(kernels["kernels"]["rows"]) == 14
    assert all(row["green"] and row["us"] > 0 for row in kernels["kernels"]["rows"].values())
    assert kernels["repeats"]["called"]["repeats bit for bit"]
    assert kernels["unit tests"]["last lines"] == ["7"]
    assert {"gpu_a/tests.txt", "gpu_a/warm-shrink.txt"} <= members(tmp_path, "gpu_a")
    (linear,) = [step for name, step in linears.items() if name.startswith("trial")]
    assert linear["times"].keys() == {"frozen", "flora separate"}
    assert linear["missing"] == {"PEFT bf16": "ZeroDivisionError: division by zero"}
    assert steps["check tiny"]["green"]
    assert steps["step tiny"]["times"].keys() == {"flora", "flora, no graphs", "frozen base"}
    assert steps["adamw"]["green"]
    assert "NOT GREEN" in done.stdout


def test_red_checks_of_the_one_command_keep_no_time_back(tmp_path):
    code = """
import sys
from bench.gpu import check as gpu_check, step as gpu_step, times as gpu_times

gpu_check.run_tests = lambda few, seconds=None: {"green": False, "summary": "1 failed"}
gpu_step.check = lambda device: 1 / 0
gpu_step.check_graphs = lambda device: {"green": False}
gpu_times.Targets.contenders = lambda self: [("frozen", self.frozen), ("flora auto", lambda: self.flora("auto"))]
cases = gpu_times.cases
gpu_times.cases = lambda models, tokens: [case for case in cases(models, tokens) if case[3] == 0.0][:1]
sys.exit(gpu_check.main(["--skip-cuda", "--trial", "--out", sys.argv[1]]))
"""
    done = run(code, str(tmp_path))
    assert done.returncode == 1, done.stderr[-3000:]
    found = read(tmp_path, "gpu_check_triton")
    assert not any(found[name]["green"] for name in ("ops", "training step", "CUDA graphs"))
    assert found["adamw"]["green"]
    (linear,) = [value for name, value in found.items() if name.startswith("trial")]
    assert linear["times"]["flora auto"]["backward"]["us"] > 0


def test_a_call_without_a_gpu_or_with_an_unknown_name_says_what_to_do():
    code = """
from bench.gpu import run as gpu_run

assert gpu_run.main(["--call", "a"]) == 2
gpu_run.main(["--call=a,d"])
"""
    done = run(code, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "sees no CUDA GPU here; --dry goes through the call without one" in done.stderr
    assert "--call must be one of a, b, c, got d" in done.stderr


def test_a_wrong_kernel_has_no_time_and_decides_nothing():
    code = """
from bench.gpu import call as gpu_call
from bench.gpu.kernels import Operands, decisions, kernels, row
from flora_kernels import reference

operands = Operands(32, 48, 9, False)
right = row("expand_", operands, 1e12)
kernels.expand_ = lambda y, *rest: reference.expand_(y, *rest).mul_(1.1)
wrong = row("expand_", operands, 1e12)
assert right["green"] and "us" in right, right
assert not wrong["green"] and "us" not in wrong, wrong
times = {"shrink": 30.0, "expand_": 30.0, "wgrad": 50.0, "F.linear": 366.0, "addmm": 372.0}
found = decisions({f"{name} 4096->4096 M8192": {"us": us} for name, us in times.items()})
assert [one["holds"] for one in found] == [True, False, True, True, False], found
assert [one["holds"] for one in decisions({})] == [None] * 5
"""
    done = run(code)
    assert done.returncode == 0, done.stderr[-3000:]
