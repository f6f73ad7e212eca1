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

import sys
import time
from typing import Any, TextIO

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


class PlainProgress:
    """Write each event as one timed line; training steps at most every `every_s` seconds."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 5.0):
        self.stream: TextIO = sys.stderr if stream is None else stream
        self.every_s = every_s
        self.began = self.last_step = time.monotonic()

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stream.flush()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        now = time.monotonic()
        if event["event"] == "train_progress":
            if now - self.last_step < self.every_s:
                return
            self.last_step = now
        line = sentence(event)
        if line is not None:
            print(f"[{now - self.began:7.1f}s] {line}", file=self.stream, flush=True)


class LiveProgress:
    """Keep a bar for the rounds and one for the steps below the lines, with rich."""

    def __init__(self, console: Any = None):
        from rich import progress as bars
        from rich.console import Console

        self.console = console or Console(stderr=True)
        self.bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self.rounds = self.bars.add_task("rounds", total=None, note="")
        self.steps = self.bars.add_task("steps", total=None, note="", visible=False)

    def __enter__(self) -> LiveProgress:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        kind = event["event"]
        if kind == "train_progress":
            note = _say_train(event).split(", ", 1)[1]
            self.bars.update(self.steps, completed=event["step"], total=event["steps"], note=note, visible=True)
            return
        if kind == "run_start":
            self.bars.update(self.rounds, total=event["rounds"], completed=event.get("resumed_from") or 0)
        elif kind == "round_start":
            self.bars.reset(self.steps, total=None, note="", visible=True)
        elif kind == "round_end":
            self.bars.update(self.rounds, completed=event["round"])
        line = sentence(event)
        if line is not None:
            self.console.print(line, highlight=False, markup=False, style="yellow" if kind == "warning" else None)


def make_progress(stream: TextIO | None = None) -> PlainProgress | LiveProgress:
    """Pick live bars where `stream` (standard error) is a terminal, else timed lines."""
    out: TextIO = sys.stderr if stream is None else stream
    if not out.isatty():
        return PlainProgress(out)
    from rich.console import Console

    return LiveProgress(Console(file=out))


class Bar:
    """Show bytes done, their rate and the time left: a live bar on a terminal, a line every few seconds otherwise."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 5.0):
        self.stream: TextIO = sys.stderr if stream is None else stream
        self.every_s, self.last = every_s, float("-inf")
        self.what, self.began, self.start = "", 0.0, 0
        self.live, self.task = self._live_bar() if self.stream.isatty() else None, None

    def _live_bar(self) -> Any:
        from rich import progress as bars
        from rich.console import Console

        texts = (bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
        columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), *texts)
        return bars.Progress(*columns, console=Console(file=self.stream))

    def __enter__(self) -> Bar:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, what: str, done: int, whole: int) -> None:
        """Take one step of a stage: ``done`` of ``whole`` bytes (modules for an export)."""
        now = time.monotonic()
        if what != self.what:
            # What an earlier attempt has done comes first, in one piece: it is not part of this one's rate.
            self.what, self.began, self.start, self.last = what, now, done, now
            if self.live:
                self.task = self.live.add_task(what, total=whole, completed=done)
        if self.live:
            self.live.update(self.task, completed=done)
        elif done == whole or now - self.last >= self.every_s:
            self.last = now
            print(self._line(done, whole, now - self.began), file=self.stream, flush=True)

    def _line(self, done: int, whole: int, seconds: float) -> str:
        if self.what == "export":
            return f"{self.what}: {done} of {whole} modules"
        rate = (done - self.start) / seconds if seconds else 0.0
        text = f"{self.what}: {show_bytes(done)} of {show_bytes(whole)}, {show_bytes(rate)}/s"
        return text + (f", {show_seconds((whole - done) / rate)} left" if rate and done < whole else "")
