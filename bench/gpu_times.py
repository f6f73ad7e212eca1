"""Times of LoRA linears and AdamW on a GPU, by one protocol: interleaved rounds, CUDA events, medians with p20 and p80.

Contenders work on the same data with the same dropout probability; forward and backward are timed apart. Buffers
rotate, so that nothing is found in the L2 cache. Clients follow one another in PEFT, as its users run them.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

import platform
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.protocol import ROOT, quantile
from flora_core import Segments, ways
from flora_core.ops import cohort_adamw_, lora_linear
from flora_kernels.triton import counts

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
# (N, K) of the linears of each model.
SHAPES = {
    "7b": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "tinyllama": [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)],
}
ROUNDS, BUFFERS, DEVICE = 25, 3, "cuda"
Contender = tuple[Callable[[int], Any], Callable[[Any, int], None]]


def setting() -> dict[str, Any]:
    """Where and with what this ran."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    found: dict[str, Any] = {"commit": commit, "torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError as error:
        found["triton"] = str(error)
    if torch.cuda.is_available():
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,clocks.sm,clocks.mem,utilization.gpu",
            "--format=csv,noheader",
        ]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def summary(times: list[float]) -> dict[str, float]:
    return {"us": quantile(times, 0.5), "p20": quantile(times, 0.2), "p80": quantile(times, 0.8)}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds of one call, and what it gave."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    value = work()
    stop.record()
    stop.synchronize()
    return 1000 * start.elapsed_time(stop), value


