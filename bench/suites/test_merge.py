"""Aggregation of all layers: stacked merge against PEFT's cat-and-merge and against addmm_ client by client.

Letters: K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import flora_core as flora
from bench.cases import cohorts
from bench.cases.cohorts import LINEARS, RANKS
from bench.harness.protocol import Check, Result, interleave
from flora_core.merge.in_place import apply_base_delta_
from flora_core.ops.api import MergeItem, stacked_merge_many_
from flora_core.testing import budget_ratio

Weights = dict[str, torch.Tensor]
# From separate updates, with checks and certificate, summed in float64: what a federation's round does.
AS_A_ROUND = "flora, as a round"


class Round:
    """A base, ten clients' updates with weights by example counts, and every contender's own copy of the weights."""

    def __init__(self, layers: int):
        self.model = cohorts.random_model(layers)
        cohort = flora.attach(self.model, cohorts.specs(cohorts.random_batches(1, 2)), LINEARS)
        cohorts.start_adapters(cohort)
        self.updates = [cohort.update(name, examples=100 + 37 * c) for c, name in enumerate(cohort.names)]
        total = sum(update.weight for update in self.updates)
        self.shares = [update.weight / total for update in self.updates]
        self.bank = {
            path: (e.A_PK.detach().clone(), e.B_PN.detach().clone()) for path, e in cohort.bank.modules.items()
        }
        flora.detach(self.model)
        self.base = {path: self.model.get_submodule(path).weight.detach().clone() for path in self.bank}
        # alpha = 2r: every scale is 2.
        coef = [share * 2.0 for share, rank in zip(self.shares, RANKS, strict=True) for _ in range(rank)]
        self.coef_P = torch.tensor(coef)

    def exact(self, path: str) -> torch.Tensor:
        """The base plus the clients' products one after another, in float64."""
        total = self.base[path].double()
        for share, update in zip(self.shares, self.updates, strict=True):
            A_RK, B_RN = update.adapters[path]
            total += share * update.scaling[path] * (B_RN.double().T @ A_RK.double())
        return total


class Peft:
    """``add_weighted_adapter`` with ``cat``, then ``merge_adapter``, over ten adapters on one base."""

    def __init__(self, round: Round):
        model = cohorts.shared_copy(round.model)
        for path, weight in round.base.items():
            model.get_submodule(path).weight = torch.nn.Parameter(weight.clone())
        self.names = [update.client for update in round.updates]
        self.shares, self.paths = round.shares, list(round.base)
        for c, update in enumerate(round.updates):
            config = cohorts.LoraConfig(
                r=RANKS[c], lora_alpha=2 * RANKS[c], target_modules=list(LINEARS), task_type="CAUSAL_LM"
            )
            if c == 0:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                    self.model: Any = cohorts.get_peft_model(model, config, adapter_name=update.client)
            else:
                self.model.add_adapter(update.client, config)
            cohorts.load_peft(self.model, update.client, update.adapters)

    def run(self) -> None:
        self.model.add_weighted_adapter(self.names, self.shares, "round", combination_type="cat")
        self.model.merge_adapter(["round"])

    def reset(self, base: Weights) -> None:
        """Undo a merge; not timed."""
        if "round" in self.model.peft_config:
            self.model.unmerge_adapter()
            self.model.delete_adapter("round")
        for path, weight in base.items():
            self._weight(path).copy_(weight)

    def _weight(self, path: str) -> torch.Tensor:
        return self.model.base_model.model.get_submodule(path).base_layer.weight.data

    def weights(self) -> Weights:
        return {path: self._weight(path) for path in self.paths}


def contenders(round: Round) -> tuple[dict[str, Any], dict[str, Weights], Peft]:
    """Name -> work, and name -> the weights that it changes."""
    peft = Peft(round)
    own = {
        name: {path: weight.clone() for path, weight in round.base.items()}
        for name in ("flora float32", "flora float64", AS_A_ROUND, "addmm per layer")
    }

    def items(name: str) -> list[MergeItem]:
        return [MergeItem(own[name][path], A, B, round.coef_P) for path, (A, B) in round.bank.items()]

    def addmm() -> None:
        for path, (A_PK, B_PN) in round.bank.items():
            own["addmm per layer"][path].addmm_(B_PN.T * round.coef_P, A_PK)

    work = {
        "flora float32": lambda: stacked_merge_many_(items("flora float32")),
        "flora float64": lambda: stacked_merge_many_(items("flora float64"), accumulate="float64"),
        AS_A_ROUND: lambda: apply_base_delta_(own[AS_A_ROUND], flora.aggregate(round.updates).base_delta),
        "addmm per layer": addmm,
        "peft": peft.run,
    }
    return work, {**own, "peft": peft.weights()}, peft


def check_merge(round: Round, found: dict[str, Weights], ours: str) -> Check:
    """Every module's change to the budget, by its own size; PEFT's is ``low``, in the weights' dtype."""
    worst = 0.0
    for path, base in round.base.items():
        exact = round.exact(path)
        out, low = found[ours][path], found["peft"][path]
        worst = max(worst, budget_ratio(out, exact, low), key=lambda ratio: (ratio != ratio, ratio))
        if torch.equal(out, base):
            worst = float("inf")
    return Check(worst, f"all {len(round.base)} merged weights against float64")


@pytest.mark.parametrize("accumulate", ["float32", "float64"])
def test_bench_merge(benchmark: Any, scale: Any, accumulate: str):
    ours = f"flora {accumulate}"
    result = Result(
        f"merge_{accumulate}",
        f"Adding ten clients' updates to all linears of the base, summed in {accumulate}: stacked merge against PEFT",
        {**scale.settings, "ranks": RANKS, "targets": "all linears", "dtype": "float32"},
        scale.folder,
    )
    with result.reported():
        measure(benchmark, result, scale, ours)
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}


def measure(benchmark: Any, result: Result, scale: Any, ours: str) -> None:
    """One merge of everybody on weights of his own, the check, then all in turns."""
    round = Round(scale.layers)
    work, weights, peft = contenders(round)
    rivals = {name: work[name] for name in ("addmm per layer", AS_A_ROUND, "peft")}

    def before(name: str) -> None:
        if name == "peft":
            return peft.reset(round.base)
        for path, weight in weights[name].items():
            weight.copy_(round.base[path])
        return None

    interleave(
        benchmark,
        result,
        (ours, work[ours]),
        rivals,
        check=lambda _: check_merge(round, weights, ours),
        seconds=15 * scale.seconds,
        most=15,
        before=before,
    )
    print("\n" + result.conclude(ours, {"peft": 4.0, "addmm per layer": None, AS_A_ROUND: None}))
