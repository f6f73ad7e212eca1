"""Show a federated run while it goes on: live bars on a terminal, timed lines anywhere else.

`Federation` calls its callbacks with plain dicts ("events"), and writes the same dicts, one JSON object per line, to
`metrics.jsonl`. Every event has `event` (its kind). Rounds count from 1; round 0 is the model before training. A field
marked ? may be missing or None. Losses are means over labelled tokens; sizes are bytes; times are seconds.

run_start       rounds, strategy, clients: [{name, rank, examples, parameters?}], device?, out?, seed?,
                resumed_from?: the last round found done in `out` (its events stand in metrics.jsonl already),
                base?: {held: "sharded", reason, bytes: of it on rank 0 between passes}, where ranks share it
round_start     round, rounds, clients: [name], cohorts?: number of cohorts the planner made,
                shares?: [[name]]: the clients of each process, where torchrun started several
train_progress  round, step, steps: optimizer steps done and planned in this round, over all cohorts,
                loss: mean over the clients that just stepped, tokens: trained so far in this round, seconds: since
                round_start, cohort?: 1.., cohorts?            (not written to metrics.jsonl)
client_done     round, client, rank, examples, tokens, steps, loss_first?, loss_last?, seconds, tokens_per_s,
                refused?: why this update was not used (non-finite, too large, ...)
exchanged       round, reduced: modules of which sums moved between processes and not adapters, reason,
                gather_bytes: what all adapters would move, bytes: what moved
aggregated      round, strategy, clients: number of updates used, aggregation_error?, application_error? and both
                _by_module: {module: error}?, application_rows?: rows of each weight that it is of (None: all),
                bytes_up, bytes_down, up?, down?: {client: bytes}, forms?: {stack, recompressed, dense or none: number
                of modules whose change travels so}, catch_up?: {client that was away: {kind: log or snapshot, bytes}},
                privacy?: {epsilon, delta, releases, noise_multiplier, clip}: what the run has cost so far,
                seconds, seconds_of?: {aggregate, certify, write}, peak_memory_bytes?
evaluated       round, examples, seconds, loss?, exact_match? (0..1), accuracy? (0..1; multiple choice has only this),
                groups?: {skill: {examples, loss?, exact_match?, accuracy?}}, clients?: {client: the same of its own
                held-out records}, over_clients?: {number: {mean, weighted_mean, std}}: what `evaluate` returns
round_end       round, rounds, applied: False if too few updates were good, seconds, peak_memory_bytes,
                checkpoint?: path
converted       round, dtype: that in which the model is saved, rounding_error: the norm of what was rounded off over
                that of the weights
run_end         rounds, seconds, peak_memory_bytes, out?, privacy?
warning         message, round?, client?

Unknown kinds and unknown fields are ignored, so that the list may grow.
"""

from __future__ import annotations

import time
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ..common import show_bytes, show_error, show_number, show_seconds
from .events import Event
from .summary import show_cost, show_forms


def sentence(event: Event) -> str | None:
    """Say one event in one line; None for events that are not worth a line."""
    writer = _SENTENCES.get(event["event"])
    return writer(event) if writer else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _say_start(event: Event) -> str:
    text = f"{_count(len(event['clients']), 'client')}, {_count(event['rounds'], 'round')} of {event['strategy']}"
    text += f" on {event['device']}" if event.get("device") else ""
    if event.get("base"):
        text += f", the base {event['base']['held']} ({event['base']['reason']})"
    if event.get("resumed_from") is not None:
        text += f", resumed after round {event['resumed_from']}"
    return text + (f"; results go to {event['out']}" if event.get("out") else "")


def _say_round(event: Event) -> str:
    cohorts = event.get("cohorts")
    number = len(event["clients"])
    text = f"round {event['round']}/{event['rounds']}: {_count(number, 'client')} train{'s' * (number == 1)}"
    return text + (f" in {cohorts} cohort{'s' if cohorts > 1 else ''}" if cohorts else "")


def _say_train(event: Event) -> str:
    speed = event["tokens"] / event["seconds"] if event["seconds"] else 0.0
    return (
        f"round {event['round']}: step {event['step']}/{event['steps']}, loss {event['loss']:.3f}, {speed:.0f} tokens/s"
    )


def _say_client(event: Event) -> str:
    text = (
        f"round {event['round']}: {event['client']} (rank {event['rank']}, {event['examples']} examples) "
        f"loss {show_number(event.get('loss_first'))} -> {show_number(event.get('loss_last'))}"
    )
    return text + (f"; REFUSED: {event['refused']}" if event.get("refused") else "")


def _say_aggregated(event: Event) -> str:
    return (
        f"round {event['round']}: aggregated {_count(event['clients'], 'update')}, "
        f"aggregation error {show_error(event.get('aggregation_error'))}, {_written(event)}"
        f"{show_bytes(event['bytes_up'])} up, {show_bytes(event['bytes_down'])} down{_travelling(event)}"
        f" in {show_seconds(event['seconds'])}{show_cost(event)}"
    )


def _written(event: Event) -> str:
    if event.get("application_error") is None:
        return ""
    rows = event.get("application_rows")
    sample = f" in {rows} rows a weight" if rows else ""
    return f"application error {show_error(event['application_error'])}{sample}, "


