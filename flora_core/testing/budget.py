"""The error budget: how far a result may be from the truth, and other measures of a result.

In float64 an oracle gives the truth (``ref64``), in the tested dtype it shows the rounding that this dtype cannot avoid
(``low``); the budget holds a result against both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..common import Segments

Results = Mapping[str, torch.Tensor]


def budget_ratio(out: torch.Tensor, ref64: torch.Tensor, low: torch.Tensor) -> float:
    """How much of its error budget a result uses; a right one stays at or below 1.

    ``max|out - ref64| / (2 (max|low - ref64| + eps(low.dtype) max|ref64|))``; in float64 over ``1e-9 max|ref64|``.

    Example:
        >>> from flora_core.testing import budget_ratio
        >>> ref64 = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> round(budget_ratio(torch.tensor([1.0, 2.01]), ref64, low=ref64.bfloat16()), 2)
        0.32
    """
    if not out.numel():
        return 0.0
    error, size = (out.double() - ref64).abs().max().item(), ref64.abs().max().item()
    if low.dtype == torch.float64:
        budget = 1e-9 * size
    else:
        budget = 2 * ((low.double() - ref64).abs().max().item() + torch.finfo(low.dtype).eps * size)
    if error == 0:
        return 0.0
    # A NaN compares as false, so the good case is the one to ask for.
    return error / budget if error < float("inf") and budget > 0 else float("inf")


def budget_ratios(out: Results, ref64: Results, low: Results, parts: Mapping[str, Segments]) -> dict[str, list[float]]:
    """The ratio of every result in every client's rows.

    Example:
        >>> from flora_core.testing import budget_ratios
        >>> ref64, tokens = torch.ones(3, 2, dtype=torch.float64), flora.Segments.from_lengths([2, 1])
        >>> out = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.01]])
        >>> ratios = budget_ratios({"y": out}, {"y": ref64}, {"y": ref64.bfloat16()}, {"y": tokens})
        >>> [round(ratio, 2) for ratio in ratios["y"]]
        [0.0, 0.64]
    """
    for name in out:
        if out[name].shape != ref64[name].shape:
            raise AssertionError(f"{name} must have shape {tuple(ref64[name].shape)}, got {tuple(out[name].shape)}")
    return {
        name: [budget_ratio(out[name][rows], ref64[name][rows], low[name][rows]) for rows in parts[name]]
        for name in out
    }


def check_budget(out: Results, ref64: Results, low: Results, parts: Mapping[str, Segments]) -> float:
    """Raise AssertionError with every ratio above 1; give back the worst.

    Example:
        >>> from flora_core.testing import check_budget
        >>> ref64, tokens = {"y": torch.ones(3, 2, dtype=torch.float64)}, {"y": flora.Segments.from_lengths([2, 1])}
        >>> check_budget({"y": torch.full((3, 2), 1.1)}, ref64, low={"y": ref64["y"].float()}, parts=tokens)
        Traceback (most recent call last):
        AssertionError: error / budget above 1: y of client 0: ...; y of client 1: ...
    """
    ratios = budget_ratios(out, ref64, low, parts)
    over = [f"{name} of client {c}: {r:.3g}" for name, row in ratios.items() for c, r in enumerate(row) if not r <= 1]
    if over:
        raise AssertionError("error / budget above 1: " + "; ".join(over))
    return max((ratio for row in ratios.values() for ratio in row), default=0.0)


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of a dtype at each value, in float64.

    Example:
        >>> from flora_core.testing import ulp
        >>> ulp(torch.tensor([1.0, 3.0]), torch.bfloat16)
        tensor([0.0078, 0.0156], dtype=torch.float64)
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.double().abs().clamp(min=info.tiny)).exponent
    return info.eps * torch.exp2(exponent.double() - 1)


@contextmanager
def nan_filled() -> Iterator[None]:
    """Fill whatever is allocated with NaN, so that a result that is not wholly written shows.

    Example:
        >>> from flora_core.testing import nan_filled
        >>> with nan_filled():
        ...     torch.empty(2)
        tensor([nan, nan])
    """
    # torch fills fresh memory with NaN while deterministic algorithms are on; cuBLAS then wants a workspace of its own.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def saved_bytes(run: Callable[[], Any], fixed: torch.nn.Module | Iterable[torch.Tensor], context: Any = None) -> int:
    """Bytes that autograd keeps of a run: every storage once, without those of the fixed tensors or the model's own.

    Example:
        >>> from flora_core.testing import saved_bytes
        >>> x = torch.ones(4, requires_grad=True)
        >>> saved_bytes(lambda: (x * x).exp(), fixed=[x])
        16
    """
    tensors = fixed.parameters() if isinstance(fixed, torch.nn.Module) else fixed
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in tensors}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # The tensor is held as well, so that no address is used twice.
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in known else storage.nbytes(), tensor
        return tensor

    with context or nullcontext(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(size for size, _ in kept.values())
