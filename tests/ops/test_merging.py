"""Whose kernels merge: by device, by name, or by a measurement that leaves the weights alone and is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core import MergeItem, stacked_merge_many_
from flora_core.merge.in_place import apply_base_delta_
from flora_core.ops import autotune, backends, merging
from flora_core.testing import MergeCase, make_merge
from tests.support.models import tiny

pytest.importorskip("flora_kernels.native", exc_type=ImportError)
OPTIONS: dict[str, Any] = dict(rounding="nearest", seed=0, accumulate=torch.float32)


def items(count: int = 3, low_bits: bool = False) -> list[MergeItem]:
    made = [make_merge(MergeCase("", 20, 24, (3, 5), torch.bfloat16), seed) for seed in range(count)]
    low = torch.zeros(20, 24, dtype=torch.int16) if low_bits else None
    return [MergeItem(one.weight, one.A, one.B, one.coef, low) for one in made]


def timer(runs: list[int], *times: float) -> Callable[[Sequence[Callable[[], Any]]], list[float]]:
    def told(calls: Sequence[Callable[[], Any]]) -> list[float]:
        for call in calls:
            call()
        runs.append(len(calls))
        return list(times)

    return told


@pytest.fixture
def choices(tmp_path: Path) -> autotune.Choices:
    return autotune.Choices({"device": "test"}, tmp_path)


@pytest.mark.parametrize(("times", "wanted"), [((2.0, 1.0), "native"), ((1.0, 2.0), "reference")])
def test_the_faster_one_is_taken_and_kept(times, wanted, choices, tmp_path):
    runs: list[int] = []
    for _ in range(2):
        assert merging.pick(items(), ["reference", "native"], choices, timer(runs, *times), **OPTIONS) == wanted
    again = autotune.Choices({"device": "test"}, tmp_path)
    assert merging.pick(items(), ["reference", "native"], again, timer(runs, 0.0, 0.0), **OPTIONS) == wanted
    assert runs == [2]
    assert wanted in again.describe(20, 24, torch.bfloat16, "merge")
    assert again.describe(20, 99, torch.bfloat16, "merge") == "measured at its first merge"
    assert list(choices.used) == ["merge-nearest-float32 M4 N20 K24 P64 bfloat16"]


@pytest.mark.parametrize("low_bits", [False, True])
def test_a_measurement_changes_no_weight(low_bits, choices):
    mine, before = items(low_bits=low_bits), items(low_bits=low_bits)
    merging.pick(mine, ["reference", "native"], choices, timer([], 1.0, 2.0), **OPTIONS)
    for one, other in zip(mine, before, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert one.low_bits is None or not one.low_bits.any()


def test_a_measurement_copies_a_part_of_a_large_model(monkeypatch):
    monkeypatch.setattr(merging, "SAMPLE_BYTES", 2 * items()[0].weight.nbytes)
    assert [len(merging._copies(items(count))) for count in (1, 2, 5)] == [1, 2, 2]


def test_what_is_summed_otherwise_is_measured_apart(choices):
    runs: list[int] = []
    for options in (OPTIONS, {**OPTIONS, "accumulate": torch.float64}, {**OPTIONS, "rounding": "stochastic"}):
        merging.pick(items(), ["reference", "native"], choices, timer(runs, 1.0, 2.0), **options)
    merging.pick(items(low_bits=True), ["reference", "native"], choices, timer(runs, 1.0, 2.0), **OPTIONS)
    assert len(runs) == 4


def test_while_a_graph_is_captured_the_first_is_taken(choices):
    runs: list[int] = []
    assert merging.pick(items(), ["native", "reference"], choices, timer(runs), False, **OPTIONS) == "native"
    assert runs == []


def on_gpu(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these backends were to be had for tensors on a GPU."""
    monkeypatch.setattr(merging, "able", lambda op, tensor=None: list(names))


def test_contenders_on_a_gpu(monkeypatch):
    on_gpu(monkeypatch, "triton", "native", "reference")
    same = items()
    assert merging.contenders(same) == ["triton", "native"]
    assert merging.contenders([*same, same[0]._replace(A=same[0].A.half())]) == ["triton"]
    on_gpu(monkeypatch, "reference")
    assert merging.contenders(same) == ["reference"]


def test_a_cpu_takes_native_and_a_name_is_taken_as_it_is(monkeypatch):
    assert merging.merge_kernels(items(), "auto", **OPTIONS).__name__ == "flora_kernels.native"
    assert merging.merge_kernels(items(), "reference", **OPTIONS).__name__ == "flora_kernels.reference"
    called = []
    monkeypatch.setattr("flora_kernels.native.merge_many_", lambda stacks, **_: called.append(len(stacks)))
    stacked_merge_many_(items())
    weights = {f"m{i}": item.weight for i, item in enumerate(items())}
    delta = {f"m{i}": (item.A, item.B, item.coef) for i, item in enumerate(items())}
    apply_base_delta_(weights, delta, rounding="nearest")
    apply_base_delta_(weights, delta, rounding="nearest", backend="reference")
    assert called == [3, 3]


def test_order_of_preference():
    assert backends.able("merge_many_", torch.zeros(2, 2))[0] == "native"
    assert backends.able("merge_many_", torch.zeros(2, 2, device="meta"))[0] == "reference"


def test_explain_says_who_merges():
    model = tiny(dtype=torch.float32)
    flora.attach(model, [flora.ClientSpec("a", adapter=flora.AdapterConfig(2, 4))], ["q_proj"])
    assert "merge: native (nothing is measured on a CPU)" in flora.explain(model).notes
