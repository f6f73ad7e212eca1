"""Train a cohort: every client's local steps, packed into shared passes through one resident base.

Letters: M packed tokens, C clients of the cohort.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..adapters import AdapterBank, ClientUpdate, TailPenalty
from ..common import CrowdedError, crowded_text, is_out_of_memory
from ..config import TrainConfig
from ..distributed import check_training
from ..model import (
    ClientSpec,
    Cohort,
    as_tokenizer,
    deterministic_libraries,
    embedding_rows,
    evaluation_mode,
    keeping_less,
    sequence_limit,
)
from . import planner
from .client import LocalClient, examples_of
from .optimizer import CohortAdamW
from .pause import Paused, State, client_state, restore_client
from .steps import CohortSteps

Event = dict[str, Any]


class CohortTrainer:
    """Train all clients of a cohort and return their updates.

    Args:
        cohort: From ``attach``.
        config: Settings of every client; ``ClientSpec.train`` overrides them field by field.
        tokenizer: For clients whose data are records or files; not needed for encoded examples.
        round, rounds: Which round of how many this is, from 0; data order and dropout depend on it, and schedules
            with ``schedule_scope="run"`` span all of them.
        callbacks: Called with event dicts: ``train_progress``, ``client_done``, ``warning``.
        optimizer_state: What ``optimizer_state`` of the round before was, for clients that keep theirs.
        trainable: The factors that are trained, "A", "B" or both; the other one stays as it is, bit for bit.
        penalties: Client -> what is added to its loss; losses are reported without it.
        stop: PendingClients after every step; where it says True, training ends with ``Paused``, which has the state.
        resume: The state of a ``Paused``, to go on from.
    Raises:
        ValueError: For missing data, a client without examples, or sequences longer than the model allows; before
            anything is trained.
    Deterministic: yes, on one machine with one number of threads.
    Example:
        >>> cohort = flora.attach(model, clients, ["q_proj"])
        >>> updates = flora.CohortTrainer(cohort, flora.TrainConfig(lr=1e-2, batch_size=2), tokenizer).run()
        >>> [(update.client, update.weight) for update in updates]
        [('a', 5.0), ('b', 6.0), ('c', 7.0)]
    """

    def __init__(
        self,
        cohort: Cohort,
        config: TrainConfig | None = None,
        tokenizer: Any = None,
        *,
        round: int = 0,
        rounds: int = 1,
        callbacks: Sequence[Callable[[Event], None]] = (),
        optimizer_state: Mapping[str, dict[str, Any]] | None = None,
        trainable: Sequence[str] = ("A", "B"),
        penalties: Mapping[str, TailPenalty] | None = None,
        stop: Callable[[], bool] = lambda: False,
        resume: Mapping[str, State] | None = None,
    ):
        self.trainable, self.penalties = tuple(trainable), dict(penalties or {})
        self.stop, self.begun = stop, dict(resume or {})
        self.tokens_in_flight: int | None = None
        self.cohort, self.tokenizer = cohort, as_tokenizer(tokenizer)
        self.config = config or TrainConfig()
        self.round, self.rounds, self.callbacks = round, rounds, tuple(callbacks)
        self.optimizer_state = dict(optimizer_state or {})
        self.clients = {spec.name: self._client(spec) for spec in cohort.clients}
        self.failures: dict[str, str] = {}
        self.finished: dict[str, int] = {}
        self.cuda_graphs = "off: nothing was trained yet"
        for client in self.clients.values():
            check_training(cohort.model, client.config, client.name)
            client.check_lengths(sequence_limit(cohort.model))
            client.check_ids(embedding_rows(cohort.model), self.tokenizer)

    def _client(self, spec: ClientSpec) -> LocalClient:
        def warn(text: str) -> None:
            self._emit("warning", message=text, client=spec.name)
            if not self.callbacks:
                warnings.warn(f"client {spec.name!r}: {text}", stacklevel=4)

        config = self.config.overridden(spec.train)
        return LocalClient(spec.name, config, examples_of(spec, config, self.tokenizer, warn), self.round)

    def _emit(self, event: str, **fields: Any) -> None:
        for callback in self.callbacks:
            callback({"event": event, **fields})

    def plan(self) -> planner.Plan:
        """The cohorts that will train one after another, and the tokens in flight."""
        budgeted = any(c.config.memory_budget_gb is not None for c in self.clients.values())
        per_token = self._bytes_per_token() if budgeted else 0.0
        param = self.cohort.bank.param
        return planner.plan(
            [client.demand(self._parameters(name)) for name, client in self.clients.items()],
            bytes_per_token=per_token,
            device=param.device.type,
            bytes_per_number=param.element_size(),
        )

    def _parameters(self, name: str) -> int:
        return sum(A.numel() + B.numel() for A, B in self.cohort.bank.adapters(name).values())

    def _bytes_per_token(self) -> float:
        """Estimate the bytes that one token keeps for backward, with its part of the one layer that is recomputed at a
        time."""
        with evaluation_mode(self.cohort.model):
            whole, most = planner.measure_bytes_per_token(self.cohort), 0.0
            layers = getattr(self.cohort.model.config, "num_hidden_layers", None) or 1
            ways = {(c.config.gradient_checkpointing, c.config.recompute): c.config for c in self.clients.values()}
            for config in ways.values():
                with keeping_less(self.cohort.model, config):
                    kept = planner.measure_bytes_per_token(self.cohort)
                most = max(most, kept + (whole - kept) / layers)
        return most

    def run(self) -> list[ClientUpdate]:
        """Train every client's steps of this round.

        Returns:
            One update per client whose losses and gradients stayed finite, in the cohort's order, with ``weight`` its
            number of examples. The others are in ``failures`` with the reason.
        Raises:
            Paused: If ``stop`` said so.
            RuntimeError, MemoryError: If memory holds not even one sequence of one client; where it runs out before,
                passes and then cohorts are split, which changes results by rounding only.
        """
        for name, state in self.begun.items():
            self.cohort.load(name, restore_client(self.clients[name], state))
        if self.cohort.packing_failed and self.round == 0:
            self._warn(f"batches are padded, not packed, which costs time and memory ({self.cohort.packing_reason})")
        chosen = self.plan()
        cohorts = [part for cohort in chosen.cohorts for part in self._abreast(cohort)]
        steps = sum(max(self.clients[name].steps for name in cohort) for cohort in cohorts)
        progress = {"steps": steps, "done": 0, "started": time.perf_counter(), "cohorts": len(cohorts)}
        # The base's own dropout is off: its random numbers would depend on who else is in the cohort.
        with evaluation_mode(self.cohort.model):
            for number, names in enumerate(cohorts):
                self._train_cohort(names, chosen.token_budget, {**progress, "cohort": number + 1})
                progress["done"] += max(self.clients[name].steps for name in names)
        for client in self.clients.values():
            if client.failure:
                self.failures[client.name] = client.failure
                warnings.warn(f"client {client.name!r} was stopped: {client.failure}", RuntimeWarning, stacklevel=2)
        good = [c for c in self.clients.values() if not c.failure]
        return [self.cohort.update(c.name, **c.metrics()) for c in good]

    def _train_cohort(self, names: Sequence[str], token_budget: int, progress: dict[str, Any]) -> None:
        clients = [self.clients[name] for name in names]
        config = clients[0].config
        device = self.cohort.bank.param.device
        with (
            deterministic_libraries(device, config.deterministic),
            self.cohort.training(names) as bank,
            keeping_less(self.cohort.model, config),
        ):
            steps, crowded = None, False
            first, last = self._next_step(names[0]), max(client.steps for client in clients)
            step = first
            try:
                steps = self.steps_of(bank, clients)
                for step in range(first, last):
                    steps.step(step, token_budget)
                    self._report(clients, step, progress)
                    if self.stop():
                        raise Paused({**self.begun, **self._states(steps.optimizer, clients, step + 1)})
            except (RuntimeError, MemoryError) as error:
                # Anywhere else a step may be half done, and must not be done again.
                crowded = isinstance(error, CrowdedError) or (steps is None and is_out_of_memory(error))
                if not crowded or len(clients) == 1:
                    raise
            finally:
                if steps is not None:
                    self.begun |= self._states(steps.optimizer, clients, step) if crowded else {}
                    self._release(steps)
            if steps is not None and not crowded:
                self._finish(steps.optimizer, clients, last)
            del steps  # its optimizer's moments go before the factors are copied back
        if crowded:
            half = len(names) // 2
            self._warn(crowded_text(self.round, step, f"training clients {', '.join(names)} in two parts"))
            for part in (names[:half], names[half:]):
                self._train_cohort(part, token_budget, progress)

    def _next_step(self, name: str) -> int:
        return self.begun[name]["step"] if name in self.begun else 0

    def _abreast(self, names: Sequence[str]) -> list[list[str]]:
        """A planned cohort cut into clients that are equally far, as all are unless memory ran out before a pause."""
        steps = dict.fromkeys(map(self._next_step, names))
        return [[name for name in names if self._next_step(name) == step] for step in steps]

    def _states(self, optimizer: CohortAdamW, clients: Sequence[LocalClient], step: int) -> dict[str, State]:
        """The states of those who train, before a step, and of those who are finished."""
        bank = optimizer.bank
        states = {c.name: client_state(c, step, bank.adapters(c.name), optimizer.state(c.name)) for c in clients}
        return states | self.finished_states()

    def finished_states(self) -> dict[str, State]:
        """The states of those who are finished."""
        return {
            name: client_state(self.clients[name], end, self.cohort.bank.adapters(name), self.optimizer_state.get(name))
            for name, end in self.finished.items()
        }

    def _warn(self, text: str) -> None:
        self._emit("warning", round=self.round + 1, message=text)

    def _release(self, steps: CohortSteps) -> None:
        graphed = steps.graphed
        steps.release()
        self.tokens_in_flight, self.cuda_graphs = steps.tokens_in_flight, steps.cuda_graphs
        if graphed:
            self._emit("cuda_graphs", round=self.round + 1, message=self.cuda_graphs)

    def _finish(self, optimizer: CohortAdamW, clients: Sequence[LocalClient], last: int) -> None:
        """Tell that clients are done, and keep what they carry to the next round."""
        for client in clients:
            self.finished[client.name] = last
            if client.config.keep_optimizer:
                self.optimizer_state[client.name] = optimizer.state(client.name)
            shape = self.cohort.spec(client.name).adapter
            failed = {"refused": client.failure} if client.failure else {}
            self._emit(
                "client_done",
                round=self.round + 1,
                client=client.name,
                rank=shape.rank,
                **client.metrics(),
                **failed,
            )

    def steps_of(self, bank: AdapterBank, clients: Sequence[LocalClient]) -> CohortSteps:
        """Make the steps of some clients, whose working bank is the active one; ``release`` them afterwards."""
        pad_id = getattr(self.tokenizer, "pad_token_id", None)
        steps = CohortSteps(
            self.cohort,
            clients,
            self._optimizer(bank, clients),
            round=self.round,
            pad_id=0 if pad_id is None else int(pad_id),
            penalties=self.penalties,
            tokens_in_flight=self.tokens_in_flight,
            warn=self._warn,
        )
        self.cuda_graphs = steps.cuda_graphs
        return steps

    def _optimizer(self, bank: AdapterBank, clients: Sequence[LocalClient]) -> CohortAdamW:
        spans = [self.rounds if client.config.schedule_scope == "run" else 1 for client in clients]
        optimizer = CohortAdamW(
            bank,
            [client.config for client in clients],
            [client.steps * span for client, span in zip(clients, spans, strict=True)],
            [client.steps * self.round * (span > 1) for client, span in zip(clients, spans, strict=True)],
            self.cohort.backend,
            self.trainable,
        )
        for client in clients:
            before = self.optimizer_state.get(client.name) if client.config.keep_optimizer else None
            moments = self.begun.get(client.name, {}).get("optimizer") or before
            if moments is not None:
                optimizer.load_state(client.name, moments)
        return optimizer

    def _report(self, clients: Sequence[LocalClient], step: int, progress: dict[str, Any]) -> None:
        recent = [c.losses[-1] for c in clients if c.losses and step < c.steps and not c.failure]
        self._emit(
            "train_progress",
            round=self.round + 1,
            step=progress["done"] + step + 1,
            steps=progress["steps"],
            loss=sum(recent) / len(recent) if recent else math.nan,
            tokens=sum(client.tokens for client in self.clients.values()),
            seconds=time.perf_counter() - progress["started"],
            cohort=progress["cohort"],
            cohorts=progress["cohorts"],
        )
