"""The benchmarks' machinery: the grid, rivals that are missing, stops, spreads, comparisons, pages, the command."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare, explain, gpu_run, grid, publish, run, tables
from bench.linears import RIVALS, Contender, Linear
from bench.outcomes import Outcomes
from bench.protocol import Check, Missing, Result, interleave, reason, speedup, tensors_ratio
from bench.rates import rates
from bench.rivals import FROZEN, Rival, ready
from flora_core import cli

ROOT = Path(__file__).resolve().parents[1]


class Pedantic:
    """What ``interleave`` needs of pytest-benchmark's fixture."""

    def pedantic(self, work: Any, setup: Any, rounds: int, **others: Any) -> None:
        assert others["iterations"] == 1
        for _ in range(rounds):
            setup()
            work()


class Clock:
    """Time that goes on only when a contender says so, with noise."""

    def __init__(self, seed: int, noise: float = 0.08):
        self.now, self.random, self.noise = 0.0, random.Random(seed), noise

    def work(self, seconds: float) -> Any:
        def run() -> None:
            self.now += seconds * self.random.lognormvariate(0, self.noise)

        return run


def timed(folder: Path, name: str, seed: int, monkeypatch: pytest.MonkeyPatch, ours: float = 1.0) -> dict[str, Any]:
    """A whole run on a clock of its own: ours at so many seconds against a rival at 1.5."""
    clock = Clock(seed)
    with monkeypatch.context() as patched:
        patched.setattr("bench.protocol.time.perf_counter", lambda: clock.now)
        patched.setattr("bench.protocol.torch.cuda.is_available", lambda: False)
        result = Result(name, "?", {}, folder)
        work = "flora", clock.work(ours)
        interleave(Pedantic(), result, work, {"PEFT": clock.work(1.5)}, seconds=0, least=12, most=12)
        result.conclude(Check(0.5, "exactly"), "flora", {"PEFT": None})
    return json.loads(result.path.read_text())


# The grid.


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


# Rivals that are missing, fail or run out of memory.


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
    values = interleave(Pedantic(), result, ("flora", lambda: 7), rivals, seconds=0, least=4, most=4)
    result.conclude(Check(0.1, "exactly"), "flora", {"bad": None, "good": None})
    found = json.loads(result.path.read_text())
    assert words in found["missing"]["bad"] == reason(error)
    assert (list(found["speedups"]), len(values["flora"]), len(calls)) == (["good"], 5, 2)
    assert any("not measured: " + found["missing"]["bad"] in row for row in tables.speed_rows(found))


def test_own_failure_is_in_the_file_and_in_the_table(tmp_path):
    result = Result("r", "Is it fast?", {"model": "m"}, tmp_path)
    with pytest.raises(torch.OutOfMemoryError), result.told():
        raise torch.OutOfMemoryError("no room")
    found = json.loads(result.path.read_text())
    assert not found["finished"]
    assert "failed: out of memory: no room" in publish.step_table([found])
    assert "failed: out of memory: no room" in tables.cases_rows([found])[1][0][1]


def test_interrupted_run_leaves_valid_json_and_says_so(tmp_path):
    result = Result("r", "?", {}, tmp_path)

    def stops() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), result.told():
        interleave(Pedantic(), result, ("flora", stops), {"PEFT": lambda: None}, seconds=0, least=3, most=3)
    found = json.loads(result.path.read_text())
    assert (found["finished"], found["failed"]) == (False, "KeyboardInterrupt: KeyboardInterrupt")
    assert "failed: KeyboardInterrupt" in publish.step_table([found])


def test_numbers_that_json_does_not_have_are_written_as_words(tmp_path):
    result = Result("r", "?", {}, tmp_path)
    with pytest.raises(AssertionError, match="check is red"):
        result.conclude(Check(float("nan"), "?", {"losses": (float("inf"), 1.0)}), "flora", {})
    text = result.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail)["check"]["losses"] == ["inf", 1.0]
    assert "speedups" not in json.loads(text)


