"""One party of a federation on its own machine: its data, its training, and its copy of the global model.

Nothing here knows how messages travel (``flora_core.flower`` does that).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..adapters import Adapters, ClientUpdate
from ..common import derive, json_digest, require
from ..model import ClientSpec, Cohort, attach, detach
from ..runs import environment
from ..training import CohortTrainer
from .model_copy import ModelCopy
from .protocol import Terms, base_digest


class Site:
    """One party: a model, its data, and a folder in which the copy of the global model is kept.

    Args:
        model: The base as everybody has it; its target weights are changed in place.
        tokenizer: For data that are not encoded.
        spec: Name, data, adapter and own settings of the party.
        folder: Where the copies of runs are kept; no other program may write there.
    """

    def __init__(self, model: Any, tokenizer: Any, spec: ClientSpec, folder: str | Path):
        self.model, self.tokenizer, self.spec = model, tokenizer, spec
        self.base, self.environment = base_digest(model), environment(model.device)
        self.copy = ModelCopy(model, Path(folder), spec.name)

    def begin(self, terms: Terms) -> dict[str, Any]:
        """Take part in a run, or go on with it: find the copy, encode the data once, and say what this party has.

        Returns:
            JSON values: ``client``, ``adapter``, ``train``, ``examples``, ``tokens``, ``data`` (a digest), ``base``,
            ``environment``, ``round`` and ``weights`` (as ``digest`` gives it).
        Raises:
            ValueError: If the base is another one than the run's, or the data do not fit.
        """
        require(
            self.base == terms.base,
            f"client {self.spec.name!r} has another base model ({self.base[:12]}) than the server ({terms.base[:12]}): "
            "load the same weights in the same dtype on both sides",
        )
        if not self.copy.is_open(terms):
            self._open(terms)
        data = [(example.input_ids, example.labels) for example in self.spec.data]
        return {
            "client": self.spec.name,
            "adapter": asdict(self.spec.adapter),
            "train": dict(self.spec.train) if isinstance(self.spec.train, Mapping) else None,
            "examples": len(data),
            "tokens": sum(len(ids) for ids, _ in data),
            "data": json_digest(data),
            "base": self.base,
            "environment": self.environment,
            "round": self.copy.round,
            "weights": self.copy.digest(),
        }

    def _open(self, terms: Terms) -> None:
        """Leave the run before, encode the data with this one's settings, and take up its model."""
        self.copy.close()
        cohort = self._attach(terms, 0)
        try:
            trainer = CohortTrainer(cohort, terms.train_config(), self.tokenizer)
            self.spec = replace(self.spec, data=trainer.clients[self.spec.name].examples)
        finally:
            detach(self.model)
        self.copy.open(terms)

    def _attach(self, terms: Terms, number: int) -> Cohort:
        seed = derive(terms.seed, "round", number)
        return attach(self.model, [self.spec], terms.target_modules, seed=seed, backend=terms.backend, fuse=terms.fuse)

    def train(self, terms: Terms, number: int, trainable: Sequence[str], start: Adapters, keep: bool) -> ClientUpdate:
        """Train this party's steps of a round.

        Args:
            terms: The run's.
            number: The round, from 1.
            trainable: The factors to train.
            start: Module -> factors to start from; what is not in it starts fresh.
            keep: Whether the optimizer's state of the round before counts (an update that was refused does not).
        Returns:
            The update; an optimizer's state that is kept is on the disk.
        Raises:
            ValueError: If training failed; with the reason.
        """
        name, config, self.copy.order = self.spec.name, terms.train_config(), number
        cohort = self._attach(terms, number)
        try:
            cohort.load(name, {**cohort.bank.adapters(name), **start})
            trainer = CohortTrainer(
                cohort,
                config,
                self.tokenizer,
                round=number - 1,
                rounds=terms.rounds,
                optimizer_state=self.copy.optimizer if keep else {},
                trainable=trainable,
            )
            updates = trainer.run()
        finally:
            detach(self.model)
        self.copy.optimizer = trainer.optimizer_state
        if self.copy.optimizer:
            self.copy.save()
        require(bool(updates), f"client {name!r} was stopped: {trainer.failures.get(name)}")
        return updates[0]
