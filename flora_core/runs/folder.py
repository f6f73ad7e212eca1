"""The folder of one run: what is in it is whole, and enough to go on from after a kill at any instant.

    run.json            what the run is (compared when it is resumed) and where it ran
    metrics.jsonl       its events, one a line
    rounds/0001/        appears all at once when round 1 is over, and that is what makes the round count as done
        <client>/           the client's adapter in PEFT form; run.json has the folder of each client
        state.safetensors   target weights with their low bits, strategy and optimizer state; only of the newest rounds
        round.json          where the tensors belong in the state, the round's events, a sha256 of every file
    paused/             where a round stopped that SIGTERM interrupted, as a round's state; gone when it is over
    quarantine/0001/    updates that were refused in round 1, each with its reason
    adapter/            the global adapter in PEFT form, of strategies that have one
    model/              the final model, as transformers saves it

Nothing but JSON and safetensors is written or read.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapters import Base, ClientUpdate, save_peft_adapter
from ..common import (
    SaveError,
    atomic_dir,
    locked,
    show_bytes,
    system_errors,
)
from .events import Event
from .metrics import MetricsFile
from .record import RUN, RunRecord
from .saving import write_dtype
from .snapshot import DAMAGE, ROUND, STATE, Snapshot, read_events, read_snapshot, taken_apart, write_snapshot

ROUNDS, LOCK, PAUSED = "rounds", ".lock", "paused"
_UNKNOWN = Base()
_ADAPTER_NOTE = """# Adapter of client {client}, round {number}

It was trained on the base after round {base.round} of this run. On the run's original base it is another model.
`flora_base.safetensors` holds values of the right weights, by which `flora aggregate` knows them.
This writes the adapter for the original base, exactly:

    flora adapter RUN --round {number} --client {words} --out DIR
