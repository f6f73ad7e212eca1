"""The CPU's merge of 10 clients' stack (P = 160) into bfloat16 and fp32 weights, against what torch offers.

Beside the medians, which the published tables show, a result holds the fastest round of each contender: where something
else is running, threads that wait for each other lose more than their share, and short calls most of all.
Letters: K in_features, N out_features, P sum of ranks.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.protocol import Check, Result, interleave
from flora_core.testing import budget_ratio

native = pytest.importorskip("flora_kernels.native", exc_type=ImportError)
P = 160
SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
TINYLLAMA = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]
MODELS = {
    "256x2048": ([(256, 2048)], 32),
    "2048x2048": ([(2048, 2048)], 8),
    "4096x4096": ([(4096, 4096)], 2),
    "SmolLM2-135M": (SMOLLM2, 30),
    "TinyLlama-1.1B": (TINYLLAMA, 22),
}
# All that a merge may need beyond its arrays.
MEMORY_BYTES = 16 << 20
# The square product whose rate stands for what the processor's fp32 units give.
LARGE = 2048


class Layers:
    """Weights of a model in one dtype, and one stack for each shape: what differs between layers is W alone."""

    def __init__(self, name: str, layers: int, dtype: torch.dtype):
        random = torch.Generator().manual_seed(0)
        shapes, count = MODELS[name]
        self.shapes = shapes * min(count, layers)
        self.stacks = {}
        for n, k in shapes:
            A, B = (torch.randn(P, size, generator=random) for size in (k, n))
            self.stacks[n, k] = A, B * 1e-3, torch.rand(P, generator=random)
        self.dtype = dtype
        self.flop = sum(2 * n * k * P for n, k in self.shapes)
        self.start = {shape: (torch.randn(shape, generator=random) * 0.02).to(dtype) for shape in shapes}

    def weights(self) -> list[torch.Tensor]:
        return [self.start[shape].clone() for shape in self.shapes]

    def items(self, weights: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        return [(W, *self.stacks[shape]) for W, shape in zip(weights, self.shapes, strict=True)]


def ours(layers: Layers, weights: list[torch.Tensor], isa: str = "auto") -> Callable[[], int]:
    items = layers.items(weights)
    return lambda: native.merge_many_(items, isa=isa)


def addmm(layers: Layers, weights: list[torch.Tensor]) -> Callable[[], None]:
    items = layers.items(weights)

    def work() -> None:
        for W, A, B, coef in items:
            W.addmm_(B.T * coef, A)

    return work


def widened(layers: Layers, weights: list[torch.Tensor], reuse: bool) -> Callable[[], None]:
    """``W.float()``, ``addmm_``, back; ``reuse`` keeps one fp32 buffer for each shape."""
    items = layers.items(weights)
    buffers = {shape: torch.empty(shape) for shape in layers.start} if reuse else {}

    def work() -> None:
        for W, A, B, coef in items:
            wide = buffers[W.shape[0], W.shape[1]].copy_(W) if reuse else W.float()
            W.copy_(wide.addmm_(B.T * coef, A))

    return work


def bf16_addmm(layers: Layers, weights: list[torch.Tensor]) -> Callable[[], None]:
    """torch's own bfloat16 product, with B (N x P) and A (P x K) stored as PEFT stores them."""
    items = [(W, A.bfloat16(), (B.T * coef).contiguous().bfloat16()) for W, A, B, coef in layers.items(weights)]

    def work() -> None:
        for W, A, B in items:
            W.addmm_(B, A)

    return work


def check(layers: Layers, make: Callable[[Layers, list[torch.Tensor]], Callable[[], Any]]) -> Check:
    """One merge of every shape against float64; torch's fp32 route, rounded once, is ``low``."""
    found, low = layers.weights(), layers.weights()
    make(layers, found)()
    (widened(layers, low, reuse=False) if layers.dtype == torch.bfloat16 else addmm(layers, low))()
    worst, seen = 0.0, set()
    for W, rounded, shape in zip(found, low, layers.shapes, strict=True):
        if shape in seen:
            continue
        seen.add(shape)
        A, B, coef = (tensor.double() for tensor in layers.stacks[shape])
        exact = layers.start[shape].double() + B.T @ (coef[:, None] * A)
        worst = max(worst, budget_ratio(W, exact, rounded), key=lambda ratio: (ratio != ratio, ratio))
    return Check(worst, "one weight of every shape against float64")


