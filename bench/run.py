"""``flora bench``: measure chosen questions on this machine and print tables.

flora bench                                     every question of the selection that fits this machine
flora bench cohort_rivals merge --minutes 5     some questions; none begins after five minutes
flora bench linear_forward --select all         the whole grid of a question, which takes hours
flora bench --select quick --out /tmp/trial     a smoke test
flora bench --explain                           where the time and memory of a step go, and the largest gap
flora bench --list                              the questions
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases.grid import SELECTIONS

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Question:
    """A file of benchmarks.

    Args:
        about: What it asks.
        standard: Which of its tests a ``cpu`` or ``quick`` run takes; None for all of them, empty for none.
        gpu: Whether a ``gpu`` run takes it.
        quick: Whether a ``quick`` run takes it.
    """

    about: str
    standard: tuple[str, ...] | None = None
    gpu: bool = False
    quick: bool = True


# In the order in which they run: what matters most first, for a run may be out of time before its end, and what is
# long before what is short, for what has begun runs on.
QUESTIONS = {
    "cohort_step": Question(
        "a step of SmolLM2-135M with ten clients, packed and one after another", ("test_bench_cohort_step[batch1]",)
    ),
    "cohort_rivals": Question("a step of a whole model against every rival", gpu=True),
    "memory": Question("peak memory against speed at several token budgets", gpu=True, quick=False),
    "federated_round": Question("a whole round: train, aggregate, apply", gpu=True),
    "linear_forward": Question("one LoRA linear, forward", gpu=True),
    "linear_backward": Question("one LoRA linear, backward", gpu=True),
    "decoder_layer": Question("one decoder layer, forward and backward", gpu=True),
    "merge": Question("adding ten clients' updates to the base"),
    "optimizer": Question("an AdamW step over all adapters", gpu=True),
    "data_loading": Question("from records to batches"),
    "saved_activations": Question("bytes kept for backward"),
    "cpu_merge": Question("the merge kernel of the CPU against torch's products"),
    "stream_merge": Question("merging adapters into a checkpoint on disk", (), quick=False),
    "demo": Question("the demo as a newcomer runs it, by seed", (), quick=False),
    "strategies": Question("what a server pays for each strategy with 1,000 clients", (), quick=False),
}


def tests(names: Sequence[str], selection: str) -> list[str]:
    """The files or tests that a run takes; named questions are taken whole.

    Raises:
        ValueError: For a question that is not known.
    """
    unknown = [name for name in names if name not in QUESTIONS]
    if unknown:
        raise ValueError(f"no such question: {', '.join(unknown)}; there are: {', '.join(QUESTIONS)}")
    if names:
        return [str(HERE / "suites" / f"test_{name}.py") for name in QUESTIONS if name in names]
    found = []
    for name, question in QUESTIONS.items():
        path = str(HERE / "suites" / f"test_{name}.py")
        if selection == "all":
            found.append(path)
        elif selection == "gpu":
            found += [path] * question.gpu
        elif selection == "cpu" or question.quick:
            found += [path] if question.standard is None else [f"{path}::{test}" for test in question.standard]
    return found


def listed() -> list[list[str]]:
    """Every question, what it asks and which selections take it; a named one always runs."""
    rows = []
    for name, question in QUESTIONS.items():
        path = str(HERE / "suites" / f"test_{name}.py")
        taken = [choice for choice in SELECTIONS if any(t.startswith(path) for t in tests([], choice))]
        rows.append([name, question.about, ", ".join(taken)])
    return rows


def words(options: argparse.Namespace, selection: str) -> list[str]:
    """Arguments of pytest."""
    shrunk = ["--bench-layers=1", "--bench-tokens=16", "--bench-seconds=0.01"] if selection == "quick" else []
    given = {"minutes": options.minutes, "stop": options.stop, "layers": options.layers, "tokens": options.tokens}
    given["seconds"] = options.seconds
    return [
        *tests(options.questions, selection),
        "--benchmark-only",
        "--benchmark-columns=min,median,max,rounds",
        "--benchmark-disable-gc",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        # A newer torch or transformers may warn of something; that is no reason not to measure.
        "-W",
        "default",
        f"--rootdir={HERE.parent}",
        f"--confcutdir={HERE}",
        f"--bench-select={selection}",
        *shrunk,
        *(f"--bench-{name}={value}" for name, value in given.items() if value is not None),
        *options.pytest,
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; words after ``--`` go to pytest."""
    parser = argparse.ArgumentParser(
        prog="flora bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", metavar="question", help=", ".join(QUESTIONS))
    parser.add_argument("--select", choices=SELECTIONS, help="which cases (cpu, or gpu where there is one)")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many minutes")
    parser.add_argument("--stop", type=float, metavar="MINUTES", help="stop what runs after so many minutes")
    parser.add_argument("--layers", type=int, help="of the model, for a smoke test")
    parser.add_argument("--tokens", type=int, help="of a sequence, for a smoke test")
    parser.add_argument("--seconds", type=float, help="factor on how long each comparison goes on")
    parser.add_argument("--threads", type=int, help="CPU threads (2)")
    parser.add_argument("--compile", action="store_true", help="take part with torch.compile also on a CPU")
    parser.add_argument("--out", type=Path, help="folder of the JSON files, instead of bench/results")
    parser.add_argument("--explain", action="store_true", help="break a step into its parts, and name the largest gap")
    parser.add_argument("--list", action="store_true", help="show the questions")
    parser.add_argument("--pytest", action="append", default=[], metavar="WORD", help="a word for pytest, such as -x")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, then print what was measured; 0 if every check was green, 1 if not."""
    options = parse(argv)
    # As the flora command does, before torch loads OpenMP: threads that spin make everything slower beside other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The profiler says on the terminal when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if options.out is not None:
        os.environ["FLORA_BENCH_RESULTS"] = str(options.out.resolve())
    if options.threads is not None:
        os.environ["FLORA_BENCH_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.compile:
        os.environ["FLORA_BENCH_COMPILE"] = "1"
    from flora_core.common.tables import print_tables  # after the environment is set: torch reads it

    if options.list:
        print_tables([("Questions", ["question", "what", "selections that take it"], listed())])
        return 0
    if options.explain:
        from bench.reporting.explain import explain

        tables, text = explain(options.layers, options.tokens, options.questions)
        print_tables(tables)
        print(text)
        return 0
    return _measure(options, print_tables)


def _measure(options: argparse.Namespace, print_tables: Any) -> int:
    import pytest
    import torch

    from bench.harness.protocol import PARTIAL, RESULTS, SMOKE, machine_folder
    from bench.reporting.tables import load, summary

    selection = options.select or ("gpu" if torch.cuda.is_available() else "cpu")
    if selection == "gpu" and not torch.cuda.is_available():
        raise ValueError(
            f"--select gpu needs a CUDA GPU, and torch {torch.__version__} sees none; use --select cpu, or a torch "
            "built for CUDA on a machine that has one"
        )
    command, began = words(options, selection), time.time()
    ends = "--bench-minutes", "--bench-stop"
    own = [word for word in command if word.startswith("--bench-") and not word.startswith(ends)]
    os.environ["FLORA_BENCH_WORDS"] = " ".join(own)
    code = int(pytest.main(command))
    fresh = {}
    for folder in (machine_folder(RESULTS), machine_folder(SMOKE)):
        for path in (*folder.glob("*.json"), *(folder / PARTIAL).glob("*.json")):
            if path.stat().st_mtime >= began:
                fresh |= load(path)
    print_tables(summary(fresh))
    return 130 if code == pytest.ExitCode.INTERRUPTED else code


if __name__ == "__main__":
    raise SystemExit(main())
