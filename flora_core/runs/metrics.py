"""metrics.jsonl: a run's events, one a line."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common import SaveError, atomic_write_bytes, finite
from .events import Event

METRICS = "metrics.jsonl"
# Events after which a reader may want the file to be on the disk.
_MILESTONES = ("evaluated", "round_end", "run_end")


class MetricsFile:
    """The events of one run.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / METRICS

    def append(self, event: Event) -> None:
        """Add an event to metrics.jsonl.

        Raises:
            SaveError: If writing fails.
        """
        try:
            with open(self.path, "ab") as file:
                file.write(_line(event))
                if event["event"] in _MILESTONES:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            text = f"could not write {self.path}: {error.strerror}; make room, then start the same run again"
            raise SaveError(error.errno, text) from error

    def cut_back(self, number: int, kept: Sequence[Event]) -> list[Event]:
        """Cut the file back to the end of a round, so that nothing stands in it twice; a torn line is dropped.

        Of a round that is not complete there any more, what its snapshot kept is put back.

        Args:
            number: The round; 0 for a run that begins anew.
            kept: The events in the snapshots of the rounds up to this one.
        Returns:
            The events that are in it now.
        """
        if number == 0:
            self.path.unlink(missing_ok=True)
            return []
        written, saved = _by_round(self.events()), _by_round(kept)
        events = [event for before in range(number) for event in _complete(written[before], saved[before])]
        events += saved[number]
        atomic_write_bytes(self.path, b"".join(map(_line, events)))
        return events

    def events(self) -> list[Event]:
        """The events in metrics.jsonl, but for lines that are not whole."""
        events = []
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else []:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            events += [event] if _is_event(event) else []
        return events


def _is_event(event: Any) -> bool:
    return isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(_round_of(event), int)


def _round_of(event: Event) -> int:
    """The round that an event belongs to; a resumed run's start belongs to what comes after the round it found."""
    if event["event"] == "run_end":
        return 1 << 62
    return event.get("round", event.get("resumed_from") or 0)


def _by_round(events: Sequence[Event]) -> defaultdict[int, list[Event]]:
    found = defaultdict(list)
    for event in events:
        found[_round_of(event)].append(event)
    return found


def _complete(written: list[Event], kept: list[Event]) -> list[Event]:
    """Choose a round's events: those written, with starts of resumed runs, or the kept ones if one of these is lost."""
    return written if {_line(event) for event in kept} <= {_line(event) for event in written} else kept


def _line(event: Event) -> bytes:
    return (json.dumps(finite(event), allow_nan=False) + "\n").encode()
