"""Train a cohort: every client's local steps, packed into shared passes through one resident base.

Letters: M packed tokens, C clients of the cohort.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from . import planner
from .attach import Cohort
from .bank import AdapterBank
from .checks import require
from .config import TrainConfig
from .data.pack import epoch_order
from .data.records import check_records, load_records
from .data.template import IGNORE, EncodeReport, Example, encode, require_examples
from .forward import Batch, deterministic_libraries, evaluation_mode, labelled_hidden, lay_out
from .loss import client_losses
from .optimizer import CohortAdamW
from .recompute import keeping_less
from .segments import Segments
from .update import ClientUpdate

Event = dict[str, Any]


@dataclass
class _Client:
    """One client's data and progress in this round."""

    name: str
    config: TrainConfig
    examples: list[Example]
    round: int
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    failure: str | None = None

    @property
    def per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps of this round."""
        steps = math.ceil(len(self.examples) / self.per_step) * self.config.local_epochs
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def batch(self, step: int) -> list[Example]:
        """The examples of one optimizer step; epochs are shuffled by seed, client, round and epoch alone."""
        per_epoch = math.ceil(len(self.examples) / self.per_step)
        epoch, within = divmod(step, per_epoch)
        order = epoch_order(len(self.examples), self.config.seed, self.name, self.round, epoch)
        return [self.examples[i] for i in order[within * self.per_step : (within + 1) * self.per_step]]

    def metrics(self) -> dict[str, Any]:
        first, last = (self.losses[0], self.losses[-1]) if self.losses else (None, None)
        return {
            "loss_first": first,
            "loss_last": last,
            "examples": len(self.examples),
            "tokens": self.tokens,
            "steps": len(self.losses),
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / self.seconds if self.seconds else 0.0,
        }


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
    Raises:
        ValueError: For missing data, a client without examples, or sequences longer than the model allows; before
            anything is trained.
    Deterministic: yes, on one machine with one number of threads.
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
    ):
        self.trainable = tuple(trainable)
        self.cohort, self.tokenizer = cohort, tokenizer
        self.config = config or TrainConfig()
        self.round, self.rounds, self.callbacks = round, rounds, tuple(callbacks)
        self.optimizer_state = dict(optimizer_state or {})
        self.clients = {spec.name: self._client(spec) for spec in cohort.clients}
        self.failures: dict[str, str] = {}
        self._check_lengths()

    def _client(self, spec: Any) -> _Client:
        config = self.config.overridden(spec.train)
        return _Client(spec.name, config, self._examples(spec, config), self.round)

    def _examples(self, spec: Any, config: TrainConfig) -> list[Example]:
        data: Any = spec.data
        require(data is not None, f"client {spec.name!r} has no data: pass a JSONL path, records or encoded examples")
        if not isinstance(data, (list, tuple)):
            data = load_records(data)
        report = None
        if not data or not isinstance(data[0], Example):
            check_records(data, f"client {spec.name!r}")
            require(self.tokenizer is not None, f"tokenizer must be given: client {spec.name!r} has plain records")
            report = EncodeReport()
            data = encode(
                data,
                self.tokenizer,
                max_length=config.max_length,
                loss_on=config.loss_on,
                template=config.template,
                report=report,
            )
        require_examples(spec.name, data, report)
        if report is not None and (report.truncated or report.dropped):
            self._emit("warning", message=str(report), client=spec.name)
        return list(data)

    def _check_lengths(self) -> None:
        limit = getattr(self.cohort.model.config, "max_position_embeddings", None)
        for client in self.clients.values():
            longest = max(len(example.input_ids) for example in client.examples)
            require(
                limit is None or longest <= limit,
                f"client {client.name!r} has a sequence of {longest} tokens, the model allows {limit}; "
                f"set max_length={limit} or shorter",
            )

    def _emit(self, event: str, **fields: Any) -> None:
        for callback in self.callbacks:
            callback({"event": event, **fields})

    def plan(self) -> planner.Plan:
        """The cohorts that will train one after another, and the tokens in flight."""
        budgeted = any(c.config.memory_budget_gb is not None for c in self.clients.values())
        per_token = self._bytes_per_token() if budgeted else 0.0
        param = self.cohort.bank.param
        return planner.plan(
            [self._demand(client) for client in self.clients.values()],
            bytes_per_token=per_token,
            device=param.device.type,
            bytes_per_number=param.element_size(),
        )

    def _bytes_per_token(self) -> float:
        """What one token keeps for backward, and its part of the one layer that is computed again at a time."""
        with evaluation_mode(self.cohort.model):
            whole, most = planner.measure_bytes_per_token(self.cohort), 0.0
            layers = getattr(self.cohort.model.config, "num_hidden_layers", None) or 1
            ways = {(c.config.gradient_checkpointing, c.config.recompute): c.config for c in self.clients.values()}
            for config in ways.values():
                with keeping_less(self.cohort.model, config):
                    kept = planner.measure_bytes_per_token(self.cohort)
                most = max(most, kept + (whole - kept) / layers)
        return most

    def _demand(self, client: _Client) -> planner.Demand:
        lengths = sorted((len(example.input_ids) for example in client.examples), reverse=True)
        mean = math.ceil(sum(lengths) / len(lengths))
        parameters = sum(A.numel() + B.numel() for A, B in self.cohort.bank.adapters(client.name).values())
        tokens = mean * min(client.config.batch_size, len(lengths))
        return planner.Demand(client.name, client.config, tokens, lengths[0], parameters)

    def run(self) -> list[ClientUpdate]:
        """Train every client's steps of this round.

        Returns:
            One update per client whose losses and gradients stayed finite, in the cohort's order, with ``weight`` its
            number of examples. The others are in ``failures`` with the reason.
        """
        chosen = self.plan()
        steps = sum(max(self.clients[name].steps for name in cohort) for cohort in chosen.cohorts)
        progress = {"steps": steps, "done": 0, "started": time.perf_counter(), "cohorts": len(chosen.cohorts)}
        # The base's own dropout is off: its random numbers would depend on who else is in the cohort.
        with evaluation_mode(self.cohort.model):
            for number, names in enumerate(chosen.cohorts):
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
            optimizer = self._optimizer(bank, clients)
            try:
                for step in range(max(client.steps for client in clients)):
                    self._step(optimizer, clients, step, token_budget)
                    self._report(clients, step, progress)
            finally:
                optimizer.release()
            for client in clients:
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
            del optimizer  # its moments go before the factors are copied back

    def _optimizer(self, bank: AdapterBank, clients: Sequence[_Client]) -> CohortAdamW:
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
            if client.config.keep_optimizer and client.name in self.optimizer_state:
                optimizer.load_state(client.name, self.optimizer_state[client.name])
        return optimizer

    def _step(self, optimizer: CohortAdamW, clients: Sequence[_Client], step: int, token_budget: int) -> None:
        """One optimizer step of every client that still has one, in as many passes as the budget asks for."""
        started = time.perf_counter()
        batches = [client.batch(step) if step < client.steps and not client.failure else [] for client in clients]
        active = [bool(batch) for batch in batches]
        if not any(active):
            return
        optimizer.zero_grad()
        losses, tokens = self._forward_backward(clients, batches, step, token_budget)
        norms = optimizer.grad_norms()
        for c, client in enumerate(clients):
            if active[c] and not (math.isfinite(losses[c]) and math.isfinite(norms[c])):
                records = [example.record for example in batches[c]]
                what = "loss" if not math.isfinite(losses[c]) else "gradient"
                client.failure = f"{what} is not finite at step {step + 1} (records {records})"
                active[c] = False
        optimizer.step(active, norms)
        elapsed = time.perf_counter() - started
        for c, client in enumerate(clients):
            if active[c]:
                client.losses.append(losses[c])
            client.tokens += tokens[c]
            client.seconds += elapsed * tokens[c] / max(1, sum(tokens))

    def _forward_backward(
        self, clients: Sequence[_Client], batches: Sequence[Sequence[Example]], step: int, token_budget: int
    ) -> tuple[list[float], list[int]]:
        """Accumulate every client's gradient; losses and tokens per client."""
        counts = [sum(map(_num_labels, batch)) for batch in batches]
        weight_C = [1.0 / count if count else 0.0 for count in counts]
        items = [((c, ex), len(ex.input_ids)) for c, batch in enumerate(batches) for ex in batch]
        tokens, losses = [0] * len(clients), None
        for group in planner.passes(items, token_budget, padded=not self.cohort.packs):
            chosen = [[ex for owner, ex in group if owner == c] for c in range(len(clients))]
            batch = lay_out(chosen, self.cohort.packs, self.cohort.bank.param.device, self._pad_id())
            with self._running(clients, batch, step, tokens) as hidden_MH:
                labelled = Segments.from_lengths(sum(map(_num_labels, rows)) for rows in chosen)
                loss_C = client_losses(self.cohort.head, hidden_MH, batch.target_M, labelled, weight_C)
                loss_C.sum().backward()
            losses = loss_C.detach() if losses is None else losses + loss_C.detach()
            tokens = [done + new for done, new in zip(tokens, batch.tokens, strict=True)]
        return ([] if losses is None else losses.tolist()), tokens

    @contextmanager
    def _running(
        self, clients: Sequence[_Client], batch: Batch, step: int, done_C: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """Hidden states at the labelled positions of one pass; the context must last through the backward pass."""
        routed = self.cohort.batch(
            batch.tokens,
            sequences=batch.sequences,
            real_index=batch.real_index,
            positions=batch.positions,
            row_C=list(done_C),
            dropout_step=step,
            seed_C=[client.config.seed for client in clients],
            round=self.round,
        )
        with routed, self._autocast(clients[0].config):
            yield labelled_hidden(self.cohort.model, batch)

    def _pad_id(self) -> int:
        pad_id = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if pad_id is None else int(pad_id)

    def _autocast(self, config: TrainConfig) -> Any:
        if config.dtype is None:
            return nullcontext()
        return torch.autocast(self.cohort.bank.param.device.type, dtype=getattr(torch, config.dtype))

    def _report(self, clients: Sequence[_Client], step: int, progress: dict[str, Any]) -> None:
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


def _num_labels(example: Example) -> int:
    """Labels with a token before them."""
    return sum(label != IGNORE for label in example.labels[1:])


__all__ = ["CohortTrainer", "TrainConfig"]
