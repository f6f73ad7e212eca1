"""Every launcher of the Triton kernels, called on tensors without data, in every configuration that is compiled.

Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flora_core import Segments
from flora_kernels import triton as kernels

ROWS, RANKS = (820,) * 2 + (819,) * 8, (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
LOW_RANKS = (16, 8, 4, 1)
M, K, N = sum(ROWS), 4096, 4096
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def lora(
    op: str,
    dtype: torch.dtype,
    ranks: tuple[int, ...] = RANKS,
    dropout: bool = False,
    factor: torch.dtype = torch.float32,
    K: int = K,
    N: int = N,
    rows: tuple[int, ...] = ROWS,
    targets: int = 3,
) -> None:
    """Call one of the LoRA launchers."""
    rows = rows[: len(ranks)]
    tokens, bank, scaling = Segments(rows), Segments(ranks), [2.0] * len(ranks)
    draws = kernels.Dropout([6554] * len(ranks), [1] * len(ranks), [0] * len(ranks)) if dropout else None
    x, dy, s = empty(sum(rows), K, dtype=dtype), empty(sum(rows), N, dtype=dtype), empty(1, dtype=dtype)
    A, B = (empty(sum(ranks), size, dtype=factor) for size in (K, N))
    weight, bias = empty(N, K, dtype=dtype), empty(N, dtype=dtype)
    if op == "shrink":
        kernels.shrink(x, A, tokens, bank, None if dropout else scaling, draws)
    elif op == "shrink_many":
        kernels.shrink_many(x, [A] * targets, tokens, [bank] * targets, [None] * targets, [draws] * targets)
    elif op == "expand_":
        kernels.expand_(dy, s, B, tokens, bank, None if dropout else scaling, draws)
    elif op == "expand_many_":
        many: list[list[Any]] = [[value] * targets for value in (s, B, bank, None, draws)]
        kernels.expand_many_(dy, many[0], many[1], tokens, *many[2:])
    elif op == "wgrad":
        kernels.wgrad(s, x, s, dy, tokens, bank, scaling, factor, draws)
    elif op == "place_":
        kernels.place_(empty(sum(rows), K % 256 + 192, dtype=dtype), s, tokens, bank, scaling)
    elif op == "dx":
        kernels.linear_lora(dy, weight.T, None, s, A, tokens, bank, scaling)
    elif op == "linear":
        kernels.linear(x, weight, bias)
    else:
        kernels.linear_lora(x, weight, bias, s, B, tokens, bank, scaling)


def merge(dtype: torch.dtype, factor: torch.dtype = torch.float32, K: int = K, N: int = N, **options: Any) -> None:
    A, B = (empty(sum(RANKS), size, dtype=factor) for size in (K, N))
    low_bits = empty(N, K, dtype=torch.int16) if options.pop("low_bits", False) else None
    kernels.merge_(empty(N, K, dtype=dtype), A, B, empty(sum(RANKS)), low_bits_NK=low_bits, **options)


def adamw(dtype: torch.dtype) -> None:
    buffer = empty(4096, dtype=dtype)
    hyper_CH = empty(2, 7, dtype=torch.float64)
    kernels.cohort_adamw_(buffer, buffer, buffer, buffer, Segments([1000, 3096]), hyper_CH, [0, 1])


def split_wgrad() -> None:
    """One client long enough to be cut into chunks."""
    tokens, bank, s = Segments([M]), Segments([16]), empty(1, dtype=torch.bfloat16)
    x, dy = empty(M, K, dtype=torch.bfloat16), empty(M, N, dtype=torch.bfloat16)
    kernels.wgrad(s, x, s, dy, tokens, bank, [2.0], torch.float32)


# Sizes and addresses that no vector width divides; a crowd; more targets that share X than a model has.
ODD: dict[str, Any] = dict(K=4093, N=4091)
CROWD: dict[str, Any] = dict(ranks=(8,) * 256, rows=(32,) * 256)
DROPS = ("shrink", "shrink_many", "expand_", "expand_many_", "wgrad")
LORA = (*DROPS, "linear_lora")

# Name -> what calls the launcher. Products in 16 bits must use the matrix instructions of their target.
CONFIGURATIONS: dict[str, Callable[[], None]] = {}


def configure(name: str, op: str, dtype: str, **options: Any) -> None:
    run = merge if op == "merge" else lambda d, **rest: lora(op.partition("-")[2] or op, d, **rest)
    CONFIGURATIONS[name] = lambda: run(DTYPES[dtype], **options)


for _name in DTYPES:
    for _op in DROPS:
        for _dropout, _suffix in ((False, ""), (True, "-dropout")):
            configure(f"{_op}-{_name}{_suffix}", _op, _name, dropout=_dropout)
            # A narrower tile of ranks is another matrix instruction; in float32 it is less of the same.
            if _name == "bf16" and not _op.startswith("expand"):
                configure(f"{_op}-{_name}{_suffix}-low-ranks", _op, _name, dropout=_dropout, ranks=LOW_RANKS)
    for _op in ("linear", "linear_lora", "linear_lora-dx", "place_", "merge"):
        configure(f"{_op}-{_name}", _op, _name)
    configure(f"merge-{_name}-fp64-sum", "merge", _name, accumulate=torch.float64)
for _name in DTYPES:
    for _op in (*LORA, "linear", "merge"):
        configure(f"{_op}-{_name}-unaligned", _op, _name, **ODD, **(dict(dropout=True) if _op in DROPS else {}))
    for _op in ("shrink_many", "expand_many_"):
        configure(f"{_op}-{_name}-five", _op, _name, dropout=True, targets=5)
for _name in ("bf16", "fp16"):
    for _op in (*LORA, "merge"):
        configure(f"{_op}-{_name}-narrow-factors", _op, _name, factor=DTYPES[_name])
        if _op != "merge":
            configure(f"{_op}-{_name}-crowd", _op, _name, **CROWD, **(dict(dropout=True) if _op in DROPS else {}))
for _kind, _options in {
    "stochastic": dict(rounding="stochastic"),
    "low-bits": dict(low_bits=True),
    "fp64-sum": dict(accumulate=torch.float64),
}.items():
    if _kind != "fp64-sum":
        configure(f"merge-bf16-{_kind}", "merge", "bf16", **_options)
        configure(f"merge-bf16-{_kind}-fp64-sum", "merge", "bf16", **_options, accumulate=torch.float64)
    configure(f"merge-bf16-{_kind}-unaligned", "merge", "bf16", **_options, **ODD)
configure("place_-bf16-unaligned", "place_", "bf16", **ODD)
CONFIGURATIONS |= {
    "merge-fp64": lambda: merge(torch.float64),
    "wgrad-bf16-in-chunks": split_wgrad,
    "adamw-fp32": lambda: adamw(torch.float32),
    "adamw-fp32-unaligned": lambda: adamw(torch.float32),
    "adamw-fp64": lambda: adamw(torch.float64),
}
# What make test compiles: one of each kernel; make test-all compiles all of them for all targets.
FEW = ("shrink-bf16-dropout", "expand_-bf16", "wgrad-bf16-dropout", "linear_lora-bf16", "merge-bf16", "adamw-fp32")
FEW += ("shrink_many-bf16-dropout", "expand_many_-bf16-dropout", "wgrad-bf16-unaligned", "expand_-bf16-narrow-factors")
