"""One case of the memory benchmark, alone in its process: print peak memory beyond the base, and speed, as JSON.

python -m bench.memory_case '{"side": "flora", "layers": 30, "batch_size": 2, "tokens": 128, "steps": 2, ...}'
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import flora_core as flora
from bench import cohorts


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


def forget_peak() -> None:
    """Let the peak start anew, where Linux allows it: making the base took more than the base keeps."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def train_flora(model: Any, batches: Any, steps: int, token_budget: int) -> tuple[list[float], float]:
    """A round of the cohort at a token budget, as users run it: the clients' last losses, and seconds of training."""
    config = flora.TrainConfig(token_budget=token_budget, max_steps=steps)
    cohort = flora.attach(model, cohorts.specs(batches), cohorts.LINEARS)
    trainer = flora.CohortTrainer(cohort, config)
    started = time.perf_counter()
    updates = trainer.run()
    return [update.metrics["loss_last"] for update in updates], time.perf_counter() - started


def train_peft(model: Any, batches: Any, steps: int) -> tuple[list[float], float]:
    """A round of PEFT, one client after another on one base; finished adapters stay, optimizers and gradients go."""
    peft: Any = None
    losses, seconds = [], 0.0
    for c, (rank, batch) in enumerate(zip(cohorts.RANKS, batches, strict=True)):
        config = cohorts.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(cohorts.LINEARS), task_type="CAUSAL_LM"
        )
        if peft is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                peft = cohorts.get_peft_model(model, config, adapter_name="client-0")
        else:
            peft.add_adapter(f"client-{c}", config)
        peft.set_adapter(f"client-{c}")
        peft.train()
        weights = [p for p in peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=cohorts.LR, weight_decay=0.0)
        inputs = cohorts.padded_inputs(batch)
        started = time.perf_counter()
        losses.append([cohorts.SequentialPeft._one(peft, optimizer, inputs) for _ in range(steps)][-1])
        seconds += time.perf_counter() - started
        optimizer.zero_grad()
        del optimizer, weights
    return losses, seconds


def main() -> None:
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    model = cohorts.random_model(case["layers"])
    batches = cohorts.random_batches(case["batch_size"], case["tokens"])
    with torch.no_grad():  # what a first pass loads and sets up is not the contender's
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    gc.collect()
    forget_peak()
    base = resident_bytes()
    if case["side"] == "flora":
        losses, seconds = train_flora(model, batches, case["steps"], case["token_budget"])
    else:
        losses, seconds = train_peft(model, batches, case["steps"])
    peak = resident_bytes()["peak"]
    tokens = len(batches) * case["batch_size"] * case["tokens"] * case["steps"]
    answer = {"base_bytes": base["now"], "base_peak_bytes": base["peak"], "peak_bytes": peak}
    answer |= {"process_cpu_s": time.process_time()}
    answer |= {"beyond_base_bytes": peak - base["now"], "seconds": seconds, "tokens_per_s": tokens / seconds}
    print(json.dumps({**case, **answer, "losses": losses}))


if __name__ == "__main__":
    main()
