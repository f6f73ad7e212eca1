"""Steps of static shape: what they fill up, that they train what ordinary steps train, and when they are captured.

No GPU is needed: ``Eager`` and a stand-in for the few things that CUDA does run the same functions of the same buffers.
Letters: M rows of a pass, C clients.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.common.segments import DeviceSegments, Segments
from flora_core.data.template import IGNORE, Example
from flora_core.model.cohort import keys_on_device
from flora_core.model.loss import client_losses
from flora_core.ops import autotune
from flora_core.training import cuda_graphs, static_steps, steps
from flora_core.training.static_steps import Shape, round_up, shape_of
from tests.support import models
from tests.support.fake_graphs import FakeGraphs, attend_by_offsets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have trainers run steps of static shape; the executors that they made."""
    made: list[Any] = []

    def executor(device: torch.device) -> FakeGraphs:
        made.append(FakeGraphs())
        return made[-1]

    monkeypatch.setattr(steps, "why_not", lambda cohort, config: None if config.cuda_graphs else "off")
    monkeypatch.setattr(steps, "executor_for", executor)
    # Few sizes, so that they come again in a short training.
    monkeypatch.setattr(static_steps, "round_up", lambda count, sizes: max(64, 1 << (count - 1).bit_length()))
    return made


def train(family: str, clients: Sequence[flora.ClientSpec], **settings: Any):
    cohort = flora.attach(models.tiny(family), clients, models.FAMILIES[family].targets)
    for i, name in enumerate(cohort.names):
        cohort.load(name, models.random_adapters(cohort.update(name).adapters, i))
    trainer = flora.CohortTrainer(cohort, flora.TrainConfig(**settings))
    with models.exact64():
        return trainer, {update.client: update for update in trainer.run()}


def largest_error(one: flora.ClientUpdate, other: flora.ClientUpdate) -> float:
    pairs = [pair for path in one.adapters for pair in zip(one.adapters[path], other.adapters[path], strict=True)]
    return max(((x - y).abs().max() / x.abs().max()).item() for x, y in pairs)


@pytest.mark.parametrize("budget", [None, 25])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_static_steps_train_what_ordinary_steps_train(family: str, budget: int | None, static: list[Any]):
    """Mixed ranks, dropout, clipping, accumulation, schedules, and clients that are done earlier; in float64.

    Products over more rows may be blocked otherwise, so the last bits may differ; a wrong mask or clip is not small.
    """
    ordinary, expected = train(family, models.clients(family), cuda_graphs=False, token_budget=budget)
    assert ordinary.cuda_graphs == "off: off"
    assert not static
    trainer, updates = train(family, models.clients(family), token_budget=budget)
    assert any(isinstance(key, Shape) for executor in static for key in executor.replays)
    assert trainer.cuda_graphs.startswith("on: ")
    for name, update in updates.items():
        assert largest_error(expected[name], update) <= 1e-9
        losses = trainer.clients[name].losses
        assert losses == pytest.approx(ordinary.clients[name].losses, rel=1e-9)
        assert update.metrics["tokens"] == expected[name].metrics["tokens"]


def test_a_bad_client_stops_and_the_others_train_on(static: list[Any]):
    """The device alone decides who steps; what the host reads afterwards says the same."""
    results = []
    for graphs_wanted in (False, "auto"):
        cohort = flora.attach(models.tiny("llama"), models.clients(), ["q_proj", "v_proj"])
        sick = cohort.update("plain").adapters
        next(iter(sick.values()))[1][0, 0] = math.inf
        cohort.load("plain", sick)
        trainer = flora.CohortTrainer(cohort, flora.TrainConfig(cuda_graphs=graphs_wanted))
        with models.exact64(), pytest.warns(RuntimeWarning, match="client 'plain' was stopped"):
            results.append({update.client: update for update in trainer.run()})
        assert "is not finite at step 1" in trainer.failures["plain"]
        own = cohort.bank.adapters("plain")
        assert all(torch.equal(x, y) for path in sick for x, y in zip(sick[path], own[path], strict=True))
    assert results[0].keys() == results[1].keys() == {"rslora", "pattern", "others", "early"}
    assert max(largest_error(results[0][name], results[1][name]) for name in results[0]) <= 1e-9


