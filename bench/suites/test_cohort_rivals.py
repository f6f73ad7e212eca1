"""A training step of a whole model: a packed cohort against the frozen base and every rival that can take part."""

from __future__ import annotations

import os
from typing import Any

import torch

from bench.cases.grid import Case
from bench.cases.rivals import ready
from bench.cases.steps import RIVALS, Step
from bench.harness.protocol import Result, interleave
from bench.harness.rates import device, rates
from flora_core.training.cuda_graphs import WARM_UP

QUESTION = "cohort_rivals"
# On a CPU a third of the layers tells as much: the step is a sum over layers, and the head's share is larger.
CPU_LAYERS = 10
# Times as fast as ten sequential PEFT steps, on a GPU, at about 819 tokens each.
TARGETS = {"TinyLlama-1.1B": 3.0, "Llama-7B": 1.7}


def target_of(case: Case) -> float | None:
    """How many times as fast as PEFT a step must be on a GPU; nowhere slower."""
    if not torch.cuda.is_available():
        return None
    return TARGETS.get(case.model, 1.0) if (case.mix, case.tokens) == ("mixed", 819) else 1.0


def compiles(case: Case) -> bool:
    """Return whether torch.compile takes part: on a GPU in the case without dropout of the smaller model, which is
    last."""
    chosen = (case.model, case.mix, case.dropout) == ("TinyLlama-1.1B", "mixed", 0.0)
    return os.environ.get("FLORA_BENCH_COMPILE") == "1" or (torch.cuda.is_available() and chosen)


def test_bench_cohort_rivals(benchmark: Any, scale: Any, case: Case):
    gpu, clients = torch.cuda.is_available(), len(case.ranks)
    layers = scale.depth(case.shapes.layers if gpu else min(CPU_LAYERS, case.shapes.layers))
    question = (
        f"A training step of {clients} clients ({case.mix}) of {case.model}, {layers} layers, {case.tokens} tokens each"
    )
    result = Result(f"cohort_rivals_{case.id}", question, {**case.settings, "layers": layers}, scale.folder)
    with result.reported():
        setting = Step(case, layers, compiles=compiles(case))
        result.save(rates=rates(device()), tokens_step=setting.tokens, dtype=str(setting.dtype))
        rivals = ready(RIVALS, setting, result)
        limits: Any = dict(seconds=(12 if gpu else 60) * scale.seconds, most=15)
        with setting.packed.running():
            interleave(
                benchmark,
                result,
                ("flora", setting.packed.step),
                rivals,
                check=lambda _: setting.check(range(clients) if clients <= 10 else (0, 1, 2)),
                # On a GPU the first steps are called, then one is captured, then it is replayed.
                warm_ups=WARM_UP + 2 if gpu else 1,
                **limits,
            )
        print("\n" + result.conclude("flora", {**dict.fromkeys(rivals), "PEFT": target_of(case)}))
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}
