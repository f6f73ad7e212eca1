"""Memory that runs out in a cohort: passes are cut, then cohorts, and the result is the same."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flora_core as flora
from flora_core.common.errors import CrowdedError, is_out_of_memory
from flora_core.training.pause import Paused
from flora_core.training.trainer import CohortTrainer
from tests.support.federations import TRAIN, make_clients, make_model, make_tokenizer
from tests.support.models import exact64

ROOT = Path(__file__).resolve().parents[2]
CPU = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


ERRORS = {
    "cpu": RuntimeError(CPU),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError(),
}


def trained(monkeypatch=None, fails=lambda trainer, clients, tokens: False, error=ERRORS["cpu"], **changes):
    """One round in float64: updates, failures and warnings; ``fails`` says which passes have no memory."""
    model, told = make_model(torch.float64), []
    specs = make_clients(dropout=0.2)
    cohort = flora.attach(model, specs, ["q_proj", "v_proj"])
    options = {name: changes.pop(name) for name in ("stop", "resume") if name in changes}
    trainer = CohortTrainer(
        cohort, flora.TrainConfig(**{**TRAIN, **changes}), make_tokenizer(), callbacks=[told.append], **options
    )
    if monkeypatch is not None:
        backward = torch.Tensor.backward

        def scarce(tensor, *rest):
            backward(tensor, *rest)  # gradients are there already when memory ends
            if fails(trainer, cohort.active.names, in_flight[-1]):
                raise error

        running, in_flight = type(cohort).running, [0]

        def watched(cohort, batch):
            in_flight.append(batch.tokens.total)
            return running(cohort, batch)

        monkeypatch.setattr(type(cohort), "running", watched)
        monkeypatch.setattr(torch.Tensor, "backward", scarce)
    with exact64():
        updates = trainer.run()
    return {u.client: u for u in updates}, [e["message"] for e in told if e["event"] == "warning"], trainer


def same(one, other) -> None:
    assert list(one) == list(other) != []
    for name, update in one.items():
        assert update.metrics["steps"] == other[name].metrics["steps"]
        assert update.metrics["tokens"] == other[name].metrics["tokens"]
        for module, pair in update.adapters.items():
            for got, want in zip(pair, other[name].adapters[module], strict=True):
                assert float((got - want).abs().max()) <= 1e-9 * float(want.abs().max())


@pytest.mark.parametrize("kind", ERRORS)
def test_a_step_that_memory_cannot_hold_is_done_in_smaller_passes(kind, monkeypatch):
    want, none, _ = trained()
    assert none == []
    with monkeypatch.context() as patch:
        got, told, trainer = trained(patch, lambda trainer, names, tokens: tokens > 20, ERRORS[kind])
    same(got, want)
    assert trainer.tokens_in_flight is not None
    assert trainer.tokens_in_flight <= 20
    assert told
    assert told[0].startswith("memory ran out at step 1 of round 1: going on with 2")
    assert "token_budget or memory_budget_gb" in told[0]


@pytest.mark.parametrize("fails_from", [0, 2])
def test_a_cohort_that_memory_cannot_hold_is_trained_in_parts(fails_from, monkeypatch):
    want, _, _ = trained(keep_optimizer=True)

    def fails(trainer, names, tokens):
        return len(names) > 1 and len(trainer.clients["a"].losses) >= fails_from

    with monkeypatch.context() as patch:
        got, told, trainer = trained(patch, fails, keep_optimizer=True)
    same(got, want)
    assert f"memory ran out at step {fails_from + 1} of round 1: training clients a, b, c in two parts" in told[-2]
    assert "training clients b, c in two parts" in told[-1]
    assert set(trainer.optimizer_state) == set("abc")


def test_what_not_even_one_client_has_memory_for_is_an_error_that_says_what_to_do(monkeypatch):
    with (
        monkeypatch.context() as patch,
        pytest.raises(CrowdedError, match=r"one sequence of 9 tokens.*lower max_length"),
    ):
        trained(patch, lambda *_: True)


def test_another_error_is_not_taken_for_memory(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"^shapes$"):
        trained(patch, lambda *_: True, RuntimeError("shapes"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_memory_that_runs_out_while_weights_are_written_is_not_tried_again(monkeypatch):
    """A step that is half done must not be done twice."""
    from flora_core.training.optimizer import CohortAdamW

    def fail(*_):
        raise RuntimeError(CPU)

    monkeypatch.setattr(CohortAdamW, "step", fail)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        trained()
    assert not isinstance(caught.value, CrowdedError)


# Pauses.


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("budget", [None, 20])
def test_training_that_paused_goes_on_to_the_same_bytes(after, budget):
    """With a budget of 20 tokens there are three cohorts, so that some are finished and some not begun."""
    want, _, whole = trained(token_budget=budget, keep_optimizer=True)
    steps = [after]

    def stop() -> bool:
        steps[0] -= 1
        return steps[0] < 0

    with pytest.raises(Paused) as caught:
        trained(token_budget=budget, keep_optimizer=True, stop=stop)
    got, _, trainer = trained(token_budget=budget, keep_optimizer=True, resume=caught.value.state)
    assert list(got) == list(want)
    for name, update in got.items():
        assert update.metrics["loss_first"] == want[name].metrics["loss_first"]
        assert update.metrics["steps"] == want[name].metrics["steps"]
        for module, pair in update.adapters.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, want[name].adapters[module], strict=True))
        for part in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(trainer.optimizer_state[name][part], whole.optimizer_state[name][part])


def test_a_pause_after_memory_ran_out_goes_on_as_well(monkeypatch):
    """The parts of a split cohort are not equally far then."""
    want, _, _ = trained()
    steps = [3]

    def stop() -> bool:
        steps[0] -= 1
        return steps[0] < 0

    with monkeypatch.context() as patch, pytest.raises(Paused) as caught:
        trained(
            patch, lambda trainer, names, tokens: len(names) > 1 and len(trainer.clients["a"].losses) > 1, stop=stop
        )
    assert len({state["step"] for state in caught.value.state.values()}) > 1
    got, _, _ = trained(resume=caught.value.state)
    same(got, want)


# A real limit.

LIMITED = """
import resource, sys, warnings
import torch
torch.set_num_threads(1)
import flora_core as flora
from tests.support.federations import make_model, make_tokenizer, make_records
from flora_core.training.trainer import CohortTrainer