def test_shapes_come_from_a_short_list():
    assert [round_up(n, 16) for n in (1, 16, 17, 256, 257, 8192, 8193)] == [16, 16, 17, 256, 272, 8192, 8704]
    assert [round_up(n, 1) for n in (3, 17, 100)] == [16, 32, 128]
    assert [round_up(n, 4) for n in (100, 1000, 1025)] == [112, 1024, 1280]
    for n in range(1, 5000, 7):
        assert n <= round_up(n, 16) <= max(16, n * 17 / 16)
    # 300 rows are filled up by at least one, in sequences no longer than the longest.
    assert shape_of(300, 90, 3, 2) == Shape(304, 96, 16)
    assert shape_of(256, 90, 14, 2).rows > 256
    assert shape_of(272, 90, 14, 2).sequences >= 14 + (288 - 272) // 2


def test_a_function_is_called_then_captured_then_replayed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    executor, ran = FakeGraphs(), []
    for _ in range(5):
        for key in ("a", "b", "c", None):
            executor.run(key, lambda key=key: ran.append(key))
    assert [ran.count(key) for key in ("a", "b", "c", None)] == [5] * 4, "none is left out, none runs twice"
    assert set(executor.replays) == {"a", "b"}
    assert (executor.replayed, executor.called) == (6, 14)
    assert str(executor) == "on: 2 captured, 6 replays, 14 calls before or beside them"


@pytest.mark.parametrize("part", ["run", "_step"])
def test_what_cannot_be_captured_goes_on_as_it_is(part: str, static: list[Any], monkeypatch: pytest.MonkeyPatch):
    """A step that fails on the way is done again, as a whole; where graphs are a must, the error is the user's."""
    _, expected = train("llama", models.clients(), cuda_graphs=False)

    def failing(self: FakeGraphs, function: Callable[[], None]) -> Callable[[], None]:
        if function.__name__ != part:
            return function
        if part == "run":
            function()  # the gradients are there already
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(FakeGraphs, "capture", failing)
    trainer, updates = train("llama", models.clients())
    assert trainer.cuda_graphs == "off: operation not permitted when stream is capturing"
    assert max(largest_error(expected[name], updates[name]) for name in updates) <= 1e-9
    with pytest.raises(RuntimeError, match="not permitted"):
        train("llama", models.clients(), cuda_graphs=True)


def test_where_graphs_cannot_be_had():
    cohort = flora.attach(models.tiny("llama"), models.clients(), ["q_proj"])
    trainer = flora.CohortTrainer(cohort, flora.TrainConfig(max_steps=1))
    trainer.run()
    assert trainer.cuda_graphs == "off: training on cpu"
    assert "CUDA graphs: off (training on cpu)" in flora.explain(cohort.model).notes
    with pytest.raises(
        ValueError, match="cuda_graphs=True cannot be had here: training on cpu; use cuda_graphs='auto'"
    ):
        flora.CohortTrainer(cohort, flora.TrainConfig(cuda_graphs=True)).run()
    with pytest.raises(ValueError, match="cuda_graphs must be 'auto', True or False, got 'on'"):
        flora.TrainConfig(cuda_graphs="on")


