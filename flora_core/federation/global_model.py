"""The global model: the target weights of the base with their low bits, whole or this process's rows of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..adapters import Base, ClientUpdate, values, values_of
from ..aggregation import Deviation, Stack
from ..common import require, tensor_digest
from ..distributed import sharded
from ..merge import adapter_stack, apply_base_delta_, apply_to_parts_, new_low_bits
from ..model import adapter_beside, is_conv1d, target_weights


class GlobalModel:
    """The weights that rounds change.

    Args:
        model: Its target weights are changed in place.
        targets: Module paths.
        rounding: How rounds are written into 16-bit weights.
        check_rows: Rows of each weight whose change is compared with what was to be written; None for all.
    Raises:
        ValueError: If the rounding does not suit the weights' dtype, or a target cannot be written.

    Attributes:
        base: The base in shards; None where this process has it whole.
        weights: Module -> its weight (N, K), of a sharded base this process's rows.
        low_bits: Module -> the low bits of its float32 master, with ``rounding="low_bits"``.
    """

    def __init__(self, model: Any, targets: Iterable[str], rounding: str = "low_bits", check_rows: int | None = 64):
        self.model, self.rounding, self.check_rows = model, rounding, check_rows
        self.base = sharded(model)
        self.weights = target_weights(model, targets) if self.base is None else self.base.weights(targets)
        self._check_rounding()
        self.low_bits = new_low_bits(self.weights) if rounding == "low_bits" else {}
        # Of the base after a round that changed it: the round, and values of its weights.
        self._known: tuple[int, dict[str, torch.Tensor]] = (-1, {})

    def _check_rounding(self) -> None:
        dtypes = {weight.dtype for weight in self.weights.values()}
        require(
            self.rounding != "low_bits" or torch.float16 not in dtypes,
            "rounding='low_bits' needs bfloat16 or float32 targets, got float16; load the model in one of these, or "
            "choose rounding='nearest'",
        )
        require(
            self.rounding != "stochastic" or dtypes == {torch.bfloat16},
            f"rounding='stochastic' is for bfloat16 targets, got {', '.join(map(str, dtypes))}; use 'low_bits'",
        )

    @property
    def device(self) -> torch.device:
        """Where the targets lie."""
        return next(iter(self.weights.values())).device

    @property
    def largest(self) -> float:
        """The largest number that every target weight can hold."""
        return min(torch.finfo(weight.dtype).max for weight in self.weights.values())

    @property
    def has_lossy_rounding(self) -> bool:
        """Return whether a round's small changes are lost in 16 bits."""
        return self.rounding == "nearest" and any(weight.element_size() == 2 for weight in self.weights.values())

    @property
    def size_bytes(self) -> int:
        """Of all targets' weights with their low bits, whole."""
        widths = {m: weight.element_size() + 2 * (m in self.low_bits) for m, weight in self.weights.items()}
        shapes = {m: weight.shape if self.base is None else self.base.shape(m) for m, weight in self.weights.items()}
        return sum(width * shapes[m][0] * shapes[m][1] for m, width in widths.items())

    @property
    def fan_in_fan_out(self) -> bool:
        """Return whether the targets are Conv1D, as PEFT must know."""
        return any(is_conv1d(self.model.get_submodule(module)) for module in self.weights)

    def digest(self, changed: int) -> str:
        """A digest of the whole targets' weights after the round that changed them; with shards on all processes."""
        if self.base is None:
            return tensor_digest(self.weights.items())
        self._known = (changed, {})
        return tensor_digest(self._noted(self.base.wholes(self.weights)))

    def _noted(self, wholes: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Keep values of weights that pass by: of a sharded base, whole ones are seldom at hand."""
        for module, weight in wholes:
            self._known[1][module] = values(weight)
            yield module, weight

    def as_base(self, changed: int) -> Base:
        """Describe the base as it is, for adapters that are trained on it; ``changed`` is the newest round in it."""
        if self._known[0] != changed and self.base is None:
            self._known = (changed, values_of(self.weights.items()))
        return Base(base_path(self.model), changed, self._known[1])

    def saved(self, changed: int) -> dict[str, Any]:
        """Weights and low bits; tensors are not copied.

        Of a sharded base all processes ask for it, and the first alone has the whole weights, in its host's memory.
        """
        parts = {"weights": self.weights, "low_bits": self.low_bits}
        if self.base is not None:
            parts = {name: self.base.gathered(held) for name, held in parts.items()}
            self._known = (changed, values_of(parts["weights"].items()))
        return parts

    def restore(self, saved: Mapping[str, Any], changed: int) -> None:
        """Go back to what ``saved`` gave; of a sharded base all processes do, and the first has the whole weights."""
        if self.base is None:
            for module, weight in saved["weights"].items():
                self.weights[module].copy_(weight)
            self.low_bits = saved["low_bits"]
        else:
            self.base.scatter_(self.weights, saved["weights"])
            self.base.scatter_(self.low_bits, saved["low_bits"])
        self._known = (changed, values_of(saved["weights"].items()))

    def write(self, delta: Mapping[str, Stack], seed: int | None, rounding: str | None = None) -> dict[str, Deviation]:
        """Add a change to the weights, rounded once; module -> the error of the write."""
        options: dict[str, Any] = dict(rounding=rounding or self.rounding, seed=seed, check_rows=self.check_rows)
        if options["rounding"] == "low_bits":
            options["low_bits"] = self.low_bits
        if self.base is None:
            return apply_base_delta_(self.weights, delta, accumulate="float64", **options)
        return apply_to_parts_(self.base, self.weights, delta, **options)

    def run_empty_passes(self) -> None:
        """With a sharded base, take part in the other processes' passes until none has any left."""
        if self.base is not None:
            self.base.run_along()

    @contextmanager
    def beside(self, adapter: ClientUpdate | None) -> Iterator[Any]:
        """The model to run: the base, with the global adapter beside it if there is one."""
        if adapter is None:
            yield self.model
            return
        # The base is its own: nothing is to be compared.
        with adapter_beside(self.model, replace(adapter, trained_on=None)) as model:
            yield model

    @contextmanager
    def merged(self, adapter: ClientUpdate | None) -> Iterator[Any]:
        """The model as plain weights, or its parts, with the global adapter in them; the base is put back after."""
        before = {} if adapter is None else {module: self.weights[module].clone() for module in adapter.adapters}
        try:
            if adapter is not None:
                stacks = {module: adapter_stack(adapter, module, self.device) for module in before}
                self.write(stacks, None, "nearest")
            yield self.model
        finally:
            for module, weight in before.items():
                self.weights[module].copy_(weight)


def base_path(model: Any) -> str | None:
    """Name the place that transformers loads the model from: a hub name, or the whole path of a folder; None for a
    model made here."""
    name = getattr(model.config, "_name_or_path", None) or None
    return os.path.abspath(name) if name and os.path.isdir(name) else name
