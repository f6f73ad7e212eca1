"""A training step of a whole model: a packed cohort against the frozen base and every rival that can take part."""

from __future__ import annotations

import os
from typing import Any

import torch

from bench.grid import Case
from bench.protocol import Result, interleave
from bench.rates import device, rates
from bench.rivals import ready
from bench.steps import RIVALS, Step

QUESTION = "cohort_rivals"
# On a CPU a third of the layers tells as much: the step is a sum over layers, and the head's share is larger.
CPU_LAYERS = 10


def watched(result: Result, name: str, work: Any) -> Any:
    """The work, noting on a GPU what it allocates at most beyond what was there when it began."""
    if not torch.cuda.is_available():
        return work

    def run() -> Any:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = work()
        peaks = result.data.setdefault("step_bytes", {})
        peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated() - before)
        return value

    return run


def test_bench_cohort_rivals(benchmark: Any, scale: Any, case: Case):
    layers = scale.depth(case.shapes.layers if torch.cuda.is_available() else min(CPU_LAYERS, case.shapes.layers))
    clients = len(case.ranks)
    question = (
        f"A training step of {clients} clients ({case.mix}) of {case.model}, {layers} layers, {case.tokens} tokens each"
    )
    result = Result(f"cohort_rivals_{case.id}", question, {**case.settings, "layers": layers}, scale.folder)
    with result.told():
        compiles = torch.cuda.is_available() or os.environ.get("FLORA_BENCH_COMPILE") == "1"
        setting = Step(case, layers, compiles=compiles)
        result.save(rates=rates(device()), tokens_step=setting.tokens, dtype=str(setting.dtype))
        rivals = ready(RIVALS, setting, result)
        with setting.packed.running():
            interleave(
                benchmark,
                result,
                ("flora", watched(result, "flora", setting.packed.step)),
                {name: watched(result, name, work) for name, work in rivals.items()},
                check=lambda _: setting.check(range(clients) if clients <= 10 else (0, 1, 2)),
                seconds=30 * scale.seconds,
                least=3,
                most=9,
            )
        print("\n" + result.conclude("flora", dict.fromkeys(rivals)))
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}
