"""PEFT adapters of which only the headers are in memory, and a round's sum over them, one module at a time.

Letters: K in_features, N out_features, R one client's rank, P the sum of ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters import (
    CONFIG,
    WEIGHTS,
    ClientUpdate,
    base_of,
    pair_factors,
    read_config,
    refuse_other_tensors,
    scaling_of,
    sort_keys,
    weights_path,
)
from ..aggregation import (
    Deviation,
    Stack,
    Strategy,
    certify,
    check_updates,
    get_strategy,
    norm,
    round_terms,
    stack_of,
    total,
)
from ..common import require
from .shards import DTYPES, Entry, read_shard, read_tensor


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter's layout.

    Args:
        name: Its name in messages.
        folder: Where it lies.
        weight: Its weight, relative to the others.
        config: Its ``adapter_config.json``.
        scaling: Module path -> s.
        shapes: Module path -> (R, K, N).
        factors: Module path -> where lora_A and lora_B lie.
        halves: Modules of which one factor is missing, left out.
        copies: Tensors of the base that lie beside the factors: name in the file -> (name in the base, where).
    """

    name: str
    folder: Path
    weight: float
    config: Mapping[str, Any]
    scaling: Mapping[str, float]
    shapes: Mapping[str, tuple[int, int, int]]
    factors: Mapping[str, tuple[Entry, ...]]
    halves: tuple[str, ...]
    copies: Mapping[str, tuple[str, Entry]]

    @property
    def fan_in_fan_out(self) -> bool:
        """True where its config has ``fan_in_fan_out``: weights are stored K x N."""
        return self.config.get("fan_in_fan_out") is True

    @property
    def base(self) -> str | None:
        """The base that its config names."""
        return base_of(self.config, self.folder)

    def update(self, modules: Sequence[str]) -> ClientUpdate:
        """Read some modules; those that it does not adapt are left out."""
        mine = [module for module in modules if module in self.scaling]
        pairs = {}
        with open(self.folder / WEIGHTS, "rb", buffering=0) as file:
            for module in mine:
                A_RK, B_NR = (read_tensor(file, entry) for entry in self.factors[module])
                # Stacking copies it into rows.
                pairs[module] = (A_RK, B_NR.T)
        return ClientUpdate(self.name, pairs, {module: self.scaling[module] for module in mine}, self.weight)


def open_adapters(weights: Mapping[Any, float], *, partial: bool = False) -> list[Adapter]:
    """Read the configs and headers of adapters; the factors stay on disk.

    Args:
        weights: Folder of an adapter -> its weight.
        partial: Leave out modules of which one factor is missing.
    Raises:
        FileNotFoundError, ValueError: As ``load_peft_adapter``; besides for an adapter that is given twice, and for
            weights that are no numbers of at least 0, or all 0.
    """
    require(len(weights) > 0, "adapters must name at least one PEFT adapter, got none")
    adapters = [_open(os.fspath(path), weight, partial) for path, weight in weights.items()]
    for i, one in enumerate(adapters):
        for other in adapters[:i]:
            same = _same_bytes(one.folder / WEIGHTS, other.folder / WEIGHTS)
            same = same and _same_bytes(one.folder / CONFIG, other.folder / CONFIG)
            require(
                not same,
                f"adapter {one.name} is the same as {other.name}; give it once, with the sum of both weights",
            )
    require(any(one.weight for one in adapters), "the adapters' weights are all 0; give at least one a weight above 0")
    return adapters


def _open(path: str, weight: float, partial: bool) -> Adapter:
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    require(
        number and math.isfinite(weight) and weight >= 0,
        f"the weight of adapter {path} must be a finite number of at least 0, got {weight!r}; to subtract an adapter,"
        " merge it alone with a negative scale (--scale)",
    )
    folder = Path(path)
    config = read_config(folder)
    shard = read_shard(weights_path(folder))
    entries = {entry.name: entry for entry in shard.entries}
    for entry in shard.entries:
        require(
            entry.dtype in DTYPES,
            f"{shard.path}: {entry.name!r} is {entry.dtype}; factors must be one of {', '.join(DTYPES)}",
        )
    meta = {e.name: torch.empty(e.shape, dtype=DTYPES[e.dtype], device="meta") for e in shard.entries}
    keys = sort_keys(shard.path, meta)
    copies = {key: (name.replace(".base_layer.", "."), entries[key]) for key, name in keys.rest.items()}
    refuse_other_tensors(folder, [key for key in copies if not _may_be_a_copy(key)])
    pairs = pair_factors(folder, config, keys, meta, partial=partial)
    shapes = {module: (A.shape[0], A.shape[1], B.shape[0]) for module, (A, B) in pairs.items()}
    scaling = {module: scaling_of(config, module, shape[0]) for module, shape in shapes.items()}
    factors = {module: tuple(entries[keys.factors[module][factor]] for factor in "AB") for module in pairs}
    halves = tuple(module for module in keys.factors if module not in pairs)
    return Adapter(path, folder, float(weight), config, scaling, shapes, factors, halves, copies)