def extra_bytes(work: Callable[[], Any]) -> int | None:
    """By how much the process grows at most while it works on a thread that has no workspace yet; None: not told."""

    def size(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return 1024 * int(line.split()[1])

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = size("VmRSS")
    except OSError:
        return None
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return max(0, size("VmHWM") - before)


def run(benchmark: Any, result: Result, layers: Layers, name: str, rivals: dict[str, Any], seconds: float) -> None:
    """Check, then time all contenders and the large product in turn; rates and workspace stand beside the check."""
    make = ours
    work = make(layers, layers.weights())
    side = torch.randn(LARGE, LARGE)
    out = torch.empty_like(side)
    large = {"large fp32 product": lambda: torch.mm(side, side, out=out)}
    limits: Any = dict(seconds=seconds, most=25)
    checks = lambda _: check(layers, make)  # noqa: E731
    values = interleave(benchmark, result, (name, work), {**rivals, **large}, check=checks, **limits)
    times = result.data["times"]
    rates = {key: layers.flop / time["median_s"] / 1e9 for key, time in times.items() if key not in large}
    rates |= {key: 2 * LARGE**3 / times[key]["median_s"] / 1e9 for key in large}
    shares = [
        layers.flop / mine / (2 * LARGE**3 / theirs)
        for mine, theirs in zip(times[name]["wall_s"], times["large fp32 product"]["wall_s"], strict=True)
    ]
    extra = extra_bytes(work)
    fastest = {key: min(time["wall_s"]) for key, time in times.items()}
    details = {
        "gflops": rates,
        "share_of_large_product": statistics.median(shares),
        "workspace_bytes": max(values[name]),
        "extra_bytes": extra,
        "fastest_rounds": {
            "share_of_large_product": layers.flop / fastest[name] / (2 * LARGE**3 / fastest["large fp32 product"]),
            "speedups": {key: fastest[key] / fastest[name] for key in rivals},
        },
    }
    for size in (max(values[name]), extra or 0):
        assert size < MEMORY_BYTES, f"a merge needed {size / 2**20:.1f} MB beyond its arrays"
    result.save(check=result.data["check"] | details)


def settings(scale: Any, name: str, dtype: str) -> dict[str, Any]:
    native_line = native.describe()
    return {"layers": scale.layers, "shapes": name, "P": P, "dtype": dtype, "native": native_line}


@pytest.mark.parametrize("name", list(MODELS))
def test_bench_cpu_merge_bf16(benchmark: Any, scale: Any, name: str):
    result = Result(
        f"cpu_merge_bf16_{name}",
        f"Merging a stack of P = {P} into bfloat16 weights ({name}) on the CPU",
        settings(scale, name, "bfloat16"),
        scale.folder,
    )
    layers = Layers(name, scale.layers, torch.bfloat16)
    rivals = {
        "float, addmm_, back": widened(layers, layers.weights(), reuse=False),
        "float into a kept buffer, addmm_, back": widened(layers, layers.weights(), reuse=True),
    }
    targets: dict[str, float | None] = {
        "float, addmm_, back": 2.5 if min(layers.shapes[0]) >= 2048 else None,
        "float into a kept buffer, addmm_, back": 1.2 if min(layers.shapes[0]) >= 2048 else 1.0,
    }
    # Some hundred times as slow where torch knows no bfloat16 product (AVX2): one size is enough to know.
    if name == "2048x2048":
        rivals["bfloat16 addmm_"] = bf16_addmm(layers, layers.weights())
        targets["bfloat16 addmm_"] = 100.0 if torch.backends.cpu.get_cpu_capability() == "AVX2" else None
    with result.reported():
        run(benchmark, result, layers, "flora", rivals, 8 * scale.seconds)
        print("\n" + result.conclude("flora", targets))
    told = result.data["check"]
    print(f"share of the large product's rate: {told['share_of_large_product']:.2f}; fastest: {told['fastest_rounds']}")
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}


@pytest.mark.parametrize("name", list(MODELS))
def test_bench_cpu_merge_fp32(benchmark: Any, scale: Any, name: str):
    result = Result(
        f"cpu_merge_fp32_{name}",
        f"Merging a stack of P = {P} into fp32 weights ({name}) on the CPU",
        settings(scale, name, "float32"),
        scale.folder,
    )
    layers = Layers(name, scale.layers, torch.float32)
    rivals = {"addmm_": addmm(layers, layers.weights())}
    with result.reported():
        run(benchmark, result, layers, "flora", rivals, 6 * scale.seconds)
        print("\n" + result.conclude("flora", {"addmm_": 0.95}))
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}


def test_bench_cpu_merge_instruction_sets(benchmark: Any, scale: Any):
    """The best path of the processor against the others of the same library, which older processors take."""
    best = native.describe().split(", ")[1]
    name, others = "2048x2048", ("avx2", "portable")[best != "avx512" :]
    result = Result(
        f"cpu_merge_isa_{name}",
        f"Merging a stack of P = {P} into bfloat16 weights ({name}) on the CPU, by instruction set",
        settings(scale, name, "bfloat16"),
        scale.folder,
    )
    layers = Layers(name, scale.layers, torch.bfloat16)
    rivals = {isa: ours(layers, layers.weights(), isa) for isa in others}
    with result.reported():
        run(benchmark, result, layers, "flora", rivals, 8 * scale.seconds)
        print("\n" + result.conclude("flora", dict.fromkeys(others)))
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}
