"""Results of benchmarks: rivals that are missing or fail, stops, spreads, and two runs against each other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare
from bench.cases.rivals import Rival, ready
from bench.harness import machine
from bench.harness.deadline import OutOfTime, within
from bench.harness.outcomes import Outcomes
from bench.harness.protocol import Check, Load, Missing, Result, Timing, interleave, reason, speedup
from bench.reporting import publish, tables
from bench.suites import test_memory
from tests.support.bench_clock import GREEN, Pedantic, timed

ROOT = Path(__file__).resolve().parents[2]


def test_missing_rival_is_told_and_the_others_go_on(tmp_path, capsys):
    def absent(_: Any) -> Any:
        raise Missing("the package x is not installed (pip install x)")

    rivals = [Rival("x", "", absent), Rival("y", "", lambda setting: setting)]
    result = Result("r", "?", {}, tmp_path)
    assert ready(rivals, "made", result) == {"y": "made"}
    assert json.loads(result.path.read_text())["missing"] == {"x": "the package x is not installed (pip install x)"}
    assert "without x: the package x is not installed" in capsys.readouterr().out
    assert ["x", "the package x is not installed (pip install x)", "r"] in tables.missing_rows({"r": result.data})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory: CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (ValueError("two\nlines"), "ValueError: two lines"),
        (MemoryError(), "out of memory: MemoryError"),
    ],
)
def test_rival_that_fails_in_the_middle_is_left_out_with_its_reason(error, words, tmp_path):
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error

    result = Result("r", "?", {"model": "m"}, tmp_path)
    rivals = {"bad": fails, "good": lambda: None}
    limits: Any = dict(check=lambda _: GREEN, seconds=0, least=4, most=4)
    values = interleave(Pedantic(), result, ("flora", lambda: 7), rivals, **limits)
    result.conclude("flora", {"bad": None, "good": None})
    found = json.loads(result.path.read_text())
    assert words in found["missing"]["bad"] == reason(error)
    assert (list(found["speedups"]), len(values["flora"]), len(calls)) == (["good"], 5, 2)
    assert any("not measured: " + found["missing"]["bad"] in row for row in tables.speed_rows(found))


def test_own_failure_is_in_the_file_and_in_the_table(tmp_path):
    result = Result("r", "Is it fast?", {"model": "m"}, tmp_path)
    with pytest.raises(torch.OutOfMemoryError), result.reported():
        raise torch.OutOfMemoryError("no room")
    found = json.loads(result.path.read_text())
    assert not found["finished"]
    assert "failed: out of memory: no room" in publish.step_table([found])
    assert "failed: out of memory: no room" in tables.cases_rows([found])[1][0][1]


def test_interrupted_run_leaves_valid_json_and_says_so(tmp_path):
    result = Result("r", "?", {}, tmp_path)

    def stops() -> None:
        raise KeyboardInterrupt

    limits: Any = dict(check=lambda _: GREEN, seconds=0, least=3, most=3)
    with pytest.raises(KeyboardInterrupt), result.reported():
        interleave(Pedantic(), result, ("flora", stops), {"PEFT": lambda: None}, **limits)
    found = json.loads(result.path.read_text())
    assert (found["finished"], found["stopped"]) == (False, "interrupted")
    assert "not finished: interrupted" in publish.step_table([found])


def test_numbers_that_json_does_not_have_are_written_as_words(tmp_path):
    result = Result("r", "?", {}, tmp_path)
    with pytest.raises(AssertionError, match="check is red"):
        result.checked(Check(float("nan"), "?", {"losses": (float("inf"), 1.0)}))
    text = result.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail)["check"]["losses"] == ["inf", 1.0]
    assert "speedups" not in json.loads(text)


def test_outcomes_tell_what_was_skipped_and_keep_the_first_failure(tmp_path):
    class Report:
        when, outcome, duration = "setup", "skipped", 0.0
        longrepr: Any = ("file", 3, "Skipped: out of time: 1 minutes were over before its turn")

    path = tmp_path / "outcomes" / "cpu.json"
    outcomes = Outcomes(path)
    first = "bench/suites/test_optimizer.py::b"
    outcomes.add(first, Report())
    Report.when, Report.outcome, Report.longrepr = "call", "failed", "out of\nmemory"
    outcomes.add("bench/suites/test_merge.py::c", Report())
    Report.longrepr = "tear-down"
    outcomes.add("bench/suites/test_merge.py::c", Report())
    outcomes.add("bench/gone.py::d", Report())
    rows = tables.outcome_rows(tmp_path)
    assert rows == [
        ["suites/test_merge.py::c", "failed", "out of memory"],
        ["suites/test_optimizer.py::b", "skipped", "out of time: 1 minutes were over before its turn"],
    ]
    Report.when, Report.outcome = "call", "passed"
    Outcomes(path).add(first, Report())  # a later run
    assert [row[0] for row in tables.outcome_rows(tmp_path)] == ["suites/test_merge.py::c"]


# Spreads: two runs agree, a slower engine is seen, drift of the machine is not.


def test_two_runs_differ_by_less_than_the_spread_that_they_report(tmp_path, monkeypatch):
    runs = [timed(tmp_path, f"r{seed}", seed, monkeypatch) for seed in range(12)]
    for one, two in zip(runs[::2], runs[1::2], strict=True):
        apart = abs(one["times"]["flora"]["median_s"] - two["times"]["flora"]["median_s"])
        spread = sum(found["times"]["flora"]["p80_s"] - found["times"]["flora"]["p20_s"] for found in (one, two))
        assert apart < spread
        assert compare.changes({"r": one}, {"r": two})[0]["verdict"] == "within the noise"


def test_regression_beyond_the_noise_is_shown(tmp_path, monkeypatch):
    before = timed(tmp_path, "a", 1, monkeypatch)
    after = timed(tmp_path, "b", 2, monkeypatch, ours=1.6)
    text, slower = compare.report({"r": before}, {"r": after})
    assert slower
    assert "**slower**" in text
    assert "faster" in compare.report({"r": after}, {"r": before})[0]
    assert not compare.report({"r": after}, {"r": before})[1]


def test_machine_that_drifts_is_no_regression():
    fast, slow = ({"median_s": s, "wall_s": [s, 1.1 * s, 0.9 * s]} for s in (1.0, 1.5))
    rival, slow_rival = ({"median_s": 2 * t["median_s"], "wall_s": [2 * s for s in t["wall_s"]]} for t in (fast, slow))
    one, two = speedup(fast, rival), speedup(slow, slow_rival)
    old, new = ({"r": {"settings": {}, "speedups": {"PEFT": found}}} for found in (one, two))
    assert not compare.report(old, new)[1]


def test_speed_up_that_is_gone_and_other_settings_are_told():
    one = {"settings": {"layers": 1}, "speedups": {"PEFT": {"times": 2.0, "rounds": [2.0], "target": None}}}
    text, slower = compare.report({"r": one}, {"r": {"settings": {"layers": 1}}})
    assert slower
    assert "no speed-up any more" in text
    text, slower = compare.report({"r": one, "s": one}, {"r": {**one, "settings": {"layers": 2}}})
    assert not slower
    assert "settings differ: r" in text
    assert "only one of them has it: s" in text


def test_compare_reads_commits_and_refuses_what_is_none(capsys, tmp_path):
    assert compare.main(["no-such-commit", "HEAD"]) == 2
    assert "no-such-commit" in capsys.readouterr().err
    assert compare.main([]) == 2
    repository = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode == 0
    if repository:
        assert compare.main(["HEAD", "HEAD"]) == 0
        assert "within the noise" in capsys.readouterr().out


def test_memory_case_without_memory_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    sizes = {"PEFT, one client after another": 3, "flora, one client": 2, "flora, all": 9}

    def run_case(case: Any) -> dict[str, Any]:
        if case == 9:
            raise Missing("out of memory: the system killed it")
        return {"beyond_base_bytes": case * 10**9, "tokens_per_s": 10.0 * case, "tokens_in_flight": 128}

    monkeypatch.setattr(test_memory, "run_case", run_case)
    result = Result("memory", "How much?", {}, tmp_path)
    test_memory.measure(result, sizes, repeats=2)
    found = json.loads(result.path.read_text())
    assert found["missing"] == {"flora, all": "out of memory: the system killed it"}
    assert [row["case"] for row in found["rows"]] == list(sizes)[:2]
    assert "| flora, one client | 2.00 GB | 15625 kB | 0.67 | 20 |" in publish.memory_table(found)
    found["rows"] = found["rows"][1:]
    assert "| flora, one client | 2.00 GB | 15625 kB | - | 20 |" in publish.memory_table(found)


@pytest.mark.parametrize(
    ("code", "stderr", "words"),
    [
        (1, "Traceback\nKeyError: 'layers'\n", "^KeyError: 'layers'$"),
        (-9, "", "out of memory: the system killed it"),
        (-6, "", "ended with -6"),
    ],
)
def test_memory_case_that_fails_says_why(code, stderr, words, monkeypatch):
    ended = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr(test_memory.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(Missing, match=words):
        test_memory.run_case({})


def test_load_of_children_is_this_run_s_own():
    load = Load()
    subprocess.run([sys.executable, "-c", "sum(range(5_000_000))"], check=True)
    assert load.since()["own_cores"] * load.since()["seconds"] > 0.05


@pytest.mark.parametrize(("others_s", "cores"), [(0.0, 0.0), (3.0, 1.5)])
def test_other_load_is_what_neither_this_process_nor_its_children_did(others_s, cores, monkeypatch):
    elsewhere = iter((0.0, others_s))
    monkeypatch.setattr(machine, "_busy_s", lambda: machine._own_s() + next(elsewhere))
    load = Load()
    load.wall -= 2.0
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    found = load.since()
    assert found["other_cores"] == pytest.approx(cores * 2 / found["seconds"], abs=0.01)
    assert found["own_cores"] > 0


def test_results_and_pages_are_no_local_changes_of_the_code(tmp_path, monkeypatch):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    files = [tmp_path / name for name in ("README.md", "code.py", "bench/results/a.json")]
    for path in files:
        path.write_text("1")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    for path, changed in zip((files[0], files[2], files[1]), ([], [], ["code.py"]), strict=True):
        path.write_text("2")
        machine._git.cache_clear()
        assert machine.environment()["changed_files"] == changed
    machine._git.cache_clear()


# A stop loses nothing: neither what it has measured nor what an earlier run had.


def test_stopped_run_leaves_the_earlier_result_and_tells_of_itself(tmp_path, monkeypatch):
    before = timed(tmp_path, "r", 1, monkeypatch)
    result = Result("r", "?", {}, tmp_path)
    result.timings({"flora": Timing([1.0], [1.0])})  # a kill here: nothing is told any more
    assert tables.load(tmp_path)["r"] == before
    assert tables.outcome_rows(tmp_path) == [["r", "stopped", "killed"]]
    with pytest.raises(OutOfTime), result.reported(), within(0.01, "the run"):
        time.sleep(5)
    assert tables.load(tmp_path)["r"] == before
    assert tables.outcome_rows(tmp_path) == [["r", "stopped", "out of time: the run was stopped after 0.01 s"]]
    after = timed(tmp_path, "r", 2, monkeypatch)
    assert tables.load(tmp_path)["r"] == after != before
    assert tables.outcome_rows(tmp_path) == []


def test_red_check_takes_an_earlier_speed_up_away(tmp_path, monkeypatch):
    timed(tmp_path, "r", 1, monkeypatch)
    with pytest.raises(AssertionError, match="check is red"):
        Result("r", "?", {}, tmp_path).checked(Check(2.0, "?"))
    assert "speedups" not in tables.load(tmp_path)["r"]


def test_the_earlier_of_two_ends_counts_and_the_later_one_still_stands():
    with pytest.raises(OutOfTime, match="outside was stopped"), within(0.05, "outside"), within(5, "inside"):
        time.sleep(1)

    def both() -> None:
        with pytest.raises(OutOfTime, match="inside was stopped"), within(0.01, "inside"):
            time.sleep(1)
        time.sleep(1)

    with pytest.raises(OutOfTime, match="outside was stopped"), within(0.2, "outside"):
        both()
    time.sleep(0.02)  # nothing is left running


def test_speed_up_without_a_check_is_refused(tmp_path):
    result = Result("r", "?", {}, tmp_path)
    result.timings({"flora": Timing([1.0], [1.0]), "PEFT": Timing([2.0], [2.0])})
    with pytest.raises(AssertionError, match="no green check, no speed-up"):
        result.conclude("flora", {"PEFT": None})
    assert "speedups" not in json.loads(result.path.read_text())


def test_memory_is_held_to_its_targets_per_token_and_in_all(tmp_path):
    sizes = {"PEFT": (10, 819), "PEFT bf16": (8, 819), "flora, one client": (9, 819), "flora, all": (40, 8190)}
    result = Result("memory_x", "How much?", {"dropout": 0.1}, tmp_path)
    names = {name: name if "," in name else f"{name}, one client after another" for name in sizes}
    result.save(
        rows=[
            {"case": names[name], "beyond_base_bytes": size * 10**9, "tokens_in_flight": tokens, "tokens_per_s": 1.0}
            for name, (size, tokens) in sizes.items()
        ]
    )
    lines = test_memory.conclude(result)
    told = {(found["what"].partition(", of ")[2], found["target"]): found["met"] for found in result.data["targets"]}
    assert told == {
        ("PEFT's", 1.0): True,
        ("PEFT bf16's", 1.0): False,
        ("PEFT's", 0.45): True,
        ("PEFT bf16's", 0.65): True,
    }
    assert sum(line.startswith("MISSED: ") for line in lines) == 1


def test_a_case_that_failed_gives_back_what_its_error_held():
    class Large:
        pass

    large = Large()
    held = weakref.ref(large)

    def fails(room: Large) -> None:
        raise MemoryError

    try:
        fails(large)
    except MemoryError as error:
        sys.last_value = error  # as pytest leaves it
    del large
    assert held() is not None
    machine.forget()
    assert held() is None


@pytest.mark.parametrize("name", ["MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "FLORA_ISA"])
def test_a_processor_held_to_fewer_instructions_is_labelled_so(name, monkeypatch):
    for other in machine.HOLDS:
        monkeypatch.delenv(other, raising=False)
    assert "held-to" not in machine.machine_slug()
    monkeypatch.setenv(name, "avx2")
    assert "held-to" in machine.machine_slug()
