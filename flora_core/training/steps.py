"""Optimizer steps of clients that train together: passes within memory, losses, norms, and CUDA graphs of them.

Letters: M packed tokens, C clients of the cohort.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..adapters import TailPenalty
from ..common import CrowdedError, Segments, crowded_text, is_out_of_memory, require
from ..data import Example, lay_out, passes
from ..distributed import sharded
from ..model import Cohort, client_losses, labelled_hidden
from .client import LocalClient
from .cuda_graphs import executor_for
from .optimizer import CohortAdamW
from .static_steps import StaticSteps, num_labels, why_not


class CohortSteps:
    """The optimizer steps of clients that train together, on the bank that is active.

    Args:
        cohort: Whose model runs.
        clients: Who trains, in the order of the bank; each keeps its losses, its time and why it failed.
        optimizer: Over that bank.
        round: From 0; dropout depends on it.
        pad_id: Token that fills padded batches up.
        penalties: Client -> what is added to its gradient.
        tokens_in_flight: What is left of a pass where memory ran out before; halved where it does again.
        warn: Called with a message when a fallback is used.
    """

    def __init__(
        self,
        cohort: Cohort,
        clients: Sequence[LocalClient],
        optimizer: CohortAdamW,
        *,
        round: int,
        pad_id: int,
        penalties: Mapping[str, TailPenalty],
        tokens_in_flight: int | None,
        warn: Callable[[str], None],
    ):
        self.cohort, self.clients, self.optimizer = cohort, clients, optimizer
        self.round, self.pad_id, self.penalties = round, pad_id, penalties
        self.tokens_in_flight, self._warn = tokens_in_flight, warn
        self.cuda_graphs = ""
        self._static = self._graphed()

    def _graphed(self) -> StaticSteps | None:
        """Runner of steps as CUDA graphs; None where something speaks against them."""
        config = self.clients[0].config
        reason = why_not(self.cohort, config)
        self.cuda_graphs = f"off: {reason}"
        wanted = config.cuda_graphs is True and reason is not None
        require(not wanted, f"cuda_graphs=True cannot be had here: {reason}; use cuda_graphs='auto'")
        if reason is not None:
            return None
        longest = max(len(example.input_ids) for client in self.clients for example in client.examples)
        executor = executor_for(self.optimizer.bank.param.device)
        return StaticSteps(self.cohort, self.optimizer, executor, longest, self._autocast)

    @property
    def graphed(self) -> bool:
        """Return whether steps run as CUDA graphs now."""
        return self._static is not None

    def release(self) -> None:
        """Let go of the gradients and of the graphs that write them."""
        self.optimizer.release()
        if self._static is not None:
            self.cuda_graphs, self._static = str(self._static.executor), None

    def _without_graphs(self, error: RuntimeError) -> None:
        """Go on without graphs after one could not be captured, unless they are a must or memory ran out."""
        static, self._static = self._static, None
        wanted = any(client.config.cuda_graphs is True for client in self.clients)
        if static is None or wanted or isinstance(error, torch.OutOfMemoryError):
            raise error
        self.cuda_graphs = f"off: {first_error(error)}"
        self._warn(f"CUDA graphs are {self.cuda_graphs}")

    def step(self, step: int, token_budget: int) -> None:
        """One optimizer step of every client that still has one, in as many passes as the budget asks for.

        Raises:
            CrowdedError: If memory holds not even one sequence.
        """
        optimizer, clients = self.optimizer, self.clients
        started = time.perf_counter()
        batches = [client.batch(step) if step < client.steps and not client.failure else [] for client in clients]
        active = [bool(batch) for batch in batches]
        if not any(active):
            return
        losses, tokens = self._within_memory(batches, step, token_budget)
        self._add_penalties([client.name for c, client in enumerate(clients) if active[c]])
        losses, norms, stepped = self._losses_and_norms(losses, active)
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
        self, batches: Sequence[Sequence[Example]], step: int, token_budget: int
    ) -> tuple[torch.Tensor, list[int]]:
        """Do a step's passes; where memory runs out, all of them again with half the tokens in flight."""
        lengths = [len(example.input_ids) for batch in batches for example in batch]
        while True:
            self.optimizer.zero_grad()
            budget = min(token_budget, self.tokens_in_flight or token_budget)
            try:
                return self._forward_backward(batches, step, budget)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if sharded(self.cohort.model) is not None:
                    raise MemoryError(
                        f"memory ran out with {min(budget, sum(lengths))} tokens in flight, and with a sharded base no "
                        f"process can do a pass again; lower token_budget ({error})"
                    ) from error
                if min(budget, sum(lengths)) <= max(lengths):
                    raise CrowdedError(
                        f"memory ran out with one sequence of {max(lengths)} tokens in flight; lower max_length, turn "
                        f"gradient_checkpointing on, or give fewer or smaller adapters ({error})"
                    ) from error
            # Here the error is gone, and with it the tensors that its traceback held.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.tokens_in_flight = max(min(budget, sum(lengths)) // 2, max(lengths))
            self._warn(crowded_text(self.round, step, f"going on with {self.tokens_in_flight} tokens in flight"))

    def _add_penalties(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.penalties:
                adapters = self.optimizer.bank.adapters(name)
                self.penalties[name].add_gradients_(adapters, self.optimizer.bank.adapters(name, self.optimizer.grad))

    def _forward_backward(
        self, batches: Sequence[Sequence[Example]], step: int, token_budget: int
    ) -> tuple[torch.Tensor, list[int]]:
        """Accumulate every client's gradient; losses and tokens per client."""
        clients = self.clients
        counts = [sum(map(num_labels, batch)) for batch in batches]
        weight_C = [1.0 / count if count else 0.0 for count in counts]
        items = [((c, ex), len(ex.input_ids)) for c, batch in enumerate(batches) for ex in batch]
        groups = [
            [[ex for owner, ex in group if owner == c] for c in range(len(clients))]
            for group in passes(items, token_budget, padded=not self.cohort.packs)
        ]
        if self._static is not None:
            keys = self.cohort.dropout_seeds(step, [client.config.seed for client in clients], self.round)
            try:
                return self._static.forward_backward(groups, counts, keys)
            except RuntimeError as error:
                self._without_graphs(error)
                self.optimizer.zero_grad()
        tokens, losses = [0] * len(clients), torch.zeros((), device=self.cohort.bank.param.device)
        keys = self.cohort.dropout_keys(step, [client.config.seed for client in clients], self.round)
        for chosen in groups:
            laid_out = lay_out(chosen, self.cohort.packs, losses.device, self.pad_id)
            batch = replace(laid_out, keys=keys, row_C=list(tokens))
            labelled = Segments.from_lengths(sum(map(num_labels, rows)) for rows in chosen)
            with self.cohort.running(batch), self._autocast():
                hidden_MH = labelled_hidden(self.cohort.model, batch)
                loss_C = client_losses(self.cohort.head, hidden_MH, batch.target_M, labelled, weight_C)
                loss_C.sum().backward()
            losses = losses + loss_C.detach()
            tokens = [done + rows.stop - rows.start for done, rows in zip(tokens, batch.tokens, strict=True)]
        return losses, tokens

    def _losses_and_norms(self, loss_C: torch.Tensor, active: Sequence[bool]) -> tuple[list[float], list[float], bool]:
        """Every client's loss and the norm of its gradient, and whether the step is done already."""
        if self._static is not None:
            try:
                return *self._static.step(loss_C, active), True
            except RuntimeError as error:
                self._without_graphs(error)
        return loss_C.tolist(), self.optimizer.grad_norms(), False

    def _autocast(self) -> Any:
        dtype = self.clients[0].config.dtype
        if dtype is None:
            return nullcontext()
        return torch.autocast(self.cohort.bank.param.device.type, dtype=getattr(torch, dtype))


def first_error(error: BaseException) -> str:
    """The first line of the error that others came of: a capture that ends badly raises one of its own over it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # pyright: ignore[reportAssignmentType]
    lines = str(error).splitlines() or [""]
    return lines[0] if isinstance(error, RuntimeError) else f"{type(error).__name__}: {lines[0]}"
