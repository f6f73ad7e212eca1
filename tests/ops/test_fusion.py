"""The ways to fuse: each gives the same linear and keeps faults with their client; which one runs is chosen once.

Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_core import testing
from flora_core.ops import autotune, backends, fusion
from flora_core.ops.autotune import Choices, Shape
from flora_core.runs.folder import RunFolder
from flora_core.testing import DTYPES, LINEAR_SHAPES, make_linear, run_linear

MIXED, LONE, EMPTY, RANK_0, NOBODY, ODD = (LINEAR_SHAPES[i] for i in (0, 1, 2, 4, 5, 6))
in_each_way = pytest.mark.parametrize("fuse", fusion.FUSIONS)


@in_each_way
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", [MIXED, LONE, EMPTY, RANK_0, NOBODY, ODD], ids=lambda case: case.id)
def test_every_way_gives_the_linear(case, dtype, dropout, fuse):
    for base in (True, False):
        inputs = make_linear(replace(case, dtype=dtype), base=base, dropout=dropout, masters=True)
        with testing.nan_filled():
            testing.check_linear(inputs, run_linear(inputs, "reference", fuse))


@in_each_way
def test_ternary_integers_are_exact(fuse):
    inputs = make_linear(RANK_0, exact=True, dropout=True)
    out = run_linear(inputs, "reference", fuse)
    for name, exact in testing.oracle_linear(inputs).items():
        assert torch.equal(out[name].double(), exact), name


def backends_and_ways() -> Iterator[Any]:
    """Every way of every backend that runs here; Triton's are run by tests/support/triton/ops.py."""
    for backend in testing.backends("shrink"):
        if backend != "triton":
            kernels, _ = backends.resolve(backend, "shrink")
            yield from (pytest.param(backend, way, id=f"{backend}-{way}") for way in fusion.possible(kernels))


@pytest.mark.parametrize(("backend", "fuse"), list(backends_and_ways()))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "A", "B", "dy"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_a_fault_stays_with_its_client(dropout, where, value, backend, fuse):
    inputs = make_linear(MIXED, dropout=dropout)
    clean = run_linear(inputs, backend, fuse)
    for spoilt in range(3):
        tensor = getattr(inputs, where).clone()
        tensor[(inputs.tokens if where in ("x", "dy") else inputs.ranks)[spoilt]] = value
        out = run_linear(replace(inputs, **{where: tensor}), backend, fuse)
        for name, result in out.items():
            for client, rows in enumerate(inputs.parts[name]):
                assert client == spoilt or torch.equal(result[rows], clean[name][rows]), f"{name} of client {client}"
        assert not all(result[inputs.parts[name][spoilt]].isfinite().all() for name, result in out.items())


def test_what_overflows_in_16_bits_stays_with_its_client():
    """A finite master may be infinite as the compute dtype sees it, and 0 * inf is NaN."""
    inputs = make_linear(replace(MIXED, dtype=torch.float16), masters=True)
    B = inputs.B.clone()
    B[inputs.ranks[1]] = 1e6
    out = run_linear(replace(inputs, B=B), "reference", "augmented")["y"]
    assert out[inputs.tokens[0]].isfinite().all()
    assert out[inputs.tokens[2]].isfinite().all()


def test_each_fusion_runs_its_own_computation_in_both_directions(monkeypatch):
    """Else the tests above would try one and the same four times."""
    inputs, called = make_linear(MIXED), []
    for name, one in fusion.FUSIONS.items():

        def forward(*args, name=name, one=one):
            called.append(f"{name} forward")
            return one.forward(*args)

        def backward(*args, name=name, one=one):
            called.append(f"{name} backward")
            return one.backward(*args)

        monkeypatch.setitem(fusion.FUSIONS, name, replace(one, forward=forward, backward=backward))
    for fuse in (*fusion.FUSIONS, "auto"):
        run_linear(inputs, "reference", fuse)
    expected = [f"{name} {way}" for name in fusion.FUSIONS for way in ("forward", "backward")]
    assert called == [*expected, "separate forward", "separate backward"]


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="fuse must be one of auto, separate, prewrite, kernel, augmented, got 'fast'"):
        run_linear(make_linear(MIXED), "reference", "fast")


def test_a_way_that_the_backend_lacks_is_refused(monkeypatch):
    from flora_kernels import reference

    monkeypatch.delattr(reference, "linear_lora")
    with pytest.raises(
        ValueError, match="fuse='kernel' is not among the fusions of backend 'reference'; it has: auto, sep"
    ):
        run_linear(make_linear(MIXED), "reference", "kernel")


SHAPE = Shape("forward", 8192, 4096, 4096, 160, torch.bfloat16)
PLATFORM = {"device": "a GPU", "torch": "2"}


def timer(*times: float) -> Callable[[Sequence[Any]], list[float]]:
    """Says how long the ways took without running them; counts how often it is asked."""

    def told(calls: Sequence[Any]) -> list[float]:
        asked.append(len(calls))
        return list(times)

    asked: list[int] = []
    told.asked = asked  # pyright: ignore[reportFunctionMemberAccess]
    return told


def nothing() -> None:
    pass


TWO = {"separate": nothing, "prewrite": nothing}


