"""Stop between two optimizer steps and go on there later: what SIGTERM asks for, and a cohort that memory cannot hold.

A client's state is JSON and tensors: its factors, its optimizer, and how far it is. Batches, dropout and schedules
depend on the step alone, so whoever goes on from a state ends with the bytes of one that never stopped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .update import Adapters

State = dict[str, Any]
_PROGRESS = ("losses", "tokens", "seconds", "failure")
# What torch says on a CPU, where it has no type of its own for this.
_CPU_WORDS = ("can't allocate memory", "cannot allocate memory", "not enough memory")


class Paused(Exception):  # noqa: N818
    """Training stopped between two steps, as was asked; ``state`` is each client's that has begun."""

    def __init__(self, state: Mapping[str, State]):
        super().__init__("training stopped between two steps, as was asked")
        self.state = dict(state)


class Stopped(SystemExit):
    """A run stopped as SIGTERM asked, and saved where it is; an uncaught one ends the process with exit code 0."""

    def __init__(self, text: str):
        super().__init__(0)
        self.text = text

    def __str__(self) -> str:
        return self.text


class CrowdedError(MemoryError):
    """Memory does not hold one sequence beside these clients' adapters, gradients and moments."""


def client_state(client: Any, step: int, adapters: Adapters, optimizer: Mapping[str, Any] | None) -> State:
    """A client's state before its optimizer step ``step``, in copies; ``optimizer`` as ``CohortAdamW.state`` has it."""
    progress = {name: getattr(client, name) for name in _PROGRESS}
    return {
        **progress,
        "losses": list(client.losses),
        "step": step,
        "adapters": {module: {"A": A.clone(), "B": B.clone()} for module, (A, B) in adapters.items()},
        "optimizer": None if optimizer is None else dict(optimizer),
    }


def restore_client(client: Any, state: State) -> Adapters:
    """Put a client's progress back; the factors to load."""
    for name in _PROGRESS:
        setattr(client, name, list(state[name]) if name == "losses" else state[name])
    return {module: (pair["A"], pair["B"]) for module, pair in state["adapters"].items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_WORDS)


def crowded_text(round: int, step: int, what: str) -> str:
    """Say where memory ran out, and what is done about it; ``round`` and ``step`` count from 0."""
    text = f"memory ran out at step {step + 1} of round {round + 1}: {what}"
    return f"{text}; a token_budget or memory_budget_gb avoids this"


@contextmanager
def stopping(wanted: bool = True) -> Iterator[Callable[[], bool]]:
    """Take SIGTERM as the wish to stop at the next good place: the function tells whether it came.

    A second SIGTERM ends the process at once, as without this. Only the main thread can listen; in any other, and
    where it is not wanted, nothing is changed and nobody is told.
    """
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
