"""Each Triton kernel of a LoRA linear alone on a GPU: microseconds, and the share of what memory allows.

Every launch is timed from a CUDA graph over buffers that rotate, more than the L2 cache holds, beside the two library
products that the branch is put together with. A kernel's own result is held to float64 before its number is kept.
``python -m bench.gpu.kernels --warm OP,OP`` compiles what these ops launch; ``--once`` launches each a single time.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from bench.gpu import times as gpu_times
from bench.gpu.times import DEVICE, GPU, SCALE, summary, timed
from bench.harness.deadline import OutOfTime
from flora_core import Segments, testing
from flora_kernels import reference
from flora_kernels import triton as kernels
from flora_kernels.triton import counts
from flora_kernels.triton.counts import Count

# (K, N): of Llama-7B and TinyLlama; in a trial without a GPU one that the interpreter does quickly.
SHAPES = ((4096, 4096), (2048, 2048), (4096, 11008), (11008, 4096), (2048, 5632), (2048, 256)) if GPU else ((32, 48),)
TOKENS, RANKS = ((8192, 1280), gpu_times.RANKS) if GPU else ((9,), (20, 4))
DROPOUT_Q = 6554  # of 65536: one in ten
LAUNCHES, ROUNDS, WARM_UP = (20, 15, 2) if GPU else (1, 1, 0)
SHARED = 3  # targets that share their input
BF16 = torch.bfloat16
Tensors = Sequence[torch.Tensor]
Parts = Sequence[Segments]


class Operands:
    """Tensors of one shape on rotating buffers, and the clients."""

    def __init__(self, K: int, N: int, M: int, dropout: bool):
        self.K, self.N, self.M = K, N, M
        base, rest = divmod(M, len(RANKS))
        self.tokens, self.ranks = Segments([base + (c < rest) for c in range(len(RANKS))]), Segments(RANKS)
        seeds, rows = tuple(range(1, 1 + len(RANKS))), (0,) * len(RANKS)
        # No launch of a training step has both: a scale goes with the forward's Y, a mask with X and dX.
        self.scaling = None if dropout else (SCALE,) * len(RANKS)
        self.dropout = kernels.Dropout((DROPOUT_Q,) * len(RANKS), seeds, rows) if dropout else None
        self.buffers = self._buffers()
        self.x = [self._random(M, K) for _ in range(self.buffers)]
        self.y = [self._random(M, N) for _ in range(self.buffers)]
        P = self.ranks.total
        self.A, self.B = (self._random(P, size, dtype=torch.float32) * size**-0.5 for size in (K, N))
        self.weight = self._random(N, K) * K**-0.5
        self.s_of_client = Segments([m * r for m, r in zip(self.tokens.lengths, RANKS, strict=True)])
        self.s = self._random(self.s_of_client.total)

    def _buffers(self) -> int:
        if not GPU:
            return 1
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
        return max(3, math.ceil(2 * cache / (2 * self.M * (self.K + self.N))))

    def _random(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype)

    @property
    def counts(self) -> dict[str, Count]:
        """Count the bytes and operations of each op."""
        m, r, K, N = self.tokens.lengths, RANKS, self.K, self.N
        base = counts.linear(m, K, N)
        one, other = counts.shrink(m, r, K), counts.expand_(m, r, N)
        x_bytes, y_bytes = 2 * self.M * K, 4 * self.M * N
        return {
            "shrink": one,
            "shrink_many": Count(SHARED * one.bytes - (SHARED - 1) * x_bytes, SHARED * one.flops),
            "expand_": other,
            "expand_many_": Count(SHARED * other.bytes - (SHARED - 1) * y_bytes, SHARED * other.flops),
            "wgrad": counts.wgrad(m, r, K, N),
            "linear": base,
            "linear_lora": counts.linear_lora(m, r, K, N),
            "F.linear": base,
            "addmm": Count(base.bytes + 2 * self.M * N, base.flops),
        }


@dataclass(frozen=True)
class Op:
    """One launch: on the n-th buffers, by some kernels in some dtype; and what of its results is a client's own."""

    call: Callable[[Operands, int, Any, torch.dtype], Tensors]
    parts: Callable[[Operands], Parts]
    drops: bool = False


