"""Clients that train in this process, as one cohort.

Everything random derives from (seed, round, client).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..adapters import ClientUpdate
from ..model import ClientSpec
from ..runs import Event, EventLog
from ..training import CohortTrainer, LocalClient
from .clients import TOGETHER, Round, RunSetup, Trained, checked_promise
from .server import Server


class LocalClients:
    """Clients of one cohort; see ``Clients``.

    Args:
        setup: The run's model and settings.
        specs: One each, with their data.
    """

    on_own_machines = False

    def __init__(self, setup: RunSetup, specs: Sequence[ClientSpec]):
        self.setup, self.specs = setup, {spec.name: spec for spec in specs}
        self.expected: dict[str, ClientUpdate] = {}
        self.optimizer: dict[str, Any] = {}

    def prepare(self) -> list[Event]:
        """Check model and data with every client, and encode the data once; warnings."""
        specs, notes = list(self.specs.values()), []
        for first in range(0, len(specs), TOGETHER):
            notes += self._check(specs[first : first + TOGETHER])
        return notes

    def _check(self, specs: Sequence[ClientSpec]) -> list[Event]:
        notes: list[Event] = []
        with self.setup.attached(specs) as cohort:
            trainer = CohortTrainer(cohort, self.setup.train, self.setup.tokenizer, callbacks=[notes.append])
            for spec in specs:
                self.specs[spec.name] = replace(spec, data=trainer.clients[spec.name].examples)
                self.expected[spec.name] = checked_promise(cohort, spec.name)
        return notes

    def gather(self, server: Server, number: int, log: EventLog) -> list[str]:
        """All of them are always here."""
        return list(self.specs)

    def train(self, round: Round) -> Trained:
        """Train those of the round's clients who are here, together."""
        done = Trained()
        with self.trainer(round, [name for name in round.names if name in self.specs], done) as trainer:
            round.start(self.setup.config.rounds, len(trainer.plan().cohorts) if trainer else 0)
            done.updates = trainer.run() if trainer else []
        self.keep(trainer, done)
        return done

    @contextmanager
    def trainer(self, round: Round, names: Sequence[str], done: Trained) -> Iterator[CohortTrainer | None]:
        """Make the trainer of these clients, whose events go to ``done`` and the log; None if there are none."""
        if not names:
            yield None
            return
        with self.setup.attached([self.specs[name] for name in names], round.number) as cohort:
            round.server.load_starts(cohort, round.number)
            yield CohortTrainer(
                cohort,
                self.setup.train,
                self.setup.tokenizer,
                round=round.number - 1,
                rounds=self.setup.config.rounds,
                callbacks=[lambda event: _hear(event, done, round.log)],
                optimizer_state=self.optimizer,
                trainable=round.server.trainable,
                penalties=round.server.penalties(names),
                stop=round.stop,
                resume={name: round.begun[name] for name in names if name in round.begun},
            )

    def keep(self, trainer: CohortTrainer | None, done: Trained) -> None:
        """Take over what a trainer leaves: moments, and who failed."""
        if trainer is None:
            return
        mine = {name: trainer.optimizer_state.get(name) for name in trainer.clients}
        self.optimizer |= {name: state for name, state in mine.items() if state is not None}
        done.failures |= trainer.failures

    def work(self, name: str, number: int) -> float:
        """Predict the cost of training a client in a round: tokens times the numbers that each meets."""
        spec = self.specs[name]
        client = LocalClient(name, self.setup.train.overridden(spec.train), spec.data, number - 1)
        mean = sum(len(example.input_ids) for example in client.examples) / len(client.examples)
        tokens = client.steps * min(client.per_step, len(client.examples)) * mean
        own = sum(factor.numel() for pair in self.expected[name].adapters.values() for factor in pair)
        return tokens * (self.setup.model.num_parameters() + own)

    def conclude(self, round: Round, good: Sequence[str], refused: Mapping[str, str], applied: bool) -> None:
        """Drop the optimizer's state of refused clients."""
        kept = {name: self.optimizer[name] for name in self.specs if name in self.optimizer and name not in refused}
        self.optimizer.clear()
        self.optimizer.update(kept)


def _hear(event: Event, done: Trained, log: EventLog) -> None:
    """Pass progress on at once; a client's result is reported when its update has been judged."""
    if event["event"] == "client_done":
        done.metrics[event["client"]] = event
    elif event["event"] == "warning":
        log.emit(**event)
    else:
        log.report(event)
