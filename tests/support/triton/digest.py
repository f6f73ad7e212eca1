"""Digests of what every Triton op gives under the interpreter, to hold one version of Triton against another.

``python -m tests.support.triton.digest`` prints them as JSON, with the versions (--few: of merges and AdamW alone);
tests/kernels/test_triton.py compares two versions.
They are not kept in the repository: the interpreter multiplies with NumPy, whose last bits depend on the CPU.
Letters: M packed tokens, K in_features, N out_features, C clients.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton

import tests.support.triton.interpreter  # noqa: F401 (before the first kernel is defined)
from flora_core import MergeItem, Segments, cohort_adamw_, stacked_merge_many_, testing
from flora_core.ops import fusion
from flora_core.testing import LINEAR_SHAPES, MERGE_SHAPES, make_linear, make_merge
from tests.ops import test_shared_input

NARROW = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXED, RANK_0 = LINEAR_SHAPES[0], LINEAR_SHAPES[4]
Named = Iterator[tuple[str, torch.Tensor]]


def linears() -> Named:
    """Forward and backward on the ragged cases, in every way to fuse, for one target and for three that share X."""
    for case in testing.in_dtypes(LINEAR_SHAPES, NARROW.values()):
        inputs = make_linear(case, base=False, dropout=True)
        yield from ((f"{case.id} {name}", out) for name, out in testing.run_linear(inputs, "triton").items())
    for dtype in NARROW.values():
        case = replace(MIXED, dtype=dtype)
        for fuse in fusion.FUSIONS:
            out = testing.run_linear(make_linear(case, masters=True), "triton", fuse)
            yield from ((f"{case.id} {fuse} {name}", result) for name, result in out.items())
        for target, out in enumerate(test_shared_input.run(test_shared_input.three(case, True), "triton")):
            yield from ((f"{case.id} shared {target} {name}", result) for name, result in out.items())


def merges() -> Named:
    """Every rounding of merges of mixed shapes, aligned or not."""
    for name, dtype in (*NARROW.items(), ("fp64", torch.float64)):
        for rounding in ("nearest", "stochastic", "low bits") if name == "bf16" else ("nearest",):
            inputs = [make_merge(replace(case, dtype=dtype)) for case in MERGE_SHAPES]
            low = [torch.zeros(i.weight.shape, dtype=torch.int16) if "low" in rounding else None for i in inputs]
            items = [MergeItem(i.weight, i.A, i.B, i.coef, bits) for i, bits in zip(inputs, low, strict=True)]
            how = "stochastic" if rounding == "stochastic" else "nearest"
            stacked_merge_many_(items, rounding=how, seed=2**40 + 1, backend="triton")
            for i, item in enumerate(items):
                yield f"merge {name} {rounding} {i}", item.weight
                if item.low_bits is not None:
                    yield f"merge {name} {rounding} {i} low", item.low_bits


def adamw() -> Named:
    """A step with settings per client, one of whom sits out."""
    for dtype in (torch.float32, torch.float64):
        buffers = [torch.rand(2248, generator=torch.Generator().manual_seed(i), dtype=dtype) for i in range(4)]
        hyper_CH = torch.tensor([[3e-2, 0.9, 0.999, 1e-8, 0.1, 5, 1], [0.1, 0.8, 0.95, 1e-3, 0, 0, 0.5]]).double()
        p, g, m, v = buffers
        cohort_adamw_(p, g, m, v, Segments([900, 0, 1348]), hyper_CH, owner=(0, 1, 1), backend="triton")
        yield from ((f"adamw {dtype} {name}", tensor) for name, tensor in zip("pgmv", buffers, strict=True))


def digest(tensor: torch.Tensor) -> str:
    """Of shape, dtype and bytes."""
    kind = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    return hashlib.sha256(kind + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def digests(few: bool) -> dict[str, str]:
    """Every result by name."""
    torch.set_num_threads(1)
    with testing.nan_filled():
        return {name: digest(out) for make in (linears, merges, adamw)[few:] for name, out in make()}


if __name__ == "__main__":
    versions = {"triton": triton.__version__, "numpy": np.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions, "digests": digests("--few" in sys.argv)}, indent=1))
