"""Train a round's clients, here together or elsewhere each by itself, and judge what comes of it.

Everything random derives from (seed, round, client), but for the draws of a private run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .aggregate.robust import clipped
from .attach import ClientSpec, Cohort, attach, detach
from .checkpoint import RunFolder
from .config import TrainConfig
from .federation_config import FederationConfig
from .history import Event
from .incoming import Asked, Remote, Task, elsewhere_done, quarantine, receive
from .privacy import PrivateSum
from .seeds import derive, generator
from .server import Server
from .trainer import CohortTrainer
from .update import ClientUpdate
from .validate import sift


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
    stop: Callable[[], bool]

    def _emit(self, event: str, **fields: Any) -> None:
        raise NotImplementedError

    def _tell(self, event: Event) -> None:
        raise NotImplementedError

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
        warn_of(silent)
        updates.sort(key=lambda update: names.index(update.client))
        good, refused = self._judge(updates, names)
        refused |= failures | silent
        trained = {update.client: update for update in updates}
        for name, reason in refused.items():
            self._set_aside(number, name, reason, answers.get(name, trained.get(name)))
        self.optimizer = {name: state for name, state in self.optimizer.items() if name not in refused}
        for name in names:
            event = done.get(name) or elsewhere_done(number, self.specs[name], asked.seconds.get(name))
            self._emit(**event | ({"refused": refused[name]} if name in refused else {}))
        return good

    def _train_here(
        self, number: int, here: Sequence[str], names: Sequence[str], done: dict[str, Event]
    ) -> tuple[list[ClientUpdate], dict[str, str]]:
        start: Event = {"round": number, "rounds": self.config.rounds, "clients": list(names)}
        if not here:
            self._emit("round_start", **start, cohorts=0)
            return [], {}
        with self._attached([self.specs[n] for n in here], derive(self.config.seed, "round", number)) as cohort:
            self.server.load_starts(cohort, number)
            trainer = CohortTrainer(
                cohort,
                self.train,
                self.tokenizer,
                round=number - 1,
                rounds=self.config.rounds,
                callbacks=[lambda event: self._hear(event, done)],
                optimizer_state=self.optimizer,
                trainable=self.server.trainable,
                penalties=self.server.penalties(here),
                stop=self.stop,
                resume=self.paused.get("clients"),
            )
            self._emit("round_start", **start, cohorts=len(trainer.plan().cohorts))
            updates = trainer.run()
        self.optimizer |= trainer.optimizer_state
        return updates, trainer.failures

    def _ask(self, number: int, names: Sequence[str]) -> Asked:
        """Have the clients elsewhere begin; they are waited for when those here are done."""
        if not names:
            return Asked({}, {}, None)
        self.server.refuse_penalties(names)
        with self._attached([self.specs[n] for n in names], derive(self.config.seed, "round", number)) as cohort:
            self.server.load_starts(cohort, number)
            starts = {name: cohort.update(name) for name in names}
        trainable = self.server.trainable
        tasks = {n: Task(number, n, start.adapters, start.scaling, trainable) for n, start in starts.items()}
        return Asked(self.remote, tasks, self.config.deadline_s)

    def _set_aside(self, number: int, name: str, reason: str, answer: Any) -> None:
        """Keep what was refused, for people to look at; that this fails must not cost the others their round."""
        if self.folder is None:
            return
        # Under privacy nothing of a client's is kept but what went wrong.
        answer = None if self.config.privacy else answer
        try:
            quarantine(self.folder.path, number, name, reason, answer, self.expected.get(name))
        except OSError as error:
            self._emit("warning", round=number, client=name, message=f"{name}'s update is not kept apart: {error}")

    def _hear(self, event: Event, done: dict[str, Event]) -> None:
        """Pass progress on at once; what a client did is told when its update has been judged."""
        if event["event"] == "client_done":
            done[event["client"]] = event
        elif event["event"] == "warning":
            self._emit(**event)
        else:
            self._tell(event)

    def _judge(
        self, updates: Sequence[ClientUpdate], names: Sequence[str]
    ) -> tuple[list[ClientUpdate], dict[str, str]]:
        bound = self.server.largest if self.config.max_norm is None else min(self.server.largest, self.config.max_norm)
        config = self.config
        good, refused = sift(updates, {name: self.expected[name] for name in names}, bound, config.outlier_factor)
        warn_of(refused)
        if config.clip_update is not None:
            good, before = clipped(good, config.clip_update)
            for name, norm in before.items():
                text = f"client {name!r} was clipped from a norm of {norm:.3g} to {config.clip_update:g} (clip_update)"
                self._emit("warning", round=self.round + 1, client=name, message=text)
        for update in good:
            update.weight = config.share(update)
        return good, refused


def warn_of(refused: Mapping[str, str]) -> None:
    """Warn of refused clients, for people without callbacks."""
    for name, reason in refused.items():
        warnings.warn(f"client {name!r} was refused: {reason}", RuntimeWarning, stacklevel=3)


__all__ = ["TrainingRound"]