model = make_model(hidden=512)
specs = [flora.ClientSpec(n, make_records(n, 8), flora.AdapterConfig(4, 8)) for n in "abcd"]
cohort = flora.attach(model, specs, ["q_proj", "v_proj"])
told = []
train = flora.TrainConfig(lr=1e-2, batch_size=2, max_length=32, max_steps=1)
trainer = CohortTrainer(cohort, train, make_tokenizer(), callbacks=[told.append])
trainer.run()
size = int([line for line in open("/proc/self/status") if line.startswith("VmSize")][0].split()[1]) * 1024
class Hungry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = torch.empty(x.shape[-2] * 4_000_000, dtype=torch.uint8)  # 4 MB a token
        return x.clone()
    @staticmethod
    def backward(ctx, g):
        return g
layer = model.model.layers[0]
forward = layer.forward
def hungry(hidden, *rest, **more):
    return forward(Hungry.apply(hidden), *rest, **more)
layer.forward = hungry
resource.setrlimit(resource.RLIMIT_AS, (size + 150_000_000, -1))
trainer = CohortTrainer(cohort, train, make_tokenizer(), callbacks=[told.append])
print(len(trainer.run()), [e["message"] for e in told if e["event"] == "warning"])
"""


@pytest.mark.slow
def test_a_process_of_limited_memory_goes_on_in_smaller_passes():
    """RLIMIT_AS, as ulimit -v: 72 tokens of 4 MB do not fit into 150 MB."""
    import os

    if not hasattr(resource, "RLIMIT_AS") or not os.path.exists("/proc/self/status"):
        pytest.skip("needs RLIMIT_AS and /proc")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", LIMITED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("4 ['memory ran out at step 1 of round 1: going on with "), done.stdout
