"""Checks and timings for a few minutes on a GPU, in three calls: ``python -m bench.gpu.run --call a --out DIR``.

    a   are the kernels right, how fast is each alone, does a step capture and repeat bit for bit
    b   LoRA linears on every path against the frozen linear and PEFT
    c   training steps of whole models, and AdamW

Each needs a source tree alone (PYTHONPATH=.:kernels), no installation, no network, and writes ``gpu_a.json`` and
``gpu_a.tar.gz`` (b, c) after every step. A red check keeps no time back but its own. ``--dry`` goes through all of it
without a GPU, on small shapes under Triton's interpreter. docs/gpu.md has the commands.
Letters: M packed tokens, C clients.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import tests.support.triton.interpreter  # noqa: F401 (before the first kernel is defined)
from bench.cases import steps
from bench.cases.cohorts import Packed
from bench.cases.grid import TARGETS, Case
from bench.gpu import kernels, step
from bench.gpu import times as gpu_times
from bench.gpu.record import Record
from bench.harness.deadline import OutOfTime
from bench.harness.machine import ROOT, gpu_now

GPU = torch.cuda.is_available()
MINUTES = 3.5
DEVICE = "cuda" if GPU else "cpu"
Found = dict[str, Any]
# Seconds of one step at most.
WARM, PYTEST, PROFILE = 60.0, 90.0, 60.0


def ceilings(found: Found) -> None:
    """The rates that everything else is held to: a large copy, and a large product of random bf16 numbers."""
    found["copy bytes/s"] = gpu_times.copy_bandwidth()
    size = 8192 if GPU else 64
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    us = gpu_times.summary([gpu_times.timed(lambda: left @ right) for _ in range(8)][3:])["us"]
    found |= {"product FLOP/s": 2 * size**3 / (1e-6 * us), "gpu": gpu_now()}


def bandwidth(record: Record) -> float:
    """Bytes a second of a copy in this run; a nominal rate where it was not measured."""
    return record.data["steps"].get("ceilings", {}).get("copy bytes/s") or kernels.counts.BYTES_PER_SECOND


def tool(words: Sequence[str], log: Path, seconds: float) -> Found:
    """Run another program of this tree and keep what it printed; past its time it is stopped."""
    with log.open("w") as out:
        try:
            done = subprocess.run(words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=seconds)
            code: int | str = done.returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds:.0f} s"
    lines = log.read_text(errors="replace").strip().splitlines()
    return {"code": code, "log": log.name, "last lines": lines[-4:]}


def warm(record: Record) -> Callable[[Found], None]:
    """Compile the kernels that are timed later, one process for each op, side by side."""

    def run(found: Found) -> None:
        began, running = time.monotonic(), {}
        try:
            for op in list(kernels.OPS) if GPU else ["shrink"]:
                words = [sys.executable, "-m", "bench.gpu.kernels", "--warm", op]
                with (record.folder / f"warm-{op}.txt").open("w") as log:
                    running[op] = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            for op, process in running.items():
                found[op] = process.wait(max(1.0, WARM - (time.monotonic() - began)))
        finally:
            for process in running.values():
                process.kill()  # one that has ended is left as it is

    return run


def unit_tests(record: Record, seconds: float = PYTEST) -> Callable[[Found], None]:
    """A selection of the tests of the Triton ops, on the device."""

    def run(found: Found) -> None:
        import importlib.util

        words = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "default",
            "tests/support/triton/ops.py",
        ]
        words += ["-n", "12"] if GPU and importlib.util.find_spec("xdist") else []
        words += ["-k", "M37 or integers or way" if GPU else "place"] + (
            [] if GPU else ["-p", "tests.support.triton.interpreter"]
        )
        found |= tool(words, record.folder / "triton_ops.txt", min(seconds, record.seconds_left))
        found["green"] = found["code"] == 0

    return run


def profile(record: Record) -> Callable[[Found], None]:
    """The hardware's counters of one launch of each kernel, where ncu is and may read them."""

    def run(found: Found) -> None:
        ncu = shutil.which("ncu")
        if ncu is None or not GPU:
            found["skipped"] = "ncu is not on the PATH" if GPU else "no GPU"
            return
        report = record.folder / "ncu"
        words = [
            ncu,
            "--set",
            "full",
            "--clock-control",
            "none",
            "--kernel-name",
            "regex:_(shrink|expand|wgrad|linear)_",
        ]
        words += ["--launch-count", "8", "--export", str(report), "--page", "details", "--print-summary", "per-kernel"]
        words += [sys.executable, "-m", "bench.gpu.kernels", "--once", "shrink,expand_,wgrad,linear_lora"]
        found |= tool(words, record.folder / "ncu.txt", min(PROFILE, record.seconds_left))

    return run


def call_a(record: Record) -> None:
    """Kernels: right, how fast, captured, repeatable."""
    record.step("ceilings", ceilings, 30)
    record.step("warm", warm(record), WARM + 5)
    table = record.step("kernels", lambda found: kernels.table(found, bandwidth(record), record.save), 75)
    record.data["decisions"] = kernels.decisions(table.get("rows", {}))
    record.step("repeats", lambda found: found.update(step.check_repeats(DEVICE)), 45)
    record.step("training step", lambda found: found.update(step.check(DEVICE)), 40)
    record.step("CUDA graphs", lambda found: found.update(step.check_graphs(DEVICE)), 60)
    record.step("unit tests", unit_tests(record), PYTEST + 5)
    record.step("profile", profile(record), PROFILE + 5)


