"""A federated round by every contender: train each client, aggregate, write the sum into the base.

The rivals' local training is PEFT's own; all start from the adapters that our round starts from.
Letters: K in_features, N out_features, R one client's rank, P sum of ranks.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch

import flora_core as flora
from bench.cases import cohorts
from bench.cases.cohorts import LR, LoraConfig, get_peft_model, padded_inputs
from bench.cases.grid import TARGETS, Case
from bench.cases.rivals import Rival
from bench.harness.protocol import Check, Missing
from bench.harness.rates import device, dtype
from flora_core.adapters.update import Adapters
from flora_core.common.seeds import derive
from tests.support.models import exact64

STEPS = 2
Weights = dict[str, torch.Tensor]


class Round:
    """The base, the clients' data and the adapters that they start from."""

    def __init__(self, case: Case, layers: int, where: torch.device | None = None):
        self.case, self.device = case, where or device()
        self.dtype = dtype(self.device)
        self.model = cohorts.random_model(layers, case.model, self.device, self.dtype).requires_grad_(False)
        self.batches = cohorts.random_batches(1, case.tokens, len(case.ranks), case.shapes.vocab)
        self.specs = cohorts.specs(self.batches, case.ranks)
        copied = cohorts.shared_copy(self.model)
        cohort = flora.attach(copied, self.specs, TARGETS[case.targets], seed=derive(0, "round", 1))
        self.start: dict[str, Adapters] = {
            name: {path: (A.clone(), B.clone()) for path, (A, B) in cohort.bank.adapters(name).items()}
            for name in cohort.names
        }
        self.base: Weights = {path: self.weight(self.model, path).clone() for path in cohort.bank.modules}
        self.events: list[dict[str, Any]] = []

    @staticmethod
    def weight(model: Any, path: str) -> torch.Tensor:
        return model.get_submodule(path).weight.data

    @property
    def shares(self) -> list[float]:
        return [1 / len(self.batches)] * len(self.batches)

    def reset(self) -> None:
        """The base as it was; not timed."""
        for path, weight in self.base.items():
            self.weight(self.model, path).copy_(weight)

    def found(self, model: Any) -> Weights:
        return {path: self.weight(model, path).clone() for path in self.base}

    def ours(self) -> Weights:
        """``Federation`` as users run it, one round in memory."""
        federation = flora.Federation(
            self.model,
            None,
            self.specs,
            config=flora.FederationConfig(rounds=1),
            train=flora.TrainConfig(max_steps=STEPS, lr=LR),
            target_modules=TARGETS[self.case.targets],
        )
        self.events = federation.run().events
        return self.found(self.model)

    def train(self, peft: Any, client: int) -> float:
        """A client's local steps; its last loss."""
        weights = [p for p in peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
        inputs = padded_inputs(self.batches[client], self.device)
        return [cohorts.SequentialPeft._one(peft, optimizer, inputs) for _ in range(STEPS)][-1]

    def authors(self, model: Any | None = None) -> Weights:
        """The FLoRA authors' procedure, from its description.

        Every client gets a deep copy of the global model with an adapter of its own; the server stacks A and B by
        concatenating client after client, loads the stack as one adapter into another copy, and merges it.
        """
        base = self.model if model is None else model
        stack: Weights = {}
        for c, (share, start) in enumerate(zip(self.shares, self.start.values(), strict=True)):
            peft = cohorts.peft_model(copy.deepcopy(base), start)
            peft = peft.double() if model is not None else peft
            self.train(peft, c)
            for path in start:
                layer = peft.base_model.model.get_submodule(path)
                A, B = (getattr(layer, f"lora_{letter}")["default"].weight.detach() for letter in "AB")
                for key, part, axis in ((f"{path} A", share * A, 0), (f"{path} B", B, 1)):
                    stack[key] = torch.cat([stack[key], part], axis) if key in stack else part.clone()
        whole = sum(self.case.ranks)
        paths = {path: (stack[f"{path} A"], stack[f"{path} B"].T) for path in self.base}
        merged = cohorts.peft_model(copy.deepcopy(base), paths) if whole else base
        if model is not None:
            merged = merged.double()
            cohorts.load_peft(merged, "default", paths)
        return self.found(merged.merge_and_unload())

    def peft(self) -> Weights:
        """One PEFT model with an adapter a client, trained in turn; ``add_weighted_adapter`` (cat) and merge."""
        peft: Any = None
        names = list(self.start)
        for c, (name, start) in enumerate(self.start.items()):
            rank = self.case.ranks[c]
            config = LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS[self.case.targets]), task_type="CAUSAL_LM"
            )
            if peft is None:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                    peft = get_peft_model(cohorts.shared_copy(self.model), config, adapter_name=name)
            else:
                peft.add_adapter(name, config)
            cohorts.load_peft(peft, name, start)
            peft.set_adapter(name)
            self.train(peft.train(), c)
        peft.add_weighted_adapter(names, self.shares, "round", combination_type="cat")
        peft.set_adapter("round")
        return self.found(peft.merge_and_unload(adapter_names=["round"]))

    def check(self, values: dict[str, list[Weights]]) -> Check:
        """The change of every weight against the same procedure in float64, by its norm; a rival's is ``low``.

        AdamW's first steps are signs, which flip where a gradient vanishes: single numbers tell nothing, norms do.
        """
        rival = next((name for name in values if name != "flora"), None)
        if rival is None:
            raise Missing("no rival's round is there to tell which error this dtype cannot avoid")
        mine, low = values["flora"][-1], values[rival][-1]
        self.reset()
        wide = copy.deepcopy(self.model).double()
        with exact64():
            exact = self.authors(wide)

        def error(weights: Weights) -> float:
            ratios = [
                ((weights[path].double() - exact[path]).norm() / (exact[path] - base.double()).norm()).item() ** 2
                for path, base in self.base.items()
            ]
            return math.sqrt(sum(ratios) / len(ratios))

        ratio = error(mine) / (2 * (error(low) + torch.finfo(self.dtype).eps))
        details = {"error": error(mine), f"error of {rival}": error(low)}
        return Check(ratio, "the change of every weight against float64, by its norm", details)


RIVALS = (
    Rival(
        "PEFT",
        "one PEFT model with ten adapters on one base, trained in turn with torch's AdamW; then add_weighted_adapter "
        "with cat and merge_and_unload",
        lambda setting: setting.peft,
    ),
    Rival(
        "FLoRA authors' procedure",
        "rebuilt from its description, no code copied: one deep-copied model a client, stacked by repeated "
        "concatenation, merge_and_unload; local training is PEFT's",
        lambda setting: setting.authors,
    ),
)

__all__ = ["RIVALS", "STEPS", "Round"]