def test_a_way_is_measured_once_per_shape_and_kept(tmp_path: Path):
    choices, slow = Choices(PLATFORM, tmp_path), timer(5.0, 4.0)
    assert [choices.pick(SHAPE, TWO, slow) for _ in range(3)] == ["prewrite"] * 3
    assert len(slow.asked) == 1  # pyright: ignore[reportFunctionMemberAccess]
    assert choices.pick(replace(SHAPE, K=11008), TWO, timer(1.0, 2.0)) == "separate"
    again, never = Choices(PLATFORM, tmp_path), timer()
    assert again.pick(SHAPE, TWO, never) == "prewrite"
    assert again.pick(replace(SHAPE, M=8000), TWO, never) == "prewrite", "M counts in powers of two"
    assert again.used == {SHAPE.key: {"way": "prewrite", "us": {"separate": 5.0, "prewrite": 4.0}}}
    told = again.describe(4096, 4096, torch.bfloat16)
    assert told == "measured on a GPU: prewrite at M8192 (prewrite 4 us, separate 5 us)"
    assert again.describe(4096, 2048, torch.bfloat16) == "measured at its first batch"


def test_another_device_or_version_has_a_table_of_its_own(tmp_path: Path):
    Choices(PLATFORM, tmp_path).pick(SHAPE, TWO, timer(5.0, 4.0))
    for other in ({"device": "another GPU"}, {"torch": "3"}):
        assert Choices({**PLATFORM, **other}, tmp_path).pick(SHAPE, TWO, timer(1.0, 2.0)) == "separate"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture
def new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forgets what this process knows, as a new one would."""

    def forget() -> None:
        monkeypatch.setattr(autotune, "_OF_DEVICE", {})
        monkeypatch.setattr(autotune, "_RECORDED", {})

    monkeypatch.setattr(autotune, "cache_folder", lambda: tmp_path / "cache")
    forget()
    return forget


def test_a_resumed_run_keeps_its_choices(tmp_path: Path, new_process: Callable[[], None]):
    cpu = torch.device("cpu")
    run = RunFolder(tmp_path / "run")
    run.record.begin({"a": 1}, {})
    run.record.keep_choices()
    assert "fuse" not in json.loads((tmp_path / "run" / "run.json").read_text())
    assert autotune.choices_for(cpu).pick(SHAPE, TWO, timer(5.0, 4.0)) == "prewrite"
    run.record.keep_choices()
    recorded = autotune.used()
    new_process()
    # In the meantime another run has measured the other way to be faster.
    (cache,) = (tmp_path / "cache").iterdir()
    cache.unlink()
    assert autotune.choices_for(cpu).pick(SHAPE, TWO, timer(1.0, 2.0)) == "separate"
    new_process()
    RunFolder(tmp_path / "run").record.begin({"a": 1}, {})
    assert autotune.choices_for(cpu).pick(SHAPE, TWO, timer()) == "prewrite"
    assert autotune.used() == recorded


def test_choices_for_a_device_that_is_not_here_are_kept(new_process: Callable[[], None]):
    recorded = {"cuda:7": {SHAPE.key: {"way": "kernel", "us": {}}}}
    autotune.use(recorded)
    assert autotune.used() == recorded


NO_TIMES = json.dumps({"format": autotune.FORMAT, "platform": PLATFORM, "choices": {SHAPE.key: {"way": "prewrite"}}})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 9, "platform": {}, "choices": {}}', NO_TIMES]
)
def test_a_damaged_table_is_told_and_written_anew(text: str, tmp_path: Path):
    Choices(PLATFORM, tmp_path).pick(SHAPE, TWO, timer(5.0, 4.0))
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    with pytest.warns(
        RuntimeWarning, match=r"fuse-\w+\.json is damaged .*measured again, and the file is written anew"
    ):
        choices = Choices(PLATFORM, tmp_path)
    assert choices.pick(SHAPE, TWO, timer(1.0, 2.0)) == "separate"
    assert Choices(PLATFORM, tmp_path).pick(SHAPE, TWO, timer()) == "separate"


def test_a_table_that_cannot_be_written_is_told_and_the_run_goes_on(tmp_path: Path):
    (tmp_path / "file").write_text("")
    choices = Choices(PLATFORM, tmp_path / "file")
    with pytest.warns(RuntimeWarning, match=r"cannot be written .*; set FLORA_CACHE to a folder that can"):
        assert choices.pick(SHAPE, TWO, timer(5.0, 4.0)) == "prewrite"
    assert choices.pick(SHAPE, TWO, timer()) == "prewrite"
    assert SHAPE.key in choices.used


def test_two_processes_keep_each_other_s_choices(tmp_path: Path):
    one, two = Choices(PLATFORM, tmp_path), Choices(PLATFORM, tmp_path)
    other = replace(SHAPE, direction="backward")
    one.pick(SHAPE, TWO, timer(5.0, 4.0))
    two.pick(other, TWO, timer(5.0, 4.0))
    assert set(Choices(PLATFORM, tmp_path).known) == {SHAPE.key, other.key}


def test_nothing_is_measured_while_a_graph_is_captured(tmp_path: Path):
    choices, never = Choices(PLATFORM, tmp_path), timer()
    assert choices.pick(SHAPE, TWO, never, may_measure=False) == "separate"
    assert not never.asked  # pyright: ignore[reportFunctionMemberAccess]
    assert not choices.used


def test_a_choice_that_is_not_to_be_had_is_measured_anew(tmp_path: Path):
    choices = Choices(PLATFORM, tmp_path)
    choices.use({SHAPE.key: {"way": "kernel", "us": {"kernel": 1.0}}})
    assert choices.pick(SHAPE, TWO, timer(5.0, 4.0)) == "prewrite"
