"""Train a round's clients, in this process, in several or remotely, and judge their updates.

Everything random derives from (seed, round, client), but for the draws of a private run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..adapters import ClientUpdate, packed, unpacked
from ..aggregation import clipped
from ..common import derive, generator
from ..config import FederationConfig, TrainConfig
from ..distributed import Ranks
from ..model import ClientSpec, Cohort, attach, detach
from ..ops import autotune
from ..runs import Event, EventLog, RunFolder
from ..training import CohortTrainer, LocalClient, Paused, spread
from .callable_clients import PendingClients, Remote, Task, receive, remote_done
from .exchange import choose, partial_sum, whole, why_gather, without_factors
from .judge import judge_updates, weight_of
from .privacy import PrivateSum
from .quarantine import quarantine
from .server import Server


class TrainingRound:
    """The part of a ``Federation`` that turns a round's clients into good updates."""

    model: Any
    tokenizer: Any
    config: FederationConfig
    train: TrainConfig
    specs: dict[str, ClientSpec]
    remote: dict[str, Remote]
    expected: dict[str, ClientUpdate]
    server: Server
    folder: RunFolder | None
    private: PrivateSum | None
    target_modules: Sequence[str] | str | None
    backend: str
    fuse: str
    round: int
    optimizer: dict[str, Any]
    paused: dict[str, Any]
    heard: list[Event]
    sums: dict[str, torch.Tensor]
    ranks: Ranks
    log: EventLog
    stop: Callable[[], bool]

    @contextmanager
    def _attached(self, specs: Sequence[ClientSpec], seed: int = 0) -> Iterator[Cohort]:
        cohort = attach(self.model, specs, self.target_modules, seed=seed, backend=self.backend, fuse=self.fuse)
        try:
            yield cohort
        finally:
            detach(self.model)

    def sampled(self, number: int) -> list[str]:
        """The clients of a round, in their order: drawn by seed and round alone, under privacy in secret."""
        names, config = list(self.specs), self.config
        if self.private is not None:
            return self.private.sample(names) if self.private.affordable else []
        count = max(1, config.min_clients, round(config.fraction * len(names)))
        drawn = torch.randperm(len(names), generator=generator(config.seed, "sample", number))
        return [names[i] for i in sorted(drawn[:count].tolist())]

    def _train(self, number: int, names: Sequence[str]) -> list[ClientUpdate]:
        """Train a round's clients, those here together; the good updates, with their weights."""
        here = [name for name in names if name not in self.remote]
        asked = self._ask(number, [name for name in names if name in self.remote])
        done: dict[str, Event] = {}
        updates, failures = self._train_here(number, here, names, done)
        answers, silent = asked.wait(self.stop)
        for name, answer in answers.items():
            try:
                updates.append(receive(answer, self.expected[name], self.server.device))
            except (ValueError, OSError) as error:
                silent[name] = str(error)
        self._warn_of(silent)
        updates.sort(key=lambda update: names.index(update.client))
        good, refused = self._judge(updates, names)
        refused |= failures | silent
        trained = {update.client: update for update in updates}
        for name, reason in refused.items():
            self._set_aside(number, name, reason, answers.get(name, trained.get(name)))
        kept = [name for name in self.specs if name in self.optimizer and name not in refused]
        self.optimizer = {name: self.optimizer[name] for name in kept}
        for name in names:
            event = done.get(name) or remote_done(number, self.specs[name], asked.seconds.get(name))
            self.log.emit(**event | ({"refused": refused[name]} if name in refused else {}))
        return good

    def _train_here(
        self, number: int, here: Sequence[str], names: Sequence[str], done: dict[str, Event]
    ) -> tuple[list[ClientUpdate], dict[str, str]]:
        start: Event = {"round": number, "rounds": self.config.rounds, "clients": list(names)}
        self.heard, self.sums = [], {}
        if not here:
            self.log.emit("round_start", **start, cohorts=0)
            return [], {}
        several = self.ranks.size > 1
        shares = spread({name: self._work(name) for name in here}, self.ranks.size) if several else [list(here)]
        with self._trainer(number, shares[self.ranks.rank], done) as trainer:
            planned = len(trainer.plan().cohorts) if trainer else 0
            self._run_along()
            cohorts = sum(self.ranks.meet(planned))
            dealt = {"shares": shares} if several else {}
            self.log.emit("round_start", **start, cohorts=cohorts, **dealt)
            updates = self._train_share(trainer)
        mine = {} if trainer is None else {name: trainer.optimizer_state.get(name) for name in trainer.clients}
        self.optimizer |= {name: state for name, state in mine.items() if state is not None}
        return self._swap(shares, updates, {} if trainer is None else trainer.failures, done)

    @contextmanager
    def _trainer(self, number: int, names: Sequence[str], done: dict[str, Event]) -> Iterator[CohortTrainer | None]:
        """Make the trainer of these clients for this round; None if there are none."""
        if not names:
            yield None
            return
        begun = self.paused.get("clients", {})
        with self._attached([self.specs[n] for n in names], derive(self.config.seed, "round", number)) as cohort:
            self.server.load_starts(cohort, number)
            yield CohortTrainer(
                cohort,
                self.train,
                self.tokenizer,
                round=number - 1,
                rounds=self.config.rounds,
                callbacks=[lambda event: self._hear(event, done)],
                optimizer_state=self.optimizer,
                trainable=self.server.trainable,
                penalties=self.server.penalties(names),
                stop=self.stop,
                resume={name: begun[name] for name in names if name in begun},
            )

    def _work(self, name: str) -> float:
        """Predict the cost of training a client in this round: tokens times the numbers that each meets."""
        spec = self.specs[name]
        client = LocalClient(name, self.train.overridden(spec.train), spec.data, self.round)
        mean = sum(len(example.input_ids) for example in client.examples) / len(client.examples)
        tokens = client.steps * min(client.per_step, len(client.examples)) * mean
        own = sum(factor.numel() for pair in self.expected[name].adapters.values() for factor in pair)
        return tokens * (self.model.num_parameters() + own)

    def _train_share(self, trainer: CohortTrainer | None) -> list[ClientUpdate]:
        """Train what is this rank's; where any rank was asked to stop, all of them do, and each has all states."""
        updates, begun = [], {}
        try:
            updates = trainer.run() if trainer else []
        except Paused as pause:
            if self.ranks.size == 1:
                raise
            begun = pause.state
        self._run_along()
        if any(self.ranks.meet(bool(begun))):
            if trainer and not begun:
                begun = trainer.finished_states()
            parts = self.ranks.exchange([{name: state} for name, state in begun.items()])
            raise Paused({name: state for part in parts for one in part for name, state in one.items()})
        return updates

    def _run_along(self) -> None:
        """With a sharded base, run the other ranks' passes along until none has any left."""
        if self.server.base is not None:
            self.server.base.run_along()

    def _swap(
        self,
        shares: Sequence[Sequence[str]],
        updates: list[ClientUpdate],
        failures: dict[str, str],
        done: dict[str, Event],
    ) -> tuple[list[ClientUpdate], dict[str, str]]:
        """Exchange the results of all processes' clients: updates, failures, moments, events."""
        if self.ranks.size == 1:
            return updates, failures
        before, mine = self.ranks.moved_bytes, shares[self.ranks.rank]
        everybody = [self.expected[name] for share in shares for name in share]
        why = why_gather(self.config, self.server.strategy.name, self.server.base is not None)
        way = choose(everybody, self.ranks.size, why)
        if way.reduced:
            # The others will not see these factors.
            updates, refused = self._judge(updates, mine)
            failures |= refused
        ready = {update.client: without_factors(update, way.reduced) for update in updates}
        parts: list[dict[str, Any]] = [{"fuse": autotune.used(), "warnings": self.heard}]
        for name in mine:
            part = {"client": name, "done": done[name], "failure": failures.get(name)}
            part |= {"update": packed(ready[name]) if name in ready else None, "optimizer": self.optimizer.get(name)}
            parts.append(part)
        all_parts = self.ranks.exchange(parts)
        self._use_choices([first["fuse"] for first, *_ in all_parts])
        for rank, (first, *others) in enumerate(all_parts):
            if rank == self.ranks.rank:
                continue
            for warning in first["warnings"]:
                self.log.emit(**warning)
            for part in others:
                name = part["client"]
                done[name] = part["done"]
                failures |= {} if part["failure"] is None else {name: part["failure"]}
                updates += [] if part["update"] is None else [whole(unpacked(part["update"]), self.expected[name])]
                self.optimizer |= {} if part["optimizer"] is None else {name: part["optimizer"]}
        if way.reduced and updates:
            order = {name: place for place, name in enumerate(self.expected)}
            updates.sort(key=lambda update: order[update.client])
            for module in way.reduced:
                self.sums[module] = partial_sum(module, updates, mine, self.server.weights[module])
                self.ranks.add_(self.sums[module])
        self.log.emit("exchanged", round=self.round + 1, **way.to_json(), bytes=self.ranks.moved_bytes - before)
        return updates, failures

    def _use_choices(self, used: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
        """Fuse as was measured anywhere, the lowest rank's choice first: a client's bits must not hang on its rank."""
        merged: dict[str, Any] = {}
        for of_device in used:
            for choices in of_device.values():
                merged = {**choices, **merged}
        if merged:
            autotune.use({str(self.server.device): merged})

    def _ask(self, number: int, names: Sequence[str]) -> PendingClients:
        """Start the remote clients; they are waited for when the local ones are done."""
        if not names:
            return PendingClients({}, {}, None)
        self.server.refuse_penalties(names)
        with self._attached([self.specs[n] for n in names], derive(self.config.seed, "round", number)) as cohort:
            self.server.load_starts(cohort, number)
            starts = {name: cohort.update(name) for name in names}
        trainable = self.server.trainable
        tasks = {n: Task(number, n, start.adapters, start.scaling, trainable) for n, start in starts.items()}
        return PendingClients(self.remote, tasks, self.config.deadline_s)

    def _set_aside(self, number: int, name: str, reason: str, answer: Any) -> None:
        """Keep what was refused, for people to look at; that this fails must not cost the others their round."""
        if self.folder is None:
            return
        # Under privacy nothing of a client's is kept but what went wrong.
        answer = None if self.config.privacy else answer
        # Only a client of the run has a folder of its own name.
        folder = self.folder.record.client_folder(name) if name in self.specs else None
        try:
            quarantine(self.folder.path, number, name, reason, answer, self.expected.get(name), folder)
        except OSError as error:
            self.log.emit("warning", round=number, client=name, message=f"{name}'s update is not kept apart: {error}")

    def _hear(self, event: Event, done: dict[str, Event]) -> None:
        """Pass progress on at once; a client's result is reported when its update has been judged."""
        if event["event"] == "client_done":
            done[event["client"]] = event
        elif event["event"] == "warning":
            self.heard.append(event)
            self.log.emit(**event)
        else:
            self.log.report(event)

    def _judge(
        self, updates: Sequence[ClientUpdate], names: Sequence[str]
    ) -> tuple[list[ClientUpdate], dict[str, str]]:
        if self.sums:
            # Of clients whose factors do not move each rank judges its own.
            return list(updates), {}
        bound = self.server.largest if self.config.max_norm is None else min(self.server.largest, self.config.max_norm)
        config = self.config
        good, refused = judge_updates(
            updates, {name: self.expected[name] for name in names}, bound, config.outlier_factor
        )
        self._warn_of(refused)
        if config.clip_update is not None:
            good, before = clipped(good, config.clip_update)
            for name, norm in before.items():
                text = f"client {name!r} was clipped from a norm of {norm:.3g} to {config.clip_update:g} (clip_update)"
                self.log.emit("warning", round=self.round + 1, client=name, message=text)
        for update in good:
            update.weight = weight_of(update, config.weights)
        return good, refused

    def _warn_of(self, refused: Mapping[str, str]) -> None:
        """Warn of refused clients, for people without callbacks."""
        for name, reason in refused.items() if self.ranks.first else ():
            warnings.warn(f"client {name!r} was refused: {reason}", RuntimeWarning, stacklevel=3)