def test_why_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Every reason in turn, as if the bank were on a GPU."""
    cohort = flora.attach(models.tiny("llama", torch.float32), models.clients(), ["q_proj"])
    on_gpu: Any = type("OnGpu", (), {"device": torch.device("cuda")})()
    cohort.bank.param = on_gpu
    why = lambda **settings: static_steps.why_not(cohort, flora.TrainConfig(**settings)) or ""  # noqa: E731
    assert why(cuda_graphs=False) == "cuda_graphs=False"
    assert why(gradient_checkpointing=True).startswith("gradient checkpointing reads")
    assert "reads the clients' lengths on the host" in why()
    monkeypatch.setattr(static_steps, "_on_device", lambda cohort: True)
    assert why().startswith("attention runs per sequence, which reads lengths on the host")
    monkeypatch.setattr(static_steps.attention, "choose", lambda *args: static_steps.attention.Way("varlen", ""))
    assert why() == ""
    cohort.packs = False
    assert why().startswith("sequences are padded")


@pytest.mark.parametrize("lengths", [(3, 0, 4, 2), (0, 0, 0, 9), (9, 0, 0, 0)])
def test_losses_by_a_table_on_the_device(lengths: tuple[int, ...]):
    """The same losses and gradients as by lengths on the host; the last range is nobody's, and one client is NaN."""
    head = flora.attach(models.tiny("llama"), models.clients(), ["q_proj"]).head
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=random, dtype=torch.float64)
    hidden[0] = math.nan
    target, weights = torch.randint(models.VOCAB, (9,), generator=random), [0.5, 0.25, 0.125, 0.0]
    segments = Segments(lengths)
    found = []
    for tokens, weight_C in (
        (segments, weights),
        (DeviceSegments(segments.offsets_on("cpu"), 9), torch.tensor(weights, dtype=torch.float64)),
    ):
        x = hidden.clone().requires_grad_()
        loss_C = client_losses(head, x, target, tokens, weight_C)
        upstream = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        (gradient,) = torch.autograd.grad(loss_C, x, upstream)
        found.append((loss_C[:3], gradient[: segments.offsets[3]]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0, equal_nan=True)


def test_lengths_on_the_device_are_not_told_to_the_host():
    segments = DeviceSegments(torch.tensor([0, 3, 5], dtype=torch.int32), 5, 4)
    assert (len(segments), segments.total, segments.longest) == (2, 5, 4)
    for ask in (lambda: segments[0], lambda: list(segments)):
        with pytest.raises(RuntimeError, match="known to the device alone"):
            ask()


def test_clients_without_labels_or_tokens(static: list[Any]):
    silent = [Example([5], [5], 0), Example([7, 8, 9], [IGNORE] * 3, 1)]
    clients = [flora.ClientSpec("a", models.examples(1, (9, 7, 5))), flora.ClientSpec("silent", silent)]
    trainer, updates = train("llama", clients, batch_size=1)
    assert trainer.clients["silent"].losses == [0.0, 0.0]
    assert all(torch.isfinite(A).all() for A, _ in updates["silent"].adapters.values())


def test_attention_by_offsets_on_the_device(static: list[Any], monkeypatch: pytest.MonkeyPatch):
    """Sequences by a table of offsets, which may end with empty ones, are the sequences by their lengths."""
    _, expected = train("llama", models.clients(), cuda_graphs=False)
    attend_by_offsets(monkeypatch)
    _, updates = train("llama", models.clients())
    assert max(largest_error(expected[name], updates[name]) for name in updates) <= 1e-9


def test_no_length_on_the_host():
    """Triton's kernels under the interpreter: clients and sequences are found by tables on the device alone."""
    code = "from bench.gpu.step import check_graphs; found = check_graphs('cpu'); print(found); assert found['green']"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    words = [sys.executable, "-c", f"import tests.support.triton.interpreter; {code}"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_a_workspace_for_any_lengths():
    """Launchers that know only the total take at least what any cut of it needs."""
    common, wgrad = (pytest.importorskip(f"flora_kernels.triton.{name}") for name in ("common", "wgrad"))
    needs = common.s_numel, wgrad._part_rows
    random, ranks = torch.Generator().manual_seed(0), Segments([16, 3, 0, 64, 0])
    for total in (wgrad.CHUNK, wgrad.CHUNK + 1, 5 * wgrad.CHUNK - 1, 20000):
        offsets = torch.tensor([0, total], dtype=torch.int32)
        most = [f(DeviceSegments(offsets, total), ranks) for f in needs]
        for _ in range(50):
            inner = torch.randint(total + 1, (4,), generator=random).sort().values.tolist()
            bounds = [0, *inner, total]
            tokens = Segments([b - a for a, b in itertools.pairwise(bounds)])
            for bound, f in zip(most, needs, strict=True):
                assert f(tokens, ranks) <= bound
    assert wgrad._part_rows(DeviceSegments(offsets, wgrad.CHUNK - 1), ranks) == 0


@pytest.mark.parametrize("clients", [1, 2, 3, 10, 11])
def test_dropout_keys_begin_at_aligned_addresses(clients: int):
    """Kernels are compiled apart for addresses that 16 does not divide: an odd number of clients must not mix both."""
    keys = {f"layer {i}": list(range(i, i + clients)) for i in range(4)}
    table = keys_on_device(keys, torch.device("cpu"))
    assert {path: row.tolist() for path, row in table.items()} == keys
    assert all(row.data_ptr() % 16 == 0 and row.is_contiguous() for row in table.values())


def test_labels_are_filled_up_by_the_padding_s_own_rows(static: list[Any]):
    cohort = flora.attach(models.tiny("llama"), models.clients(), ["q_proj"])
    static_pass = static_steps.StaticPass(cohort, Shape(64, 48, 16), 20, contextlib.nullcontext)
    batches = [models.examples(0, (9, 4)), models.examples(1, (20,)), [], [], []]
    static_pass.fill(batches, [1] * 5, [0] * 5, {path: [1] * 5 for path in cohort.layers})
    labelled = sum(static_steps.num_labels(example) for batch in batches for example in batch)
    rows = static_pass.part["labels"][labelled:].tolist()
    assert len(rows) > 10
    assert rows == [33 + i % 31 for i in range(len(rows))], "each of the padding's rows before any of them again"
    assert static_pass._padding_rows(60, 7).tolist() == [60, 61, 62, 63, 60, 61, 62]


def test_a_pass_waits_for_the_streams_of_its_own_device(monkeypatch: pytest.MonkeyPatch):
    """The caller's current device may be another one; what CUDA is asked for is recorded."""
    asked: list[Any] = []

    class Stream:
        def __init__(self, device: Any):
            self.device = device

        def wait_stream(self, other: Stream) -> None:
            asked.append((self.device, "waits for", other.device))

    current = {1: Stream(torch.device("cuda:1"))}
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[device.index])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    cuda_graphs.Cuda(torch.device("cuda:1")).call(lambda: asked.append("called"))
    one = torch.device("cuda:1")
    assert asked == [(one, "waits for", one), "called", (one, "waits for", one)]


def test_ways_are_timed_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch):
    entered: list[Any] = []

    class Device(contextlib.nullcontext):
        def __init__(self, device: torch.device):
            super().__init__()
            entered.append(device)

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(autotune, "time_on_gpu", lambda calls: [float(len(calls))])
    assert autotune.timer_on(torch.device("cuda:1"))([print, print]) == [2.0]
    assert entered == [torch.device("cuda:1")]


def test_a_failed_capture_names_the_error_that_came_first():
    """torch raises another one when it leaves the capture, which says nothing but that there was an error before."""

    def failing(first: Exception) -> BaseException:
        try:
            try:
                raise first
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
        except RuntimeError as error:
            return error

    assert steps.first_error(failing(RuntimeError("lengths are known to the device alone\nmore"))) == (
        "lengths are known to the device alone"
    )
    assert steps.first_error(failing(ValueError("no"))) == "ValueError: no"
    assert steps.first_error(RuntimeError("one\ntwo")) == "one"
