"""One case of the memory benchmark: peak memory beyond the base, and speed, of a round of ours or of PEFT's.

python -m bench.cases.memory '{"side": "flora", "model": "SmolLM2-135M", "layers": 30, ...}'    in a process of its own

On a GPU the allocator tells, so there the cases run one after another in the process that asks.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import flora_core as flora
from bench.cases import cohorts
from bench.cases.grid import MIXES, MODELS, TARGETS
from bench.harness.rates import device, dtype


def resident_bytes() -> dict[str, int]:
    """Memory that this process holds now and held at most.

    Linux counts both for the program itself; ``ru_maxrss`` would also hold what the parent had when it forked.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"now": peak, "peak": peak}
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": int(fields["VmRSS"]) * 1024, "peak": int(fields["VmHWM"]) * 1024}


def held_bytes() -> dict[str, int]:
    """Memory held now and at most: a GPU's by torch's allocator, else this process's."""
    if not torch.cuda.is_available():
        return resident_bytes()
    torch.cuda.synchronize()
    return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}


def forget_peak() -> None:
    """Let the peak start anew, where Linux allows it: making the base took more than the base keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def train_flora(model: Any, batches: Any, case: dict[str, Any]) -> tuple[list[float], float]:
    """A round of the cohort at a token budget, as users run it: the clients' last losses, and seconds of training."""
    config = flora.TrainConfig(token_budget=case["token_budget"], max_steps=case["steps"])
    specs = cohorts.specs(batches, MIXES[case["mix"]], case["dropout"])
    trainer = flora.CohortTrainer(flora.attach(model, specs, TARGETS[case["targets"]]), config)
    started = time.perf_counter()
    updates = trainer.run()
    return [update.metrics["loss_last"] for update in updates], time.perf_counter() - started


def train_peft(model: Any, batches: Any, case: dict[str, Any]) -> tuple[list[float], float]:
    """A round of PEFT, one client after another on one base; finished adapters stay, optimizers and gradients go."""
    peft: Any = None
    losses, seconds, autocast = [], 0.0, case["side"] != "peft bf16"
    for c, (rank, batch) in enumerate(zip(MIXES[case["mix"]], batches, strict=True)):
        config = cohorts.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=case["dropout"],
            target_modules=list(TARGETS[case["targets"]]),
            task_type="CAUSAL_LM",
        )
        if peft is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                peft = cohorts.get_peft_model(model, config, "client-0", autocast_adapter_dtype=autocast)
        else:
            peft.add_adapter(f"client-{c}", config, autocast_adapter_dtype=autocast)
        peft.set_adapter(f"client-{c}")
        peft.train()
        weights = [p for p in peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=cohorts.LR, weight_decay=0.0)
        inputs = cohorts.padded_inputs(batch, model.device)
        started = time.perf_counter()
        losses.append([cohorts.SequentialPeft._one(peft, optimizer, inputs) for _ in range(case["steps"])][-1])
        seconds += time.perf_counter() - started
        optimizer.zero_grad()
        del optimizer, weights
    return losses, seconds


@functools.lru_cache(maxsize=1)
def base_model(name: str, layers: int) -> Any:
    """The base, whose first pass was run: what that loads and sets up is not the contender's."""
    model = cohorts.random_model(layers, name, device(), dtype(device()))
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    return model


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One case: what the base holds, the peak beyond it, tokens a second, and the last losses."""
    shared = base_model(case["model"], case["layers"])
    ranks = MIXES[case["mix"]]
    batches = cohorts.random_batches(1, case["tokens"], len(ranks), MODELS[case["model"]].vocab)
    forget_peak()
    base = held_bytes()
    train = train_flora if case["side"] == "flora" else train_peft
    losses, seconds = train(cohorts.shared_copy(shared), batches, case)
    peak = held_bytes()["peak"]
    tokens = len(ranks) * case["tokens"] * case["steps"]
    answer = {"base_bytes": base["now"], "base_peak_bytes": base["peak"], "peak_bytes": peak}
    answer |= {"beyond_base_bytes": peak - base["now"], "seconds": seconds, "tokens_per_s": tokens / seconds}
    return {**case, **answer, "process_cpu_s": time.process_time(), "losses": losses}


def main() -> None:
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    print(json.dumps(run(case)))


if __name__ == "__main__":
    main()
