"""Check the CUDA kernels on a GPU: ``python -m tests.support.cuda.gpu_check``; without one, its emulated half.

First each wrapper of ptx.cuh against its emulation, then each kernel against float64 on ragged cases, then times,
each beside the copy bandwidth of the same run. Needs nvcc, torch and pytest, no network. Writes gpu_check.json into
$OUT, or the folder named with --out, after every step, so that what came before a crash is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flora_core import Segments, testing
from flora_core.testing import LINEAR_SHAPES, MERGE_SHAPES, LinearCase, MergeCase, make_linear, make_merge
from flora_kernels import reference
from flora_kernels.reference import MergeItem
from tests.support.cuda.emulated import ROOT, Library, build_emulated, build_for_gpu
from tests.support.cuda.probes import PROBES, expected, words_for

BF16 = torch.bfloat16
KINDS = {"bf16": BF16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
WIDE = LinearCase("tiles past one of every axis", (70, 0, 131, 1), 150, 300, (70, 3, 20, 6))
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)


def check_probes(library: Library) -> dict[str, bool]:
    """Return whether each wrapper gives the words that its manual says."""
    right = {}
    for name, number in PROBES.items():
        words = words_for(name)
        want = expected(name, words)
        right[name] = torch.equal(library.probe(number, words, want.numel()), want)
    return right


def check_linears(library: Library, device: str) -> dict[str, float]:
    """The worst share of the error budget, client by client, of y, dx, dA and dB."""
    ratios = {}
    with library.as_backend("checked") as backend:
        for case in testing.in_dtypes((*LINEAR_SHAPES, WIDE), KINDS.values()):
            inputs = make_linear(case, base=False, dropout=True, device=device)
            out = testing.run_linear(inputs, backend)
            parts = testing.budget_ratios(
                out, testing.oracle_linear(inputs), testing.oracle_linear(inputs, case.dtype), inputs.parts
            )
            ratios[case.id] = max((r for row in parts.values() for r in row), default=0.0)
    return ratios


def check_merges(library: Library, device: str) -> dict[str, float]:
    """The same of merges in every pair of dtypes; stochastic rounding as 0 where all bits are the reference's."""
    ratios = {}
    for name, dtype in KINDS.items():
        for factor in ("bf16", "fp16", "fp32"):
            for case in (*MERGE_SHAPES, MergeCase("", 130, 264, (40, 33)), MergeCase("", 300, 520, (700,))):
                one = make_merge(replace(case, dtype=dtype))
                one = replace(one, A=one.A.to(KINDS[factor]), B=one.B.to(KINDS[factor]))
                tensors = [tensor.to(device, copy=True) for tensor in (one.weight, one.A, one.B, one.coef)]
                library.merge_many_([MergeItem(*tensors)])
                low = testing.oracle_merge(one, dtype)
                ratios[f"{case.id} {name} {factor}"] = testing.budget_ratio(
                    tensors[0].cpu(), testing.oracle_merge(one), low
                )
    one = make_merge(MergeCase("", 130, 264, (40, 33), BF16), exact=True)
    want, coef = one.weight.clone(), one.coef / 1024
    mine = [tensor.to(device, copy=True) for tensor in (one.weight, one.A, one.B, coef)]
    library.merge_(*mine, rounding="stochastic", seed=77)
    reference.merge_(want, one.A, one.B, coef, rounding="stochastic", seed=77)
    ratios["stochastic"] = float(not torch.equal(mine[0].cpu(), want))
    return ratios


def check_adamw(library: Library, device: str) -> float:
    """The worst share of the budget over all four buffers."""
    parts, owner = Segments((900, 7, 0, 1300, 41)), (0, 1, 2, 2, 1)
    hyper = torch.tensor(
        [[3e-2, 0.9, 0.999, 1e-8, 0.1, 5, 1], [0.1, 0.8, 0.9, 1e-3, 0, 0, 1], [5e-2, 0, 0.9, 1, 0, 9, 1]]
    )
    low = [torch.rand(2248, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    ref64, mine = [tensor.double() for tensor in low], [tensor.to(device, copy=True) for tensor in low]
    for p, g, m, v in (low, ref64):
        reference.cohort_adamw_(p, g, m, v, parts, hyper.double(), owner)
    p, g, m, v = mine
    library.cohort_adamw_(p, g, m, v, parts, hyper.double(), owner)
    return max(testing.budget_ratio(a.cpu(), b, c) for a, b, c in zip(mine, ref64, low, strict=True))


def milliseconds(run: Callable[[], Any], repeats: int = 15, inner: int = 1) -> dict[str, float]:
    """Median, p20 and p80 of a run, replayed from a graph of ``inner`` runs: Python is slower than a small kernel."""
    run()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(inner):
            run()
    for i in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if i > 1:
            times.append(start.elapsed_time(stop) / inner)
    times.sort()
    return {"ms": statistics.median(times), "p20": times[len(times) // 5], "p80": times[len(times) * 4 // 5]}


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source))["ms"] / 1e3)


def merge_layers(shapes: list[tuple[int, int]], factor: torch.dtype, low_bits: bool = False) -> list[MergeItem]:
    P = sum(RANKS)

    def make(*shape: int, dtype: torch.dtype = factor) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype) * 0.02

    return [
        MergeItem(
            make(N, K, dtype=BF16),
            make(P, K),
            make(P, N),
            torch.rand(P, device="cuda"),
            torch.zeros(N, K, dtype=torch.int16, device="cuda") if low_bits else None,
        )
        for N, K in shapes
    ]


def moved_bytes(items: list[MergeItem]) -> int:
    sizes = [2 * i.weight.nbytes + 2 * (0 if i.low_bits is None else i.low_bits.nbytes) for i in items]
    return sum(sizes) + sum(i.A.nbytes + i.B.nbytes for i in items)


