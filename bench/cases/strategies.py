"""One strategy's round at scale, in a process of its own: time and peak memory of aggregation and certificate.

python -m bench.cases.strategies STRATEGY MODULES OPTIONS_JSON        prints one JSON object
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from flora_core.adapters.update import ClientUpdate, RoundResult
from flora_core.aggregation import aggregate, get_strategy
from flora_core.aggregation.svd import OVERSAMPLING, is_core_cheaper, is_whole_cheaper
from flora_core.common.devices import peak_memory_bytes
from flora_core.common.seeds import generator

CLIENTS, FRACTION, RANKS, EQUAL_RANK = 1000, 0.1, (4, 8, 16, 32, 64), 16
# Llama-7B: q and v of 32 layers, N = K = 4096.
MODULES, WIDTH = 64, 4096

# What arXiv 2506.09199 gives for a 7B model, in GFLOP, and the setting that fits its numbers: see counted_gflop.
PUBLISHED = {"flora": 0.0, "ffa": 0.20, "fedit": 0.39, "flora_svd": 6.18, "flexlora": 2209.0}
PUBLISHED_RANKS, PUBLISHED_MODULES = (64, 32, 16, 16, 8, 8, 4, 4), 32


def sampled_ranks(equal: bool) -> list[int]:
    """The ranks of a round's clients: 1,000 with ranks dealt in turn, a tenth of them drawn."""
    drawn = torch.randperm(CLIENTS, generator=generator(0, "sample", 1))[: int(CLIENTS * FRACTION)].sort().values
    return [EQUAL_RANK if equal else RANKS[i % len(RANKS)] for i in drawn.tolist()]


def make_updates(name: str, modules: int, width: int = WIDTH, clients: int | None = None) -> list[ClientUpdate]:
    """A round of random updates as they would arrive: every factor a tensor of its own, float32."""
    strategy = get_strategy(name)
    frozen = {"A", "B"} - set(strategy.trainable({}))
    common = {
        m: torch.rand(EQUAL_RANK, width, generator=generator(1, m)) - 0.5 for m in range(modules if frozen else 0)
    }
    updates = []
    for i, rank in enumerate(sampled_ranks(not strategy.mixed_ranks)[:clients]):
        random = generator(0, "update", i)
        make = lambda: torch.rand(rank, width, generator=random).sub_(0.5)  # noqa: B023, E731
        adapters = {f"layer{m}": (common[m] if frozen else make(), make()) for m in range(modules)}
        updates.append(ClientUpdate(f"c{i}", adapters, dict.fromkeys(adapters, 2.0), weight=50.0 + i))
    return updates


class Work(NamedTuple):
    """Floating-point operations for one module; a multiplication and an addition are two."""

    products: int = 0
    factorisations: int = 0
    sums: int = 0


