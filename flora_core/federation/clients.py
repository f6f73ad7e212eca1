"""The clients of a federation, wherever they train: one protocol, with four implementations.

``LocalClients`` train in one cohort here, ``RankClients`` spread over the processes that torchrun started,
``CallableClients`` are functions that are asked while others train here, ``Parties`` train on machines of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..adapters import ClientUpdate
from ..aggregation import Norm, Strategy
from ..common import derive, require
from ..config import FederationConfig, TrainConfig
from ..model import ClientSpec, Cohort, attach, detach
from ..runs import Event, EventLog
from .judge import Judge, promised
from .server import Server

# Clients that are checked together before training: their adapters are in memory at one time.
TOGETHER = 64


@dataclass(frozen=True)
class RunSetup:
    """A run's model and settings, as ``Federation`` takes them."""

    model: Any
    tokenizer: Any
    strategy: Strategy
    config: FederationConfig
    train: TrainConfig
    target_modules: Sequence[str] | str | None = None
    backend: str = "auto"
    fuse: str = "auto"

    @contextmanager
    def attached(self, specs: Sequence[ClientSpec], number: int | None = None) -> Iterator[Cohort]:
        """Attach clients to the model for the block, with the fresh adapters of a round."""
        seed = 0 if number is None else derive(self.config.seed, "round", number)
        cohort = attach(self.model, specs, self.target_modules, seed=seed, backend=self.backend, fuse=self.fuse)
        try:
            yield cohort
        finally:
            detach(self.model)

    def expect(self, specs: Sequence[ClientSpec]) -> dict[str, ClientUpdate]:
        """Client -> the update that its configuration promises.

        Raises:
            ValueError: If one would adapt nothing.
        """
        found = {}
        for first in range(0, len(specs), TOGETHER):
            with self.attached(specs[first : first + TOGETHER]) as cohort:
                found |= {name: checked_promise(cohort, name) for name in cohort.names}
        return found


def checked_promise(cohort: Cohort, client: str) -> ClientUpdate:
    """Give what ``promised`` gives for a client that adapts something."""
    mine = promised(cohort, client)
    require(bool(mine.adapters), f"client {client!r} has rank 0 everywhere; leave it out")
    return mine


@dataclass(frozen=True)
class Round:
    """One round, as the clients see it.

    Args:
        number: From 1.
        names: Its clients, in their order.
        server: Gives each client what it starts from.
        judge: For those who judge updates where they are trained.
        log: For warnings and progress.
        stop: Whether the run was asked to stop.
        begun: Client -> where its training goes on, after a stop within the round.
    """

    number: int
    names: Sequence[str]
    server: Server
    judge: Judge
    log: EventLog
    stop: Callable[[], bool]
    begun: Mapping[str, Any] = field(default_factory=dict)

    def start(self, of: int, cohorts: int, **facts: Any) -> None:
        """Record that the clients' training starts."""
        self.log.emit("round_start", round=self.number, rounds=of, clients=list(self.names), cohorts=cohorts, **facts)


@dataclass
class Trained:
    """A round's results, before they are judged.

    Args:
        updates: In any order.
        failures: Client -> why there is no update of it.
        metrics: Client -> its ``client_done`` event, for each of the round's clients.
        answers: Client -> what came and could not be read as an update.
        norms: Client -> the size of its update, where that was judged in the process that trained it.
        sums: Module -> ``sum_k p_k s_k B_k A_k`` in float64, where factors did not move between processes.
    """

    updates: list[ClientUpdate] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Event] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


class Clients(Protocol):
    """Whoever trains.

    Attributes:
        specs: All known clients by name, in their order; with encoded data once ``prepare`` was called.
        expected: Client -> the update that it promised.
        optimizer: Client -> the optimizer's state that it carries to its next round.
        on_own_machines: Whether they hold copies of the global model elsewhere, and come and go within one run.
    """

    specs: dict[str, ClientSpec]
    expected: dict[str, ClientUpdate]
    optimizer: dict[str, Any]
    on_own_machines: bool

    def prepare(self) -> list[Event]:
        """Check model and data with every client before training; warnings.

        Raises:
            ValueError: If they do not fit.
        """
        ...

    def gather(self, server: Server, number: int, log: EventLog) -> list[str]:
        """Names of those who can take part in a round."""
        ...

    def train(self, round: Round) -> Trained:
        """Train a round.

        Raises:
            Paused: After a request to stop, with all states.
        """
        ...

    def conclude(self, round: Round, good: Sequence[str], refused: Mapping[str, str], applied: bool) -> None:
        """End a round: the optimizer's state of a refused client is dropped; an applied change may have to be sent."""
        ...


def client_done(number: int, spec: ClientSpec, **metrics: Any) -> Event:
    """The event of a client that trained outside this process; its metrics are zero where there are none."""
    nothing = {"loss_first": None, "loss_last": None, "tokens": 0, "steps": 0, "seconds": 0.0, "tokens_per_s": 0.0}
    event = {"event": "client_done", "round": number, "client": spec.name, "rank": spec.adapter.rank}
    return {**event, "examples": len(spec.data), **nothing, **metrics}
