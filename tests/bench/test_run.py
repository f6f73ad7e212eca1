"""``flora bench``: the grid, the questions, the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import bench.gpu
from bench import run
from bench.cases import grid
from bench.gpu import run as gpu_run
from bench.harness.protocol import paired
from bench.reporting import tables
from bench.suites import test_cohort_rivals, test_memory
from flora_core.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_grid_has_every_axis_of_the_promise():
    points = list(grid.full("linear_forward"))
    for axis, wanted in {
        "model": {"SmolLM2-135M", "TinyLlama-1.1B", "Llama-7B"},
        "mix": {"mixed", "equal16", "one", "clients64"},
        "tokens": {128, 819, 3277},
        "dropout": {0.0, 0.1},
        "linear": set(grid.LINEARS),
    }.items():
        assert {getattr(point, axis) for point in points} == wanted
    assert {point.targets for point in grid.full("decoder_layer")} == {"qv", "all"}
    assert len({point.id for point in points}) == len(points)
    assert [sum(grid.MIXES[name]) for name in ("mixed", "equal16", "one")] == [160, 160, 16]
    assert len(grid.MIXES["clients64"]) == 64


@pytest.mark.parametrize(
    "question", ["linear_forward", "decoder_layer", "cohort_rivals", "memory", "federated_round", "optimizer"]
)
def test_selections_are_part_of_the_grid(question):
    everything = set(grid.full(question))
    for selection in ("cpu", "gpu"):
        chosen = grid.cases(question, selection)
        assert chosen
        assert set(chosen) <= everything | {case for case in chosen if case.tokens == 64}
    assert grid.cases(question, "all") == list(grid.full(question))


def test_linears_have_the_shapes_of_the_models():
    assert grid.MODELS["SmolLM2-135M"].linear("k_proj") == (192, 576)
    assert grid.MODELS["TinyLlama-1.1B"].linear("v_proj") == (256, 2048)
    assert grid.MODELS["Llama-7B"].linear("down_proj") == (4096, 11008)


def test_unknown_question_or_selection_is_refused():
    with pytest.raises(ValueError, match=r"question must be one of .*linear.* got 'x' and 'cpu'"):
        grid.cases("x", "cpu")
    with pytest.raises(ValueError, match="no such question: nothing; there are: cohort_step"):
        run.tests(["nothing"], "cpu")


def test_every_question_has_a_file():
    for name in run.QUESTIONS:
        assert (ROOT / "bench" / "suites" / f"test_{name}.py").is_file(), name
    for selection in grid.SELECTIONS:
        assert run.tests([], selection)


def test_flora_bench_lists_its_questions(capsys):
    assert main(["bench", "--list"]) == 0
    assert "cohort_rivals" in capsys.readouterr().out
    taken = {name: choices for name, _, choices in run.listed()}
    assert taken["cohort_rivals"] == "cpu, gpu, quick, all"
    assert taken["demo"] == "all", "a named question runs, and the whole grid takes it"


def test_flora_bench_refuses_in_a_sentence(capsys):
    assert main(["bench", "nonsense"]) == 2
    assert "no such question: nonsense; there are: cohort_step" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_run_without_a_gpu_says_what_to_do(capsys):
    assert main(["bench", "--select", "gpu"]) == 2
    assert "--select gpu needs a CUDA GPU" in capsys.readouterr().err
    assert gpu_run.main([]) == 2
    assert "bench-gpu needs a CUDA GPU" in capsys.readouterr().err


def test_flora_bench_of_an_installed_package_says_that_it_needs_a_checkout(tmp_path, monkeypatch, capsys):
    command = sys.modules["flora_core.cli.main"]
    monkeypatch.setattr(command, "__file__", str(tmp_path / "site-packages" / "flora_core" / "cli" / "main.py"))
    assert main(["bench"]) == 2
    assert re.search("needs a checkout .* no bench/ beside .*site-packages.*; clone it", capsys.readouterr().err)


def test_run_out_of_time_begins_nothing_and_says_so(tmp_path):
    words = ["-m", "bench.run", "optimizer", "--select", "quick", "--minutes", "0", "--out", str(tmp_path)]
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=alone)
    assert "skipped" in done.stdout, done.stderr
    (row,) = tables.outcome_rows(next((tmp_path / "smoke").iterdir()))
    assert row[1:] == ["skipped", "out of time: 0 minutes were over before its turn"]


# The one command for a GPU, on a machine that has none.


@pytest.fixture
def gpu_stages(monkeypatch, tmp_path):
    """``gpu_run`` whose stages do nothing but tell what they were asked for."""
    asked: list[list[str]] = []
    codes: list[int | BaseException] = []

    def stage(words: list[str]) -> int:
        asked.append(words)
        code = codes.pop(0) if codes else 0
        if isinstance(code, BaseException):
            raise code
        return code

    monkeypatch.setattr(bench.gpu, "check", types.SimpleNamespace(main=stage), raising=False)
    monkeypatch.setattr(run, "main", stage)
    monkeypatch.setattr(gpu_run, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_run.torch.cuda, "is_available", lambda: True)
    return asked, codes


def test_gpu_run_checks_then_measures_within_its_time(gpu_stages, capsys):
    asked, _ = gpu_stages
    assert gpu_run.main([]) == 0
    (check, questions, linears), time_of = asked, lambda words, name: float(words[words.index(name) + 1])
    assert check[-4:] == ["--stage", "check", "--few", "--skip-cuda"]
    assert questions[:2] == ["--select", "gpu"]
    assert time_of(questions, "--minutes") < time_of(questions, "--stop") < time_of(linears, "--minutes") < 9
    assert "What must be shown" in capsys.readouterr().out


@pytest.mark.parametrize("fails", [1, RuntimeError("no kernel")])
def test_gpu_run_measures_the_rest_after_a_failure_and_is_red(fails, gpu_stages):
    asked, codes = gpu_stages
    codes.append(fails)
    assert (gpu_run.main([]), len(asked)) == (1, 3)


@pytest.mark.parametrize("stop", [130, KeyboardInterrupt()])
def test_gpu_run_that_is_stopped_begins_nothing_more(stop, gpu_stages):
    asked, codes = gpu_stages
    codes += [0, stop]
    assert (gpu_run.main([]), len(asked)) == (130, 2)


def test_what_must_be_shown_on_a_gpu_is_measured_and_has_targets(monkeypatch):
    """Every sentence of the promise has a case of the gpu selection, and a target where it names one."""
    steps, memory = grid.cases("cohort_rivals", "gpu"), grid.cases("memory", "gpu")
    monkeypatch.setattr(test_cohort_rivals.torch.cuda, "is_available", lambda: True)
    found = {(case.model, test_cohort_rivals.target_of(case)) for case in steps if case.mix == "mixed"}
    assert found == {("TinyLlama-1.1B", 3.0), ("Llama-7B", 1.7)}
    assert {case.tokens for case in (*steps, *memory) if case.mix == "mixed"} == {819}
    assert any(len(case.ranks) == 64 for case in steps)
    assert {(case.model, case.dropout) for case in memory} == {("TinyLlama-1.1B", 0.1), ("Llama-7B", 0.1)}
    assert test_memory.PER_TOKEN == {"PEFT": 0.45, "PEFT bf16": 0.65}
    assert grid.cases("federated_round", "gpu")
    for name in ("cohort_rivals", "memory", "federated_round"):
        assert run.QUESTIONS[name].gpu
    assert [test_cohort_rivals.compiles(case) for case in steps] == [False] * (len(steps) - 1) + [True], (
        "the last alone"
    )


def test_targets_are_told_met_missed_or_not_known():
    speedups = {
        "PEFT": {**paired([2.5] * 9), "target": 3.0},
        "frozen base": {**paired([0.9] * 9), "target": None},
    }
    data = {
        "good": {"question": "A step", "ours": "flora", "speedups": speedups, "times": {}},
        "bad": {"question": "Q", "failed": "out of memory: no room"},
        "memory": {"targets": [{"what": "w", "is": 0.4, "target": 0.45, "at_least": False, "met": True}]},
    }
    rows = tables.target_rows(data)
    assert rows[0] == ["A step: speed-up over PEFT", "2.50x (2.50-2.50)", "**missed** (target >= 3)", "good"]
    assert rows[1] == ["Q", "-", "**not known**: failed: out of memory: no room", "bad"]
    assert rows[2:] == [["w", "0.4", "met (target <= 0.45)", "memory"]]


def test_verdicts_of_linears_tell_red_checks_and_what_was_not_begun(tmp_path):
    found = {
        "ops": {"green": False},
        "verdicts": {"a": {"is": 1.1, "at most": 1.12, "met": True}, "b": {"is": None, "at least": 1.25, "met": False}},
        "not begun: out of time": ["7b 4096"],
    }
    assert tables.verdict_rows(tmp_path) == []
    (tmp_path / "gpu_check_triton.json").write_text(json.dumps(found))
    assert [row[:3] for row in tables.verdict_rows(tmp_path)] == [
        ["check: ops", "", "**red**"],
        ["a", "1.1", "met (target <= 1.12)"],
        ["b", "-", "**not known**"],
        ["7b 4096", "-", "**not begun**: out of time"],
    ]
