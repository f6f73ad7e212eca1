"""A party's copy of the global model, kept on its disk.

It follows the server's model by applying the same changes in the same order, so it holds the same bits; what the party
was sent is on the disk before it trains.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common import atomic_dir, derive, put_in, require, take_out, write_safetensors
from ..merge import apply_base_delta_, new_low_bits
from ..model import target_weights
from .protocol import Tensors, Terms, weights_digest

COPY, PLACE = "copy.safetensors", "copy.json"


class ModelCopy:
    """One party's copy of a run's global model, with its optimizer's state.

    Args:
        model: The base as everybody has it; its target weights are changed in place.
        folder: Where the copies of runs are kept; no other program may write there.
        client: The party's name, for errors.

    Attributes:
        run: Which run's model this is; empty for the base.
        round: The newest round whose change it has.
        order: The newest round that orders were about.
    """

    def __init__(self, model: Any, folder: Path, client: str):
        self.model, self.folder, self.client = model, folder, client
        self.run, self.round, self.order = "", 0, 0
        # The state on the disk when this process last looked.
        self.seen = ""
        self.weights: Tensors = {}
        self.low_bits: Tensors = {}
        self.optimizer: dict[str, Any] = {}
        self._base: Tensors = {}

    def is_open(self, terms: Terms) -> bool:
        """Return whether this is the run's model as the disk has it; another process may have gone on."""
        return terms.run == self.run and self._kept() == self.seen

    def open(self, terms: Terms) -> None:
        """Take up a run's model, from the disk if it is there."""
        self.run = terms.run
        self._load(terms)

    def digest(self) -> dict[str, Any]:
        """The modules that rounds have changed so far, and the digest of their weights."""
        return weights_digest(self.weights, self.weights)

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

    def save(self) -> None:
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
                f"client {self.client!r} is too late with the orders of round {self.order}: its folder was changed "
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
            f"client {self.client!r} has round {self.round}, and the changes start from round {since}",
        )
        if not changes:
            return
        for number, tensors in changes:
            self._apply(terms, number, tensors)
            self.round = self.order = number
        self.save()

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
