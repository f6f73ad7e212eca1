"""An end that is kept: what runs past it is stopped with a reason, so that a lent machine's time goes to the rest."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OutOfTime(Exception):  # noqa: N818
    """The time of something is over; the message says of what."""


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Raise ``OutOfTime`` in the body once so many seconds are over; one inside another keeps the earlier end.

    A call into a library is left at its end. Without timers (Windows, another thread) nothing is stopped.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: Any) -> None:
        raise OutOfTime(f"out of time: {what} was stopped after {seconds:.3g} s")

    began, (left, _) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    if 0 < left <= seconds:  # the end outside comes first, and is its own
        yield
        return
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3))


__all__ = ["OutOfTime", "within"]