def _may_be_a_copy(key: str) -> bool:
    """True for the names of a base's tensors, which a state dict of the whole model has beside the factors."""
    return key.endswith((".weight", ".bias")) and "lora_" not in key and "modules_to_save" not in key


def _same_bytes(one: Path, other: Path) -> bool:
    if one.samefile(other):
        return True
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as left, open(other, "rb") as right:
        while chunk := left.read(1 << 20):
            if chunk != right.read(1 << 20):
                return False
    return True


class Sum:
    """A strategy's sum over adapters, one module at a time.

    Args:
        adapters: From ``open_adapters``.
        strategy: A name from the table of strategies.
        options: The strategy's own options.
        scale: Factor of the sum; 1 adds all of it, 0.5 half, -1 subtracts it.
    """

    def __init__(self, adapters: Sequence[Adapter], strategy: str, options: Mapping[str, Any], scale: float = 1.0):
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        require(
            number and math.isfinite(scale) and scale != 0,
            f"scale must be a finite number other than 0, got {scale!r}; 1 merges the weighted sum as it is",
        )
        self.adapters, self.options, self.scale = list(adapters), dict(options), float(scale)
        self.strategy: Strategy = get_strategy(strategy)
        self.strategy.check(self.options)
        self.modules = list(dict.fromkeys(module for one in self.adapters for module in one.shapes))
        self.errors: dict[str, Deviation] = {}
        # Adapter -> modules whose product is 0, found by check.
        self.dead: dict[str, list[str]] = {}

    @property
    def shares(self) -> dict[str, float]:
        """Adapter -> its weight over the sum of all."""
        whole = math.fsum(one.weight for one in self.adapters)
        return {one.name: one.weight / whole for one in self.adapters}

    def updates(self, module: str) -> list[ClientUpdate]:
        """Every adapter's update of one module; an adapter that lacks it keeps its weight in the sum."""
        return [one.update([module]) for one in self.adapters]

    def check(self) -> None:
        """Read every factor once: all must be finite, and of shapes and ranks that the strategy takes together.

        Raises:
            ValueError: With the adapter's and the module's name.
        """
        everything = [ClientUpdate(one.name, _empty(one), dict(one.scaling), one.weight) for one in self.adapters]
        self.strategy.check_fits(everything)
        with _one_thread():
            for module in self.modules:
                updates = self.updates(module)
                check_updates(updates)
                for one in updates:
                    if module in one.adapters and _is_zero(one, module):
                        self.dead.setdefault(one.client, []).append(module)

    def stacks(self, module: str) -> tuple[Stack, Stack]:
        """One module's change by the strategy, and the exact sum; the same object where the strategy is exact as such.

        Both are multiplied by the scale. The strategy's distance from the exact sum is kept in ``errors``.
        """
        applied, exact = self._unscaled(module)
        if self.scale == 1:
            return applied, exact
        error, factor = self.errors[module], abs(self.scale)
        size = None if error.exact is None else error.exact * factor
        self.errors[module] = Deviation(error.difference * factor, size)
        scaled = _scaled(exact, self.scale)
        return (scaled if applied is exact else _scaled(applied, self.scale)), scaled

    def _unscaled(self, module: str) -> tuple[Stack, Stack]:
        with _one_thread():
            updates = self.updates(module)
            exact = _exact(updates, module)
        self.errors[module] = Deviation(0.0, 0.0)
        if self.strategy.name == "flora":
            return exact, exact
        result = self.strategy.aggregate(updates, {}, **self.options)
        parts = result.change().get(module, [])
        if exact[0].shape[0]:
            error = certify(updates, result).aggregation[module]
            self.errors[module] = Deviation(error.difference, norm(exact) if error.exact is None else error.exact)
        return (_joined(parts) if parts else tuple(part[:0] for part in exact)), exact  # pyright: ignore

    @property
    def aggregation_error(self) -> float:
        """Relative distance of what the strategy made of all modules so far from their exact sums."""
        return total(self.errors.values()).relative


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch's other threads asleep: for factors, waking them takes several times as long as the work."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _empty(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        module: (torch.empty(R, K, device="meta"), torch.empty(R, N, device="meta"))
        for module, (R, K, N) in adapter.shapes.items()
    }


def _exact(updates: Sequence[ClientUpdate], module: str) -> Stack:
    terms = round_terms(updates).get(module)
    if terms:
        return stack_of(terms)
    # Only adapters of weight 0 have this module.
    A_RK, B_RN = next(one.adapters[module] for one in updates if module in one.adapters)
    return A_RK[:0], B_RN[:0], torch.zeros(0, dtype=torch.float64)


def _scaled(stack: Stack, scale: float) -> Stack:
    A_PK, B_PN, coef_P = stack
    return A_PK, B_PN, coef_P.double() * scale


def _is_zero(update: ClientUpdate, module: str) -> bool:
    A_RK, B_RN = update.adapters[module]
    return update.scaling[module] == 0 or not A_RK.any() or not B_RN.any()


def _joined(parts: Sequence[Stack]) -> Stack:
    A, B, coef = zip(*parts, strict=True)
    return torch.cat(A), torch.cat(B), torch.cat([one.double() for one in coef])