"""


class RunFolder:
    """One run's folder; see the module's docstring for what lies in it.

    Args:
        path: The folder; made if it is not there.
        keep_snapshots: Rounds whose ``state.safetensors`` is kept, the newest ones.
    """

    def __init__(self, path: str | os.PathLike[str], keep_snapshots: int = 2):
        self.path, self.keep_snapshots = Path(path), keep_snapshots
        self.record, self.metrics = RunRecord(self.path, (STATE, ROUND)), MetricsFile(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it.

        Raises:
            BlockingIOError: If another process works in it.
            FileExistsError: If it holds what is not a run's.
            SaveError: If nothing can be written there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file, and the results need a folder: choose another out")
        self._check_own()
        with locked(self.path / LOCK, self.path, "works in"):
            yield

    def _check_own(self) -> None:
        """A folder without run.json must be empty, but for what a run that was killed at once may leave."""
        if (self.path / RUN).is_file():
            return
        foreign = sorted(name for name in _names(self.path) if not name.startswith((LOCK, ".tmp-")))
        if foreign:
            raise FileExistsError(
                f"{self.path} already holds {', '.join(foreign[:5])} and is no run's folder: choose a new or empty out"
            )

    def save_round(
        self,
        number: int,
        updates: Sequence[ClientUpdate],
        state: Mapping[str, Any],
        events: Sequence[Event],
        base: Base = _UNKNOWN,
        fan_in_fan_out: bool = False,
    ) -> Path:
        """Save a round, whole or not at all; then drop the snapshots that it makes superfluous.

        Args:
            number: The round, from 1.
            updates: Whose adapters to save.
            state: Nested dicts and lists of tensors and JSON values: all that the next round needs.
            events: The round's own; of the first, those before it too.
            base: What the clients trained on.
            fan_in_fan_out: As in ``save_peft_adapter``.
        Returns:
            The round's folder.
        Raises:
            SaveError: If writing fails; what was saved before is unchanged.
        """
        folder = self.folder(number)
        taken = taken_apart(state)
        # A round is redone only after its folder was found damaged, so whatever is in it may go.
        with atomic_dir(folder, replaceable=_names(folder)) as new:
            for update in updates:
                place, mine = new / self.record.client_folder(update.client), replace(update, trained_on=base)
                save_peft_adapter(mine, place, base_model=base.label, fan_in_fan_out=fan_in_fan_out)
                if base.round:
                    words = shlex.quote(update.client)
                    text = _ADAPTER_NOTE.format(client=update.client, words=words, base=base, number=number)
                    (place / "README.md").write_text(text, encoding="utf-8")
            write_snapshot(new, number, *taken, events)
        self.drop_superfluous(number)
        return folder

    def drop_superfluous(self, number: int, pause: bool = True) -> None:
        """Drop what is not needed once a round is complete: a process killed in between leaves it to the next one.

        Args:
            number: The newest whole round.
            pause: Whether where a round stopped goes too.
        """
        for old in self._rounds():
            if old <= number - self.keep_snapshots:
                (self.folder(old) / STATE).unlink(missing_ok=True)
        if pause:
            shutil.rmtree(self.path / PAUSED, ignore_errors=True)

    def save_pause(self, number: int, state: Mapping[str, Any]) -> None:
        """Save where a round stopped between two steps, whole or not at all.

        Raises:
            SaveError: If writing fails; the round is then redone from its beginning.
        """
        taken = taken_apart(state)
        with atomic_dir(self.path / PAUSED, replaceable=_names(self.path / PAUSED)) as new:
            write_snapshot(new, number, *taken, [])

    def pause(self, number: int, device: torch.device | str = "cpu") -> tuple[dict[str, Any], list[str]]:
        """Where a round stopped; empty if it did not, or what was saved is of another round or damaged.

        Returns:
            The state, and a warning if it is damaged.
        """
        if not (self.path / PAUSED / ROUND).is_file():
            return {}, []
        try:
            found = read_snapshot(self.path / PAUSED, device)
        except DAMAGE as error:
            return {}, [f"{self.path / PAUSED} cannot be used ({error}); doing round {number} from its beginning"]
        return (found.state if found.round == number else {}), []

    def folder(self, number: int) -> Path:
        """Where a round lies."""
        return self.path / ROUNDS / f"{number:04d}"

    def _rounds(self) -> list[int]:
        """Numbers of the rounds that are there, newest first."""
        names = _names(self.path / ROUNDS)
        return sorted((int(name) for name in names if re.fullmatch(r"\d{4,}", name)), reverse=True)

    def newest(self, device: torch.device | str = "cpu") -> tuple[Snapshot | None, list[str]]:
        """Read the newest round that is whole.

        Args:
            device: Where its tensors go.
        Returns:
            The snapshot, or None to start from the beginning; and a warning for each newer round that is damaged.
        """
        damaged: list[str] = []
        for number in self._rounds():
            try:
                return read_snapshot(self.folder(number), device), [
                    f"{text}; going on after round {number}" for text in damaged
                ]
            except DAMAGE as error:
                damaged.append(f"{self.folder(number)} cannot be used ({error})")
        return None, [f"{text}; starting from the beginning" for text in damaged]

    def restore_metrics(self, snapshot: Snapshot | None) -> list[Event]:
        """Cut the events back to the end of a round, None for the beginning; returns those that are left."""
        if snapshot is None:
            return self.metrics.cut_back(0, [])
        kept = [event for number in range(1, snapshot.round) for event in self._kept(number)]
        return self.metrics.cut_back(snapshot.round, [*kept, *snapshot.events])

    def _kept(self, number: int) -> list[Event]:
        try:
            return read_events(self.folder(number))
        except DAMAGE:
            return []

    def save_adapter(self, adapter: ClientUpdate, fan_in_fan_out: bool = False) -> None:
        """Save the global adapter in PEFT form."""
        save_peft_adapter(adapter, self.adapter, fan_in_fan_out=fan_in_fan_out)

    @property
    def adapter(self) -> Path:
        """Where the global adapter lies."""
        return self.path / "adapter"

    def save_model(
        self,
        model: Any,
        tokenizer: Any = None,
        card: str = "",
        state: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Save a model, its tokenizer and its card as transformers does, whole or not at all.

        ``state`` has the tensors of a model that is not whole here, or that were converted to ``dtype``.
        """
        folder = self.path / "model"
        with atomic_dir(folder, replaceable=_names(folder)) as new, system_errors(new), _without_bars():
            model.save_pretrained(new, **({} if state is None else {"state_dict": dict(state)}))
            if dtype is not None:
                write_dtype(new / "config.json", model.dtype, dtype)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            (new / "README.md").write_text(card, encoding="utf-8")

    def check_room(self, needed_bytes: int) -> None:
        """Refuse to start where the disk has too little room.

        Raises:
            SaveError: With what is needed and what is free.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise SaveError(
                errno.ENOSPC,
                f"{self.path} has {show_bytes(free)} free, and a checkpoint and the final model need "
                f"{show_bytes(needed_bytes)}: free some space, or choose another out",
            )


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


@contextmanager
def _without_bars() -> Iterator[None]:
    """Saving is no place for transformers' progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
