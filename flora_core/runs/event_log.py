"""The events of a run as they happen: kept, written to its folder, reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .events import Event
from .metrics import MetricsFile


class EventLog:
    """One run's events.

    Args:
        callbacks: Called with each event; without any, warnings become Python's.
        metrics: The file that events are written to; None without a folder.
        reports: Whether this process reports: of several, the first one does.
    """

    def __init__(self, callbacks: Sequence[Callable[[Event], None]], metrics: MetricsFile | None, reports: bool):
        self.callbacks, self.metrics, self.reports = tuple(callbacks), metrics, reports
        self.events: list[Event] = []

    def emit(self, event: str, **fields: Any) -> None:
        """Keep an event, write it down and report it.

        Raises:
            SaveError: If it cannot be written.
        """
        whole = {"event": event, **fields}
        self.events.append(whole)
        if self.metrics is not None:
            self.metrics.append(whole)
        self.report(whole)

    def report(self, event: Event) -> None:
        """Report an event without keeping it."""
        if not self.reports:
            return
        for callback in self.callbacks:
            callback(event)
        if event["event"] == "warning" and not self.callbacks:
            warnings.warn(event["message"], RuntimeWarning, stacklevel=3)

    def warn_refused(self, refused: Mapping[str, str]) -> None:
        """Warn of refused clients as Python does, beside the events that say so."""
        for name, reason in refused.items() if self.reports else ():
            warnings.warn(f"client {name!r} was refused: {reason}", RuntimeWarning, stacklevel=3)
