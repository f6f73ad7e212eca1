"""The one command for a GPU: ``python -m bench.gpu.check``. First whether everything is right, then how fast it is.

1. Every Triton op against float64 on ragged cases, on the device (tests/support/triton/ops.py).
2. A training step of a small Llama on the Triton backend against PEFT, client by client, and its bits a second time.
   Steps replayed from CUDA graphs against the same steps called, bit for bit, and against float64.
3. The CUDA C++ kernels (tests/support/cuda/gpu_check.py), where nvcc is.
4. Whatever these say: AdamW against torch's; LoRA linears, each checked by itself, against the frozen linear, PEFT and
   grouped_mm; and a verdict on each thing that must be shown.

Without a GPU the first two run under Triton's interpreter (--few for a selection), and --trial goes through the fourth.
Results go to gpu_check_triton.json in $OUT, or the folder named with --out, after every step; needs no network and no
installation (PYTHONPATH=.:kernels). For a GPU that is lent for minutes, see ``bench.gpu.call`` and docs/gpu.md.
Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.protocol import finite
from flora_core.common.files import atomic_write_bytes

ROOT = Path(__file__).resolve().parents[2]
# Of the selection that bench.gpu.run takes, in a process of its own that compiles its kernels.
FEW_SECONDS = 150
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    import tests.support.triton.interpreter  # noqa: F401 (before the first kernel is defined)


def run_tests(few: bool, seconds: float | None = None) -> dict[str, Any]:
    """Run the tests of the Triton ops where their kernels run; red if they take longer than they may."""
    words = ["-q", "-p", "no:cacheprovider", "tests/support/triton/ops.py"]
    # Nearly every test compiles kernels of its own: side by side where pytest-xdist is. A new torch may warn.
    parallel = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    words += [*parallel, "-W", "default"] if GPU else ["-p", "tests.support.triton.interpreter"]
    words += ["-k", "M37 or integers or way"] if few else []
    command = [sys.executable, "-m", "pytest", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"green": False, "summary": f"out of time: {' '.join(command[1:])} was stopped after {seconds:g} s"}
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"green": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-500:], "failed": failed}


def run_cuda(out: Path) -> dict[str, Any]:
    """Run the check of the CUDA C++ kernels; its own file has the details."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.cuda.gpu_check", "--out", str(out)], cwd=ROOT, text=True
    )
    return {"green": done.returncode == 0, "details": "gpu_check.json"}


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then time; 0 if everything is green."""
    from bench.gpu import merge, times
    from bench.gpu import step as gpu_step

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--few", action="store_true", help="a selection of the tests")
    parser.add_argument("--skip-cuda", action="store_true", help="leave the CUDA C++ kernels out")
    parser.add_argument("--stage", choices=("all", "check", "time"), default="all", help="half of it, if time is short")
    parser.add_argument("--trial", action="store_true", help="without a GPU: run what would be timed, on small shapes")
    parser.add_argument("--models", default="7b,tinyllama", help="whose shapes are timed")
    parser.add_argument("--tokens", default="8192,1280,32768", help="M over ten clients, the most important first")
    parser.add_argument("--minutes", type=float, help="begin no linear after so many minutes")
    options, began = parser.parse_args(argv), time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu_check_triton.json"
    results: dict[str, Any] = {"setting": times.setting()}
    if options.stage == "time" and path.is_file():  # the other half was run before
        results = json.loads(path.read_text()) | results

    def save() -> None:
        text = json.dumps(finite(results), indent=1, default=str, allow_nan=False) + "\n"
        atomic_write_bytes(path, text.encode())

    def step(name: str, run: Callable[[], Any]) -> Any:
        try:
            results[name] = run()
        except Exception:  # the next step may still tell something
            results[name] = {"green": False, "error": traceback.format_exc(limit=4)}
        save()
        print(f"{name}: {json.dumps(results[name], default=str)[:1500]}", flush=True)
        return results[name]

    device, checks = "cuda" if GPU else "cpu", []
    if options.stage != "time":
        seconds = FEW_SECONDS if GPU and options.few else None
        checks = [step("ops", lambda: run_tests(options.few, seconds))]
        checks.append(step("training step", lambda: gpu_step.check(device)))
        checks.append(step("CUDA graphs", lambda: gpu_step.check_graphs(device)))
        if not options.skip_cuda:
            checks.append(step("CUDA C++", lambda: run_cuda(options.out)))
        if GPU and not options.skip_cuda:
            checks.append(step("CUDA merge", merge.run))
    # No red check keeps a time back but its own: each case that is timed is checked again by itself.
    if options.stage != "check" and (GPU or options.trial):
        bandwidth = step("copy bytes/s", times.copy_bandwidth)
        step("adamw", lambda: times.time_adamw(bandwidth))
        models, tokens = options.models.split(","), [int(number) for number in options.tokens.split(",")]
        for name, group, M, dropout in times.cases(*(("trial",), (40,)) if options.trial else (models, tokens)):
            results["verdicts"] = times.verdicts(results)
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                results.setdefault("not begun: out of time", []).append(name)
                continue
            case = (group, M, dropout, bandwidth)
            checks.append(step(name, lambda case=case: times.time_group(*case)))
        results["verdicts"] = times.verdicts(results)
        save()
        print(json.dumps(results["verdicts"], indent=1))
    print("sound" if all(check["green"] for check in checks) else "NOT SOUND")
    return 0 if all(check["green"] for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
