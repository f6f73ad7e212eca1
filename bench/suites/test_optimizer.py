"""An AdamW step over every client's adapters: one call for the cohort against torch's optimizers, one per client."""

from __future__ import annotations

from typing import Any

import torch

import flora_core as flora
from bench.cases.grid import TARGETS, Case
from bench.cases.rivals import Rival, ready
from bench.harness.protocol import Check, Result, interleave
from bench.harness.rates import device, rates
from flora_core.testing import budget_ratio
from flora_core.training.optimizer import CohortAdamW

QUESTION = "optimizer"
LR = 3e-4


class Adapters:
    """A cohort's bank with random factors and gradients, and the same gradients for torch's optimizers."""

    def __init__(self, case: Case, layers: int):
        self.device = device()
        names = [f"client-{c}" for c in range(len(case.ranks))]
        shapes = {f"{i}.{name}": case.shapes.linear(name) for i in range(layers) for name in TARGETS[case.targets]}
        ranks, scales = dict.fromkeys(shapes, case.ranks), dict.fromkeys(shapes, [2.0] * len(names))
        self.bank = flora.AdapterBank(names, ranks, scales, shapes, device=self.device)
        random = torch.Generator().manual_seed(0)
        self.start, self.gradient = (torch.randn(self.bank.param.shape, generator=random) for _ in range(2))
        self.bank.param.copy_(self.start)
        self.ours = CohortAdamW(self.bank, flora.TrainConfig(lr=LR))
        self.ours.grad.copy_(self.gradient)

    def clients(self) -> list[torch.Tensor]:
        """Leaves for torch, one flat tensor a client: more than fair, PEFT has two for every linear."""
        leaves = []
        for value, grad in zip(self._split(self.start), self._split(self.gradient), strict=True):
            leaf = value.to(self.device).requires_grad_()
            leaf.grad = grad.to(self.device)
            leaves.append(leaf)
        return leaves

    def pairs(self) -> list[list[torch.Tensor]]:
        """Leaves as PEFT has them: A and B of every linear, client by client."""
        found: list[list[torch.Tensor]] = [[] for _ in self.bank.names]
        for start, grad, owner in zip(
            self._parts(self.start), self._parts(self.gradient), self.bank.owner, strict=True
        ):
            if start.numel():
                found[owner].append(start.to(self.device, copy=True).requires_grad_())
                found[owner][-1].grad = grad.to(self.device, copy=True)
        return found

    def _parts(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flat.split(list(self.bank.segments.lengths))

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts: list[list[torch.Tensor]] = [[] for _ in self.bank.names]
        for part, owner in zip(self._parts(flat), self.bank.owner, strict=True):
            parts[owner].append(part)
        return [torch.cat(owned) for owned in parts]

    def check(self) -> Check:
        """One step of a fresh state against float64, all clients together; torch's float32 is ``low``."""
        self.bank.param.copy_(self.start)
        fresh = CohortAdamW(self.bank, flora.TrainConfig(lr=LR))
        fresh.grad.copy_(self.gradient)
        fresh.step()
        results = []
        for kind in (torch.float64, torch.float32):
            leaf = self.start.to(kind, copy=True).requires_grad_()
            leaf.grad = self.gradient.to(kind)
            torch.optim.AdamW([leaf], lr=LR, weight_decay=0.0).step()
            results.append(leaf.detach() - self.start.to(kind))
        moved = self.bank.param.detach().cpu() - self.start
        fresh.release()
        return Check(budget_ratio(moved, results[0], results[1]), "the change of every number against float64")


def _each(setting: Adapters, leaves: list[Any], **options: Any) -> Any:
    groups = [leaf if isinstance(leaf, list) else [leaf] for leaf in leaves]
    optimizers = [torch.optim.AdamW(group, lr=LR, weight_decay=0.0, **options) for group in groups]
    return lambda: [optimizer.step() for optimizer in optimizers]


RIVALS = (
    Rival(
        "AdamW per client",
        "torch.optim.AdamW as it comes, one for every client, over the tensors that PEFT has",
        lambda setting: _each(setting, setting.pairs()),
    ),
    Rival(
        "fused AdamW per client",
        "torch.optim.AdamW(fused=True), one for every client, over the tensors that PEFT has",
        lambda setting: _each(setting, setting.pairs(), fused=True),
    ),
    Rival(
        "fused AdamW, flat",
        "torch.optim.AdamW(fused=True) over one flat tensor a client: less to launch than any PEFT run has",
        lambda setting: _each(setting, setting.clients(), fused=True),
    ),
)


def test_bench_optimizer(benchmark: Any, scale: Any, case: Case):
    layers = scale.depth(case.shapes.layers)
    question = f"One AdamW step of {len(case.ranks)} clients' adapters of {case.model}, {case.targets} targets"
    result = Result(f"optimizer_{case.id}", question, {**case.settings, "layers": layers}, scale.folder)
    with result.reported():
        setting = Adapters(case, layers)
        numel = setting.bank.param.numel()
        result.save(rates=rates(setting.device), parameters=numel, bytes=7 * 4 * numel)
        rivals = ready(RIVALS, setting, result)
        limits: Any = dict(seconds=3 * scale.seconds, most=25)
        interleave(benchmark, result, ("flora", setting.ours.step), rivals, check=lambda _: setting.check(), **limits)
        print("\n" + result.conclude("flora", dict.fromkeys(rivals)))
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}
