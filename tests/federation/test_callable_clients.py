"""Clients elsewhere, which fail, hang or lie: the round goes on with the good ones, and what was refused is kept."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.adapters.peft import save_peft_adapter
from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation import aggregate
from flora_core.common.errors import Stopped
from flora_core.common.seeds import generator
from flora_core.federation.callable_clients import PendingClients, Task, receive
from flora_core.merge.in_place import apply_base_delta_
from flora_core.model.targets import target_weights as writable
from tests.support.federations import files, make_clients, make_federation, make_model, target_weights

NAMES = "abcdefghij"
REFUSED = pytest.mark.filterwarnings("ignore:client .* was refused:RuntimeWarning")


def honest(task: Task) -> ClientUpdate:
    """Answer of an honest client: the same whenever it is asked."""
    adapters = {}
    for module, (A_RK, B_RN) in task.start.items():
        random = generator(0, task.client, task.round, module)
        adapters[module] = A_RK, 1e-2 * torch.randn(B_RN.shape, generator=random)
    return ClientUpdate(task.client, adapters, dict(task.scaling), 1.0)


def changed(task: Task, **fields: Any) -> ClientUpdate:
    update = honest(task)
    for name, value in fields.items():
        setattr(update, name, value)
    return update


def with_value(task: Task, value: float) -> ClientUpdate:
    update = honest(task)
    next(iter(update.adapters.values()))[1][0, 0] = value
    return update


def crash(task: Task) -> ClientUpdate:
    raise ConnectionResetError("the line is dead")


def hang(task: Task) -> ClientUpdate:
    threading.Event().wait()
    raise AssertionError


LIES: dict[str, Any] = {
    "fails": (crash, "it failed: ConnectionResetError: the line is dead"),
    "hangs": (hang, "it sent nothing within the deadline of"),
    "exits": (lambda task: sys.exit(3), "it failed: SystemExit: 3"),
    "nan": (lambda task: with_value(task, math.nan), "is not finite: 1 of"),
    "too large": (lambda task: with_value(task, 1e6), "above the bound of 50 (max_norm)"),
    "far from the others": (lambda task: with_value(task, 20.0), "times the round's median of"),
    "another rank": (
        lambda task: changed(task, adapters={m: (A[:1], B[:1]) for m, (A, B) in task.start.items()}),
        "by its configuration, rank first, got",
    ),
    "another name": (lambda task: changed(task, client="a" if task.client != "a" else "b"), "in the name of"),
    "another scaling": (lambda task: changed(task, scaling=dict.fromkeys(task.scaling, 1e9)), "the scaling of"),
    "no update": (lambda task: {"weights": 1}, "it sent a dict, and not an update"),
    "no mapping": (lambda task: changed(task, adapters=[1, 2]), "its adapters are a list, and no mapping"),
    "no tensors": (lambda task: changed(task, adapters={"x": (1, 2)}), "must name two factors"),
    "no folder": (lambda task: "/nowhere/at/all", "/nowhere/at/all holds no PEFT adapter"),
    "a device": (lambda task: "/dev/zero", "/dev/zero holds no PEFT adapter"),
}


FAILS = ("fails", "exits")
HOSTILE = [kind for kind in LIES if kind not in (*FAILS, "hangs")]


def chaos(number: int, names: str = NAMES, share: float = 0.3) -> dict[str, str]:
    """Who does what wrong in a round: 30% of the clients, drawn by the round; one fails, one hangs, one is hostile."""
    random = Random(f"chaos {number}")
    bad = random.sample(names, round(share * len(names)))
    kinds = [random.choice(FAILS), "hangs", HOSTILE[(number - 1) % len(HOSTILE)]]
    return {name: kinds[i % len(kinds)] for i, name in enumerate(bad)}


def remotes(faults: dict[int, dict[str, str]]) -> dict[str, Any]:
    def remote(task: Task) -> Any:
        fault = faults.get(task.round, {}).get(task.client)
        return honest(task) if fault is None else LIES[fault][0](task)

    return dict.fromkeys(NAMES, remote)


def elsewhere(out: Path | None, faults: dict[int, dict[str, str]], rounds: int, **changes: Any) -> flora.Federation:
    clients = [
        flora.ClientSpec(name, None, spec.adapter) for name, spec in zip(NAMES, make_clients([2, 3] * 5), strict=True)
    ]
    defaults: dict[str, Any] = dict(
        weights="uniform", deadline_s=3.0, max_norm=50.0, outlier_factor=10.0, remote=remotes(faults), eval_data=None
    )
    return make_federation(out, clients=clients, rounds=rounds, **{**defaults, **changes})


@REFUSED
@pytest.mark.slow
def test_a_run_with_a_third_of_its_clients_bad_is_the_run_without_them(tmp_path, scale):
    rounds = scale(2, 12, "rounds")
    faults = {number: chaos(number) for number in range(1, rounds + 1)}
    model = make_model()
    result = elsewhere(tmp_path, faults, rounds, model=model, save_model=False).run()
    # What a round makes of the good updates alone, by the two functions that anybody can call.
    weights = writable(other := make_model(), list(target_weights(make_model())))
    for number in range(1, rounds + 1):
        assert {name: list(kinds) for name, kinds in faults[number].items()}.keys() == result.history[number - 1][
            "refused"
        ].keys()
        for name, reason in result.history[number - 1]["refused"].items():
            words = LIES[faults[number][name]][1]
            assert words in reason, f"{faults[number][name]}: {reason}"
            kept = json.loads((tmp_path / "quarantine" / f"{number:04d}" / name / "reason.json").read_text())
            assert kept["reason"] == reason
        good = [name for name in NAMES if name not in faults[number]]
        updates = [update for update in saved(tmp_path, number) if update.client in good]
        assert [update.client for update in updates] == good
        apply_base_delta_(weights, aggregate(updates).base_delta)
    for module, weight in target_weights(model).items():
        assert torch.equal(weight, target_weights(other)[module]), module


def saved(out: Path, number: int) -> list[ClientUpdate]:
    folder = out / "rounds" / f"{number:04d}"
    return [flora.load_peft_adapter(path) for path in sorted(folder.iterdir()) if path.is_dir()]


@REFUSED
@pytest.mark.parametrize("fault", sorted(set(LIES) - {"hangs", "far from the others"}))
def test_each_fault_costs_the_round_one_client(fault):
    result = elsewhere(None, {1: {"c": fault}}, 1).run()
    (one,) = result.history
    assert one["applied"]
    assert list(one["refused"]) == ["c"]
    assert LIES[fault][1] in one["refused"]["c"]


@REFUSED
def test_with_fewer_than_min_clients_the_round_changes_nothing(tmp_path):
    model, faults = make_model(), {1: dict.fromkeys("abc", "fails")}
    result = elsewhere(tmp_path, faults, 1, model=model, min_clients=8).run()
    assert not result.history[0]["applied"]
    assert all(torch.equal(weight, target_weights(make_model())[m]) for m, weight in target_weights(model).items())
    assert elsewhere(None, faults, 1, min_clients=7).run().history[0]["applied"]


def test_folders_may_be_sent_and_clients_here_and_elsewhere_go_together(tmp_path):
    """The bytes are those of a run in which every client is elsewhere, or none."""

    def by_folder(task: Task) -> Path:
        # Each machine has the base under a name of its own, which says nothing of the weights.
        save_peft_adapter(honest(task), tmp_path / f"{task.client}{task.round}", base_model=f"/{task.client}/base")
        return tmp_path / f"{task.client}{task.round}"

    def by_update(task: Task) -> flora.ClientUpdate:
        return replace(honest(task), base=f"/{task.client}/base")

    own = {"a": by_update, "b": by_update, "c": by_folder, "d": by_folder}
    one, other = make_model(), make_model()
    elsewhere(None, {}, 2, model=one).run()
    elsewhere(None, {}, 2, model=other, remote={**remotes({}), **own}).run()
    assert all(torch.equal(w, target_weights(other)[m]) for m, w in target_weights(one).items())
    clients = [spec if spec.name != "b" else flora.ClientSpec("b", None, spec.adapter) for spec in make_clients()]
    mixed = make_federation(clients=clients, remote={"b": honest}, weights="uniform", rounds=1).run()
    assert mixed.history[0]["clients"]["a"]["steps"] > 0
    assert mixed.history[0]["clients"]["b"]["steps"] == 0
    assert list(mixed.history[0]["clients"]) == ["a", "b", "c"]


def test_nobody_can_change_an_update_after_it_was_judged():
    update = ClientUpdate("a", {"x": (torch.ones(1, 2), torch.ones(1, 2))}, {"x": 1.0})
    got = receive(update, update)
    update.adapters["x"][0].fill_(math.nan)
    update.scaling["x"] = math.nan
    assert torch.equal(got.adapters["x"][0], torch.ones(1, 2))
    assert got.scaling == {"x": 1.0}


def test_a_clock_that_jumps_moves_no_deadline(monkeypatch):
    jumps = iter([0.0, 1e9, -1e9, 5e9] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    task = Task(1, "a", {}, {})
    began = time.monotonic()
    answers, failed = PendingClients({"a": lambda task: time.sleep(0.3) or "here"}, {"a": task}, 30.0).wait()
    assert (answers, failed) == ({"a": "here"}, {})
    answers, failed = PendingClients({"a": hang}, {"a": task}, 0.5).wait()
    assert failed == {"a": "it sent nothing within the deadline of 0.5 s"}
    assert time.monotonic() - began < 20


def test_a_server_that_waits_for_ever_can_be_stopped(tmp_path):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    fed = elsewhere(tmp_path, {1: {"b": "hangs"}}, 2, deadline_s=None)
    with pytest.raises(Stopped, match="stopped within round 1"):
        fed.run()
    assert time.monotonic() - began < 60
    elsewhere(tmp_path, {}, 2, deadline_s=None).run()
    elsewhere(tmp_path / "whole", {}, 2, deadline_s=None).run()
    assert files(tmp_path / "rounds", ".safetensors") == files(tmp_path / "whole" / "rounds", ".safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(weights="examples"), "weights='examples' would take the word of clients elsewhere"),
        (dict(remote={"z": honest}), "remote names clients that are not there: z"),
        (dict(deadline_s=0.0), "deadline_s must be above 0, got 0"),
        (dict(outlier_factor=0.5), r"outlier_factor must be at least 1, got 0\.5"),
        (dict(clip_update=0.0), "clip_update must be above 0, got 0"),
    ],
)
def test_settings_that_make_no_sense(changes, words):
    with pytest.raises(ValueError, match=words):
        elsewhere(None, {}, 1, **changes)


def test_updates_are_clipped_and_that_is_told():
    events: list[dict[str, Any]] = []
    plain, short = make_model(torch.float64), make_model(torch.float64)
    for model, bound in ((plain, None), (short, 1e-3)):
        elsewhere(None, {}, 1, model=model, clip_update=bound, callbacks=[events.append]).run()
    told = [event for event in events if event["event"] == "warning"]
    assert [event["client"] for event in told] == list(NAMES)
    assert "was clipped from a norm of" in told[0]["message"]
    base = target_weights(make_model(torch.float64))
    step = math.sqrt(sum(float((w - base[m]).square().sum()) for m, w in target_weights(short).items()))
    assert 0 < step <= 1e-3
    assert step < math.sqrt(sum(float((w - base[m]).square().sum()) for m, w in target_weights(plain).items()))
