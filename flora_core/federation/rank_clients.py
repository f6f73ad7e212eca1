"""Clients spread over the processes that torchrun started: each trains a share and receives the others' results.

Every process comes to the same result of a round, so each has the same global model after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters import ClientUpdate, packed, unpacked
from ..aggregation import Norm
from ..distributed import World
from ..runs import Event, EventLog
from ..training import CohortTrainer, Paused, spread
from .clients import Round, Trained
from .exchange import choose, partial_sum, share_choices, whole, why_gather, without_factors
from .local_clients import LocalClients
from .server import Server


class RankClients:
    """Clients of all processes; see ``Clients``.

    Args:
        local: Trains this process's share; knows all clients.
        world: The processes.
    """

    on_own_machines = False

    def __init__(self, local: LocalClients, world: World):
        self.local, self.world = local, world
        self.specs, self.expected, self.optimizer = local.specs, local.expected, local.optimizer

    def prepare(self) -> list[Event]:
        """As ``LocalClients.prepare``, in every process."""
        return self.local.prepare()

    def gather(self, server: Server, number: int, log: EventLog) -> list[str]:
        """All of them are always here."""
        return self.local.gather(server, number, log)

    def conclude(self, round: Round, good: Sequence[str], refused: Mapping[str, str], applied: bool) -> None:
        """As ``LocalClients.conclude``, in every process."""
        self.local.conclude(round, good, refused, applied)

    def train(self, round: Round) -> Trained:
        """Train this process's share, and receive what the others trained."""
        shares = spread({name: self.local.work(name, round.number) for name in round.names}, self.world.size)
        done, first = Trained(), len(round.log.events)
        with self.local.trainer(round, shares[self.world.process], done) as trainer:
            planned = len(trainer.plan().cohorts) if trainer else 0
            round.server.model.run_empty_passes()
            round.start(self.local.setup.config.rounds, sum(self.world.barrier(planned)), shares=shares)
            done.updates = self._train_share(trainer, round)
        self.local.keep(trainer, done)
        warnings = [event for event in round.log.events[first:] if event["event"] == "warning"]
        return self._exchange(round, shares, done, warnings)

    def _train_share(self, trainer: CohortTrainer | None, round: Round) -> list[ClientUpdate]:
        """Train what is this process's; where any was asked to stop, all of them do, and each has all states."""
        updates, begun = [], {}
        try:
            updates = trainer.run() if trainer else []
        except Paused as pause:
            begun = pause.state
        round.server.model.run_empty_passes()
        if any(self.world.barrier(bool(begun))):
            if trainer and not begun:
                begun = trainer.finished_states()
            parts = self.world.exchange([{name: state} for name, state in begun.items()])
            raise Paused({name: state for part in parts for one in part for name, state in one.items()})
        return updates

    def _exchange(
        self, round: Round, shares: Sequence[Sequence[str]], done: Trained, warnings: Sequence[Event]
    ) -> Trained:
        """Exchange all processes' results: updates with their norms, or sums; failures, moments, events."""
        before, server, mine = self.world.moved_bytes, round.server, shares[self.world.process]
        everybody = [self.expected[name] for share in shares for name in share]
        why = why_gather(self.local.setup.config, server.strategy.name, server.model.base is not None)
        way = choose(everybody, self.world.size, why)
        verdict = round.judge.each(done.updates, {name: self.expected[name] for name in mine})
        done.answers = {update.client: update for update in done.updates if update.client in verdict.refused}
        done.updates, done.norms, refused = verdict.good, verdict.norms, dict(verdict.refused)
        found = self.world.exchange([{"warnings": warnings}, *self._parts(mine, done, refused, way.reduced)])
        for process, (first, *others) in enumerate(found):
            if process != self.world.process:
                for warning in first["warnings"]:
                    round.log.emit(**warning)
                for part in others:
                    self._receive(part, done, refused)
        round.log.warn_refused(refused)
        done.failures |= refused
        share_choices(self.world, server.model.device)
        order = {name: place for place, name in enumerate(self.expected)}
        done.updates.sort(key=lambda update: order[update.client])
        for module in way.reduced if done.updates else ():
            done.sums[module] = partial_sum(module, done.updates, mine, server.model.weights[module])
            self.world.add_(done.sums[module])
        round.log.emit("exchanged", round=round.number, **way.to_json(), bytes=self.world.moved_bytes - before)
        return done

    def _parts(
        self, mine: Sequence[str], done: Trained, refused: Mapping[str, str], reduced: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Pack this process's clients for the others, one part each."""
        sent = {update.client: update for update in done.updates}
        # A refused update is kept by the first process, for inspection; where sums move, its factors do not.
        sent |= {} if reduced else done.answers
        return [
            {
                "client": name,
                "done": done.metrics[name],
                "failure": done.failures.get(name),
                "refused": refused.get(name),
                "update": packed(without_factors(sent[name], reduced)) if name in sent else None,
                "norm": list(done.norms[name]) if name in done.norms else None,
                "optimizer": self.optimizer.get(name),
            }
            for name in mine
        ]

    def _receive(self, part: Mapping[str, Any], done: Trained, refused: dict[str, str]) -> None:
        name = part["client"]
        done.metrics[name] = part["done"]
        for reasons, reason in ((done.failures, part["failure"]), (refused, part["refused"])):
            if reason is not None:
                reasons[name] = reason
        if part["norm"] is not None:
            done.updates.append(whole(unpacked(part["update"]), self.expected[name]))
            done.norms[name] = Norm(*part["norm"])
        elif part["update"] is not None:
            done.answers[name] = unpacked(part["update"])
        if part["optimizer"] is not None:
            self.optimizer[name] = part["optimizer"]