def _travelling(event: Event) -> str:
    """The forms of the base's change, and the bytes that clients which were away need more."""
    late = sum(one["bytes"] for one in (event.get("catch_up") or {}).values())
    forms = f" ({show_forms(event)})" if event.get("forms") else ""
    return forms + (f", {show_bytes(late)} to catch up" if late else "")


def _say_evaluated(event: Event) -> str:
    when = f"after round {event['round']}" if event["round"] else "before training"
    parts = [f"loss {event['loss']:.3f}"] if event.get("loss") is not None else []
    for field, words in (("exact_match", "exact match"), ("accuracy", "accuracy")):
        parts += [f"{words} {event[field]:.1%}"] if event.get(field) is not None else []
    return f"{when}: {', '.join(parts)} of {event['examples']} held-out examples"


def _say_round_end(event: Event) -> str:
    text = f"round {event['round']}/{event['rounds']}: done in {show_seconds(event['seconds'])}"
    if not event["applied"]:
        text += "; NOT APPLIED, too few good updates"
    return text + (", saved" if event.get("checkpoint") else "")


def _say_converted(event: Event) -> str:
    error = show_error(event["rounding_error"])
    return f"saving the model as {event['dtype']}: rounding changes it by {error} of its norm"


def _say_end(event: Event) -> str:
    text = f"finished in {show_seconds(event['seconds'])}, peak memory {show_bytes(event['peak_memory_bytes'])}"
    return text + show_cost(event)


_SENTENCES = {
    "run_start": _say_start,
    "round_start": _say_round,
    "train_progress": _say_train,
    "client_done": _say_client,
    "aggregated": _say_aggregated,
    "evaluated": _say_evaluated,
    "round_end": _say_round_end,
    "converted": _say_converted,
    "run_end": _say_end,
    "warning": lambda event: f"warning: {event['message']}",
}


class RunProgress:
    """Show a run's events as lines, on a terminal with bars below them, elsewhere each with the time since the start.

    Args:
        stream: Where; standard error unless given.
        every_s: The least seconds between two lines about training steps, where there are no bars.
    """

    def __init__(self, stream: TextIO | None = None, every_s: float = 5.0):
        self.console, self.every_s = Console(file=stream, stderr=stream is None), every_s
        self.live = self.console.file.isatty()
        texts = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
        columns = (TextColumn("{task.description}"), BarColumn(), *texts)
        self.bars = Progress(*columns, console=self.console, disable=not self.live)
        self.rounds = self.bars.add_task("rounds", total=None, note="")
        self.steps = self.bars.add_task("steps", total=None, note="", visible=False)
        self.began = self.last_step = time.monotonic()

    def __enter__(self) -> RunProgress:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        self._move_bars(event)
        line = None if event["event"] == "train_progress" and not self._is_due() else sentence(event)
        if line is not None:
            began = "" if self.live else f"[{time.monotonic() - self.began:7.1f}s] "
            style = "yellow" if event["event"] == "warning" else None
            self.console.print(began + line, highlight=False, markup=False, soft_wrap=True, style=style)

    def _move_bars(self, event: Event) -> None:
        kind = event["event"]
        if kind == "train_progress":
            note = _say_train(event).split(", ", 1)[1]
            self.bars.update(self.steps, completed=event["step"], total=event["steps"], note=note, visible=True)
        elif kind == "run_start":
            self.bars.update(self.rounds, total=event["rounds"], completed=event.get("resumed_from") or 0)
        elif kind == "round_start":
            self.bars.reset(self.steps, total=None, note="", visible=True)
        elif kind == "round_end":
            self.bars.update(self.rounds, completed=event["round"])

    def _is_due(self) -> bool:
        """Return whether a training step is worth a line: a bar shows it on a terminal."""
        now = time.monotonic()
        if self.live or now - self.last_step < self.every_s:
            return False
        self.last_step = now
        return True


class Bar:
    """Show what is done of each stage, its rate and the time left: by a bar on a terminal, elsewhere by lines.

    Args:
        stream: Where; standard error unless given.
        every_s: The least seconds between two lines.
        modules: Whether modules are counted, not bytes.
    """

    def __init__(self, stream: TextIO | None = None, every_s: float = 5.0, modules: bool = False):
        self.console, self.every_s = Console(file=stream, stderr=stream is None), every_s
        self.live = self.console.file.isatty()
        counted = (MofNCompleteColumn(),) if modules else (DownloadColumn(), TransferSpeedColumn())
        bar = (BarColumn(),) if self.live else ()
        columns = (TextColumn("{task.description}"), *bar, *counted, TimeRemainingColumn())
        self.bars = Progress(*columns, console=self.console, disable=not self.live)
        self.task, self.last = TaskID(-1), 0.0

    def __enter__(self) -> Bar:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def __call__(self, what: str, done: int, whole: int) -> None:
        """Take one step of a stage: ``done`` of ``whole``."""
        now, tasks = time.monotonic(), self.bars.tasks
        if not tasks or tasks[-1].description != what:
            # What an earlier attempt has done comes first, in one piece: it is not part of this one's rate.
            self.task, self.last = self.bars.add_task(what, total=whole, completed=done), now
        self.bars.update(self.task, completed=done)
        if not self.live and (done == whole or now - self.last >= self.every_s):
            self.last = now
            self.console.print(self.bars.make_tasks_table(self.bars.tasks[-1:]))
