"""A whole federated round: local training, aggregation and the write into the base, and what of it is not training."""

from __future__ import annotations

from typing import Any

import torch

from bench.cases.grid import Case
from bench.cases.rivals import ready
from bench.cases.rounds import RIVALS, STEPS, Round
from bench.harness.protocol import Result, interleave
from bench.harness.rates import device, rates

QUESTION = "federated_round"
CPU_LAYERS = 10


def test_bench_federated_round(benchmark: Any, scale: Any, case: Case):
    layers = scale.depth(case.shapes.layers if torch.cuda.is_available() else min(CPU_LAYERS, case.shapes.layers))
    question = (
        f"A round of {len(case.ranks)} clients, {STEPS} steps each: {case.model}, {layers} layers, "
        f"{case.targets} targets, {case.tokens} tokens a step"
    )
    settings = {**case.settings, "layers": layers, "steps": STEPS}
    result = Result(f"federated_round_{case.id}", question, settings, scale.folder)
    with result.reported():
        setting = Round(case, layers)
        result.save(rates=rates(device()), dtype=str(setting.dtype))
        rivals = ready(RIVALS, setting, result)
        interleave(
            benchmark,
            result,
            ("flora", setting.ours),
            rivals,
            check=setting.check,
            seconds=40 * scale.seconds,
            most=9,
            before=lambda _: setting.reset(),
        )
        parts = {
            "aggregate and write": sum(e["seconds"] for e in setting.events if e["event"] == "aggregated"),
            "training": sum(e["seconds"] for e in setting.events if e["event"] == "client_done"),
            "round": sum(e["seconds"] for e in setting.events if e["event"] == "round_end"),
        }
        result.save(seconds_of=parts, not_training=1 - parts["training"] / parts["round"])
        print("\n" + result.conclude("flora", dict.fromkeys(rivals)))
        print(f"not training: {result.data['not_training']:.1%} of the round")
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}
