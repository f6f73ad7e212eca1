"""Train a cohort: every client's local steps, packed into shared passes through one resident base.

Letters: M packed tokens, C clients of the cohort.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from . import planner
from .bank import AdapterBank
from .checks import require
from .cohort import ClientSpec, Cohort
from .config import TrainConfig
from .data.template import Example
from .forward import Batch, deterministic_libraries, evaluation_mode, labelled_hidden, lay_out
from .graphs import StaticSteps, executor_for, num_labels, why_not
from .local import LocalClient, examples_of
from .loss import client_losses
from .optimizer import CohortAdamW
from .pausing import CrowdedError, Paused, State, client_state, is_out_of_memory, restore_client
from .penalty import TailPenalty
from .recompute import keeping_less
from .segments import Segments
from .update import ClientUpdate

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
        penalties: Client -> what is added to its loss; losses are told without it.
        stop: Asked after every step; where it says True, training ends with ``Paused``, which has the state.
        resume: The state of a ``Paused``, to go on from.
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
        penalties: Mapping[str, TailPenalty] | None = None,
        stop: Callable[[], bool] = lambda: False,
        resume: Mapping[str, State] | None = None,
    ):
        self.trainable, self.penalties = tuple(trainable), dict(penalties or {})
        self.stop, self.begun = stop, dict(resume or {})
        self.tokens_in_flight: int | None = None
        self.cohort, self.tokenizer = cohort, tokenizer
        self.config = config or TrainConfig()
        self.round, self.rounds, self.callbacks = round, rounds, tuple(callbacks)
        self.optimizer_state = dict(optimizer_state or {})
        self.clients = {spec.name: self._client(spec) for spec in cohort.clients}
        self.failures: dict[str, str] = {}
        self.finished: dict[str, int] = {}
        self.cuda_graphs = "off: nothing was trained yet"
        self._static: StaticSteps | None = None
        for client in self.clients.values():
            client.check_lengths(getattr(cohort.model.config, "max_position_embeddings", None))

    def _client(self, spec: ClientSpec) -> LocalClient:
        def warn(text: str) -> None:
            self._emit("warning", message=text, client=spec.name)

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
            optimizer, crowded = None, False
            first, last = self._next_step(names[0]), max(client.steps for client in clients)
            step = first
            try:
                optimizer = self._optimizer(bank, clients)
                for step in range(first, last):
                    self._step(optimizer, clients, step, token_budget)
                    self._report(clients, step, progress)
                    if self.stop():
                        raise Paused({**self.begun, **self._states(optimizer, clients, step + 1)})
            except (RuntimeError, MemoryError) as error:
                # Anywhere else a step may be half done, and must not be done again.
                crowded = isinstance(error, CrowdedError) or (optimizer is None and is_out_of_memory(error))
                if not crowded or len(clients) == 1:
                    raise
            finally:
                if optimizer is not None:
                    self.begun |= self._states(optimizer, clients, step) if crowded else {}
                    self._release(optimizer)
            if optimizer is not None and not crowded:
                self._finish(optimizer, clients, last)
            del optimizer  # its moments go before the factors are copied back
        if crowded:
            half = len(names) // 2
            self._warn(step, f"training clients {', '.join(names)} in two parts")
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

    def _warn(self, step: int, what: str) -> None:
        text = f"memory ran out at step {step + 1} of round {self.round + 1}: {what}"
        self._emit("warning", round=self.round + 1, message=f"{text}; a token_budget or memory_budget_gb avoids this")

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
        self._static = self._static_steps(optimizer, clients)
        return optimizer

    def _static_steps(self, optimizer: CohortAdamW, clients: Sequence[LocalClient]) -> StaticSteps | None:
        """What runs steps as CUDA graphs; None where something speaks against it."""
        config = clients[0].config
        reason = why_not(self.cohort, config)
        self.cuda_graphs = f"off: {reason}"
        wanted = config.cuda_graphs is True and reason is not None
        require(not wanted, f"cuda_graphs=True cannot be had here: {reason}; use cuda_graphs='auto'")
        if reason is not None:
            return None
        longest = max(len(example.input_ids) for client in clients for example in client.examples)
        executor = executor_for(optimizer.bank.param.device)
        return StaticSteps(self.cohort, optimizer, executor, longest, lambda: self._autocast(config))

    def _release(self, optimizer: CohortAdamW) -> None:
        """Let go of the gradients and of the graphs that write them."""
        optimizer.release()
        if self._static is not None:
            self.cuda_graphs, self._static = str(self._static.executor), None
            self._emit("cuda_graphs", round=self.round + 1, message=self.cuda_graphs)

    def _without_graphs(self, error: RuntimeError) -> None:
        """Go on without graphs after one could not be captured, unless they are a must or memory ran out."""
        static, self._static = self._static, None
        wanted = any(client.config.cuda_graphs is True for client in self.clients.values())
        if static is None or wanted or isinstance(error, torch.OutOfMemoryError):
            raise error
        self.cuda_graphs = f"off: {str(error).splitlines()[0]}"
        self._emit("warning", round=self.round + 1, message=f"CUDA graphs are {self.cuda_graphs}")

    def _step(self, optimizer: CohortAdamW, clients: Sequence[LocalClient], step: int, token_budget: int) -> None:
        """One optimizer step of every client that still has one, in as many passes as the budget asks for."""
        started = time.perf_counter()
        batches = [client.batch(step) if step < client.steps and not client.failure else [] for client in clients]
        active = [bool(batch) for batch in batches]
        if not any(active):
            return
        losses, tokens = self._within_memory(optimizer, clients, batches, step, token_budget)
        self._add_penalties(optimizer, [client.name for c, client in enumerate(clients) if active[c]])
        losses, norms, stepped = self._losses_and_norms(optimizer, losses, active)
        for c, client in enumerate(clients):
            if active[c] and not (math.isfinite(losses[c]) and math.isfinite(norms[c])):
                records = [example.record for example in batches[c]]
                what = "loss" if not math.isfinite(losses[c]) else "gradient"
                client.failure = f"{what} is not finite at step {step + 1} (records {records})"
                active[c] = False
        if stepped:
            optimizer.advance(active)
        else:
            optimizer.step(active, norms)
        elapsed = time.perf_counter() - started
        for c, client in enumerate(clients):
            if active[c]:
                client.losses.append(losses[c])
            client.tokens += tokens[c]
            client.seconds += elapsed * tokens[c] / max(1, sum(tokens))

    def _within_memory(
        self,
        optimizer: CohortAdamW,
        clients: Sequence[LocalClient],
        batches: Sequence[Sequence[Example]],
        step: int,
        token_budget: int,
    ) -> tuple[torch.Tensor, list[int]]:
        """Do a step's passes; where memory runs out, all of them again with half the tokens in flight."""
        lengths = [len(example.input_ids) for batch in batches for example in batch]
        while True:
            optimizer.zero_grad()
            budget = min(token_budget, self.tokens_in_flight or token_budget)
            try:
                return self._forward_backward(clients, batches, step, budget)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if min(budget, sum(lengths)) <= max(lengths):
                    raise CrowdedError(
                        f"memory ran out with one sequence of {max(lengths)} tokens in flight; lower max_length, turn "
                        f"gradient_checkpointing on, or give fewer or smaller adapters ({error})"
                    ) from error
            # Here the error is gone, and with it the tensors that its traceback held.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.tokens_in_flight = max(min(budget, sum(lengths)) // 2, max(lengths))
            self._warn(step, f"going on with {self.tokens_in_flight} tokens in flight")

    def _add_penalties(self, optimizer: CohortAdamW, names: Sequence[str]) -> None:
        for name in names:
            if name in self.penalties:
                adapters = optimizer.bank.adapters(name)
                self.penalties[name].add_gradients_(adapters, optimizer.bank.adapters(name, optimizer.grad))

    def _forward_backward(
        self, clients: Sequence[LocalClient], batches: Sequence[Sequence[Example]], step: int, token_budget: int
    ) -> tuple[torch.Tensor, list[int]]:
        """Accumulate every client's gradient; losses and tokens per client."""
        counts = [sum(map(num_labels, batch)) for batch in batches]
        weight_C = [1.0 / count if count else 0.0 for count in counts]
        items = [((c, ex), len(ex.input_ids)) for c, batch in enumerate(batches) for ex in batch]
        groups = [
            [[ex for owner, ex in group if owner == c] for c in range(len(clients))]
            for group in planner.passes(items, token_budget, padded=not self.cohort.packs)
        ]
        if self._static is not None:
            keys = self.cohort.dropout_seeds(step, [client.config.seed for client in clients], self.round)
            optimizer = self._static.optimizer
            try:
                return self._static.forward_backward(groups, counts, keys)
            except RuntimeError as error:
                self._without_graphs(error)
                optimizer.zero_grad()
        tokens, losses = [0] * len(clients), torch.zeros((), device=self.cohort.bank.param.device)
        for chosen in groups:
            batch = lay_out(chosen, self.cohort.packs, self.cohort.bank.param.device, self._pad_id())
            with self._running(clients, batch, step, tokens) as hidden_MH:
                labelled = Segments.from_lengths(sum(map(num_labels, rows)) for rows in chosen)
                loss_C = client_losses(self.cohort.head, hidden_MH, batch.target_M, labelled, weight_C)
                loss_C.sum().backward()
            losses = losses + loss_C.detach()
            tokens = [done + new for done, new in zip(tokens, batch.tokens, strict=True)]
        return losses, tokens

    def _losses_and_norms(
        self, optimizer: CohortAdamW, loss_C: torch.Tensor, active: Sequence[bool]
    ) -> tuple[list[float], list[float], bool]:
        """Every client's loss and the norm of its gradient, and whether the step is done already."""
        if self._static is not None:
            try:
                return *self._static.step(loss_C, active), True
            except RuntimeError as error:
                self._without_graphs(error)
        return loss_C.tolist(), optimizer.grad_norms(), False

    @contextmanager
    def _running(
        self, clients: Sequence[LocalClient], batch: Batch, step: int, done_C: Sequence[int]
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


__all__ = ["CohortTrainer", "TrainConfig"]