def test_outcomes_tell_what_was_skipped_and_keep_the_first_failure(tmp_path):
    class Report:
        when, outcome, duration = "setup", "skipped", 0.0
        longrepr: Any = ("file", 3, "Skipped: out of time: 1 minutes were over before its turn")

    path = tmp_path / "outcomes" / "cpu.json"
    outcomes = Outcomes(path)
    first = "bench/test_optimizer.py::b"
    outcomes.add(first, Report())
    Report.when, Report.outcome, Report.longrepr = "call", "failed", "out of\nmemory"
    outcomes.add("bench/test_merge.py::c", Report())
    Report.longrepr = "tear-down"
    outcomes.add("bench/test_merge.py::c", Report())
    outcomes.add("bench/gone.py::d", Report())
    rows = tables.outcome_rows(tmp_path)
    assert rows == [
        ["test_merge.py::c", "failed", "out of memory"],
        ["test_optimizer.py::b", "skipped", "out of time: 1 minutes were over before its turn"],
    ]
    Report.when, Report.outcome = "call", "passed"
    Outcomes(path).add(first, Report())  # a later run
    assert [row[0] for row in tables.outcome_rows(tmp_path)] == ["test_merge.py::c"]


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


# Checks, rates and the linear rivals, on a case of a few numbers.


@pytest.fixture
def small() -> Linear:
    return Linear(grid.Case("tiny", "few", tokens=5, dropout=0.1, linear="v_proj"), torch.device("cpu"))


def test_right_linear_is_green_and_a_broken_one_is_red(small):
    assert small.check(small.ours()).green
    right = small.ours()

    def scaled(n: int) -> torch.Tensor:
        return right.forward(n) * 1.001

    assert not small.check(Contender(scaled, right.leaves)).green

    def no_gradient(n: int) -> torch.Tensor:
        return right.forward(n) + 0 * small.A.sum() - (small.A - small.A.detach()).sum()

    assert not small.check(Contender(no_gradient, right.leaves)).green


def test_rivals_of_a_linear_compute_what_they_are_to(tmp_path):
    setting = Linear(grid.Case("tiny", "few", tokens=5, linear="v_proj"), torch.device("cpu"))
    result = Result("r", "?", {}, tmp_path)
    made = ready(RIVALS, setting, result)
    assert set(made) | set(result.data["missing"]) == {rival.name for rival in RIVALS}
    assert "the base is float32" in result.data["missing"]["PEFT bf16"]
    assert setting.check(made["addmm_"]).green
    for name, contender in made.items():
        y = contender.forward(0)
        assert y.shape == setting.dy[0].shape
        assert len(setting.backward(y, 0, contender)) == 1 + len(contender.leaves), name
    assert not made[FROZEN].leaves


