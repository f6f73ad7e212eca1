"""One strategy's round at scale, in a process of its own: time and peak memory of aggregation and certificate.

python -m bench.strategies_case STRATEGY MODULES OPTIONS_JSON        prints one JSON object
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

from flora_core.aggregate import aggregate, get_strategy
from flora_core.device import peak_memory_bytes
from flora_core.seeds import generator
from flora_core.update import ClientUpdate

CLIENTS, FRACTION, RANKS, EQUAL_RANK = 1000, 0.1, (4, 8, 16, 32, 64), 16
# Llama-7B: q and v of 32 layers, N = K = 4096.
MODULES, WIDTH = 64, 4096


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
        "forms": sorted({kind for kind, _ in result.forms.values()}),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))))
