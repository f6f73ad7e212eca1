"""The program that ``tests/distributed/test_processes.py`` has torchrun start: runs a list of jobs, one after another,
on every process.

A job is {"name", "out", "changes": for ``make_federation``, "fault": name of a fault below}. Its outcome on a process
goes to ``<results>/<name>-<process>.json``: the type and text of the error, or a digest of the weights.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.common.digests import tensor_digest
from flora_core.distributed.world import World, session
from flora_core.federation.privacy import Privacy
from flora_core.federation.server import Server
from flora_core.training.steps import CohortSteps
from flora_core.training.trainer import CohortTrainer
from tests.support.federations import Stop, make_clients, make_federation, target_weights

Fault = Callable[[pytest.MonkeyPatch, dict[str, Any]], None]
FAULTS: dict[str, tuple[int, Fault]] = {}


def fault(process: int) -> Callable[[Fault], Fault]:
    """A fault of one process alone."""

    def keep(function: Fault) -> Fault:
        FAULTS[function.__name__] = process, function
        return function

    return keep


@fault(0)
def stop_after_round_1(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    def callback(event: dict[str, Any]) -> None:
        if event["event"] == "round_end":
            raise Stop("as the test wants it")

    changes["callbacks"] = [callback]


@fault(1)
def missing_data(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    clients = make_clients()
    changes["clients"] = [*clients[:2], flora.ClientSpec("c", "not-there.jsonl", clients[2].adapter)]


@fault(1)
def other_rate(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    changes["lr"] = 0.5


@fault(1)
def other_weights(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    from tests.support.federations import make_model

    changes["model"] = make_model(seed=1)


@fault(1)
def other_version(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    patch.setattr("flora_core.version.__version__", "0.0.7")


@fault(1)
def fails_in_round_1(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the disk of this machine is on fire")

    patch.setattr(CohortTrainer, "_report", fail)


@fault(1)
def no_memory(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    whole = CohortSteps._forward_backward

    def narrow(self: Any, batches: Any, step: int, token_budget: int) -> Any:
        if self.tokens_in_flight is not None:
            return whole(self, batches, step, token_budget)
        raise torch.OutOfMemoryError("no room for the whole step")

    patch.setattr(CohortSteps, "_forward_backward", narrow)


@fault(1)
def fails_within_a_pass(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward, steps = LlamaMLP.forward, [0]

    def fail(self: Any, x: Any) -> Any:
        steps[0] += torch.is_grad_enabled()
        if steps[0] == 3:  # the first layer, in the second step
            raise RuntimeError("this layer is on fire")
        return forward(self, x)

    patch.setattr(LlamaMLP, "forward", fail)


@fault(0)
def runs_the_model_alone(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    from tests.support.federations import make_model

    changes["model"] = model = make_model()

    def callback(event: dict[str, Any]) -> None:
        if event["event"] == "round_end":
            model(input_ids=torch.zeros(1, 2, dtype=torch.long))

    changes["callbacks"] = [callback]


@fault(1)
def rounds_otherwise(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    apply = Server.apply

    def another(self: Server, *args: Any) -> Any:
        result = apply(self, *args)
        next(iter(self.model.weights.values()))[0, 0] += 1e-3
        return result

    patch.setattr(Server, "apply", another)


def _asked_to_stop(patch: pytest.MonkeyPatch, at: int) -> None:
    """SIGTERM within step ``at`` of this process, counted over its clients."""
    report, steps = CohortTrainer._report, [0]

    def count(self: Any, *arguments: Any) -> None:
        report(self, *arguments)
        steps[0] += 1
        if steps[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(CohortTrainer, "_report", count)


@fault(0)
def term_to_process_0(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    _asked_to_stop(patch, 2)


@fault(1)
def term_to_process_1(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    _asked_to_stop(patch, 2)


@fault(1)
def killed_in_round_2(patch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    report = CohortTrainer._report

    def kill(self: Any, *arguments: Any) -> None:
        report(self, *arguments)
        if self.round == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(CohortTrainer, "_report", kill)


@contextmanager
def under(name: str | None, process: int, changes: dict[str, Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if name is not None and FAULTS[name][0] == process:
            FAULTS[name][1](patch, changes)
        yield


def arguments(job: dict[str, Any]) -> dict[str, Any]:
    """A job's arguments for ``make_federation``; JSON has no clients and no dtypes."""
    changes = dict(job.get("changes", {}))
    clients = make_clients(changes.pop("ranks", (4, 2, 3)), dropout=changes.pop("dropout", 0.0))
    poisoned, own = changes.pop("poisoned", None), changes.pop("own_targets", None)
    if own:  # all but the first adapt other modules
        clients[1:] = [replace(one, adapter=replace(one.adapter, target_modules=own)) for one in clients[1:]]
    changes["clients"] = [
        flora.ClientSpec(one.name, one.data, one.adapter, {"lr": 1e300}) if one.name == poisoned else one
        for one in clients
    ]
    if "base" in changes:
        from tests.support.federations import make_model

        changes["model"] = make_model(getattr(torch, changes.pop("base")))
    if "held" in changes:
        changes["base"] = changes.pop("held")
    if changes.pop("private", False):
        changes |= {"privacy": Privacy(clip=1.0, noise_multiplier=1.0), "weights": "uniform"}
    if changes.pop("elsewhere", False):
        changes |= {"remote": {"a": lambda task: None}, "weights": "uniform"}
    return changes


def paused_at(job: dict[str, Any]) -> dict[str, int]:
    """Client -> the step at which it stopped, of those that had begun."""
    path = Path(job["out"] or "") / "paused" / "round.json"
    clients = json.loads(path.read_text())["state"]["clients"] if path.is_file() else {}
    return {name: state["step"] for name, state in clients.items()}


def gathered(model: Any) -> list[int]:
    """Bytes of one weight of a sharded base within a pass, and of the same tensor after it."""
    seen: list[torch.Tensor] = []
    sizes: list[int] = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        seen.append(module.weight)
        sizes.append(module.weight.untyped_storage().size())

    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(look)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    handle.remove()
    return [*sizes, seen[0].untyped_storage().size()]


def run(job: dict[str, Any], world: World) -> dict[str, Any]:
    """One job on this process."""
    changes, before = arguments(job), world.moved_bytes
    with under(job.get("fault"), world.process, changes):
        try:
            with world.together():
                federation = make_federation(job.get("out"), **changes)
                result = federation.run()
        except BaseException as error:
            if job.get("ends"):
                raise
            return {"error": type(error).__name__, "text": str(error), "steps": paused_at(job)}
    base = federation.server.model.base
    digest = federation.server.digest() if base else tensor_digest(target_weights(federation.model).items())
    held = {"held": base.held_bytes, "gathered": gathered(federation.model)} if base else {}
    found = [event for event in result.events if event["event"] == "evaluated"]
    return {"digest": digest, "moved": world.moved_bytes - before, "evaluated": len(found), **held}


def main(jobs: str, results: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    with session() as world:
        for job in json.loads(Path(jobs).read_text()):
            found = run(job, world)
            (Path(results) / f"{job['name']}-{world.process}.json").write_text(json.dumps(found))
    assert world.group is None, "threads of a group that outlives its session abort Python at its end"


if __name__ == "__main__":
    main(*sys.argv[1:])
