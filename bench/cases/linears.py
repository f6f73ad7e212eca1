"""One LoRA linear of a packed cohort: ours, its float64 oracle, and the rivals on the same data.

Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench.cases.grid import Case
from bench.cases.rivals import FROZEN, Rival, need_bfloat16, ready
from bench.harness.protocol import Check, Missing, Result, interleave
from bench.harness.rates import device, dtype, rates
from flora_core import Segments
from flora_core.ops.api import lora_linear
from flora_core.testing import budget_ratio
from flora_kernels.reference import dropout_keep

SCALE = 2.0  # alpha = 2r


@dataclass(frozen=True)
class Part:
    """One call of a contender: its rows of x and of dY in every buffer, and the leaves besides x."""

    x: Sequence[torch.Tensor]
    dy: Sequence[torch.Tensor]
    call: Callable[[torch.Tensor], torch.Tensor]
    leaves: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Contender:
    """One call over all tokens, or one after another for each client on tensors of its own."""

    parts: list[Part]

    def forward(self, n: int) -> list[torch.Tensor]:
        """Y of every call on the n-th buffer."""
        return [part.call(part.x[n]) for part in self.parts]

    def backward(self, ys: Sequence[torch.Tensor], n: int) -> list[tuple[torch.Tensor, ...]]:
        """dX and the leaves' gradients of every call."""
        calls = zip(self.parts, ys, strict=True)
        return [torch.autograd.grad(y, [part.x[n], *part.leaves], part.dy[n]) for part, y in calls]


class Linear:
    """The data of one case. Buffers rotate on a GPU, so that nothing is found in its cache."""

    def __init__(self, case: Case, where: torch.device | None = None):
        self.case, self.device = case, where or device()
        self.dtype = dtype(self.device)
        self.N, self.K = case.shapes.linear(case.linear)
        self.tokens, self.ranks = Segments([case.tokens] * len(case.ranks)), Segments(case.ranks)
        random = torch.Generator().manual_seed(0)

        def make(*shape: int, std: float = 1.0, kind: torch.dtype = self.dtype) -> torch.Tensor:
            return (torch.randn(shape, generator=random) * std).to(self.device, kind)

        buffers, M, P = 3 if self.device.type == "cuda" else 1, self.tokens.total, self.ranks.total
        self.x = [make(M, self.K).requires_grad_() for _ in range(buffers)]
        self.dy = [make(M, self.N) for _ in range(buffers)]
        self.weight = make(self.N, self.K, std=self.K**-0.5)
        self.A = make(P, self.K, std=self.K**-0.5, kind=torch.float32).requires_grad_()
        self.B = make(P, self.N, std=0.05, kind=torch.float32).requires_grad_()
        self.seeds = [2**40 + 7919 * c for c in range(len(case.ranks))]

    @property
    def flops(self) -> dict[str, int]:
        """Operations forward and backward: the base's products, and those of the branch with no padding."""
        M = self.tokens.total
        base, pairs = 2 * M * self.N * self.K, sum(self.case.tokens * rank for rank in self.case.ranks)
        branch = 2 * pairs * (self.N + self.K)
        return {"forward": base + branch, "backward": base + 2 * branch}

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes that must be read and written at least: x, W and y; dy, W, x and dx; the factors at 4 bytes."""
        M, size = self.tokens.total, self.dtype.itemsize
        factors, base = 4 * self.ranks.total * (self.N + self.K), size * (M * self.N + M * self.K + self.N * self.K)
        return {"forward": base + factors, "backward": base + size * M * self.K + 2 * factors}

    def ours(self) -> Contender:
        options: dict[str, Any] = {}
        if self.case.dropout:
            clients = len(self.seeds)
            seeds = torch.tensor(self.seeds, device=self.device)
            options = dict(dropout_C=(self.case.dropout,) * clients, dropout_seed_C=seeds)
        scales = (SCALE,) * len(self.case.ranks)
        rest = self.weight, None, self.A, self.B, self.tokens, self.ranks, scales
        return self.packed(lambda x: lora_linear(x, *rest, **options), [self.A, self.B])

    def packed(self, call: Callable[[torch.Tensor], torch.Tensor], leaves: Sequence[torch.Tensor] = ()) -> Contender:
        """A contender that takes all tokens in one call."""
        return Contender([Part(self.x, self.dy, call, list(leaves))])

    @functools.cached_property
    def apart(self) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """x and dY of every client as tensors of its own, as clients have them who train one after another."""
        return [
            ([x.detach()[rows].clone().requires_grad_() for x in self.x], [dy[rows].clone() for dy in self.dy])
            for rows in self.tokens
        ]

    def check(self, result: Contender, low: torch.dtype | None = None) -> Check:
        """y, dx, dA and dB of every client by the error budget; ``low`` is the plain formula in the base's dtype."""
        ys = result.forward(0)
        out = [ys[0].detach(), *result.backward(ys, 0)[0]]
        exact, rounded = self._plain(torch.float64), self._plain(low or self.dtype)
        parts = self.tokens, self.tokens, self.ranks, self.ranks
        ratios = [
            budget_ratio(mine[rows], true[rows], near[rows])
            for mine, true, near, part in zip(out, exact, rounded, parts, strict=True)
            for rows in part
        ]
        worst = max(ratios, key=lambda ratio: (ratio != ratio, ratio))
        return Check(worst, "y, dx, dA and dB of every client against float64")

    def _plain(self, kind: torch.dtype) -> list[torch.Tensor]:
        """y, dx, dA and dB by the formula, client by client."""
        x, A, B = (tensor.detach().to(kind).requires_grad_() for tensor in (self.x[0], self.A, self.B))
        weight, q, outputs = self.weight.to(kind), round(65536 * self.case.dropout), []
        for c, (rows, bank) in enumerate(zip(self.tokens, self.ranks, strict=True)):
            dropped = x[rows]
            if q:
                keep = dropout_keep(dropped.shape[0], self.K, q, self.seeds[c], 0, self.device)
                dropped = dropped * keep.to(kind) * (65536 / (65536 - q))
            outputs.append(x[rows] @ weight.T + SCALE * (dropped @ A[bank].T @ B[bank]))
        y = torch.cat(outputs)
        return [y.detach(), *torch.autograd.grad(y, [x, A, B], self.dy[0].to(kind))]