def linear_cases() -> list[tuple[str, gpu_times.Group, int, float]]:
    """Model, linears, M and dropout of call b: one linear first, then those that share X, then fewer tokens."""
    if not GPU:
        return [("trial", gpu_times.LAYERS["trial"][0], 40, 0.1)]
    big, small = gpu_times.LAYERS["7b"], gpu_times.LAYERS["tinyllama"]
    order = [("7b", big[0]), ("tinyllama", small[0]), ("7b", big[2]), ("tinyllama", small[2])]
    order += [("7b", big[3]), ("tinyllama", small[3]), ("7b", big[1]), ("tinyllama", small[1])]
    found = [(model, group, 8192, dropout) for model, group in order for dropout in (0.0, 0.1)]
    return found + [(model, group, 1280, 0.0) for model, group in order[:2]]


def call_b(record: Record) -> None:
    """Linears."""
    record.step("ceilings", ceilings, 30)
    record.step("warm", warm(record), WARM + 5)
    for model, group, M, dropout in linear_cases():

        def run(found: Found, group: gpu_times.Group = group, M: int = M, dropout: float = dropout) -> None:
            found.update(gpu_times.time_group(group, M, dropout, bandwidth(record)))

        record.step(gpu_times.name_of(model, group, M, dropout), run, 40)
        record.data["verdicts"] = gpu_times.verdicts(record.data["steps"])


def time_steps(case: Case, layers: int, rounds: int, save: Callable[[], None]) -> Callable[[Found], None]:
    """Steps of one model: ours with and without CUDA graphs, the frozen base and PEFT, in turns."""

    def run(found: Found) -> None:
        setting = steps.Step(case, layers)
        options = {} if not GPU else {"token_budget": setting.tokens}
        eager = Packed(
            *(setting.model, setting.batches, case.ranks, TARGETS[case.targets], case.dropout),
            cuda_graphs=False,
            **options,
        )
        contenders = {"flora": setting.packed.step, "flora, no graphs": eager.step}
        missing = found.setdefault("missing", {})
        for name, make in (("frozen base", steps._frozen), ("PEFT bf16", steps._peft_bf16)):
            try:
                contenders[name] = make(setting)
            except OutOfTime:
                raise
            except Exception as error:
                missing[name] = f"{type(error).__name__}: {error}"[:300]
        found |= {"layers": layers, "tokens": setting.tokens, "case": case.id}
        with ExitStack() as stack:
            for packed in (setting.packed, eager):
                stack.enter_context(packed.running())
            found["peak bytes"] = {name: peak(work) for name, work in contenders.items()}
            # Shapes are called twice, then captured; the first rounds warm everyone up.
            times = gpu_times.in_turns(contenders, rounds, 3 if GPU else 0)
        found["times"] = {name: gpu_times.summary(us) for name, us in times.items()}
        frozen = found["times"].get("frozen base", {}).get("us")
        if frozen:
            found["to frozen"] = {name: time["us"] / frozen for name, time in found["times"].items()}
        save()

    return run


def peak(work: Callable[[], Any]) -> int | None:
    """Bytes of the GPU that a step takes at most beyond what everyone holds before it."""
    if not GPU:
        work()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def check_steps(case: Case) -> Callable[[Found], None]:
    """Two steps' losses of two layers against PEFT and float64, as the benchmark checks them."""

    def run(found: Found) -> None:
        check = steps.Step(case, 2).check((0, len(case.ranks) - 1))
        found |= {"error / budget": check.ratio, "how": check.how, "green": check.ratio <= 1}

    return run


def call_c(record: Record) -> None:
    """Steps of whole models."""
    record.step("ceilings", ceilings, 30)
    record.step("adamw", lambda found: found.update(gpu_times.time_adamw(bandwidth(record))), 30)
    chosen = [("TinyLlama-1.1B", "mixed", 819, 22), ("Llama-7B", "mixed", 819, 8)] if GPU else [("tiny", "few", 8, 2)]
    for model, mix, tokens, layers in chosen:
        case = Case(model, mix, tokens, 0.1)
        checked = record.step(f"check {model}", check_steps(case), 60)
        timed = record.step(f"step {model}", time_steps(case, layers, 5 if GPU else 1, record.save), 90)
        if checked.get("green") is not True:  # its own number alone is not kept
            for key in ("times", "to frozen"):
                timed.pop(key, None)
            timed["not kept"] = "the check of this step is not green"
            record.save()
        gc.collect()


CALLS = {"a": call_a, "b": call_b, "c": call_c}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the calls that are named; 0 if everything was green."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", required=True, help="a, b or c; several with commas between them")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of each call")
    parser.add_argument("--dry", action="store_true", help="without a GPU: everything on small shapes")
    options = parser.parse_args(argv)
    names = options.call.split(",")
    unknown = sorted({*names} - {*CALLS})
    if unknown:
        parser.error(f"--call must be one of {', '.join(CALLS)}, got {', '.join(unknown)}")
    if not GPU and not options.dry:
        print(
            f"torch {torch.__version__} sees no CUDA GPU here; --dry goes through the call without one", file=sys.stderr
        )
        return 2
    green = []
    for name in names:
        record = Record(options.out, f"gpu_{name}", options.minutes)
        try:
            CALLS[name](record)
        finally:
            green.append(record.close())
    print(f"{', '.join(names)}: {'green' if all(green) else 'NOT GREEN'}; {options.out}/gpu_*.json, gpu_*.tar.gz")
    return 0 if all(green) else 1


__all__ = ["CALLS", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
