"""One decoder layer, forward and backward: a packed cohort against the frozen layer and PEFT.

Letters: M packed tokens, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import flora_core as flora
from bench.cases import cohorts
from bench.cases.cohorts import start_adapters
from bench.cases.grid import TARGETS, Case
from bench.cases.rivals import FROZEN, Rival, need_bfloat16, ready
from bench.harness.protocol import Check, Result, interleave, tensors_ratio
from bench.harness.rates import device, dtype, rates

QUESTION = "decoder_layer"
Factors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One call: from hidden states to hidden states (tokens x H), dY, and the leaves that ask for gradients."""

    call: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor
    dy: torch.Tensor
    leaves: Factors = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One call for everybody, or one after another for each client on tensors of its own."""

    parts: list[Part]
    around: Callable[[], Any] = nullcontext

    def run(self) -> list[tuple[torch.Tensor, ...]]:
        """Forward and backward of every call: hidden states, dX and the leaves' gradients."""
        found = []
        with self.around():
            for part in self.parts:
                y = part.call(part.x)
                found.append((y.detach(), *torch.autograd.grad(y, [part.x, *part.leaves.values()], part.dy)))
        return found

    def results(self) -> Factors:
        """Join the results of ``run``: y and x of all tokens, and each leaf's gradient by its name."""
        found = self.run()
        joined = {"y": torch.cat([y for y, *_ in found]), "x": torch.cat([dx for _, dx, *_ in found])}
        for part, (_, _, *grads) in zip(self.parts, found, strict=True):
            joined |= zip(part.leaves, grads, strict=True)
        return joined


class Layer:
    """A model of one layer, whose head is not run, and random hidden states as its input."""

    def __init__(self, case: Case, where: torch.device | None = None):
        self.case, self.device = case, where or device()
        self.dtype = dtype(self.device)
        self.model = cohorts.random_model(1, case.model, self.device, self.dtype).requires_grad_(False)
        random = torch.Generator().manual_seed(3)
        shape = len(case.ranks), case.tokens, case.shapes.hidden
        self.x, self.dy = (torch.randn(shape, generator=random).to(self.device, self.dtype) for _ in range(2))
        self.x.requires_grad_()
        batches = cohorts.random_batches(1, 2, len(case.ranks), case.shapes.vocab)
        self.specs = cohorts.specs(batches, case.ranks, case.dropout)
        self.cohort = flora.attach(cohorts.shared_copy(self.model), self.specs, TARGETS[case.targets])
        self.adapters = start_adapters(self.cohort)

    def ours(self, dropout: bool) -> Contender:
        """The cohort's own pass: every client's tokens in one row."""
        clients, tokens, hidden = self.x.shape
        self.cohort.parameters()
        leaves: Factors = {}
        for path, entry in self.cohort.bank.modules.items():
            leaves |= {f"{path} A": entry.A_PK, f"{path} B": entry.B_PN}
        positions = torch.arange(tokens, device=self.device).repeat(clients)[None]
        options: dict[str, Any] = dict(sequences=[tokens] * clients, dropout_step=0 if dropout else None)

        def call(x: torch.Tensor) -> torch.Tensor:
            packed = x.reshape(1, clients * tokens, hidden)
            inner = self.cohort.model.base_model
            return inner(inputs_embeds=packed, position_ids=positions, use_cache=False).last_hidden_state[0]

        everything = Part(call, self.x, self.dy.flatten(0, 1), leaves)
        return Contender([everything], lambda: self.cohort.batch([tokens] * clients, **options))

    def peft(self, autocast: bool, dropout: float, wide: bool = False) -> Contender:
        """Each client's pass through a PEFT model of its own on tensors of its own; ``wide`` in float64."""
        parts, whole = [], copy.deepcopy(self.model).double() if wide else self.model
        kind = torch.float64 if wide else self.dtype
        for c, (name, adapters) in enumerate(self.adapters.items()):
            model = cohorts.peft_model(cohorts.shared_copy(whole), adapters, dropout, autocast)
            inner, named = (model.double() if wide else model).base_model.model.model, dict(model.named_parameters())
            keys = {f"{name} {path} {letter}": (path, letter) for path in adapters for letter in "AB"}
            leaves = {
                key: named[f"base_model.model.{path}.lora_{letter}.default.weight"]
                for key, (path, letter) in keys.items()
            }
            x, dy = (tensor.detach()[c].to(kind, copy=True) for tensor in (self.x, self.dy))
            parts.append(Part(lambda x, inner=inner: _hidden(inner, x[None])[0], x.requires_grad_(), dy, leaves))
        return Contender(parts)

    def frozen(self) -> Contender:
        inner = self.model.base_model
        return Contender([Part(lambda x: _hidden(inner, x).flatten(0, 1), self.x, self.dy.flatten(0, 1))])

    def check(self) -> Check:
        """Ours without dropout's random masks against float64 PEFT, client by client; PEFT itself is ``low``."""
        clients = len(self.case.ranks)
        mine, found = self.ours(dropout=False).results(), {}
        for path, entry in self.cohort.bank.modules.items():
            for name, bank in zip(self.cohort.names, entry.ranks, strict=True):
                found |= {f"{name} {path} A": mine[f"{path} A"][bank], f"{name} {path} B": mine[f"{path} B"][bank].T}
        exact = self.peft(True, 0.0, wide=True).results()
        low = self.peft(self.dtype.itemsize != 2, 0.0).results()

        def apart(results: Factors) -> Factors:
            hidden = self.case.shapes.hidden
            rows = {key: results[key].reshape(clients, -1, hidden) for key in ("y", "x")}
            each = {f"{key} of client {c}": rows[key][c] for key in rows for c in range(clients)}
            return each | {key: value for key, value in results.items() if key not in rows}

        ratio = tensors_ratio(apart({**found, "y": mine["y"], "x": mine["x"]}), apart(exact), apart(low))
        return Check(ratio, "hidden states, dX and every factor's gradient, client by client, against float64 PEFT")