def _frozen(setting: Linear) -> Contender:
    return setting.packed(lambda x: F.linear(x, setting.weight))


def _peft_layer(setting: Linear, rank: int, autocast: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    linear = nn.Linear(setting.K, setting.N, bias=False, device="meta")
    linear.weight = nn.Parameter(setting.weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=setting.case.dropout, target_modules=["linear"])
    wrapped: Any = nn.Sequential(OrderedDict(linear=linear))
    model: Any = get_peft_model(wrapped, config, autocast_adapter_dtype=autocast)
    return model.base_model.model.linear.train()


def _one_by_one(setting: Linear, autocast: bool) -> Contender:
    layers = [_peft_layer(setting, rank, autocast) for rank in setting.case.ranks]
    parts = zip(setting.apart, layers, strict=True)
    return Contender([Part(x, dy, layer, _trained(layer)) for (x, dy), layer in parts])


def _trained(layer: Any) -> list[torch.Tensor]:
    return [p for p in layer.parameters() if p.requires_grad]


def _peft(setting: Linear) -> Contender:
    return _one_by_one(setting, True)


def _peft_bf16(setting: Linear) -> Contender:
    need_bfloat16(setting)
    return _one_by_one(setting, False)


def _peft_one(setting: Linear) -> Contender:
    mean = max(1, round(setting.ranks.total / len(setting.case.ranks)))
    layer = _peft_layer(setting, mean, setting.dtype.itemsize != 2)
    return setting.packed(layer, _trained(layer))


def _addmm(setting: Linear) -> Contender:
    A, B = (tensor.detach().to(setting.dtype).requires_grad_() for tensor in (setting.A, setting.B))
    banks = [(A[bank], B[bank]) for bank in setting.ranks]

    def call(x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, setting.weight)
        dropped = F.dropout(x, setting.case.dropout) if setting.case.dropout else x
        for rows, (A_RK, B_RN) in zip(setting.tokens, banks, strict=True):
            y[rows].addmm_(dropped[rows] @ A_RK.T, B_RN, alpha=SCALE)
        return y

    return setting.packed(call, [A, B])


def _grouped(setting: Linear) -> Contender:
    product = getattr(F, "grouped_mm", None)
    if product is None:
        raise Missing("this torch has no torch.nn.functional.grouped_mm")
    where = dict(device=setting.device, dtype=setting.dtype)
    offsets = torch.tensor(setting.tokens.offsets[1:], dtype=torch.int32, device=setting.device)
    clients, widest = len(setting.case.ranks), -(-max(setting.case.ranks) // 16) * 16
    A = torch.randn(clients, setting.K, widest, **where).requires_grad_()  # pyright: ignore[reportCallIssue, reportArgumentType]
    B = torch.randn(clients, widest, setting.N, **where).requires_grad_()  # pyright: ignore[reportCallIssue, reportArgumentType]

    def call(x: torch.Tensor) -> torch.Tensor:
        dropped = F.dropout(x, setting.case.dropout) if setting.case.dropout else x
        branch = product(product(dropped, A, offs=offsets), B, offs=offsets)
        return F.linear(x, setting.weight).add_(branch, alpha=SCALE)

    return setting.packed(call, [A, B])


RIVALS = (
    Rival(FROZEN, "the linear without adapters: the limit of any method; backward takes dX alone", _frozen),
    Rival(
        "PEFT",
        "one client after another, each with a layer of its own from get_peft_model as it comes (float32 adapters), on "
        "rows that are tensors of their own: nothing is split or joined in its time",
        _peft,
    ),
    Rival("PEFT bf16", "the same with autocast_adapter_dtype=False: adapters in the base's 16 bits", _peft_bf16),
    Rival(
        "PEFT, one adapter",
        "one adapter of the clients' mean rank over all tokens in one call: not the same result, but no packing to do",
        _peft_one,
    ),
    Rival(
        "addmm_",
        "by hand: one product for the base, then addmm_ into each client's rows; factors in the base's dtype",
        _addmm,
    ),
    Rival(
        "grouped_mm",
        "torch.nn.functional.grouped_mm over the clients; ranks padded to the largest, as it needs them equal",
        _grouped,
    ),
)


def compare(benchmark: Any, scale: Any, case: Case, part: str) -> None:
    """Time forward or backward of every contender, check ours, and print speed-ups if the check is green."""
    question = f"LoRA linear {part} of {len(case.ranks)} clients: {case.model} {case.linear}, {case.tokens} tokens each"
    result = Result(f"linear_{part}_{case.id}", question, case.settings, scale.folder)
    with result.reported():
        setting = Linear(case)
        result.save(rates=rates(setting.device), flops=setting.flops[part], bytes=setting.bytes[part])
        contenders = {"flora": setting.ours(), **ready(RIVALS, setting, result)}
        outputs: dict[str, list[torch.Tensor]] = {}
        turns = dict.fromkeys(contenders, 0)

        def before(name: str) -> None:
            turns[name] = (turns[name] + 1) % len(setting.x)
            if part == "backward":
                outputs[name] = contenders[name].forward(turns[name])

        def work(name: str) -> Any:
            if part == "forward":
                return len(contenders[name].forward(turns[name]))
            return len(contenders[name].backward(outputs.pop(name), turns[name]))

        calls = {name: lambda name=name: work(name) for name in contenders}
        ours = "flora", calls.pop("flora")
        check = lambda _: setting.check(contenders["flora"])  # noqa: E731
        limits: Any = dict(seconds=3 * scale.seconds, most=25)
        interleave(benchmark, result, ours, calls, check=check, before=before, **limits)
        print("\n" + result.conclude("flora", dict.fromkeys(calls)))
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}


__all__ = ["RIVALS", "Contender", "Linear", "Part", "compare"]
