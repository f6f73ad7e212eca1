"""Clients that are callables: ask, wait no longer than agreed, read the answers within limits.

A remote client is a function that is given a ``Task`` and returns a ``ClientUpdate``, or the folder where the
client's PEFT adapter lies. It may raise, never return, or return anything: that costs the round this client alone.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters import Adapters, ClientUpdate, load_peft_adapter
from ..common import require
from ..model import ClientSpec
from ..runs import Event, EventLog
from ..training import Paused
from .clients import Round, Trained, client_done
from .local_clients import LocalClients
from .server import Server

# Besides eight bytes a number: a header has about 120 bytes a tensor, a config is a few thousand.
ROOM_BYTES = 1 << 20
# How often a waiting server looks whether it is to stop.
_LOOK_S = 0.2


@dataclass(frozen=True)
class Task:
    """One round's task of a callable client.

    Args:
        round: Which, from 1.
        client: Its name.
        start: The adapter that it starts from, module -> (A_RK, B_RN).
        scaling: Module -> s, which its update must have too.
        trainable: The factors that this round trains.
    """

    round: int
    client: str
    start: Adapters
    scaling: Mapping[str, float]
    trainable: tuple[str, ...] = ("A", "B")


Remote = Callable[[Task], "ClientUpdate | str | os.PathLike[str]"]


class PendingClients:
    """Clients that were asked at the same time, each in a thread of its own.

    Args:
        remotes: Client -> the function that asks it.
        tasks: Client -> its task.
        deadline_s: Seconds from now after which an answer counts no more; None waits for ever. Counted by a clock
            that cannot be set by others.
    """

    def __init__(self, remotes: Mapping[str, Remote], tasks: Mapping[str, Task], deadline_s: float | None):
        self.deadline_s, self.began = deadline_s, time.monotonic()
        self.missing = list(tasks)
        self.seconds: dict[str, float] = {}
        self._answers: queue.SimpleQueue[tuple[str, Any, BaseException | None]] = queue.SimpleQueue()
        for name, task in tasks.items():
            # A daemon: one that never returns keeps neither the round nor the process.
            threading.Thread(target=self._ask, args=(name, remotes[name], task), daemon=True).start()

    def _ask(self, name: str, remote: Remote, task: Task) -> None:
        try:
            self._answers.put((name, remote(task), None))
        except BaseException as error:
            self._answers.put((name, None, error))

    def wait(self, stop: Callable[[], bool] = lambda: False) -> tuple[dict[str, Any], dict[str, str]]:
        """Wait for the answers until the deadline.

        Returns:
            Client -> its answer, and client -> reason for those that failed or were late.
        Raises:
            Paused: If ``stop`` says so; all of them are to be asked again then.
        """
        answers: dict[str, Any] = {}
        failed: dict[str, str] = {}
        while self.missing:
            left = math.inf if self.deadline_s is None else self.began + self.deadline_s - time.monotonic()
            try:
                name, answer, error = self._answers.get(timeout=max(0.0, min(left, _LOOK_S)))
            except queue.Empty:
                if stop():
                    raise Paused({}) from None
                if left <= _LOOK_S:
                    break
                continue
            self.missing.remove(name)
            self.seconds[name] = time.monotonic() - self.began
            if error is None:
                answers[name] = answer
            else:
                failed[name] = f"it failed: {type(error).__name__}: {_one_line(error)}"
        late = f"it sent nothing within the deadline of {self.deadline_s or 0:g} s"
        return answers, failed | dict.fromkeys(self.missing, late)


class CallableClients:
    """Clients of which some are callables, asked while the others train here; see ``Clients``.

    Args:
        local: Those that train here.
        specs: All of them, in their order; a callable's spec needs no data.
        remotes: Client -> the function that trains it.
    Raises:
        ValueError: If a callable has no spec, or the clients' own words would decide how much they count.
    """

    on_own_machines = False

    def __init__(self, local: LocalClients, specs: Sequence[ClientSpec], remotes: Mapping[str, Remote]):
        unknown = sorted(set(remotes) - {spec.name for spec in specs})
        require(not unknown, f"remote names clients that are not there: {', '.join(unknown)}; give each a ClientSpec")
        weights = local.setup.config.weights
        require(
            weights not in ("examples", "tokens"),
            f"weights={weights!r} would take the word of clients elsewhere for how much they count; with "
            "remote= use weights='uniform' or a mapping",
        )
        self.local, self.remotes = local, dict(remotes)
        self.specs = {spec.name: replace(spec, data=[]) if spec.name in remotes else spec for spec in specs}
        self.expected: dict[str, ClientUpdate] = {}
        self.optimizer = local.optimizer

    def prepare(self) -> list[Event]:
        """Check model and data with the clients here, and the model with the others."""
        notes = self.local.prepare()
        remote = [self.specs[name] for name in self.remotes]
        expected = self.local.expected | self.local.setup.expect(remote)
        self.specs |= self.local.specs
        self.expected = {name: expected[name] for name in self.specs}
        return notes

    def gather(self, server: Server, number: int, log: EventLog) -> list[str]:
        """All of them can be asked."""
        return list(self.specs)

    def train(self, round: Round) -> Trained:
        """Ask the callables, train the others meanwhile, then wait until the deadline."""
        asked = self._ask(round)
        done = self.local.train(round)
        done.answers, silent = asked.wait(round.stop)
        for name, answer in done.answers.items():
            try:
                done.updates.append(receive(answer, self.expected[name], round.server.model.device))
            except (ValueError, OSError) as error:
                silent[name] = str(error)
        round.log.warn_refused(silent)
        done.failures |= silent
        for name in [name for name in round.names if name in self.remotes]:
            # Its own metrics are not taken for facts.
            done.metrics[name] = client_done(round.number, self.specs[name], seconds=asked.seconds.get(name) or 0.0)
        return done

    def _ask(self, round: Round) -> PendingClients:
        names = [name for name in round.names if name in self.remotes]
        if not names:
            return PendingClients({}, {}, None)
        server = round.server
        server.refuse_penalties(names)
        with self.local.setup.attached([self.specs[name] for name in names], round.number) as cohort:
            server.load_starts(cohort, round.number)
            starts = {name: cohort.update(name) for name in names}
        tasks = {n: Task(round.number, n, one.adapters, one.scaling, server.trainable) for n, one in starts.items()}
        return PendingClients(self.remotes, tasks, self.local.setup.config.deadline_s)

    def conclude(self, round: Round, good: Sequence[str], refused: Mapping[str, str], applied: bool) -> None:
        """As ``LocalClients.conclude``: a callable keeps what it keeps."""
        self.local.conclude(round, good, refused, applied)


def receive(answer: Any, expected: ClientUpdate, device: torch.device | str = "cpu") -> ClientUpdate:
    """Make an update of a client's answer; a folder is read within the limits of what the client promised.

    Args:
        answer: A ``ClientUpdate``, or the folder of a PEFT adapter, which somebody else may have filled.
        expected: What ``judge.promised`` gives for the client.
        device: Where its tensors go.
    Returns:
        The update, in copies that no other code can change; ``judge_updates`` judges what is in it.
    Raises:
        ValueError, OSError: With the file's name, if the folder holds no adapter that can be read safely: larger than
            what was promised can be, a link, damaged, with regular expressions, ...
    """
    name = expected.client
    if isinstance(answer, ClientUpdate):
        # Else a client could have another one refused, for two updates of one name.
        require(answer.client == name, f"it sent an update in the name of {str(answer.client)[:80]!r}")
        return _copy(answer, device)
    require(
        isinstance(answer, (str, os.PathLike)),
        f"it sent a {type(answer).__name__}, and not an update or the folder of one",
    )
    folder = Path(answer)
    require(not folder.is_symlink(), f"{folder} must be a folder, not a link")
    limit = 8 * numbers_of(expected) + ROOM_BYTES
    return _copy(load_peft_adapter(folder, client=name, trusted=False, max_bytes=limit), device)


def _copy(update: ClientUpdate, device: torch.device | str) -> ClientUpdate:
    require(
        isinstance(update.adapters, Mapping), f"its adapters are a {type(update.adapters).__name__}, and no mapping"
    )
    require(isinstance(update.scaling, Mapping), f"its scaling is a {type(update.scaling).__name__}, and no mapping")
    adapters: Any = {}
    for module, pair in update.adapters.items():
        fine = isinstance(module, str) and isinstance(pair, (tuple, list)) and len(pair) == 2
        fine = fine and all(isinstance(factor, torch.Tensor) and not factor.is_meta for factor in pair)
        require(fine, f"{str(module)[:80]!r} must name two factors, A and B, as tensors")
        adapters[module] = tuple(factor.detach().to(device, copy=True) for factor in pair)
    # Another machine has the base under another name, which would be taken for another base.
    return replace(update, adapters=adapters, scaling=dict(update.scaling), metrics={}, base=None, trained_on=None)


def numbers_of(expected: ClientUpdate) -> int:
    return sum(factor.numel() for pair in expected.adapters.values() for factor in pair)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