def _hidden(inner: Any, embedded: torch.Tensor) -> torch.Tensor:
    return inner(inputs_embeds=embedded, use_cache=False).last_hidden_state


def _bf16(setting: Layer) -> Contender:
    need_bfloat16(setting)
    return setting.peft(False, setting.case.dropout)


RIVALS = (
    Rival(FROZEN, "the layer without adapters, every client's sequence in one batch: the limit", Layer.frozen),
    Rival(
        "PEFT",
        "get_peft_model as it comes, one client after another, each with a PEFT model of its own on the shared weights "
        "and hidden states that are a tensor of its own",
        lambda setting: setting.peft(True, setting.case.dropout),
    ),
    Rival("PEFT bf16", "the same with autocast_adapter_dtype=False: adapters in the base's 16 bits", _bf16),
)


def test_bench_decoder_layer(benchmark: Any, scale: Any, case: Case):
    question = (
        f"Forward and backward of a decoder layer for {len(case.ranks)} clients ({case.mix}): {case.model}, "
        f"{case.targets} targets, {case.tokens} tokens each, dropout {case.dropout:g}"
    )
    result = Result(f"decoder_layer_{case.id}", question, case.settings, scale.folder)
    with result.reported():
        setting = Layer(case)
        result.save(rates=rates(setting.device), dtype=str(setting.dtype))
        contenders = ready(RIVALS, setting, result)
        works = {name: lambda c=contender: len(c.run()) for name, contender in contenders.items()}
        ours = setting.ours(dropout=case.dropout > 0)
        mine = "flora", lambda: len(ours.run())
        limits: Any = dict(seconds=6 * scale.seconds, most=25)
        interleave(benchmark, result, mine, works, check=lambda _: setting.check(), **limits)
        print("\n" + result.conclude("flora", dict.fromkeys(contenders)))
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}
