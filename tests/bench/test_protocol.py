"""The benchmarks' own tests, on a tiny model: a broken engine gets no speed-up, a stop loses nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import flora_core as flora
from bench.cases import cohorts
from bench.cases.cohorts import Packed, SequentialPeft, check_losses, exact_losses
from bench.harness.protocol import Result, Timing, interleave, quantile
from bench.reporting import publish
from flora_core.data.template import IGNORE, Example
from flora_core.ops.backends import resolve, without_checks
from tests.support import models
from tests.support.bench_clock import GREEN, Pedantic

RANKS = (4, 3, 1)


def run(result: Result) -> str:
    """The cohort-step benchmark on three clients of a tiny model."""
    model = models.tiny("llama", torch.float32)
    rows = [[[5, 9, 4, 7], [8, 3]], [[11, 6, 10]], [[4, 4, 12, 5, 9]]]
    batches = [[Example(ids, [IGNORE, *ids[1:]], i) for i, ids in enumerate(client)] for client in rows]
    packed = Packed(model, batches, RANKS)
    peft = SequentialPeft(model, batches, packed.adapters)
    with packed.running():
        interleave(
            Pedantic(),
            result,
            ("flora", packed.step),
            {"peft": peft.step},
            check=lambda values: check_losses(
                values["flora"], values["peft"], exact_losses(model, batches, packed.adapters, (0, 2)), (0, 2)
            ),
            seconds=0,
            least=3,
            most=3,
            warm_ups=2,
        )
    return result.conclude("flora", {"peft": 1.3})


def read(result: Result) -> dict[str, Any]:
    return json.loads(result.path.read_text())


def test_right_engine_gets_a_speed_up(tmp_path: Path):
    result = Result("tiny", "Is it faster?", {}, tmp_path)
    assert "times as fast as peft" in run(result)
    found = read(result)
    assert found["check"]["green"]
    assert len(found["speedups"]["peft"]["rounds"]) == 3
    assert found["environment"]["versions"]["torch"] == torch.__version__


def _forgets_scale(*args: Any) -> Any:
    *rest, scaling = args[:6]
    return _EXPAND(*rest, [2 * s for s in scaling] if scaling is not None else None, *args[6:])


def _half_gradient(*args: Any) -> Any:
    dA_PK, dB_PN = _WGRAD(*args)
    return dA_PK * 0, dB_PN


_KERNELS = without_checks(resolve("auto", "shrink", torch.zeros(1))[0])  # those that linears call
_EXPAND, _WGRAD = _KERNELS.expand_, _KERNELS.wgrad


@pytest.mark.parametrize(("name", "broken"), [("expand_", _forgets_scale), ("wgrad", _half_gradient)])
def test_broken_engine_gets_none(
    name: str, broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(_KERNELS, name, broken)
    monkeypatch.setattr(cohorts, "LR", 0.05)  # a tiny model learns little in one step at the usual rate
    result = Result("tiny", "Is it faster?", {}, tmp_path)
    with pytest.raises(AssertionError, match="check is red, no speed-up"), result.reported():
        print(run(result))
    found = read(result)
    assert not found["check"]["green"]
    assert not {"speedups", "times"} & set(found), "checked first: not even timed"
    assert "times as fast" not in capsys.readouterr().out
    assert "no speed-up" in publish.step_table([found])


def test_losses_that_are_not_finite_are_red():
    good = [[1.0, 2.0]] * 2
    bad = [[1.0, math.nan]] * 2
    assert check_losses(good, good, good, (0, 1)).green
    assert not check_losses(bad, good, good, (0, 1)).green
    assert not check_losses(bad, good, [[1.0]] * 2, (0,)).green


def test_a_stop_keeps_the_rounds_before_it(tmp_path: Path):
    result, calls = Result("stopped", "?", {}, tmp_path), []

    def stops() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave(
            Pedantic(),
            result,
            ("flora", lambda: None),
            {"peft": stops},
            check=lambda _: GREEN,
            seconds=0,
            least=5,
            most=5,
        )
    found = read(result)
    assert not found["finished"]
    assert (found["times"]["flora"]["rounds"], found["times"]["peft"]["rounds"]) == (1, 1)


def test_quantiles_and_medians():
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0, 0.5, 0.75, 1)] == [1, 2, 2.5, 3]
    assert Timing([1.0, 3.0], [1.0, 1.0]).summary()["busy_cores"] == 0.5


def test_published_page_changes_between_the_marks_only(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{publish.START}\nold\n{publish.END}\nafter\n")
    publish.write_between(page, "new")
    assert page.read_text() == f"before\n{publish.START}\nnew\n{publish.END}\nafter\n"


def test_clients_are_the_cohort_of_the_design():
    assert sum(cohorts.RANKS) == 160
    specs = cohorts.specs(cohorts.random_batches(1, 4))
    assert all(isinstance(spec, flora.ClientSpec) and spec.adapter.alpha == 2 * spec.adapter.rank for spec in specs)
