"""Where a run stops and how it goes on there: as the same run, in all of its processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..common import on_device, tensor_digest
from ..distributed import World
from ..runs import Event, EventLog, RunFolder, identity
from .clients import Clients, RunSetup
from .evaluation import HeldOut
from .exchange import share_choices
from .privacy import PrivateSum
from .server import Server


@dataclass
class Progress:
    """How far a run has come.

    Args:
        round: The newest whole round.
        server: What ``Server.saved`` gave after it; empty before the first.
        optimizer: Client -> its optimizer's state.
        paused: Of a round that was stopped between two steps: ``names`` and ``clients`` {name: state}.
        finished: Whether the run was over and left what it is to leave.
        events: All so far.
    """

    round: int = 0
    server: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    paused: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    events: list[Event] = field(default_factory=list)


def kept_settings(setup: RunSetup) -> dict[str, Any]:
    """List the settings of the saved model; a finished run that saved it otherwise saves it again."""
    return {"save_model": setup.config.save_model, "save_dtype": setup.config.save_dtype}


def find_progress(
    folder: RunFolder,
    setup: RunSetup,
    server: Server,
    facts: tuple[Mapping[str, Any], Mapping[str, Any], str],
    private: PrivateSum | None,
) -> tuple[Progress, list[str]]:
    """Find the newest whole round in a run's folder, if the folder holds this run.

    Args:
        folder: Of the run.
        setup, server: Of the run.
        facts: Its fingerprint, its environment and the digest of the weights that it begins with.
        private: Opens its ledger of releases.
    Returns:
        The progress, and warnings.
    """
    mine, where, start = facts
    notes, device = folder.record.begin(mine, where, start), server.model.device
    # Whole weights of a sharded base have no room on a device.
    snapshot, damaged = folder.newest(device if server.model.base is None else torch.device("cpu"))
    found = Progress()
    if snapshot is None:
        folder.record.check_start(start)
    else:
        found.round, found.server = snapshot.round, snapshot.state["server"]
        found.optimizer = on_device(snapshot.state["optimizer"], device)
    if private is not None:
        private.open(found.round)
    notes += folder.record.extend(mine)
    found.paused, torn = folder.pause(found.round + 1, device)
    folder.drop_superfluous(found.round, pause=not found.paused)
    saved_otherwise = setup.config.save_model and folder.record.kept not in (None, kept_settings(setup))
    found.finished = folder.record.finished and not saved_otherwise
    over = found.finished and found.round == setup.config.rounds
    found.events = folder.metrics.events() if over else folder.restore_metrics(snapshot)
    return found, notes + damaged + torn


def share_progress(world: World, found: Progress, server: Server) -> Progress:
    """Give every process what the first one found in the folder: the others may not even see its disk."""
    if world.size == 1:
        return found
    world.barrier()
    # What is sharded goes to each process in parts, by itself.
    sharded = {} if server.model.base is None else {"weights": {}, "low_bits": {}}
    parts = {f: getattr(found, f) for f in Progress.__dataclass_fields__}
    sent = world.send({**parts, "server": {**found.server, **sharded} if found.server else {}})
    share_choices(world, server.model.device)
    return found if world.first else Progress(**sent)


def keep_alike(world: World, server: Server, log: EventLog, number: int) -> None:
    """See that a round left all processes the same weights; where a machine rounds otherwise, the first's count."""
    if world.size == 1 or server.model.base is not None:
        return  # no other process has a copy
    low_bits = {f"{module} low bits": low for module, low in server.model.low_bits.items()}
    digests = world.exchange([tensor_digest({**server.model.weights, **low_bits}.items())])
    others = [str(process) for process, digest in enumerate(digests) if digest != digests[0]]
    if others:
        found = world.send(server.saved())
        if not world.first:
            server.restore(found)
        text = f"processes {', '.join(others)} came to other weights than process 0 and take its: their machines differ"
        log.emit("warning", round=number, message=text)


def fingerprint(setup: RunSetup, server: Server, clients: Clients, held_out: HeldOut) -> dict[str, Any]:
    """Everything that a run's result depends on, by dotted name; a resumed run must match it."""
    config = asdict(replace(setup.config, out=None))
    # These change what is kept, and nothing that is computed.
    for name in ("base", "out", "keep_snapshots", "save_model", "save_dtype", "save_adapters"):
        config.pop(name)
    model, base = setup.model, server.model.base
    targets = {f"{module}.weight" for module in server.model.weights}
    parameters = model.named_parameters() if base is None else base.parameters()
    others = {
        "strategy": setup.strategy.name,
        "target_modules": setup.target_modules,
        "backend": setup.backend,
        "fuse": setup.fuse,
        **held_out.digests(),
        "model.class": type(model).__name__,
        "model.dtype": str(model.dtype),
        "model.weights": tensor_digest((name, part) for name, part in parameters if name not in targets),
    }
    facts = identity(list(clients.specs.values()), setup.train, config, others)
    # Parties come and go within one run.
    return {name: fact for name, fact in facts.items() if not (clients.on_own_machines and name.startswith("clients"))}
