"""A packed cohort step against ten sequential PEFT steps, at fixed lengths and at those of real data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench.cases import cohorts
from bench.cases.cohorts import RANKS, Packed, SequentialPeft, check_losses, exact_losses
from bench.harness.protocol import ROOT, Check, Result, interleave
from flora_core.data.records import load_records
from flora_core.data.template import EncodeReport, Example, encode
from flora_core.runs.demo_model import demo_model_dir

DOLLY = ROOT.parent / "shared" / "data" / "dolly"
# A large, a middle and a small rank, where float64 runs of all ten would take longer than the timing.
SOME = (0, 4, 9)
ALL = tuple(range(len(RANKS)))


def compare(
    benchmark: Any, scale: Any, name: str, question: str, batches: Any, oracle: Any, target: float, **settings: Any
) -> None:
    """Time both contenders on one model, check their losses, print the speed-up only if the check is green."""
    seconds = settings.pop("seconds")
    details = {"ranks": RANKS, "alpha": "2r", "targets": "all linears", "dtype": "float32", "lr": cohorts.LR}
    result = Result(name, question, {**scale.settings, **details, **settings}, scale.folder)
    with result.reported():
        measure(benchmark, result, scale, batches, oracle, target, dict(seconds=seconds, most=15))
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}


def measure(
    benchmark: Any, result: Result, scale: Any, batches: Any, oracle: Any, target: float, limits: dict[str, Any]
) -> None:
    """Two steps of both and the check, then both in turns."""
    model = cohorts.real_model(scale.layers)
    packed = Packed(model, batches)
    tokens = sum(len(example.input_ids) for rows in batches for example in rows)
    result.save(token_budget=packed.budget, tokens_step=tokens)
    peft = SequentialPeft(model, batches, packed.adapters)
    limits["seconds"] *= scale.seconds

    def check(values: dict[str, list[Any]]) -> Check:
        for step, (ours, theirs) in enumerate(zip(values["flora"], values["peft"], strict=True)):
            print(f"\nlosses of step {step + 1}, flora: {ours}\n                   peft: {theirs}", end="")
        exact = exact_losses(model, batches, packed.adapters, oracle)
        return check_losses(values["flora"], values["peft"], exact, oracle)

    with packed.running():
        interleave(benchmark, result, ("flora", packed.step), {"peft": peft.step}, check=check, warm_ups=2, **limits)
    print("\n" + result.conclude("flora", {"peft": target}))


@pytest.mark.parametrize(("batch_size", "target"), [(1, 1.3), (4, 1.0)], ids=["batch1", "batch4"])
def test_bench_cohort_step(benchmark: Any, scale: Any, batch_size: int, target: float):
    compare(
        benchmark,
        scale,
        f"cohort_step_batch{batch_size}",
        f"One step of ten clients, {scale.tokens} tokens x batch {batch_size}: packed against sequential PEFT",
        cohorts.random_batches(batch_size, scale.tokens),
        ALL if batch_size == 1 else SOME,
        target,
        batch_size=batch_size,
        data="random tokens, a label everywhere",
        seconds=60,
    )


@pytest.mark.skipif(not DOLLY.is_dir(), reason="needs the real data sets beside the checkout (../shared/data)")
def test_bench_dolly_step(benchmark: Any, scale: Any):
    batches, padding = dolly_batches(DOLLY, max_length=4 * scale.tokens)
    compare(
        benchmark,
        scale,
        "cohort_step_dolly",
        "One optimizer step of ten clients, 4 Dolly records each: packed against PEFT padded to the batch's longest",
        batches,
        SOME,
        1.5,
        batch_size=4,
        data=f"Dolly, first batch of seed 0 of each client, cut at {4 * scale.tokens} tokens, loss on answers",
        **padding,
        seconds=60,
    )


def dolly_batches(folder: Path, max_length: int, draws: int = 40) -> tuple[list[list[Example]], dict[str, float]]:
    """Each client's first random batch of 4, and how much padding costs in it and in ``draws`` such batches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    records = {record["id"]: record for record in load_records(folder / "dolly15k.jsonl")}
    parts = json.loads((folder / "partitions.json").read_text())["dirichlet05_10"]
    batches: list[list[list[Example]]] = []
    for c in range(len(RANKS)):
        chosen = random.Random(c).sample(parts[str(c)], 4 * draws)
        examples = encode([records[i] for i in chosen], tokenizer, max_length=max_length, report=EncodeReport())
        batches.append([examples[i : i + 4] for i in range(0, len(examples) - 3, 4)])
    first = [client[0] for client in batches]
    everything = [batch for client in batches for batch in client]
    return first, {"padded_over_real": _padding(first), "padded_over_real_many_batches": _padding(everything)}


def _padding(batches: list[list[Example]]) -> float:
    lengths = [[len(example.input_ids) for example in batch] for batch in batches]
    return sum(max(rows) * len(rows) for rows in lengths) / sum(map(sum, lengths))
