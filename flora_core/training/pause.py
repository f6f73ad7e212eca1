"""Stop between two optimizer steps and go on there later: what SIGTERM asks for, and a cohort that memory cannot hold.

A client's state is JSON and tensors: its factors, its optimizer, and how far it is. Batches, dropout and schedules
depend on the step alone, so a client resumed from a state ends with the bytes of one that never stopped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..adapters import Adapters

State = dict[str, Any]
_PROGRESS = ("losses", "tokens", "seconds", "failure")


class Paused(Exception):  # noqa: N818
    """Training stopped between two steps, as was asked; ``state`` is each client's that has begun."""

    def __init__(self, state: Mapping[str, State]):
        super().__init__("training stopped between two steps, as was asked")
        self.state = dict(state)


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


@contextmanager
def stopping(wanted: bool = True) -> Iterator[Callable[[], bool]]:
    """Take SIGTERM as the wish to stop at the next good place: the function tells whether it came.

    A second SIGTERM ends the process at once, as without this. Only the main thread can listen; in any other, and
    where it is not wanted, nothing is changed or reported.
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