def test_check_of_many_tensors_sees_a_wrong_one():
    exact = {"a": torch.randn(8, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    low = {key: value.float() for key, value in exact.items()}
    assert tensors_ratio(low, exact, low) <= 1
    assert tensors_ratio({**low, "b": low["b"] * 1.01}, exact, low) > 1
    with pytest.raises(AssertionError, match="other tensors"):
        tensors_ratio({"a": low["a"]}, exact, low)


def test_rates_are_measured():
    found = rates(torch.device("cpu"), 64, 1 << 16)
    assert found["copy_bytes_per_s"] > 0
    assert found["matrix_flops_per_s"] > 0


# Explaining a step.


class Event:
    """What the profiler tells of an operation."""

    def __init__(self, name: str, own: float, parent: Event | None = None, nr: int = -1, start: float = 0.0):
        self.name, self.self_cpu_time_total, self.cpu_parent, self.sequence_nr = name, own, parent, nr
        self.time_range = type("Range", (), {"start": start})()


def test_time_goes_to_the_part_that_made_the_operation():
    norm = Event("flora::norm", 1.0)
    linear = Event("flora::linear", 0.0)
    undo = Event("autograd::engine::evaluate_function: MulBackward0", 0.0, nr=4, start=9.0)
    events = [
        norm,
        Event("aten::mul", 10.0, norm, nr=4),
        Event("aten::mm", 40.0, linear),
        Event("aten::to", 5.0, linear),
        Event("aten::mul", 20.0, undo, start=9.1),
        Event("aten::mm", 14.0, Event("LoraLinearsBackward", 0.0)),
        Event("aten::mm", 6.0, Event("flora::LoRA", 0.0)),
    ]
    shares = explain.seconds_of_parts(events, 100.0, gpu=False)
    assert set(shares) == set(explain.PARTS)
    found = {part: round(100 * share) for part, share in shares.items() if share}
    assert found == {"norm": 30, "base products": 54, "LoRA": 11, "host": 5}


def test_explain_names_the_largest_gap_and_its_memory(tmp_path, monkeypatch):
    for name in ("RESULTS", "SMOKE"):
        monkeypatch.setattr(explain, name, tmp_path)
    monkeypatch.setattr(explain, "rates", lambda _: {"copy_bytes_per_s": 1e10, "matrix_flops_per_s": 1e11})
    (times, memory), text = explain.explain(None, None, ["tiny", "few"])
    assert re.search(r"The largest gap to a limit is [\w ]+: \d+ ms", text)
    assert {row[0] for row in times[2]} == {*explain.PARTS, "whole step"}
    assert abs(sum(float(row[2].rstrip("%")) for row in times[2][:-1]) - 100) < 1
    assert float(dict(memory[2])["adapters"]) >= 0
    saved = json.loads(next(tmp_path.glob("explain*.json")).read_text())
    assert saved["saved_bytes"]["LoRA"] > 0
    assert saved["seconds"] > 0
    with pytest.raises(ValueError, match=r"knows models, cohorts and targets .*SmolLM2-135M.* got 'x'"):
        explain.explain(None, None, ["x"])


# Pages.


def test_pages_are_written_from_results_alone(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    data = timed(folder, "cohort_step_batch1", 0, monkeypatch)
    data["speedups"]["peft"] = data["speedups"].pop("PEFT")
    data["times"]["peft"] = data["times"].pop("PEFT")
    (folder / "cohort_step_batch1.json").write_text(json.dumps(data))
    linear = timed(folder, "linear_forward_x", 0, monkeypatch)
    linear |= {"rates": {"copy_bytes_per_s": 1e10, "matrix_flops_per_s": 1e11}, "flops": 10**9, "bytes": 10**7}
    linear["settings"] = grid.Case(linear="q_proj").settings
    linear["missing"] = {"Unsloth": "needs a GPU"}
    (folder / "linear_forward_x.json").write_text(json.dumps(linear))
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    for path in (page, readme):
        path.write_text(f"before\n{publish.START}\nold 9.99\n{publish.END}\nafter\n")
    publish.publish(page, readme, tmp_path / "img", folder)
    times = f"{data['speedups']['peft']['times']:.2f} times faster"
    assert times in page.read_text()
    assert times in readme.read_text()
    assert "bench/results/cohort_step_batch1.json" in readme.read_text()
    assert "Unsloth | needs a GPU" in page.read_text()
    assert "9.99" not in page.read_text() + readme.read_text()
    for text in (page.read_text(), readme.read_text()):
        assert text.startswith("before\n")
        assert text.endswith("after\n")
    assert {path.name for path in (tmp_path / "img").iterdir()} == {
        "bench_speedups.png",
        "bench_roofline.png",
        "bench_scaling.png",
    }


def test_page_without_marks_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text")
    with pytest.raises(ValueError, match="must have <!-- bench:start -->"):
        publish.write_between(page, "new")


def test_losses_and_the_limit_are_worded_as_what_they_are():
    assert tables.ratio(0.5, "PEFT") == "**2.00 times slower**"
    assert tables.ratio(0.8, FROZEN) == "1.25 times the limit"
    assert tables.ratio(0.4, FROZEN) == "**2.50 times the limit**"


def test_terminal_tables_tell_speed_who_is_missing_and_what_failed(tmp_path, monkeypatch):
    good = timed(tmp_path, "good", 0, monkeypatch)
    good["missing"] = {"Unsloth": "needs a GPU"}
    failed = {"name": "bad", "question": "?", "failed": "out of memory: no room", "settings": {}}
    speed, missing, others = tables.summary({"good": good, "bad": failed, "memory": {"finished": True}})
    assert (speed[2][0][0], speed[2][0][2]) == ("good", "PEFT")
    assert "times faster" in speed[2][0][4]
    assert speed[2][1][4] == "failed: out of memory: no room"
    assert missing[2] == [["Unsloth", "needs a GPU", "good"]]
    assert others[2] == [["memory", "yes"]]


# The command.


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