def qr(tall: int, thin: int, vectors: bool = True) -> int:
    """Householder QR of tall x thin, with the thin Q or without (Golub and Van Loan, 5.2)."""
    return (2 if vectors else 1) * (2 * tall * thin**2 - 2 * thin**3 // 3)


def work(name: str, ranks: Sequence[int], N: int, K: int, options: Mapping[str, Any]) -> Work:
    """Count what a strategy computes to combine one module's factors; checks, certificate and write are not in it."""
    P, S, width = sum(ranks), N + K, max(ranks) + OVERSAMPLING
    stack = torch.empty(P, K, device="meta"), torch.empty(P, N, device="meta"), torch.empty(P, device="meta")
    if name in ("fedit", "zero_pad", "fedex"):
        return Work(sums=2 * P * S)
    if name in ("ffa", "rolora"):  # one factor is averaged, the other one compared
        return Work(sums=2 * P * N + 5 * P * K)
    if name == "hetlora":
        dense = [4 * r * S >= N * K for r in ranks]
        norms = [0 if whole else qr(N, r, False) + qr(K, r, False) for r, whole in zip(ranks, dense, strict=True)]
        products = [2 * N * K * r if whole else 2 * r**3 for r, whole in zip(ranks, dense, strict=True)]
        return Work(sum(products), sum(norms), 2 * P * S)
    if (name == "flora_warm" or options.get("svd") == "fast") and not is_whole_cheaper(stack, max(ranks)):
        thin = 5 * qr(N, width) + 4 * qr(K, width) + 6 * K * width**2 + 20 * width**3
        return Work(20 * P * S * width + 2 * N * width**2, thin)
    if name in ("flora_warm", "flora_svd", "flexlora", "raflora"):
        if is_core_cheaper(stack):
            return Work(2 * P**3 + 2 * P**2 * S, qr(N, P) + qr(K, P) + 22 * P**3)
        return Work(2 * N * K * P, 14 * max(N, K) * min(N, K) ** 2 + 8 * min(N, K) ** 3)
    return Work()  # flora: stacking


def counted_gflop(name: str, **options: Any) -> float:
    """GFLOP of one round in the setting of the published numbers: 8 clients, a 4096 x 4096 matrix a layer.

    That setting is inferred: ``32 (2 N P^2 + P^3)`` with P = 152, the sum of the ranks that are the default of
    FLoRIST's public code, is 6.17 against their 6.18, and an SVD of a dense N x N counted as N^3 gives
    ``32 N^3 = 2199`` against their 2209 for FlexLoRA.
    """
    equal = not get_strategy(name).mixed_ranks
    ranks = [EQUAL_RANK] * len(PUBLISHED_RANKS) if equal else PUBLISHED_RANKS
    return PUBLISHED_MODULES * sum(work(name, ranks, WIDTH, WIDTH, options)) / 1e9


def checked(updates: Sequence[ClientUpdate], result: RoundResult, module: str = "layer0") -> float:
    """Compare one module with the clients' products, summed one by one in float64, and the certificate with that.

    Returns:
        The norm of the difference, relative to the exact sum.
    Raises:
        AssertionError: If the certificate tells another error.
    """
    total = sum(update.weight for update in updates)
    A, B = updates[0].adapters[module]
    exact = torch.zeros(B.shape[1], A.shape[1], dtype=torch.float64)
    for update in updates:
        A, B = (factor.double() for factor in update.adapters[module])
        exact.addmm_(B.T, A, alpha=update.weight / total * update.scaling[module])
    got = torch.zeros_like(exact)
    for stack in result.change()[module]:
        A, B, coef = (part.double() for part in stack)
        got.addmm_(B.T * coef, A)
    told, found = result.certificate.aggregation[module].relative, float((got - exact).norm() / exact.norm())
    assert abs(found - told) <= 1e-9 * max(1.0, told), f"{module} is {found} off, its certificate says {told}"
    return found


def storage(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes of every buffer below these tensors, once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def main(name: str, modules: int, options: dict[str, Any], width: int = WIDTH) -> dict[str, Any]:
    """Run one round; what it took."""
    torch.set_num_threads(int(os.environ.get("FLORA_BENCH_THREADS", "2")))
    updates = make_updates(name, modules, width)
    before = peak_memory_bytes(torch.device("cpu")) or 0
    began = time.perf_counter()
    result = aggregate(updates, name, **options)
    seconds = time.perf_counter() - began
    factors = [factor for update in updates for pair in update.adapters.values() for factor in pair]
    made = [part for stacks in (result.base_delta, result.adapter) for stack in stacks.values() for part in stack]
    peak, sent = peak_memory_bytes(torch.device("cpu")) or 0, storage(factors)
    return {
        "strategy": name,
        "options": options,
        "modules": modules,
        "clients": len(updates),
        "sum_of_ranks": sum(update.ranks["layer0"] for update in updates),
        "seconds": seconds,
        "seconds_of": result.seconds,
        "update_bytes": sum(sent.values()),
        "result_bytes": sum(size for at, size in storage(made).items() if at not in sent),
        "working_bytes": peak - before,
        "peak_bytes": peak,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "aggregation_error": result.certificate.aggregation_error,
        "checked_error": checked(updates, result),
        "forms": sorted({kind for kind, _ in result.forms.values()}),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))))
