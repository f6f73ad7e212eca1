"""The server's side of a round: starts for the clients, aggregation into the global model, and what each client lacks.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..adapters import Adapters, Base, ClientUpdate, RoundResult, TailPenalty
from ..aggregation import BOTH, Certificate, DeltaLog, Deviation, check_weights, combine, get_strategy
from ..common import derive, generator, on_device, require
from ..model import Cohort
from .exchange import dense_stack, without_factors
from .global_model import GlobalModel
from .protocol import Tensors, dense_tensors, round_tensors


class Server:
    """A run's strategy with its state, the global model, and the log of what each round sent down.

    Args:
        model: The global model.
        expected: Client -> what ``judge.promised`` gives: modules, ranks and scalings of everybody.
        strategy, options: How updates are aggregated.
        seed: Of initial adapters and stochastic rounding.
        sends: Whether each round's change is kept, to be sent to copies of the global model.
    """

    def __init__(
        self,
        model: GlobalModel,
        expected: Mapping[str, ClientUpdate],
        strategy: str,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        sends: bool = False,
    ):
        self.model, self.expected, self.strategy = model, expected, get_strategy(strategy)
        self.seed, self.sends = seed, sends
        everybody = {name: update.ranks for name, update in expected.items()}
        self.options = {**self.strategy.population_options(everybody), **(options or {})}
        self.state: dict[str, Any] = {}
        self.log = DeltaLog(model.size_bytes)
        if sends:
            self.refuse_penalties(expected)
        self._common: tuple[int, dict[str, torch.Tensor]] = (0, {})

    def digest(self) -> str:
        """A digest of the whole targets' weights; of a sharded base all processes ask for it."""
        return self.model.digest(self.log.changed)

    def trained_on(self) -> Base:
        """The base as it is now, which the next round's clients train on."""
        return self.model.as_base(self.log.changed)

    def saved(self) -> dict[str, Any]:
        """All that the next round needs; see ``GlobalModel.saved``."""
        return {**self.model.saved(self.log.changed), "strategy": self.state, "log": self.log.saved()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go back to what ``saved`` gave."""
        self.log.restore(saved["log"])
        self.model.restore(saved, self.log.changed)
        self.state = on_device(saved["strategy"], self.model.device)

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

    def lacking(self, client: str, newest: int) -> tuple[int | None, list[tuple[int, Tensors]]]:
        """Compute what a client needs to hold the newest round.

        Returns:
            The round that the changes start from, None for a snapshot; and (round, tensors) in order.
        """
        since, (kind, _, rounds) = self.log.have.get(client, 0), self.log.missed(client)
        if kind == "none":
            return since, []
        if kind == "log" and all(number in self.log.deltas for number in rounds):
            return since, [(number, dict(self.log.deltas[number])) for number in rounds]
        whole: Tensors = {}
        for module in self.model.weights:
            whole |= dense_tensors(module, self.model.weights, self.model.low_bits)
        return None, [(newest, whole)]

    def start(self, client: str, number: int) -> Adapters:
        """Module -> factors that a client starts a round from: the strategy's, else the common A; others are fresh."""
        own, start = self.expected[client], {}
        if self.strategy.shared_start:
            for module, A_PK in self._common_start(number).items():
                if module in own.adapters:
                    R, N = own.adapters[module][1].shape
                    start[module] = (A_PK[:R], torch.zeros(R, N))
        return start | (self.strategy.next_adapter(self.state, client, own.ranks, own.scaling) or {})

    def load_starts(self, cohort: Cohort, number: int) -> None:
        """Start every client of a cohort of fresh adapters from what it is to start from."""
        for client in cohort.names:
            cohort.load(client, {**cohort.bank.adapters(client), **self.start(client, number)})

    def _common_start(self, number: int) -> dict[str, torch.Tensor]:
        """One A per module, of the largest rank: factors that are averaged separately must start alike."""
        if self._common[0] == number:
            return self._common[1]
        shapes: dict[str, torch.Size] = {}
        for update in self.expected.values():
            for module, (A_RK, _) in update.adapters.items():
                shapes[module] = max(shapes.get(module, A_RK.shape), A_RK.shape)
        starts = {}
        for module, (rank, K) in shapes.items():
            random = generator(self.seed, "common start", number, module)
            starts[module] = torch.empty(rank, K).uniform_(-(K**-0.5), K**-0.5, generator=random)
        self._common = (number, starts)
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
        check_weights(updates)
        sent = [without_factors(update, sums) for update in updates] if sums else updates
        result = combine(sent, self.strategy, self.state, self.options)
        if sums:
            _add_sums(result, updates, sums)
        began = time.perf_counter()
        written = self.model.write(result.base_delta, derive(self.seed, "rounding", number))
        result.seconds["write"] = time.perf_counter() - began
        self.state = result.state
        self._record(result, number, [one.client for one in updates])
        result.certificate = replace(result.certificate, application=written, rows=self.model.check_rows)
        return result

    def _record(self, result: RoundResult, number: int, clients: Sequence[str]) -> None:
        """Note the round's change; copies of the model elsewhere have it once they say so."""
        size = sum(size for _, size in result.forms.values())
        if self.sends:
            self.log.record(number, size, [], round_tensors(result, self.model.weights, self.model.low_bits))
        else:
            self.log.record(number, size, clients)

    def adapter(self) -> ClientUpdate | None:
        """The global adapter, scalings 1, of a strategy that keeps one in ``state["adapter"]``."""
        pairs = {}
        # A module of which nothing is carried beside the base has rank 0 here.
        held = {m: pair for m, pair in self.state.get("adapter", {}).items() if pair["A"].shape[0]}
        for module, pair in held.items():
            dtype = torch.promote_types(self.model.weights[module].dtype, torch.float32)
            pairs[module] = (pair["A"].to(dtype), pair["B"].to(dtype))
        base = self.trained_on().of(pairs)
        scaling = dict.fromkeys(pairs, 1.0)
        return ClientUpdate("global", pairs, scaling, base=base.label, trained_on=base) if pairs else None


def _add_sums(result: RoundResult, updates: Sequence[ClientUpdate], sums: Mapping[str, torch.Tensor]) -> None:
    """Put modules into a result whose sums are known: they travel dense, which many clients' factors exceed."""
    items = {m: A.element_size() for update in updates for m, (A, _) in update.adapters.items()}
    forms = {module: ("dense", total.numel() * items[module]) for module, total in sums.items()}
    result.forms = {**result.forms, **forms}
    result.base_delta |= {module: dense_stack(total) for module, total in sums.items()}
    exact = {module: Deviation(0.0, None) for module in sums}
    result.certificate = Certificate({**result.certificate.aggregation, **exact})
    result.up = {update.client: update.size_bytes for update in updates}
    result.down = dict.fromkeys(result.up, sum(size for _, size in result.forms.values()))
