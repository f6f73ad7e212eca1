"""``make bench-gpu``: in one process, check everything, then measure it against the rivals, in nine minutes.

First ``bench.gpu_check``: are the kernels right, and how fast are linears, merge and AdamW; then the questions of
``flora bench --select gpu`` on whole layers, models and rounds. Every file is written as it grows, so a stop loses
nothing. Words on the command line go to ``bench.gpu_check``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import torch

from bench.protocol import RESULTS

MINUTES = 9.0
# The check begins with its most important times; what follows needs about three minutes.
CHECK = ["--tokens", "8192"]


def main(argv: Sequence[str] | None = None) -> int:
    """Check and measure; 0 if everything is green."""
    began = time.monotonic()
    if not torch.cuda.is_available():
        print(
            f"bench-gpu needs a CUDA GPU, and torch {torch.__version__} sees none here. On a machine without one: "
            "make bench; or python -m bench.gpu_check --few, which checks the kernels under Triton's interpreter.",
            file=sys.stderr,
        )
        return 2
    from bench import gpu_check, run

    folder = RESULTS / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OUT"] = str(folder)
    before, sys.argv = sys.argv, ["bench.gpu_check", *CHECK, *(sys.argv[1:] if argv is None else argv)]
    try:
        code = gpu_check.main()
    finally:
        sys.argv = before
    if code:
        print("a check is red: nothing else is measured")
        return code
    left = MINUTES - (time.monotonic() - began) / 60
    print(f"checked and timed in {MINUTES - left:.1f} minutes; {max(left, 0):.1f} are left")
    # A question that has begun runs on for up to about a minute.
    return run.main(["--select", "gpu", "--minutes", f"{max(0.0, left - 0.8):.2f}"])


if __name__ == "__main__":
    raise SystemExit(main())
