"""Deterministic algorithms of torch's libraries: for a whole training step, and strictly for one attention call.

``warn_only`` lets an operation that has no deterministic algorithm run. Flash attention has one and still takes the
other under ``warn_only``: its backward then sums dQ by atomics, in an order that changes from run to run as soon as a
sequence spans two blocks of keys. So the strict mode is on around that backward alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic_libraries(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """On CUDA, have torch's libraries use deterministic algorithms; an operation that has none warns and runs."""
    if not wanted or device.type != "cuda":
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fills = filling.fill_uninitialized_memory
    # cuBLAS reads it with its first product, and repeats its sums only with a workspace of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would write NaN into every tensor before we do: nothing here reads what it has not written.
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        filling.fill_uninitialized_memory = fills


def strict_backward(out: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Run the backward of the operations between ``inputs`` and ``out`` in strict deterministic mode.

    Nothing changes where deterministic algorithms are off or already strict. Each node switches the mode on right
    before it runs and back right after, so that no other operation of the model meets the strict mode.

    Returns:
        ``out`` itself.
    """
    # While a graph is compiled there are no nodes to hook, and torch.compile cannot trace the question of the mode.
    if torch.compiler.is_compiling():
        return out
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if out.grad_fn is None or not torch.are_deterministic_algorithms_enabled() or not warns:
        return out
    for node in _between(out, inputs):
        node.register_prehook(lambda _: torch.use_deterministic_algorithms(True, warn_only=False))
        node.register_hook(lambda *_: torch.use_deterministic_algorithms(True, warn_only=True))
    return out


def _between(out: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[Any]:
    """The nodes of autograd's graph from ``out`` down to what made ``inputs``, which are left out."""
    ends = {tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None}
    found, waiting = [], [out.grad_fn]
    while waiting:
        node = waiting.pop()
        # Where a leaf's gradient is kept stands an AccumulateGrad, which has nothing below it.
        if node is None or node in ends or node in found or not node.next_functions:
            continue
        found.append(node)
        waiting += [below for below, _ in node.next_functions]
    return found