def time_merges(library: Library, bandwidth: float) -> dict[str, Any]:
    """Llama-7B's layers: q and v, then all linears; against a loop of addmm_ on the same layers."""
    q_v = [(4096, 4096)] * 64
    everything = ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32
    rows = {}
    for name, shapes, factor, rounding, low_bits in (
        ("q,v bf16 factors", q_v, BF16, "nearest", False),
        ("q,v fp32 factors", q_v, torch.float32, "nearest", False),
        ("q,v stochastic", q_v, BF16, "stochastic", False),
        ("q,v low bits", q_v, BF16, "nearest", True),
        ("all linears bf16 factors", everything, BF16, "nearest", False),
    ):
        items = merge_layers(shapes, factor, low_bits)
        timed: dict[str, Any] = milliseconds(lambda i=items, r=rounding: library.merge_many_(i, rounding=r), 7)
        timed["bytes"] = moved_bytes(items)
        timed["share of copy bandwidth"] = timed["bytes"] / (timed["ms"] / 1e3) / bandwidth
        if factor == BF16 and rounding == "nearest" and not low_bits:

            def loop(items: list[MergeItem] = items) -> None:
                for item in items:
                    item.weight.addmm_((item.B * item.coef[:, None]).to(BF16).T, item.A)

            timed["addmm_ loop ms"] = milliseconds(loop, 7)["ms"]
        rows[name] = timed
        del items
        torch.cuda.empty_cache()
    return rows


def time_linears(library: Library, bandwidth: float) -> dict[str, Any]:
    """shrink, expand and wgrad for 8192 tokens of ten clients, 4096 -> 4096, bf16 with fp32 masters; AdamW."""
    M, K = 8192, 4096
    tokens, ranks = Segments((820,) * 2 + (819,) * 8), Segments(RANKS)
    x, dy = (torch.randn(M, K, device="cuda", dtype=BF16) for _ in range(2))
    A, B = (torch.randn(ranks.total, K, device="cuda") * 0.01 for _ in range(2))
    scaling = torch.ones(10, device="cuda", dtype=torch.float64)
    dropout = reference.Dropout(*(torch.full((10,), v, device="cuda") for v in (6554, 12345, 0)))
    s = library.shrink(x, A, tokens, ranks)
    pairs = s.numel()
    factors = 4 * ranks.total * K
    rows = {}
    for name, run, size in (
        ("shrink", lambda: library.shrink(x, A, tokens, ranks), 2 * (M * K + pairs) + factors),
        ("shrink dropout", lambda: library.shrink(x, A, tokens, ranks, None, dropout), 2 * (M * K + pairs) + factors),
        ("expand", lambda: library.expand_(dy, s, B, tokens, ranks, scaling), 2 * (2 * M * K + pairs) + factors),
        (
            "wgrad",
            lambda: library.wgrad(s, x, s, dy, tokens, ranks, scaling, torch.float32),
            2 * (2 * M * K + 2 * pairs) + 2 * factors,
        ),
    ):
        rows[name] = {**milliseconds(run, inner=20), "bytes": size, "limit ms": 1e3 * size / bandwidth}
    p, g, m, v = [torch.rand(84_000_000, device="cuda") for _ in range(4)]
    hyper, parts = torch.tensor([[1e-4, 0.9, 0.999, 1e-8, 0.0, 3, 1.0]] * 10, device="cuda"), Segments([8_400_000] * 10)
    timed = milliseconds(lambda: library.cohort_adamw_(p, g, m, v, parts, hyper, range(10)))
    rows["adamw"] = {**timed, "bytes": 28 * 84_000_000, "limit ms": 1e3 * 28 * 84_000_000 / bandwidth}
    return rows


def output_of(*words: str) -> str:
    """Output of a program; empty where it is missing."""
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def within_budget(found: dict[str, Any]) -> bool:
    """Return whether every ratio of a check is at most 1."""
    return all(isinstance(ratio, float) and ratio <= 1 for ratio in found.values())


def setting() -> dict[str, Any]:
    """Where and with what this ran."""
    found = {
        "commit": output_of("git", "rev-parse", "HEAD"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem"
        found["gpu"] = output_of("nvidia-smi", query, "--format=csv,noheader")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    out = parser.parse_args().out / "gpu_check.json"
    results: dict[str, Any] = {"setting": setting()}

    def step(name: str, run: Callable[[], Any]) -> Any:
        try:
            results[name] = run()
        except Exception:  # the next step may still tell something
            results[name] = {"error": traceback.format_exc(limit=3)}
        out.write_text(json.dumps(results, indent=1, default=str) + "\n")
        print(f"{name}: {json.dumps(results[name], default=str)[:1500]}", flush=True)
        return results[name]

    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        library = Library(build_for_gpu(Path(folder)), "cuda") if gpu else Library(build_emulated(Path(folder)))
    device = "cuda" if gpu else "cpu"
    probes = step("probes", lambda: check_probes(library))
    linears = step("linears", lambda: check_linears(library, device))
    merges = step("merges", lambda: check_merges(library, device))
    adam = step("adamw", lambda: check_adamw(library, device))
    sound = all(value is True for value in probes.values()) and isinstance(adam, float) and adam <= 1
    sound = sound and within_budget(linears) and within_budget(merges)
    if gpu:
        library.fill = False
        bandwidth = step("copy bytes/s", copy_bandwidth)
        # What is red is not timed itself, and keeps nothing else from being timed.
        if within_budget(merges):
            step("merge times", lambda: time_merges(library, bandwidth))
        if within_budget(linears) and isinstance(adam, float) and adam <= 1:
            step("linear times", lambda: time_linears(library, bandwidth))
    print("sound" if sound else "NOT SOUND")
    return 0 if sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
