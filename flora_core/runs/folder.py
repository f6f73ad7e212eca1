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
import json
import os
import re
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from ..adapters import Base, ClientUpdate, save_peft_adapter
from ..common import (
    SaveError,
    atomic_dir,
    atomic_write_bytes,
    atomic_write_json,
    differences,
    explained,
    finite,
    folder_names,
    parse_json,
    require,
    show_bytes,
    system_errors,
    try_lock,
)
from ..ops import autotune
from .events import Event
from .fingerprint import ROUNDS as NUM_ROUNDS
from .fingerprint import check_rounds
from .saving import write_dtype
from .snapshot import DAMAGE, ROUND, STATE, Snapshot, read_events, read_snapshot, taken_apart, write_snapshot

RUN, METRICS, ROUNDS, LOCK, PAUSED = "run.json", "metrics.jsonl", "rounds", ".lock", "paused"
# Events after which a reader may want metrics.jsonl to be on the disk.
_MILESTONES = ("evaluated", "round_end", "run_end")
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
        self.facts: dict[str, Any] = {}

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
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._check_own()
        with explained(self.path):
            file = open(self.path / LOCK, "a+")  # noqa: SIM115 (closed below)
        with file:
            _lock(file, self.path)
            yield

    def _check_own(self) -> None:
        """A folder without run.json must be empty, but for what a run that was killed at once may leave."""
        if (self.path / RUN).is_file():
            return
        names = sorted(os.listdir(self.path))
        foreign = [name for name in names if name != LOCK and not name.startswith(".tmp-")]
        if foreign:
            raise FileExistsError(
                f"{self.path} already holds {', '.join(foreign[:5])} and is no run's folder: choose a new or empty out"
            )

    def begin(self, identity: Mapping[str, Any], environment: Mapping[str, Any], start: str = "") -> list[str]:
        """Write run.json for a new run, or make sure that the run in the folder is this one.

        Args:
            identity: What makes the run what it is, by dotted name (``flora_core.runs.fingerprint``).
            environment: What else its last bits depend on.
            start: Digest of the weights that a new run begins with.
        Returns:
            One warning for each part of the environment that is not as it was.
        Raises:
            ValueError: If the folder holds another run; the fields that differ are named. More rounds are no other run
                where those already done would be the same (``extend``).
        """
        if not (self.path / RUN).exists():
            folders = folder_names(identity.get("clients", []), taken=(STATE, ROUND))
            self._write_facts(
                identity=identity, environments=[environment], start=start, folders=folders, finished=False
            )
            return []
        self.facts = self._read_facts()
        autotune.use(self.facts["fuse"])
        both = [{name: one[name] for name in one if name != NUM_ROUNDS} for one in (self.facts["identity"], identity)]
        fields = differences(*both)
        some = "; ".join(fields[:8]) + (f"; and {len(fields) - 8} more" if len(fields) > 8 else "")
        require(
            not fields,
            f"{self.path} holds a run with another configuration: {some}. Choose another out, or set these back to go "
            "on with that run",
        )
        more = check_rounds(self.facts["identity"], identity)
        changes = differences(self.facts["environments"][-1], environment)
        if (self.finished and not more) or not changes:
            return []
        self._write_facts(environments=[*self.facts["environments"], environment])
        return [f"{text} since the run stopped: it may not repeat an unstopped run bit for bit" for text in changes]

    def extend(self, identity: Mapping[str, Any]) -> list[str]:
        """Write down that the run goes on to more rounds than it had; a note of it, if it does."""
        was, now = self.facts["identity"].get(NUM_ROUNDS), identity.get(NUM_ROUNDS)
        if was == now:
            return []
        self._write_facts(identity=identity, finished=False)
        return [f"federation.rounds was {was}, is {now}: the run goes on, and its results are replaced at its end"]

    def check_start(self, start: str) -> None:
        """Make sure that a run without a whole round begins again with the weights that it began with."""
        require(
            self.facts["start"] == start,
            f"{self.path} has no whole round to go on from, and the model's weights are not those that its run began "
            "with: load the model anew",
        )

    @property
    def finished(self) -> bool:
        """Return whether the run in the folder is over."""
        return bool(self.facts.get("finished"))

    @property
    def kept(self) -> dict[str, Any] | None:
        """The settings of what the finished run left; None if it does not say."""
        return self.facts.get("kept") or None

    def _write_facts(self, **facts: Any) -> None:
        self.facts = {**self.facts, **facts}
        atomic_write_json(self.path / RUN, self.facts)

    def _read_facts(self) -> dict[str, Any]:
        try:
            facts = parse_json(self.path / RUN, (self.path / RUN).read_bytes())
            kept = {name: facts[name] for name in ("identity", "environments", "start", "finished")}
            lists = [kept["identity"], *kept["environments"]]
            require(len(lists) > 1 and all(isinstance(one, dict) for one in lists), "these are mappings")
            folders = facts.get("folders") or {name: name for name in kept["identity"].get("clients", [])}
            what = dict(facts.get("kept") or {})
            return {**kept, "folders": dict(folders), "fuse": dict(facts.get("fuse", {})), "kept": what}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.path / RUN} is damaged, or of another program: choose another out, or put it back"
            ) from None

    def keep_choices(self) -> None:
        """Write down which ways to fuse were measured to be fastest; a resumed run goes on with them."""
        used = autotune.used()
        if used != self.facts.get("fuse", {}):
            self._write_facts(fuse=used)

    def append(self, event: Event) -> None:
        """Add an event to metrics.jsonl.

        Raises:
            SaveError: If writing fails.
        """
        try:
            with open(self.path / METRICS, "ab") as file:
                file.write(_line(event))
                if event["event"] in _MILESTONES:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            text = f"could not write {self.path / METRICS}: {error.strerror}; make room, then start the same run again"
            raise SaveError(error.errno, text) from error

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
                place, mine = new / self.client_folder(update.client), replace(update, trained_on=base)
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

    def client_folder(self, client: str) -> str:
        """Name of a client's folder within a round's: its own name, or a safe form of it."""
        return self.facts.get("folders", {}).get(client) or folder_names([client], taken=(STATE, ROUND))[client]

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
        """Cut metrics.jsonl back to the end of a round, so that nothing stands in it twice; a torn line is dropped.

        Of a round that is not whole there any more, what its snapshot kept is put back.

        Returns:
            The events that are in it now.
        """
        if snapshot is None:
            (self.path / METRICS).unlink(missing_ok=True)
            return []
        told = _by_round(self.events())
        kept = _by_round([event for number in range(1, snapshot.round) for event in self._kept(number)])
        for number, event in ((_round_of(event), event) for event in snapshot.events):
            kept[number].append(event)
        events = [event for number in range(snapshot.round) for event in _whole(told[number], kept[number])]
        events += kept[snapshot.round]
        atomic_write_bytes(self.path / METRICS, b"".join(map(_line, events)))
        return events

    def _kept(self, number: int) -> list[Event]:
        try:
            return read_events(self.folder(number))
        except DAMAGE:
            return []

    def events(self) -> list[Event]:
        """The events in metrics.jsonl, but for lines that are not whole."""
        path, events = self.path / METRICS, []
        for line in path.read_bytes().split(b"\n") if path.is_file() else []:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            events += [event] if _is_event(event) else []
        return events

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

    def finish(self, kept: Mapping[str, Any] | None = None) -> None:
        """Mark the run as over; ``kept`` are the settings of what it left."""
        self._write_facts(finished=True, kept=dict(kept or {}))

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


def _whole(told: list[Event], kept: list[Event]) -> list[Event]:
    """A round's events as they were reported, starts of resumed runs among them; what was kept, if one of those is
    lost."""
    return told if {_line(event) for event in kept} <= {_line(event) for event in told} else kept


def _line(event: Event) -> bytes:
    return (json.dumps(finite(event), allow_nan=False) + "\n").encode()


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _lock(file: IO[str], folder: Path) -> None:
    """Keep other processes out for as long as the file is open; it tells them who works here."""
    if not try_lock(file):
        file.seek(0)
        raise BlockingIOError(
            f"another process ({file.read()}) works in {folder}: wait until it ends, or choose another out"
        )
    file.truncate(0)
    file.write(f"pid {os.getpid()}")
    file.flush()


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
