"""The server's side of a round: the global model, what clients start from, and how updates are written into it.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..adapters import Base, ClientUpdate, RoundResult, TailPenalty, values, values_of
from ..aggregation import BOTH, Certificate, DeltaLog, Deviation, Stack, aggregate, get_strategy
from ..common import derive, generator, on_device, require, tensor_digest
from ..distributed import sharded
from ..merge import adapter_stack, apply_base_delta_, apply_to_parts_, new_low_bits
from ..model import Cohort, adapter_beside, is_conv1d, target_weights
from .exchange import dense_stack, without_factors


class Server:
    """The global model of a run: base weights with their low bits, and what the strategy carries.

    Args:
        model: Its target weights are changed in place.
        expected: Client -> what ``judge.promised`` gives: modules, ranks and scalings of everybody.
        strategy, options: How updates are aggregated.
        rounding: How rounds are written into 16-bit weights.
        seed: Of initial adapters and stochastic rounding.
        check_rows: Rows of each weight whose change is compared with what was to be written; None for all.
    Raises:
        ValueError: If the rounding does not suit the weights' dtype, or a target cannot be written.
    """

    def __init__(
        self,
        model: Any,
        expected: Mapping[str, ClientUpdate],
        strategy: str,
        options: Mapping[str, Any] | None = None,
        rounding: str = "low_bits",
        seed: int = 0,
        check_rows: int | None = 64,
    ):
        self.model, self.expected, self.strategy = model, expected, get_strategy(strategy)
        self.rounding, self.seed, self.check_rows = rounding, seed, check_rows
        everybody = {name: update.ranks for name, update in expected.items()}
        self.options = {**self.strategy.population_options(everybody), **(options or {})}
        targets = dict.fromkeys(module for update in expected.values() for module in update.adapters)
        self.base = sharded(model)
        # Of a sharded base these are this rank's rows.
        self.weights = target_weights(model, targets) if self.base is None else self.base.weights(targets)
        self._check_rounding()
        self.low_bits = new_low_bits(self.weights) if rounding == "low_bits" else {}
        self.state: dict[str, Any] = {}
        self.log = DeltaLog(self.size_bytes)
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

    def digest(self) -> str:
        """A digest of the whole targets' weights; of a sharded base all ranks ask for it."""
        if self.base is None:
            return tensor_digest(self.weights.items())
        self._known = (self.log.changed, {})
        return tensor_digest(self._noted(self.base.wholes(self.weights)))

    def _noted(self, wholes: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Keep values of weights that pass by: of a sharded base, whole ones are seldom at hand."""
        for module, weight in wholes:
            self._known[1][module] = values(weight)
            yield module, weight

    def trained_on(self) -> Base:
        """The base as it is now, which the next round's clients train on."""
        if self._known[0] != self.log.changed and self.base is None:
            self._known = (self.log.changed, values_of(self.weights.items()))
        return Base(base_path(self.model), self.log.changed, self._known[1])

    def saved(self) -> dict[str, Any]:
        """All that the next round needs; tensors are not copied.

        Of a sharded base all ranks ask for it, and rank 0 alone has the whole weights, in its host's memory.
        """
        parts = {"weights": self.weights, "low_bits": self.low_bits}
        if self.base is not None:
            parts = {name: self.base.gathered(held) for name, held in parts.items()}
            self._known = (self.log.changed, values_of(parts["weights"].items()))
        return {**parts, "strategy": self.state, "log": self.log.saved()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go back to what ``saved`` gave; of a sharded base all ranks do, and rank 0 has the whole weights."""
        if self.base is None:
            for module, weight in saved["weights"].items():
                self.weights[module].copy_(weight)
            self.low_bits = saved["low_bits"]
        else:
            self.base.scatter_(self.weights, saved["weights"])
            self.base.scatter_(self.low_bits, saved["low_bits"])
        self.state = on_device(saved["strategy"], self.device)
        self.log.restore(saved["log"])
        self._known = (self.log.changed, values_of(saved["weights"].items()))

    @property
    def trainable(self) -> tuple[str, ...]:
        """The factors that the clients train in the next round."""
        return self.strategy.trainable(self.state)

    def penalties(self, clients: Iterable[str]) -> dict[str, TailPenalty]:
        """Client -> what it adds to its loss in the next round, where the strategy asks for it."""
        found = {
            name: self.strategy.penalty(self.state, name, self.expected[name].ranks, **self.options) for name in clients
        }
        return {name: penalty for name, penalty in found.items() if penalty is not None}

    def refuse_penalties(self, clients: Iterable[str]) -> None:
        """Refuse a penalty for remote clients: their task has no field for it."""
        asked = list(self.penalties(clients))
        require(
            not asked,
            f"clients {', '.join(asked[:3])} train elsewhere, where a penalty on the loss cannot be added; leave the "
            f"penalty of strategy {self.strategy.name!r} out, or train here",
        )

    def catch_up(self, client: str) -> tuple[str, int]:
        """How a client gets from the newest round that it has to the global model, and the bytes of that.

        Returns:
            ``none``, ``log`` (the changes of the rounds that it missed) or ``snapshot`` (of the weights), and the
            bytes, with those of the adapter that it starts from.
        """
        kind, size, _ = self.log.missed(client)
        if kind != "none" and self.state:
            size += self.strategy.adapter_bytes(self.state, self.expected[client], BOTH)
        return kind, size

    def load_starts(self, cohort: Cohort, number: int) -> None:
        """Start every client from what the strategy gives it, else from the common A, else from its fresh adapter."""
        common = self._common_start(number) if self.strategy.shared_start else {}
        for client in cohort.names:
            own = self.expected[client]
            start = dict(cohort.bank.adapters(client))
            start |= {m: (common[m][: len(A_RK)], B_RN) for m, (A_RK, B_RN) in start.items() if m in common}
            start |= self.strategy.next_adapter(self.state, client, own.ranks, own.scaling) or {}
            cohort.load(client, start)

    def _common_start(self, number: int) -> dict[str, torch.Tensor]:
        """One A per module, of the largest rank: factors that are averaged separately must start alike."""
        shapes: dict[str, torch.Size] = {}
        for update in self.expected.values():
            for module, (A_RK, _) in update.adapters.items():
                shapes[module] = max(shapes.get(module, A_RK.shape), A_RK.shape)
        starts = {}
        for module, (rank, K) in shapes.items():
            random = generator(self.seed, "common start", number, module)
            starts[module] = torch.empty(rank, K).uniform_(-(K**-0.5), K**-0.5, generator=random)
        return starts

    def apply(
        self, updates: Sequence[ClientUpdate], number: int, sums: Mapping[str, torch.Tensor] | None = None
    ) -> RoundResult:
        """Aggregate a round's updates and write the sum into the base, rounded once.

        Args:
            updates: The good ones.
            number: The round.
            sums: Module -> ``sum_k p_k s_k B_k A_k`` in float64, where it was made by other processes
            (``flora_core.federation.exchange``).
        Returns:
            The round's result, whose certificate has the error of the write too.
        """
        sent = [without_factors(update, sums) for update in updates] if sums else updates
        result = aggregate(sent, self.strategy.name, self.state, **self.options)
        if sums:
            self._add_sums(result, updates, sums)
        began = time.perf_counter()
        written = self._write(result.base_delta, self.rounding, derive(self.seed, "rounding", number))
        result.seconds["write"] = time.perf_counter() - began
        self.state = result.state
        self.log.record(number, sum(size for _, size in result.forms.values()), [one.client for one in updates])
        result.certificate = replace(result.certificate, application=written, rows=self.check_rows)
        return result

    def _write(self, delta: Mapping[str, Stack], rounding: str, seed: int | None) -> dict[str, Deviation]:
        options: dict[str, Any] = dict(rounding=rounding, seed=seed, check_rows=self.check_rows)
        if rounding == "low_bits":
            options["low_bits"] = self.low_bits
        if self.base is None:
            return apply_base_delta_(self.weights, delta, accumulate="float64", **options)
        return apply_to_parts_(self.base, self.weights, delta, **options)

    def _add_sums(self, result: RoundResult, updates: Sequence[ClientUpdate], sums: Mapping[str, torch.Tensor]) -> None:
        """Put modules into a result whose sums are known: they travel dense, which many clients' factors exceed."""
        items = {m: A.element_size() for update in updates for m, (A, _) in update.adapters.items()}
        forms = {module: ("dense", total.numel() * items[module]) for module, total in sums.items()}
        result.forms = {**result.forms, **forms}
        result.base_delta |= {module: dense_stack(total) for module, total in sums.items()}
        exact = {module: Deviation(0.0, None) for module in sums}
        result.certificate = Certificate({**result.certificate.aggregation, **exact})
        result.up = {update.client: update.size_bytes for update in updates}
        result.down = dict.fromkeys(result.up, sum(size for _, size in result.forms.values()))

    def adapter(self) -> ClientUpdate | None:
        """The global adapter, scalings 1, of a strategy that keeps one in ``state["adapter"]``."""
        pairs = {}
        # A module of which nothing is carried beside the base has rank 0 here.
        held = {m: pair for m, pair in self.state.get("adapter", {}).items() if pair["A"].shape[0]}
        for module, pair in held.items():
            dtype = torch.promote_types(self.weights[module].dtype, torch.float32)
            pairs[module] = (pair["A"].to(dtype), pair["B"].to(dtype))
        base = self.trained_on().of(pairs)
        scaling = dict.fromkeys(pairs, 1.0)
        return ClientUpdate("global", pairs, scaling, base=base.label, trained_on=base) if pairs else None

    @property
    def fan_in_fan_out(self) -> bool:
        """Return whether the targets are Conv1D, as PEFT must know."""
        return any(is_conv1d(self.model.get_submodule(module)) for module in self.weights)

    @contextmanager
    def in_use(self) -> Iterator[Any]:
        """The global model to run: the base, with the global adapter beside it if there is one."""
        adapter = self.adapter()
        if adapter is None:
            yield self.model
            return
        # The base is its own: nothing is to be compared.
        with adapter_beside(self.model, replace(adapter, trained_on=None)) as model:
            yield model

    @contextmanager
    def merged(self) -> Iterator[Any]:
        """The global model as plain weights, or its parts; the base is put back as it was."""
        adapter = self.adapter()
        before = {} if adapter is None else {module: self.weights[module].clone() for module in adapter.adapters}
        try:
            if adapter is not None:
                stacks = {module: adapter_stack(adapter, module, self.device) for module in before}
                self._write(stacks, "nearest", None)
            yield self.model
        finally:
            for module, weight in before.items():
                self.weights[module].copy_(weight)


def base_path(model: Any) -> str | None:
    """Name the place that transformers loads the model from: a hub name, or the whole path of a folder; None for a
    model made here."""
    name = getattr(model.config, "_name_or_path", None) or None
    return os.path.abspath(name) if name and os.path.isdir(name) else name
