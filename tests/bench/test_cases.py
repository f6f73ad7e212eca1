"""Cases of a few numbers: linears, a decoder layer, rates, and where a step's time goes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from bench.cases import grid, linears
from bench.cases.linears import RIVALS, Contender, Linear, Part
from bench.cases.rivals import FROZEN, ready
from bench.harness.protocol import Result, tensors_ratio
from bench.harness.rates import rates
from bench.reporting import explain
from flora_core.testing import budget_ratio, plain_rounding
from tests.support.bench_clock import Pedantic


@pytest.fixture
def small() -> Linear:
    return Linear(grid.Case("tiny", "few", tokens=5, dropout=0.1, linear="v_proj"), torch.device("cpu"))


def test_right_linear_is_green_and_a_broken_one_is_red(small):
    assert small.check(small.ours()).green
    (right,) = small.ours().parts
    scaled = small.packed(lambda x: right.call(x) * 1.001, right.leaves)
    assert not small.check(scaled).green

    def no_gradient(x: torch.Tensor) -> torch.Tensor:
        return right.call(x) + 0 * small.A.sum() - (small.A - small.A.detach()).sum()

    assert not small.check(small.packed(no_gradient, right.leaves)).green


def test_rivals_of_a_linear_compute_what_they_are_to(tmp_path):
    setting = Linear(grid.Case("tiny", "few", tokens=5, linear="v_proj"), torch.device("cpu"))
    result = Result("r", "?", {}, tmp_path)
    made = ready(RIVALS, setting, result)
    assert set(made) | set(result.data["missing"]) == {rival.name for rival in RIVALS}
    assert "the base is float32" in result.data["missing"]["PEFT bf16"]
    assert setting.check(made["addmm_"]).green
    for name, contender in made.items():
        ys = contender.forward(0)
        assert sum(y.shape[0] for y in ys) == setting.tokens.total
        for part, (dx, *grads) in zip(contender.parts, contender.backward(ys, 0), strict=True):
            assert (dx.shape, len(grads)) == (part.x[0].shape, len(part.leaves)), name
    assert not made[FROZEN].parts[0].leaves


def test_peft_s_clients_have_tensors_of_their_own():
    """Nothing is split or joined in PEFT's time: each client's layer takes a leaf, and gives what it should."""
    setting = Linear(grid.Case("tiny", "few", tokens=5, linear="v_proj"), torch.device("cpu"))
    (peft,) = [rival.make(setting) for rival in RIVALS if rival.name == "PEFT"]
    exact = setting._plain(torch.float64)[0]
    with plain_rounding():
        low = setting._plain(torch.float32)[0]
    for part, rows, bank in zip(peft.parts, setting.tokens, setting.ranks, strict=True):
        (x,) = part.x
        assert x.is_leaf
        assert x.data_ptr() != setting.x[0][rows].data_ptr()
        with torch.no_grad():
            for leaf, factor in zip(part.leaves, (setting.A[bank], setting.B[bank].T), strict=True):
                leaf.copy_(factor)
        assert budget_ratio(part.call(x).detach(), exact[rows], low[rows]) <= 1


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
    """Facts of an operation from the profiler."""

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
    monkeypatch.setattr(
        explain, "rates", lambda _, turn=0: {"copy_bytes_per_s": 1e10 * (turn + 1), "matrix_flops_per_s": 1e11}
    )
    (times, memory), text = explain.explain(None, None, ["tiny", "few"])
    assert re.search(r"The largest gap to a limit is [\w ]+: \d+ ms", text)
    assert {row[0] for row in times[2]} == {*explain.PARTS, "whole step"}
    assert abs(sum(float(row[2].rstrip("%")) for row in times[2][:-1]) - 100) < 1
    assert float(dict(memory[2])["adapters"]) >= 0
    saved = json.loads(next(tmp_path.glob("*/explain*.json")).read_text())
    assert saved["saved_bytes"]["LoRA"] > 0
    assert saved["seconds"] > 0
    assert saved["rates"] == {"copy_bytes_per_s": 2e10, "matrix_flops_per_s": 1e11}, "the better of both sides"
    with pytest.raises(ValueError, match=r"knows models, cohorts and targets .*SmolLM2-135M.* got 'x'"):
        explain.explain(None, None, ["x"])


# The whole of a suite: what is wrong is not timed.


class Fixture(Pedantic):
    """pytest-benchmark's fixture as the suites use it."""

    def __init__(self):
        self.extra_info: dict[str, Any] = {}


def _neighbours_rows(setting: Linear, right: Part) -> Contender:
    """Every client's tokens with the branch of the client before."""

    def call(x: torch.Tensor) -> torch.Tensor:
        base = x @ setting.weight.T
        return base + (right.call(x) - base).roll(setting.case.tokens, 0)

    return setting.packed(call, right.leaves)


def _last_rank_dropped(setting: Linear, right: Part) -> Contender:
    """The last client's last rank counts for nothing, forward and backward."""
    last = -setting.case.tokens

    def call(x: torch.Tensor) -> torch.Tensor:
        lost = x[last:] @ setting.A[-1:].T @ setting.B[-1:]
        return right.call(x) - torch.cat([torch.zeros(x.shape[0] + last, setting.N), 2.0 * lost])

    return setting.packed(call, right.leaves)


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("broken", [None, _neighbours_rows, _last_rank_dropped], ids=["right", "rows", "rank"])
def test_suite_of_a_broken_linear_times_nothing(part, broken, tmp_path, monkeypatch, capsys):
    case = grid.Case("tiny", "few", tokens=5, linear="v_proj")
    scale = type("Scale", (), {"folder": tmp_path, "seconds": 0.0})
    monkeypatch.setattr(linears, "rates", lambda _: {})
    if broken is None:
        linears.compare(Fixture(), scale, case, part)
        assert "times as fast as PEFT" in capsys.readouterr().out
        return
    right = Linear.ours
    monkeypatch.setattr(Linear, "ours", lambda self: broken(self, right(self).parts[0]))
    with pytest.raises(AssertionError, match="check is red, no speed-up"):
        linears.compare(Fixture(), scale, case, part)
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert not {"times", "speedups"} & set(found)
    assert "times as fast" not in capsys.readouterr().out
