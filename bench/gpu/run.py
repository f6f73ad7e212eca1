"""``make bench-gpu``: in one process, check, then measure against the rivals, in nine minutes.

1. ``bench.gpu.check``, a selection: are the Triton ops, a training step and steps from CUDA graphs right.
2. The questions of ``flora bench --select gpu``, what matters most first: steps of whole models, memory, a round, then
   linears, a layer, AdamW. Each is held to the oracle by itself before it is timed, so a red check in 1 does not keep
   the others from being measured; the end is red all the same.
3. Linears on every way to fuse, from CUDA graphs, with the time that is left.

``--call a``, ``b`` or ``c`` asks the questions of a GPU that is lent for minutes instead (``bench.gpu.call``).

Every file is written as it grows, what runs past its time is stopped with that reason, and a table of what must be
shown ends it. ``python -m bench.gpu.check`` alone has all checks, those of the CUDA C++ kernels too.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.harness.protocol import RESULTS

# Minutes after the start: no question begins, the questions are stopped, no linear begins. The page takes some seconds.
BEGIN, STOP, END = 6.6, 7.4, 8.3
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Check and measure; 0 if everything is green, 130 if it was stopped. Words go to ``bench.gpu.check``."""
    began = time.monotonic()
    given = list(sys.argv[1:] if argv is None else argv)
    if any(word.split("=")[0] == "--call" for word in given):
        from bench.gpu import call

        return call.main(given)
    if not torch.cuda.is_available():
        print(
            f"bench-gpu needs a CUDA GPU, and torch {torch.__version__} sees none here. On a machine without one: "
            "make bench; or python -m bench.gpu.check --few, which checks the kernels under Triton's interpreter.",
            file=sys.stderr,
        )
        return 2
    folder, words = RESULTS / "gpu", given
    folder.mkdir(parents=True, exist_ok=True)
    code = stages(folder, words, lambda minutes: f"{max(0.0, minutes - (time.monotonic() - began) / 60):.2f}")
    print(f"checked and measured in {(time.monotonic() - began) / 60:.1f} minutes")
    tell_targets(folder)
    return code


def stages(folder: Path, words: Sequence[str], left: Callable[[float], str]) -> int:
    """One after another; the first code that is not 0, after all of them. ``left``: minutes until such a minute."""
    from bench import run
    from bench.gpu import check as gpu_check

    check = [*words, "--out", str(folder)]
    works: list[Callable[[], int]] = [
        lambda: gpu_check.main([*check, "--stage", "check", "--few", "--skip-cuda"]),
        lambda: run.main(["--select", "gpu", "--minutes", left(BEGIN), "--stop", left(STOP)]),
        lambda: gpu_check.main([*check, "--stage", "time", "--tokens", "8192", "--minutes", left(END)]),
    ]
    first = 0
    for work in works:
        try:
            code = work()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception:  # the stages after it may still tell something
            traceback.print_exc()
            code = 1
        first = first or code
        if code == INTERRUPTED:
            return code
    return first


def tell_targets(folder: Path) -> None:
    """Print what must be shown, and whether it is."""
    from bench.reporting.tables import TARGET_HEADER, load, target_rows, verdict_rows
    from flora_core.common.tables import print_tables

    rows = [*target_rows(load(folder)), *verdict_rows(folder)]
    print_tables([("What must be shown", TARGET_HEADER, [[cell.replace("**", "") for cell in row] for row in rows])])


if __name__ == "__main__":
    raise SystemExit(main())
