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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters import Adapters, ClientUpdate, load_peft_adapter
from ..common import require
from ..model import ClientSpec
from ..training import Paused

# Besides eight bytes a number: a header has about 120 bytes a tensor, a config is a few thousand.
_ROOM_BYTES = 1 << 20
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
    fine = isinstance(answer, (str, os.PathLike))
    require(fine, f"it sent a {type(answer).__name__}, and not an update or the folder of one")
    folder = Path(answer)
    require(not folder.is_symlink(), f"{folder} must be a folder, not a link")
    limit = 8 * _numbers(expected) + _ROOM_BYTES
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


def _numbers(expected: ClientUpdate) -> int:
    return sum(factor.numel() for pair in expected.adapters.values() for factor in pair)


def remote_done(round: int, spec: ClientSpec, seconds: float | None) -> dict[str, Any]:
    """The event of a client that trained remotely: its own metrics are not taken for facts."""
    known = {"examples": 0, "tokens": 0, "steps": 0, "seconds": seconds or 0.0, "tokens_per_s": 0.0}
    event = {"event": "client_done", "round": round, "client": spec.name, "rank": spec.adapter.rank}
    return {**event, "loss_first": None, "loss_last": None, **known}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
