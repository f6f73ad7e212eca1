"""Times of LoRA linears and AdamW on a GPU, by one protocol: interleaved rounds, medians with p20 and p80.

Contenders work on the same data with the same dropout probability; forward and backward are timed apart, each a CUDA
graph over buffers that rotate, more than the L2 cache holds, so that neither Python nor the cache counts. Clients
follow one another in PEFT, as its users run them. Ours is held against float64 first: a red way is not timed.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients, T targets that share X.
"""

from __future__ import annotations

import gc
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench.harness.deadline import OutOfTime
from bench.harness.protocol import environment, quantile
from flora_core import LoraWeights, Segments, testing
from flora_core.ops import fusion
from flora_core.ops.api import cohort_adamw_, lora_linears
from flora_kernels.triton import counts

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
SCALE = 2.0
Group = tuple[tuple[int, ...], int]
# The linears of one layer as they share their input, (N of each, K); and one of each that is not there by itself.
LAYERS: dict[str, tuple[Group, ...]] = {
    "7b": (((4096,), 4096), ((4096,), 11008), ((4096,) * 3, 4096), ((11008,) * 2, 4096)),
    "tinyllama": (((2048,), 2048), ((2048,), 5632), ((2048, 256, 256), 2048), ((5632,) * 2, 2048)),
    "trial": (((48,), 64), ((40,) * 2, 48)),
}
ALONE: dict[str, tuple[Group, ...]] = {
    "7b": (((11008,), 4096),),
    "tinyllama": (((256,), 2048), ((5632,), 2048)),
    "trial": (),
}
GPU = torch.cuda.is_available()
DEVICE, ROUNDS, WARM = ("cuda", 25, 3) if GPU else ("cpu", 2, 1)
Tensors = Sequence[torch.Tensor]
# forward(n) on the n-th buffer, and what takes the gradients of what it gave.
Contender = tuple[Callable[[int], Tensors], Callable[[Tensors, int], Tensors]]


def setting() -> dict[str, Any]:
    """Where and with what this runs."""
    return environment()


def summary(times: Sequence[float]) -> dict[str, float]:
    return {"us": quantile(list(times), 0.5), "p20": quantile(list(times), 0.2), "p80": quantile(list(times), 0.8)}


def timed(work: Callable[[], Any]) -> float:
    """Microseconds of one call, by events on a GPU."""
    if not GPU:
        start_s = time.perf_counter()
        work()
        return 1e6 * (time.perf_counter() - start_s)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()  # pyright: ignore[reportCallIssue]
    work()
    stop.record()  # pyright: ignore[reportCallIssue]
    stop.synchronize()
    return 1000 * start.elapsed_time(stop)


def copy_bandwidth(size_bytes: int = 2**31 if GPU else 2**20) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size_bytes / (1e-6 * quantile([timed(lambda: target.copy_(source)) for _ in range(12)][2:], 0.5))


def in_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS, warm: int = WARM
) -> dict[str, list[float]]:
    """Microseconds of every contender, round by round; the first rounds warm up."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + warm):
        for name, work in contenders.items():
            us = timed(work)
            found[name] += [us] if number >= warm else []
    return found


class Played:
    """A contender's forward and its backward over these buffers, each a graph to replay; on a CPU they ran once."""

    def __init__(self, contender: Contender, turns: Sequence[int]):
        self.kept: list[Any] = []
        forward, backward = contender
        self.forward = self._graph(lambda: [forward(n) for n in turns], None)
        outputs = self.kept[0]
        self.backward = self._graph(
            lambda: [backward(ys, n) for ys, n in zip(outputs, turns, strict=True)], self.forward
        )

    def _graph(self, run: Callable[[], Any], before: Any) -> Callable[[], None]:
        """A graph of ``run``, whose results are kept: a graph writes them where they lie."""
        if not GPU:
            self.kept.append(run())
            return lambda: None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=before and before.__self__.pool()):
            self.kept.append(run())
        return graph.replay


