"""One party of a federation on its own machine: its copy of the global model, kept on its disk, and its training.

The copy follows the server's by applying the same changes in the same order, so it holds the same bits; what it was
sent is on the disk before it trains. Nothing here knows how messages travel (``flora_core.flower`` does that).

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..adapters import Adapters, ClientUpdate
from ..common import atomic_dir, derive, json_digest, put_in, require, take_out, write_safetensors
from ..config import AdapterConfig
from ..merge import apply_base_delta_, new_low_bits
from ..model import ClientSpec, Cohort, attach, detach, target_weights
from ..runs import environment
from ..training import CohortTrainer
from .protocol import Tensors, Terms, base_digest, weights_digest

COPY, PLACE = "copy.safetensors", "copy.json"


class Site:
    """One party: a model, its data, and a folder in which the copy of the global model is kept.

    Args:
        model: The base as everybody has it; its target weights are changed in place.
        tokenizer: For data that are not encoded.
        spec: Name, data, adapter and own settings of the party.
        folder: Where the copies of runs are kept; no other program may write there.
    """

    def __init__(self, model: Any, tokenizer: Any, spec: ClientSpec, folder: str | Path):
        self.model, self.tokenizer, self.spec, self.folder = model, tokenizer, spec, Path(folder)
        self.base, self.environment = base_digest(model), environment(model.device)
        self.run, self.round = "", 0
        # The newest round that orders were about, and what was on the disk when this process last looked.
        self.order, self.seen = 0, ""
        self.weights: Tensors = {}
        self.low_bits: Tensors = {}
        self.optimizer: dict[str, Any] = {}
        self._base: Tensors = {}

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
        if terms.run != self.run or self._kept() != self.seen:
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
            "round": self.round,
            "weights": self.digest(),
        }

    def digest(self) -> dict[str, Any]:
        """The modules that rounds have changed so far, and the digest of their weights."""
        return weights_digest(self.weights, self.weights)

    def _open(self, terms: Terms) -> None:
        self.close()
        cohort = self._attach(terms, 0)
        try:
            trainer = CohortTrainer(cohort, terms.train_config(), self.tokenizer)
            self.spec = replace(self.spec, data=trainer.clients[self.spec.name].examples)
        finally:
            detach(self.model)
        self.run = terms.run
        self._load(terms)

    def close(self) -> None:
        """Leave the run: the model is the base again."""
        for module, weight in self._base.items():
            self.weights[module].copy_(weight)
        self.run, self.round, self.optimizer, self.order, self.seen = "", 0, {}, 0, ""
        self.weights, self.low_bits, self._base = {}, {}, {}

    def _follow(self, terms: Terms, modules: Iterable[str]) -> None:
        """Keep modules that a round changes for the first time; other parties may adapt more than this one."""
        new = target_weights(self.model, [module for module in modules if module not in self.weights])
        self.weights |= new
        self._base |= {module: weight.clone() for module, weight in new.items()}
        self.low_bits |= new_low_bits(new) if terms.rounding == "low_bits" else {}

    def _attach(self, terms: Terms, number: int) -> Cohort:
        seed = derive(terms.seed, "round", number)
        return attach(self.model, [self.spec], terms.target_modules, seed=seed, backend=terms.backend, fuse=terms.fuse)

    def _load(self, terms: Terms) -> None:
        """Go on from the copy on the disk, if there is one."""
        from safetensors.torch import load_file

        self.seen = self._kept()
        if not self.seen:
            return
        place = json.loads(self.seen)
        state = put_in(place["state"], load_file(self.folder / self.run / COPY))
        self._follow(terms, state["weights"])
        for module, weight in state["weights"].items():
            self.weights[module].copy_(weight)
        for module, bits in state["low_bits"].items():
            self.low_bits[module].copy_(bits)
        self.round, self.order, self.optimizer = place["round"], place.get("order", 0), state["optimizer"]

    def _kept(self) -> str:
        path = self.folder / self.run / PLACE
        return path.read_text("utf-8") if path.is_file() else ""

    def _save(self) -> None:
        """Keep the copy, unless a later order's process has kept its own while this one was held up."""
        tensors: Tensors = {}
        state = {"weights": self.weights, "low_bits": self.low_bits, "optimizer": self.optimizer}
        skeleton = take_out(state, tensors)
        with atomic_dir(self.folder / self.run, replaceable=(COPY, PLACE)) as new:
            write_safetensors(new / COPY, tensors)
            text = json.dumps({"round": self.round, "order": self.order, "state": skeleton})
            (new / PLACE).write_text(text, "utf-8")
            kept = self._kept()
            newest = json.loads(kept).get("order", 0) if kept != self.seen and kept else 0
            require(
                newest <= self.order,
                f"client {self.spec.name!r} is too late with the orders of round {self.order}: its folder was changed "
                f"by those of round {newest} meanwhile, and stays as it is",
            )
        self.seen = text

    def receive(self, terms: Terms, since: int | None, changes: Sequence[tuple[int, Tensors]]) -> None:
        """Apply what the copy lacks, and keep it on the disk.

        Args:
            terms: The run's.
            since: The round that the changes start from; None if they stand for themselves (a snapshot).
            changes: (round, ``round_tensors``) in order.
        Raises:
            ValueError: If the copy is at another round; nothing is changed then.
        """
        require(
            since is None or since == self.round,
            f"client {self.spec.name!r} has round {self.round}, and the changes start from round {since}",
        )
        if not changes:
            return
        for number, tensors in changes:
            self._apply(terms, number, tensors)
            self.round = self.order = number
        self._save()

    def _apply(self, terms: Terms, number: int, tensors: Tensors) -> None:
        stacks, parts = {}, {}
        for name, tensor in tensors.items():
            module, _, part = name.rpartition("/")
            parts.setdefault(module, {})[part] = tensor
        self._follow(terms, parts)
        for module, found in parts.items():
            if "weight" in found:
                self.weights[module].copy_(found["weight"])
                if module in self.low_bits:
                    self.low_bits[module].copy_(found["low_bits"])
            else:
                stacks[module] = tuple(found[name].to(self.weights[module].device) for name in ("A", "B", "coef"))
        apply_base_delta_(
            self.weights,
            stacks,
            low_bits=self.low_bits,
            rounding=terms.rounding,
            seed=derive(terms.seed, "rounding", number),
            accumulate="float64",
            check_rows=1,
        )

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
        name, config, self.order = self.spec.name, terms.train_config(), number
        cohort = self._attach(terms, number)
        try:
            cohort.load(name, {**cohort.bank.adapters(name), **start})
            trainer = CohortTrainer(
                cohort,
                config,
                self.tokenizer,
                round=number - 1,
                rounds=terms.rounds,
                optimizer_state=self.optimizer if keep else {},
                trainable=trainable,
            )
            updates = trainer.run()
        finally:
            detach(self.model)
        self.optimizer = trainer.optimizer_state
        if self.optimizer:
            self._save()
        require(bool(updates), f"client {name!r} was stopped: {trainer.failures.get(name)}")
        return updates[0]


def adapter_config(values: Mapping[str, Any]) -> AdapterConfig:
    """Make an adapter's configuration of what a party said; raises ``TypeError`` or ``ValueError`` for nonsense."""
    return AdapterConfig(**values)