def interleaved(contenders: dict[str, Contender]) -> dict[str, Any]:
    """Forward and backward of every contender, in turns; the first three rounds warm up."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contenders}
    for number in range(ROUNDS + 3):
        for name, (forward, backward) in contenders.items():
            there, out = timed(lambda f=forward, n=number: f(n % BUFFERS))
            back, _ = timed(lambda b=backward, o=out, n=number: b(o, n % BUFFERS))
            if number >= 3:
                found[name][0].append(there)
                found[name][1].append(back)
    return {name: {"forward": summary(there), "backward": summary(back)} for name, (there, back) in found.items()}


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source))[0] for _ in range(12)][2:]
    return 2 * source.numel() / (1e-6 * quantile(times, 0.5))


class Linears:
    """The contenders for one shape: the frozen linear, ours in every way to fuse, PEFT twice, grouped_mm."""

    def __init__(self, N: int, K: int, M: int, dropout: float):
        base, rest = divmod(M, len(RANKS))
        self.lengths = [base + (c < rest) for c in range(len(RANKS))]
        self.tokens, self.ranks = Segments(self.lengths), Segments(RANKS)
        self.dropout = dropout
        options: dict[str, Any] = dict(device=DEVICE, dtype=torch.bfloat16)
        self.x = [torch.randn(M, K, **options).requires_grad_() for _ in range(BUFFERS)]
        self.dy = [torch.randn(M, N, **options) for _ in range(BUFFERS)]
        self.weight = torch.randn(N, K, **options) * K**-0.5
        self.A = (torch.randn(sum(RANKS), K, device=DEVICE) * K**-0.5).requires_grad_()
        self.B = (torch.randn(sum(RANKS), N, device=DEVICE) * 0.02).requires_grad_()
        self.scaling = (2.0,) * len(RANKS)

    def backward(self, out: Any, n: int, *leaves: torch.Tensor) -> None:
        torch.autograd.grad(out, [self.x[n], *leaves], self.dy[n])

    def frozen(self) -> Contender:
        return lambda n: nn.functional.linear(self.x[n], self.weight), self.backward

    def ours(self, fuse: str) -> Contender:
        seeds = torch.arange(1, 11, device=DEVICE)
        options: dict[str, Any] = dict(backend="triton", fuse=fuse)
        if self.dropout:
            options |= dict(dropout_C=(self.dropout,) * 10, dropout_seed_C=seeds)
        arguments = self.weight, None, self.A, self.B, self.tokens, self.ranks, self.scaling
        return (
            lambda n: lora_linear(self.x[n], *arguments, **options),
            lambda out, n: self.backward(out, n, self.A, self.B),
        )

    def peft(self, adapters_in_fp32: bool) -> Contender:
        from peft import LoraConfig, get_peft_model

        layers, leaves = [], []
        for rank in RANKS:
            linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(self.weight, requires_grad=False)
            config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=self.dropout, target_modules=["linear"])
            model: Any = get_peft_model(
                nn.Sequential(OrderedDict(linear=linear)), config, autocast_adapter_dtype=adapters_in_fp32
            )
            layers.append(model.base_model.model.linear.train())
            leaves += [p for p in layers[-1].parameters() if p.requires_grad]

        def forward(n: int) -> torch.Tensor:
            parts = zip(layers, self.x[n].split(self.lengths), strict=True)
            return torch.cat([layer(part) for layer, part in parts])

        return forward, lambda out, n: self.backward(out, n, *leaves)

    def grouped(self) -> Contender:
        """Ranks padded to the largest, as grouped products want them; no dropout mask of a client's own."""
        offsets = torch.tensor(self.tokens.offsets[1:], dtype=torch.int32, device=DEVICE)
        sizes = len(RANKS), self.weight.shape[1], max(RANKS)
        A = torch.randn(sizes, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        B = torch.randn(sizes[0], sizes[2], self.weight.shape[0], device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        product = nn.functional.grouped_mm

        def forward(n: int) -> torch.Tensor:
            x = nn.functional.dropout(self.x[n], self.dropout) if self.dropout else self.x[n]
            branch = product(product(x, A, offs=offsets), B, offs=offsets)
            return nn.functional.linear(self.x[n], self.weight).add_(branch, alpha=2.0)

        return forward, lambda out, n: self.backward(out, n, A, B)


def time_linear(N: int, K: int, M: int, dropout: float) -> dict[str, Any]:
    """All contenders for one linear, and the counted limit."""
    made, skipped = Linears(N, K, M, dropout), {}
    makers: dict[str, Callable[[], Contender]] = {"frozen": made.frozen}
    makers |= {f"flora {way}": lambda w=way: made.ours(w) for way in (*ways.WAYS, "auto")}
    makers |= {"PEFT bf16": lambda: made.peft(False), "PEFT": lambda: made.peft(True), "grouped_mm": made.grouped}
    contenders: dict[str, Contender] = {}
    for name, make in makers.items():
        try:
            forward, backward = make()
            backward(forward(0), 0)
            contenders[name] = forward, backward
        except Exception as error:  # a rival that this torch lacks is left out, by name
            skipped[name] = f"{type(error).__name__}: {error}"[:300]
    found = interleaved(contenders)
    limit = counts.linear_lora(made.lengths, RANKS, K, N).limit_us
    total = {name: row["forward"]["us"] + row["backward"]["us"] for name, row in found.items()}
    ratios = {name: total[name] / total["frozen"] for name in total}
    return {"times": found, "to frozen": ratios, "counted limit of the forward, us": limit, "skipped": skipped}


def time_adamw(bandwidth: float, numel: int = 84_000_000) -> dict[str, Any]:
    """Ten clients' adapters of a 7B model in one launch, against torch's fused AdamW on the same buffers."""
    p, g, m, v = (torch.rand(numel, device=DEVICE) for _ in range(4))
    segments = Segments([numel // 10] * 10)
    hyper_CH = torch.tensor([[1e-4, 0.9, 0.999, 1e-8, 0.0, 3, 1.0]] * 10, device=DEVICE, dtype=torch.float64)
    lists = [p], [g], [m], [v], [], [torch.full((), 3.0, device=DEVICE)]
    settings: dict[str, Any] = dict(lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8)
    fused: dict[str, Any] = dict(amsgrad=False, maximize=False)

    def ours() -> None:
        cohort_adamw_(p, g, m, v, segments, hyper_CH, backend="triton")

    def theirs() -> None:
        torch._fused_adamw_(*lists, **settings, **fused)  # pyright: ignore[reportPrivateImportUsage]

    times: dict[str, list[float]] = {"flora": [], "torch fused": []}
    for number in range(ROUNDS + 3):
        for name, work in (("flora", ours), ("torch fused", theirs)):
            us, _ = timed(work)
            times[name] += [us] if number >= 3 else []
    moved = counts.cohort_adamw_(numel).bytes
    found: dict[str, Any] = {name: summary(us) for name, us in times.items()}
    return found | {"share of copy bandwidth": moved / (1e-6 * found["flora"]["us"]) / bandwidth, "bytes": moved}


__all__ = ["SHAPES", "copy_bandwidth", "setting", "time_adamw", "time_linear"]
