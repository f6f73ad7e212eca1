"""``flora bench``: the grid, the questions, the command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_run, grid, run, tables
from flora_core import cli

ROOT = Path(__file__).resolve().parents[1]


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
    "question", ["linear_forward", "decoder_layer", "cohort_rivals", "federated_round", "optimizer"]
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
        assert (ROOT / "bench" / f"test_{name}.py").is_file(), name
    for selection in grid.SELECTIONS:
        assert run.tests([], selection)


def test_flora_bench_lists_its_questions(capsys):
    assert cli.main(["bench", "--list"]) == 0
    assert "cohort_rivals" in capsys.readouterr().out


def test_flora_bench_refuses_in_a_sentence(capsys):
    assert cli.main(["bench", "nonsense"]) == 2
    assert "no such question: nonsense; there are: cohort_step" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_run_without_a_gpu_says_what_to_do(capsys):
    assert cli.main(["bench", "--select", "gpu"]) == 2
    assert "--select gpu needs a CUDA GPU" in capsys.readouterr().err
    assert gpu_run.main([]) == 2
    assert "bench-gpu needs a CUDA GPU" in capsys.readouterr().err


def test_flora_bench_of_an_installed_package_says_that_it_needs_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "flora_core" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert re.search("needs a checkout .* no bench/ beside .*site-packages.*; clone it", capsys.readouterr().err)


def test_run_out_of_time_begins_nothing_and_says_so(tmp_path):
    words = ["-m", "bench.run", "optimizer", "--select", "quick", "--minutes", "0", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert "skipped" in done.stdout, done.stderr
    (row,) = tables.outcome_rows(tmp_path / "smoke")
    assert row[1:] == ["skipped", "out of time: 0 minutes were over before its turn"]