class Targets:
    """Targets that share X: their data on buffers that rotate, and the contenders."""

    def __init__(self, group: Group, M: int, dropout: float):
        (self.sizes, self.K), self.dropout = group, dropout
        base, rest = divmod(M, len(RANKS))
        self.tokens = Segments([base + (c < rest) for c in range(len(RANKS))])
        self.ranks = Segments(RANKS)
        self.turns = [turn % self._buffers(M) for turn in range(self._turns(M))]
        self.buffers = max(self.turns) + 1
        self.x = [self._random(M, self.K).requires_grad_() for _ in range(self.buffers)]
        self.dys = [[self._random(M, N) for N in self.sizes] for _ in range(self.buffers)]
        self.weights = [self._random(N, self.K) * self.K**-0.5 for N in self.sizes]
        P, wide = self.ranks.total, torch.float32
        self.A = [(self._random(P, self.K, dtype=wide) * self.K**-0.5).requires_grad_() for _ in self.sizes]
        self.B = [(self._random(P, N, dtype=wide) * 0.05).requires_grad_() for N in self.sizes]
        self.seeds = [torch.arange(1, 11, device=DEVICE) + 100 * t for t in range(len(self.sizes))]

    def _buffers(self, M: int) -> int:
        """As many as the cache holds twice over, and three at least."""
        if not GPU:
            return 1
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
        return max(3, math.ceil(2 * cache / (2 * M * (self.K + sum(self.sizes)))))

    def _turns(self, M: int) -> int:
        """Every buffer once at least, and so often that what a graph's launch takes does not show."""
        counted_us = sum(counts.linear([M], self.K, N).limit_us for N in self.sizes)
        return max(self._buffers(M), min(math.ceil(500 / counted_us), 32)) if GPU else 1

    def _random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype)

    def frozen(self) -> Contender:
        """The linears without adapters; backward takes dX alone."""
        return (
            lambda n: [F.linear(self.x[n], weight) for weight in self.weights],
            lambda ys, n: torch.autograd.grad(ys, [self.x[n]], self.dys[n]),
        )

    def flora(self, fuse: str, dtype: torch.dtype = torch.bfloat16, backend: str = "triton") -> Contender:
        """Ours; in another dtype or on another backend for the check."""
        drop: dict[str, Any] = dict(dropout_C=(self.dropout,) * len(RANKS)) if self.dropout else {}
        wide = torch.promote_types(dtype, torch.float32)
        same, scales = dtype == torch.bfloat16, (SCALE,) * len(RANKS)
        A, B = (
            factors if same else [f.detach().to(wide).requires_grad_() for f in factors] for factors in (self.A, self.B)
        )
        targets = [
            LoraWeights(weight.to(dtype), None, a, b, self.ranks, scales, seeds if self.dropout else None)
            for weight, a, b, seeds in zip(self.weights, A, B, self.seeds, strict=True)
        ]
        xs = self.x if same else [self.x[0].detach().to(dtype).requires_grad_()]

        def backward(ys: Tensors, n: int) -> Tensors:
            return torch.autograd.grad(ys, [xs[n], *A, *B], [dy.to(dtype) for dy in self.dys[n]])

        return lambda n: lora_linears(xs[n], targets, self.tokens, backend=backend, fuse=fuse, **drop), backward

    def peft(self, adapters_in_fp32: bool) -> Contender:
        """A layer of PEFT's for every client and target; each client has an x of its own: nothing is put together."""
        layers = [[self._peft_layer(weight, rank, adapters_in_fp32) for weight in self.weights] for rank in RANKS]
        leaves = [p for own in layers for layer in own for p in layer.parameters() if p.requires_grad]
        xs = [[part.detach().requires_grad_() for part in x.split(self.tokens.lengths)] for x in self.x]
        dys = [[dy[rows] for rows in self.tokens for dy in dys] for dys in self.dys]

        def forward(n: int) -> Tensors:
            return [layer(x) for x, own in zip(xs[n], layers, strict=True) for layer in own]

        return forward, lambda ys, n: torch.autograd.grad(ys, [*xs[n], *leaves], dys[n])

    def _peft_layer(self, weight: torch.Tensor, rank: int, adapters_in_fp32: bool) -> Any:
        from peft import LoraConfig, get_peft_model

        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=self.dropout, target_modules=["linear"])
        holder: Any = nn.Sequential(OrderedDict(linear=linear))
        model: Any = get_peft_model(holder, config, autocast_adapter_dtype=adapters_in_fp32)
        return model.base_model.model.linear.train()

    def grouped(self) -> Contender:
        """Products grouped by client, ranks padded to the largest, as they need; one mask for all clients."""
        offsets, product = self.tokens.offsets_on(DEVICE)[1:].clone(), F.grouped_mm
        widest = max(RANKS)
        A = [self._random(len(RANKS), self.K, widest).requires_grad_() for _ in self.sizes]
        B = [self._random(len(RANKS), widest, N).requires_grad_() for N in self.sizes]

        def forward(n: int) -> Tensors:
            ys = []
            for weight, a, b in zip(self.weights, A, B, strict=True):
                dropped = F.dropout(self.x[n], self.dropout) if self.dropout else self.x[n]
                branch = product(product(dropped, a, offs=offsets), b, offs=offsets)
                ys.append(F.linear(self.x[n], weight).add_(branch, alpha=SCALE))
            return ys

        return forward, lambda ys, n: torch.autograd.grad(ys, [self.x[n], *A, *B], self.dys[n])

    def results(self, contender: Contender) -> dict[str, torch.Tensor]:
        """y, dx, dA and dB of ours on the first buffer, by name."""
        ys = contender[0](0)
        dx, *factors = contender[1](ys, 0)
        names = [f"{kind}{t}" for kind in ("dA", "dB") for t in range(len(self.sizes))]
        ys = {f"y{t}": y.detach() for t, y in enumerate(ys)}
        return {**ys, "dx": dx, **dict(zip(names, factors, strict=True))}

    def oracle(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The same by the reference in float64, and in bfloat16 for the rounding that cannot be avoided."""
        wide, low = torch.float64, torch.bfloat16
        return tuple(self.results(self.flora("separate", kind, "reference")) for kind in (wide, low))  # pyright: ignore

    def ratio(self, contender: Contender, exact: Any, low: Any) -> float:
        """The worst share of the error budget, client by client and result by result."""
        parts = {name: self.ranks if name[1] in "AB" else self.tokens for name in exact}
        ratios = testing.budget_ratios(self.results(contender), exact, low, parts)
        return max((ratio for row in ratios.values() for ratio in row), key=lambda ratio: (ratio != ratio, ratio))

    def contenders(self) -> Iterator[tuple[str, Callable[[], Contender]]]:
        """Everybody's name, and what makes him."""
        yield "frozen", self.frozen
        yield from ((f"flora {way}", lambda w=way: self.flora(w)) for way in ("auto", *fusion.FUSIONS))
        yield "PEFT bf16", lambda: self.peft(False)
        yield "PEFT", lambda: self.peft(True)
        yield "grouped_mm", self.grouped


def ready(made: Targets) -> tuple[dict[str, Contender], dict[str, float], dict[str, str]]:
    """The contenders, warmed up; the share of the error budget that ours use; those left out, with the reason."""
    (exact, low), found, checks, missing = made.oracle(), {}, {}, {}
    for name, make in made.contenders():
        try:
            contender = make()
            if name.startswith("flora"):
                checks[name] = made.ratio(contender, exact, low)
                if not checks[name] <= 1:
                    raise AssertionError(f"check is red: error / budget = {checks[name]:.3g}")
            for n in range(made.buffers):
                contender[1](contender[0](n), n)
            found[name] = contender
        except OutOfTime:
            raise
        except Exception as error:  # a rival that is not here is left out, by name
            missing[name] = f"{type(error).__name__}: {error}"[:300]
    return found, checks, missing


def time_group(group: Group, M: int, dropout: float, bandwidth: float) -> dict[str, Any]:
    """All contenders for targets that share X, against the frozen linears and the counted limits."""
    made = Targets(group, M, dropout)
    contenders, checks, missing = ready(made)
    played: dict[str, Played] = {}
    for name, contender in contenders.items():
        try:
            played[name] = Played(contender, made.turns)
        except OutOfTime:
            raise
        except Exception as error:
            missing[name] = f"no CUDA graph of it: {type(error).__name__}: {error}"[:300]
    times: dict[str, dict[str, Any]] = {name: {} for name in played}
    for part in ("forward", "backward"):
        for name, each in in_turns({name: getattr(both, part) for name, both in played.items()}).items():
            times[name][part] = summary([us / len(made.turns) for us in each])
    extra = counts.branch_bytes(made.tokens.lengths, RANKS, made.K, made.sizes)
    limits = [
        times["frozen"][p]["us"] + 1e6 * b / bandwidth for p, b in zip(("forward", "backward"), extra, strict=True)
    ]
    total = {name: time["forward"]["us"] + time["backward"]["us"] for name, time in times.items()}
    found: dict[str, Any] = {"tokens": list(made.tokens.lengths), "buffers": made.buffers, "times": times}
    found |= {"to frozen": {name: us / total["frozen"] for name, us in total.items()}, "total us": total}
    found |= {"limit us": limits, "to the limit": {name: us / sum(limits) for name, us in total.items()}}
    found |= {
        "error / budget": checks,
        "missing": missing,
        "green": bool(checks) and all(r <= 1 for r in checks.values()),
    }
    del played, contenders, made
    gc.collect()
    return found


def name_of(model: str, group: Group, M: int, dropout: float) -> str:
    return f"{model} {group[1]}->{'+'.join(map(str, group[0]))} M{M} dropout {dropout:g}"


def cases(models: Sequence[str], tokens: Sequence[int]) -> Iterator[tuple[str, Group, int, float]]:
    """Everything to time, by name; what the first targets are about comes first."""
    for M in tokens:
        for model in models:
            for group in (*LAYERS[model], *ALONE[model]):
                for dropout in (0.1, 0.0):
                    yield name_of(model, group, M, dropout), group, M, dropout


def layer(results: Mapping[str, Any], model: str, M: int, dropout: float) -> dict[str, float] | None:
    """Microseconds of a layer's linears, forward and backward, of each contender timed in all of them."""
    rows = [results.get(name_of(model, group, M, dropout), {}).get("total us") for group in LAYERS[model]]
    if not all(rows):
        return None
    return {name: sum(row[name] for row in rows) for name in rows[0] if all(name in row for row in rows)}


def verdicts(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each thing that must be shown: what was measured, what it must be, and whether it is."""
    found: dict[str, dict[str, Any]] = {}

    def tell(what: str, value: float | None, wanted: float, at_most: bool = True) -> None:
        met = value is not None and (value <= wanted if at_most else value >= wanted)
        found[what] = {"is": value, "at most" if at_most else "at least": wanted, "met": met}

    def of(name: str, table: str, who: str = "flora auto") -> float | None:
        return results.get(name, {}).get(table, {}).get(who)

    for dropout, wanted in ((0.1, 1.18), (0.0, 1.12)):
        name = name_of("7b", ((4096,), 4096), 8192, dropout)
        tell(f"{name}: to frozen", of(name, "to frozen"), wanted)
        ours, theirs = of(name, "total us"), of(name, "total us", "PEFT bf16")
        tell(f"{name}: times as fast as PEFT bf16", theirs / ours if ours and theirs else None, 1.25, at_most=False)
    for name, *_ in cases(("7b", "tinyllama"), (8192,)):
        tell(f"{name}: to its own limit", of(name, "to the limit"), 1.12)
    for model, wanted in (("7b", 1.7), ("tinyllama", 2.3)):
        us = layer(results, model, 8192, 0.1) or {}
        value = us["PEFT"] / us["flora auto"] if {"PEFT", "flora auto"} <= us.keys() else None
        tell(f"{model}: times as fast as PEFT as it comes, a layer's linears", value, wanted, at_most=False)
    adamw = results.get("adamw", {})
    tell("adamw: share of the copy bandwidth", adamw.get("share of copy bandwidth"), 0.85, at_most=False)
    tell("adamw: to torch's fused", adamw.get("to torch fused"), 1.0)
    return found


def adamw_ratio(sizes: Sequence[int] = (900, 7, 1300)) -> float:
    """How much of the error budget one step of ours uses, all four buffers."""
    count, segments = sum(sizes), Segments(sizes)
    hyper_CH = torch.tensor([[3e-2, 0.9, 0.999, 1e-8, 0.1, 5, 1.0]] * len(sizes), dtype=torch.float64)
    low = [torch.rand(count, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    exact, mine = [buffer.double() for buffer in low], [buffer.to(DEVICE, copy=True) for buffer in low]
    for p, g, m, v in (low, exact):
        cohort_adamw_(p, g, m, v, segments, hyper_CH, backend="reference")
    p, g, m, v = mine
    cohort_adamw_(p, g, m, v, segments, hyper_CH.to(DEVICE), backend="triton")
    return max(testing.budget_ratio(a.cpu(), b, c) for a, b, c in zip(mine, exact, low, strict=True))


def bank_ranges(numel: int, width: int = 4096) -> Segments:
    """The ranges of a bank of about so many numbers: in each factor of a module every client's own rows."""
    width = min(width, max(1, numel // sum(RANKS)))
    return Segments([rank * width for _ in range(max(1, numel // (width * sum(RANKS)))) for rank in RANKS])


def replayed(work: Callable[[], Any]) -> Callable[[], Any]:
    """Work as a graph, so that what Python takes to launch it is not timed; on a CPU as it is."""
    if not GPU:
        return work
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def time_adamw(bandwidth: float, numel: int = 84_000_000 if GPU else 5000) -> dict[str, Any]:
    """Ten clients' adapters of a 7B model in one launch, against torch's fused AdamW on the same buffers."""
    ratio = adamw_ratio()
    if not ratio <= 1:
        return {"green": False, "error / budget": ratio}
    segments = bank_ranges(numel)
    owner, numel = [i % len(RANKS) for i in range(len(segments))], segments.total
    p, g, m, v = (torch.rand(numel, device=DEVICE) for _ in range(4))
    hyper_CH = torch.tensor([[1e-4, 0.9, 0.999, 1e-8, 0.0, 3, 1.0]] * 10, device=DEVICE, dtype=torch.float64)
    lists = [p], [g], [m], [v], [], [torch.full((), 3.0, device=DEVICE)]
    settings: dict[str, Any] = dict(lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8)
    fused: dict[str, Any] = dict(amsgrad=False, maximize=False)
    times = in_turns(
        {
            "flora": replayed(lambda: cohort_adamw_(p, g, m, v, segments, hyper_CH, owner=owner, backend="triton")),
            "torch fused": replayed(lambda: torch._fused_adamw_(*lists, **settings, **fused)),  # pyright: ignore
        }
    )
    moved = counts.cohort_adamw_(numel).bytes
    found: dict[str, Any] = {name: summary(us) for name, us in times.items()}
    found["to torch fused"] = found["flora"]["us"] / found["torch fused"]["us"]
    found |= {"share of copy bandwidth": moved / (1e-6 * found["flora"]["us"]) / bandwidth, "bytes": moved}
    return found | {"green": True, "error / budget": ratio}


__all__ = [
    "LAYERS",
    "cases",
    "copy_bandwidth",
    "in_turns",
    "layer",
    "setting",
    "summary",
    "time_adamw",
    "time_group",
    "verdicts",
]