def _factor(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Masters of 16-bit activations are float32; a reference in another dtype takes its own."""
    return factor if dtype == BF16 else factor.to(dtype)


def _shrink(d: Operands, n: int, k: Any, dtype: torch.dtype) -> Tensors:
    return [k.shrink(d.x[n].to(dtype), _factor(d.A, dtype), d.tokens, d.ranks, None, d.dropout)]


def _shrink_many(d: Operands, n: int, k: Any, dtype: torch.dtype) -> Tensors:
    if k is reference:
        return list(_shrink(d, n, k, dtype)) * SHARED
    each = [[value] * SHARED for value in (d.A, d.ranks, None, d.dropout)]
    return k.shrink_many(d.x[n], each[0], d.tokens, *each[1:])


def _expand(d: Operands, n: int, k: Any, dtype: torch.dtype) -> Tensors:
    y = d.y[n].to(dtype)
    return [k.expand_(y, d.s.to(dtype), _factor(d.B, dtype), d.tokens, d.ranks, d.scaling, d.dropout)]


def _expand_many(d: Operands, n: int, k: Any, dtype: torch.dtype) -> Tensors:
    y, s, B = d.y[n].to(dtype), d.s.to(dtype), _factor(d.B, dtype)
    if k is reference:
        for _ in range(SHARED):
            k.expand_(y, s, B, d.tokens, d.ranks, d.scaling, d.dropout)
        return [y]
    each: list[list[Any]] = [[value] * SHARED for value in (s, B, d.ranks, d.scaling, d.dropout)]
    k.expand_many_(y, each[0], each[1], d.tokens, *each[2:])
    return [y]


def _wgrad(d: Operands, n: int, k: Any, dtype: torch.dtype) -> Tensors:
    s, wide = d.s.to(dtype), torch.promote_types(dtype, torch.float32)
    return k.wgrad(s, d.x[n].to(dtype), s, d.y[n].to(dtype), d.tokens, d.ranks, (SCALE,) * len(RANKS), wide, d.dropout)


def _linear(d: Operands, n: int, k: Any, dtype: torch.dtype) -> Tensors:
    return [k.linear(d.x[n].to(dtype), d.weight.to(dtype), None)]


def _linear_lora(d: Operands, n: int, k: Any, dtype: torch.dtype) -> Tensors:
    x, weight, s, B = d.x[n].to(dtype), d.weight.to(dtype), d.s.to(dtype), _factor(d.B, dtype)
    if k is reference:
        return [k.expand_(k.linear(x, weight, None), s, B, d.tokens, d.ranks, d.scaling)]
    return [k.linear_lora(x, weight, None, s, B, d.tokens, d.ranks, d.scaling)]


def _library(d: Operands, n: int, k: Any, dtype: torch.dtype) -> Tensors:
    return [F.linear(d.x[n].to(dtype), d.weight.to(dtype))]


def _addmm(d: Operands, n: int, k: Any, dtype: torch.dtype) -> Tensors:
    return [d.y[n].to(dtype).addmm_(d.x[n].to(dtype), d.weight.to(dtype).T)]


def _of_tokens(d: Operands) -> Parts:
    return [d.tokens]


OPS = {
    "shrink": Op(_shrink, lambda d: [d.s_of_client], True),
    "expand_": Op(_expand, _of_tokens, True),
    "wgrad": Op(_wgrad, lambda d: [d.ranks, d.ranks], True),
    "F.linear": Op(_library, _of_tokens),
    "addmm": Op(_addmm, _of_tokens),
    "linear_lora": Op(_linear_lora, _of_tokens),
    "shrink_many": Op(_shrink_many, lambda d: [d.s_of_client] * SHARED, True),
    "expand_many_": Op(_expand_many, _of_tokens, True),
    "linear": Op(_linear, _of_tokens),
}


def ratio(name: str, d: Operands) -> float:
    """The worst share of the error budget, client by client and result by result."""
    op, kept = OPS[name], d.y[0].clone()
    found: list[Tensors] = []
    # The last is the kernel's own, which may write into the buffer.
    for k, dtype in ((reference, torch.float64), (reference, BF16), (kernels, BF16)):
        found.append([result.clone() for result in op.call(d, 0, k, dtype)])
        d.y[0].copy_(kept)
    exact, low, out = ({str(i): result for i, result in enumerate(results)} for results in found)
    parts = {str(i): segments for i, segments in enumerate(op.parts(d))}
    ratios = testing.budget_ratios(out, exact, low, parts)
    return max((r for row in ratios.values() for r in row), key=lambda r: (r != r, r))


def microseconds(run: Callable[[int], Any], buffers: int) -> dict[str, float]:
    """Of one launch: a graph of many over rotating buffers, replayed."""
    if not GPU:
        return summary([timed(lambda: run(0)) for _ in range(ROUNDS)])
    kept: list[Any] = []
    for n in range(buffers):
        run(n)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept += [run(i % buffers) for i in range(LAUNCHES)]
    times = [timed(graph.replay) / LAUNCHES for _ in range(ROUNDS + WARM_UP)][WARM_UP:]
    del kept
    return summary(times)


def row(name: str, d: Operands, bandwidth: float) -> dict[str, Any]:
    """One line of the table: the check, and the time if it is green."""
    found: dict[str, Any] = {"error / budget": ratio(name, d)}
    found["green"] = found["error / budget"] <= 1
    if not found["green"]:
        return found
    found |= microseconds(lambda n: OPS[name].call(d, n, kernels, BF16), d.buffers)
    count = d.counts[name]
    seconds = 1e-6 * found["us"]
    found |= {"share of copy": count.bytes / seconds / bandwidth, "TFLOP/s": count.flops / seconds / 1e12}
    return found


def cases() -> Iterator[tuple[int, int, int, bool]]:
    """K, N, M and dropout; what decides most comes first."""
    for M in TOKENS:
        for dropout in (False, True):
            for K, N in SHAPES:
                yield K, N, M, dropout


def table(found: dict[str, Any], bandwidth: float, save: Callable[[], None] = lambda: None) -> None:
    """Fill ``found["rows"]``, a row for each shape, op and dropout."""
    rows = found.setdefault("rows", {})
    found["green"] = True
    for K, N, M, dropout in cases():
        operands = Operands(K, N, M, dropout)
        for name, op in OPS.items():
            if dropout and not op.drops:
                continue
            key = f"{name} {K}->{N} M{M}{' dropout' if dropout else ''}"
            try:
                rows[key] = row(name, operands, bandwidth)
            except OutOfTime:
                raise
            except Exception as error:  # one kernel that fails leaves the others
                rows[key] = {"green": False, "error": f"{type(error).__name__}: {error}"[:500]}
            found["green"] &= rows[key]["green"]
        del operands
        save()


def decisions(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Which rebuilding the measured times ask for first; None where a time is missing."""

    def us(name: str) -> float | None:
        return rows.get(f"{name} 4096->4096 M8192", {}).get("us")

    product, added = us("F.linear"), us("addmm")
    extra = None if product is None or added is None else added - product
    rate = None if product is None else 2 * 8192 * 4096 * 4096 / (1e-6 * product) / 1e12
    asked = (
        ("shrink, us", us("shrink"), 24.0, True, "split K in fixed pieces; keep a padded 16-bit copy of the factors"),
        ("expand_, us", us("expand_"), 38.0, True, "a table of tiles made once a pass; a padded S; load Y first"),
        ("wgrad, us", us("wgrad"), 42.0, True, "a padded S, so that both operands are copied asynchronously"),
        ("addmm_ with beta = 1 over F.linear, us", extra, 8.0, False, "write the branch, then let the product add it"),
        ("F.linear, TFLOP/s", rate, 720.0, False, "the goal of 1.09 frozen linears is nearer by about 0.02"),
    )
    return [
        {
            "what": what,
            "is": value,
            "above" if above else "below": bound,
            "so": so,
            "holds": None if value is None else (value > bound if above else value < bound),
        }
        for what, value, bound, above, so in asked
    ]


def main() -> int:
    """Compile what some ops launch, or launch each once for a profiler."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", default="", help="ops, with commas between them")
    parser.add_argument("--once", default="", help="the same, each launched a single time")
    options = parser.parse_args()
    (K, N), M = SHAPES[0], TOKENS[0]
    for name in filter(None, (options.warm or options.once).split(",")):
        for dropout in (False, True) if options.warm and OPS[name].drops else (False,):
            operands = Operands(K, N, M, dropout)
            OPS[name].call(operands, 0, kernels, BF16)
    if GPU:
        torch.cuda.synchronize()
    return 0


__all__ = ["OPS", "Operands", "decisions", "row", "table"]

if __name__ == "__main__":
    raise SystemExit(main())
