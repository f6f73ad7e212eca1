"""One client's NaN or Inf stays with it: every other client ends with the same bits as if it had been healthy.

Bits can be compared because the reference run holds the same tokens in every step: there the sick client is healthy
and simply done after the step in which it fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.model.loss import client_losses
from flora_core.ops import backends
from flora_core.ops.fusion import FUSIONS
from flora_core.training import steps
from tests.support import models
from tests.support.models import FAMILIES

SICK = "rslora"
NAN, INF = float("nan"), float("inf")
CONFIG = flora.TrainConfig(lr=1e-2, batch_size=2, keep_optimizer=True)


class Poison(torch.autograd.Function):
    """Set some rows to a value, on the way forward or on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: slice, value: float, backward: bool) -> torch.Tensor:
        ctx.rows, ctx.value, ctx.backwards = rows, value, backward
        return x.clone() if backward else _set(x, rows, value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _set(grads[0], ctx.rows, ctx.value) if ctx.backwards else grads[0], None, None, None


def _set(x: torch.Tensor, rows: slice, value: float) -> torch.Tensor:
    x = x.clone()
    x[rows.stop - 1, 0] = value
    return x


def clients(**train: Any) -> list[flora.ClientSpec]:
    """Four clients of five steps; ``train`` goes to the one in the middle that falls ill."""
    shapes = {"plain": (4, 0.0), SICK: (3, 0.1), "third": (5, 0.1), "last": (2, 0.0)}
    return [
        flora.ClientSpec(
            name,
            models.examples(i, [11, 9, 7, 5, 10, 6, 8, 9, 3, 9]),
            flora.AdapterConfig(rank, dropout=dropout),
            train if name == SICK else {"clip_norm": 0.5} if name == "third" else {},
        )
        for i, (name, (rank, dropout)) in enumerate(shapes.items())
    ]


def run(
    family: str,
    specs: Sequence[flora.ClientSpec],
    prepare: Callable[[flora.Cohort], None] = lambda cohort: None,
    packs: bool = True,
    base: torch.dtype = torch.float32,
    fuse: str = "auto",
    **config: Any,
) -> tuple[dict[str, flora.ClientUpdate], flora.CohortTrainer]:
    cohort = flora.attach(models.tiny(family, base), specs, FAMILIES[family].targets, fuse=fuse)
    cohort.packs = cohort.packs and packs
    for i, name in enumerate(cohort.names):
        cohort.load(name, models.random_adapters(cohort.update(name).adapters, i))
    prepare(cohort)
    trainer = flora.CohortTrainer(cohort, CONFIG.overridden(config))
    return {update.client: update for update in trainer.run()}, trainer


def poison(monkeypatch: pytest.MonkeyPatch, value: float, passes: range, backward: bool = False) -> list[int]:
    """In some of the passes, the sick client's hidden states, or their gradients, hold one such number."""
    rows: list[int] = []

    def poisoned(head: Any, hidden: torch.Tensor, target: torch.Tensor, tokens: Any, weight_C: Any) -> torch.Tensor:
        rows.append(tokens.lengths[1])
        if len(rows) - 1 in passes and rows[-1]:
            hidden = Poison.apply(hidden, tokens[1], value, backward)
        return client_losses(head, hidden, target, tokens, weight_C)

    monkeypatch.setattr(steps, "client_losses", poisoned)
    return rows


def check_others(
    got: tuple[dict[str, flora.ClientUpdate], flora.CohortTrainer],
    healthy: tuple[dict[str, flora.ClientUpdate], flora.CohortTrainer],
) -> None:
    """Losses, adapters and moments of everybody else, bit for bit."""
    (updates, trainer), (expected, reference) = got, healthy
    assert set(updates) == set(expected) - {SICK}
    for name, update in updates.items():
        assert trainer.clients[name].losses == reference.clients[name].losses
        for path, pair in expected[name].adapters.items():
            assert all(map(torch.equal, update.adapters[path], pair)), f"{name} {path}"
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(trainer.optimizer_state[name][key], reference.optimizer_state[name][key])


@pytest.mark.parametrize(
    ("family", "value", "backward"),
    [
        ("llama", NAN, False),
        ("llama", INF, False),
        ("llama", NAN, True),
        ("llama", INF, True),
        ("gemma2", NAN, False),  # an Inf its softcap would swallow
        ("gemma2", INF, True),
        ("bloom", NAN, False),
        ("bloom", INF, True),
    ],
)
def test_a_client_that_turns_non_finite(family: str, value: float, backward: bool, monkeypatch: pytest.MonkeyPatch):
    """In its third step: the others never notice, and it keeps the adapter of its second."""
    healthy, before = run(family, clients(max_steps=3)), run(family, clients(max_steps=2))
    poison(monkeypatch, value, range(2, 9), backward)
    with pytest.warns(RuntimeWarning, match="client 'rslora' was stopped"):
        got = run(family, clients())
    check_others(got, healthy)
    trainer = got[1]
    records = [example.record for example in trainer.clients[SICK].batch(2)]
    what = "gradient" if backward else "loss"
    assert trainer.failures == {SICK: f"{what} is not finite at step 3 (records {records})"}
    kept = trainer.cohort.update(SICK).adapters
    for path, pair in before[0][SICK].adapters.items():
        assert all(map(torch.equal, kept[path], pair))
    assert len(trainer.clients[SICK].losses) == 2


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("factor", [0, 1], ids=["A", "B"])
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
def test_an_adapter_that_starts_non_finite(packs: bool, factor: int, value: float):
    def spoil(cohort: flora.Cohort) -> None:
        for pair in cohort.bank.adapters(SICK).values():
            pair[factor][1, 2] = value

    healthy = run("llama", clients(max_steps=1), packs=packs)
    with pytest.warns(RuntimeWarning, match="loss is not finite at step 1"):
        got = run("llama", clients(), spoil, packs)
    check_others(got, healthy)
    assert set(got[1].failures) == {SICK}


@pytest.mark.parametrize("how", ["autocast", "checkpointed", "float64"])
def test_isolation_holds_however_the_cohort_runs(how: str, monkeypatch: pytest.MonkeyPatch):
    base = torch.float64 if how == "float64" else torch.float32
    config = {"autocast": {"dtype": "bfloat16"}, "checkpointed": {"gradient_checkpointing": True}, "float64": {}}[how]
    healthy = run("llama", clients(max_steps=1), base=base, **config)
    poison(monkeypatch, NAN, range(9))
    with pytest.warns(RuntimeWarning, match="was stopped"):
        check_others(run("llama", clients(), base=base, **config), healthy)


@pytest.mark.parametrize("fuse", [way for way in FUSIONS if way != "separate"])
def test_isolation_holds_in_every_way_to_fuse(fuse: str, monkeypatch: pytest.MonkeyPatch):
    """By the reference, which has all of them; the one way left out is what every other test here takes."""
    monkeypatch.setattr(backends, "availability", lambda: {"reference": None})

    def spoil(cohort: flora.Cohort) -> None:
        for _, B in cohort.bank.adapters(SICK).values():
            B[1, 2] = NAN

    healthy = run("llama", clients(max_steps=1), fuse=fuse)
    with pytest.warns(RuntimeWarning, match="loss is not finite at step 1"):
        check_others(run("llama", clients(), spoil, fuse=fuse), healthy)


def test_a_learning_rate_that_blows_a_client_up():
    """No planted fault: the adapter overflows by itself, in the step after its first."""
    healthy = run("llama", clients(max_steps=2))
    with pytest.warns(RuntimeWarning, match=r"client 'rslora' was stopped: \w+ is not finite at step 2"):
        got = run("llama", clients(lr=1e30))
    check_others(got, healthy)


def test_one_bad_pass_of_several(monkeypatch: pytest.MonkeyPatch):
    """A step cut into passes fails as a whole for the client that was bad in one of them, and for nobody else."""
    config: dict[str, Any] = {"token_budget": 90, "gradient_accumulation": 5}
    healthy = run("llama", clients(), **config)
    rows = poison(monkeypatch, NAN, range(1))
    with pytest.warns(RuntimeWarning, match="'rslora' was stopped: loss is not finite at step 1"):
        got = run("llama", clients(), **config)
    assert len(got[1].plan().cohorts) == 1
    assert len([count for count in rows if count]) == 2, "its tokens lie in two passes, the first of them bad"
    check_others(got, healthy)


def test_everybody_fails(monkeypatch: pytest.MonkeyPatch):
    """The run ends, reports every client, and emits who was refused."""
    events: list[dict[str, Any]] = []
    specs = clients()[:2]
    cohort = flora.attach(models.tiny("llama", torch.float32), specs, ["q_proj"])
    cohort.bank.param.fill_(NAN)
    trainer = flora.CohortTrainer(cohort, CONFIG, callbacks=[events.append])
    with pytest.warns(RuntimeWarning, match="was stopped"):
        assert trainer.run() == []
    assert set(trainer.failures) == {"plain", SICK}
    refused = {e["client"]: e["refused"] for e in events if e["event"] == "client_done"}
    assert refused == trainer.failures


def test_nobody_fails():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, trainer = run("llama", clients(max_steps=1))
    assert set(updates) == {"plain", SICK, "third", "last"}
    assert not trainer.failures
