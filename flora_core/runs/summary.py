"""Add the events of a run up (`progress` lists them) into the tables that end it and fill its report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..common import Table, show_bytes, show_error, show_number, show_seconds
from .events import Event

# Rows of the table of certificates, at most.
MOST_ROUNDS = 12


@dataclass
class History:
    """Summary of a run's events; a round that was redone after a crash counts once."""

    start: Event = field(default_factory=dict)
    clients: dict[tuple[int, str], Event] = field(default_factory=dict)
    aggregated: dict[int, Event] = field(default_factory=dict)
    evaluated: dict[int, Event] = field(default_factory=dict)
    round_ends: dict[int, Event] = field(default_factory=dict)
    warnings: list[Event] = field(default_factory=list)
    converted: Event = field(default_factory=dict)
    end: Event = field(default_factory=dict)

    @classmethod
    def of(cls, events: Iterable[Event]) -> History:
        """Add up all events."""
        history = cls()
        for event in events:
            history.add(event)
        return history

    def add(self, event: Event) -> None:
        """Take in one event."""
        kind, number = event["event"], event.get("round", 0)
        if kind == "client_done":
            self.clients[number, event["client"]] = event
        elif kind in ("aggregated", "evaluated"):
            getattr(self, kind)[number] = event
        elif kind == "round_end":
            self.round_ends[number] = event
        elif kind == "run_start":
            self.start = event
        elif kind == "converted":
            self.converted = event
        elif kind == "run_end":
            self.end = event
        elif kind == "warning":
            self.warnings.append(event)

    def client_rows(self) -> list[dict[str, Any]]:
        """Return one row per client: what it is, and its losses from its first to its last round."""
        rows = []
        for client in self.start.get("clients", []):
            name = client["name"]
            done = [self.clients[key] for key in sorted(self.clients) if key[1] == name]
            good = [event for event in done if not event.get("refused")]
            tokens, seconds = sum(event["tokens"] for event in done), sum(event["seconds"] for event in done)
            rows.append(
                dict(
                    client=name,
                    rank=client["rank"],
                    examples=client["examples"],
                    rounds=len(good),
                    loss_before=good[0].get("loss_first") if good else None,
                    loss_after=good[-1].get("loss_last") if good else None,
                    tokens_per_s=tokens / seconds if seconds else None,
                    refused=sum(bool(event.get("refused")) for event in done),
                )
            )
        return rows

    def traffic_rows(self) -> list[dict[str, Any]]:
        """Return one row per client: the bytes that it sent, was sent, and was sent for rounds that it missed."""
        rows = []
        for client in self.start.get("clients", []):
            name, rounds = client["name"], list(self.aggregated.values())
            up, down = (sum((event.get(way) or {}).get(name, 0) for event in rounds) for way in ("up", "down"))
            late = sum((event.get("catch_up") or {}).get(name, {}).get("bytes", 0) for event in rounds)
            rows.append(dict(client=name, up=up, down=down, catch_up=late))
        return [row for row in rows if row["up"] or row["down"]]

    def certificate_rows(self) -> list[dict[str, Any]]:
        """Return one row per round that was applied: its errors, the module where each is largest, bytes and cost."""
        rows = []
        for number, event in sorted(self.aggregated.items()):
            errors = {f"{kind}_error": event.get(f"{kind}_error") for kind in ("aggregation", "application")}
            cost = {name: event.get(name) for name in ("bytes_up", "bytes_down", "seconds", "peak_memory_bytes")}
            worst = {f"{kind}_worst": worst_module(event, kind) for kind in ("aggregation", "application")}
            rows.append({"round": number, **errors, **worst, **cost, "forms": show_forms(event)})
        return rows

    def totals(self) -> dict[str, Any]:
        """Return what the whole run sent, took and lost."""
        errors = [event.get("aggregation_error") for event in self.aggregated.values()]
        applied = [event.get("application_error") for event in self.aggregated.values()]
        return dict(
            aggregation_error=max((error for error in errors if error is not None), default=None),
            application_error=max((error for error in applied if error is not None), default=None),
            bytes_up=sum(event["bytes_up"] for event in self.aggregated.values()),
            bytes_down=sum(event["bytes_down"] for event in self.aggregated.values()),
            seconds=sum(event["seconds"] for event in self.round_ends.values()),
            peak_memory_bytes=max((event["peak_memory_bytes"] for event in self.round_ends.values()), default=None),
        )


def show_cost(event: Event) -> str:
    """Write what a private run has cost so far; nothing for a run that is not."""
    cost = event.get("privacy")
    if not cost:
        return ""
    return f", epsilon {cost['epsilon']:.3g} at delta {cost['delta']:g} after {cost['releases']} releases"


def show_forms(event: Event) -> str:
    """Write how a round's change of the base travels: 40 stack, 20 dense."""
    return ", ".join(f"{count} {kind}" for kind, count in (event.get("forms") or {}).items())


def worst_module(event: Event, kind: str) -> tuple[str, float] | None:
    """Return the module where a round's aggregation or application error is largest, and that error."""
    found = {m: error for m, error in (event.get(f"{kind}_error_by_module") or {}).items() if error is not None}
    return max(found.items(), key=lambda item: item[1]) if found else None


def hit_rate(event: Event) -> float | None:
    """Return an evaluation's share of right answers, whichever way it counts them."""
    return event.get("exact_match", event.get("accuracy"))


def summary_tables(history: History) -> list[Table]:
    """Return the tables that end a run: (title, columns, rows), all as text."""
    rows = history.client_rows()
    clients = [
        [
            row["client"],
            str(row["rank"]),
            str(row["examples"]),
            str(row["rounds"]),
            show_number(row["loss_before"]),
            show_number(row["loss_after"]),
            show_number(row["tokens_per_s"], ".0f"),
        ]
        for row in rows
    ]
    tables = [
        ("Clients", ["client", "rank", "examples", "rounds", "loss before", "loss after", "tokens/s"], clients),
        ("Traffic", ["client", "up", "down", "caught up"], _traffic_rows(history)),
        ("Held-out data", *_evaluation_table(history)),
        ("Held-out data of each client", *_client_evaluation_table(history)),
        _certificate_table(history),
        ("The whole run", ["quantity", "value"], _total_rows(history)),
    ]
    return [table for table in tables if table[2]]


def _certificate_table(history: History) -> Table:
    """Errors over all modules with the largest one's in brackets; of many rounds some, metrics.jsonl has them all."""
    rows = history.certificate_rows()
    step = -(-len(rows) // MOST_ROUNDS) or 1
    shown = [row for row in rows if (len(rows) - row["round"]) % step == 0]
    title = "Certificate" + (f", every {step} rounds" if step > 1 else "")
    columns = ["round", "aggregation error", "application error", "up", "down", "base travels as", "server", "memory"]
    return title, columns, [_certificate_cells(row) for row in shown]


def _certificate_cells(row: dict[str, Any]) -> list[str]:
    cells = [str(row["round"])]
    for kind in ("aggregation", "application"):
        worst = row[f"{kind}_worst"]
        cells.append(show_error(row[f"{kind}_error"]) + (f" ({show_error(worst[1])})" if worst and worst[1] else ""))
    sizes = [show_bytes(row[name]) for name in ("bytes_up", "bytes_down")]
    return [*cells, *sizes, row["forms"] or "-", show_seconds(row["seconds"]), show_bytes(row["peak_memory_bytes"])]


_METRICS = (("loss", "loss", ".3f"), ("exact_match", "exact", ".1%"), ("accuracy", "accuracy", ".1%"))


def _evaluation_table(history: History) -> tuple[list[str], list[list[str]]]:
    if not history.evaluated:
        return [], []
    first, last = _ends(history)
    groups = {"all": (first, last)}
    groups |= {
        name: ((first.get("groups") or {}).get(name, {}), end) for name, end in (last.get("groups") or {}).items()
    }
    return _before_and_after("skill", groups, first, last)


def _client_evaluation_table(history: History) -> tuple[list[str], list[list[str]]]:
    """Each client's own held-out records, then mean, weighted mean and spread over the clients."""
    if not history.evaluated or not _ends(history)[1].get("clients"):
        return [], []
    first, last = _ends(history)
    pairs = {name: ((first.get("clients") or {}).get(name, {}), end) for name, end in last["clients"].items()}
    columns, rows = _before_and_after("client", pairs, first, last)
    words = {"mean": f"mean of {len(pairs)}", "weighted_mean": "mean, by examples", "std": "standard deviation"}
    for kind, word in words.items():
        row = [word, "-"]
        for key, _, spec in _METRICS:
            if last.get(key) is not None:
                over = [(event.get("over_clients") or {}).get(key, {}) for event in (first, last)]
                row += [show_number(one.get(kind), spec) for one in over]
        rows.append(row)
    return columns, rows


def _ends(history: History) -> tuple[Event, Event]:
    """The first and the last evaluation."""
    return history.evaluated[min(history.evaluated)], history.evaluated[max(history.evaluated)]


def _before_and_after(
    kind: str, pairs: dict[str, tuple[Event, Event]], first: Event, last: Event
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what is evaluated, at the beginning and at the end."""
    before, after = (f"round {event['round']}" if event["round"] else "before" for event in (first, last))
    columns, rows = [kind, "examples"], [[name, str(end["examples"])] for name, (_, end) in pairs.items()]
    for key, word, spec in _METRICS:
        if last.get(key) is None:
            continue
        columns += [f"{word} {before}", f"{word} {after}"]
        for row, pair in zip(rows, pairs.values(), strict=True):
            row += [show_number(event.get(key), spec) for event in pair]
    return columns, rows


def _rows_checked(history: History) -> str:
    rows = [event["application_rows"] for event in history.aggregated.values() if event.get("application_rows")]
    return f", {max(rows)} rows of each weight" if rows else ""


def _traffic_rows(history: History) -> list[list[str]]:
    rows = history.traffic_rows()
    return [[row["client"], *(show_bytes(row[way]) for way in ("up", "down", "catch_up"))] for row in rows]


def _total_rows(history: History) -> list[list[str]]:
    totals, saved = history.totals(), history.converted
    costs = [show_cost(event).lstrip(", ") for _, event in sorted(history.aggregated.items()) if event.get("privacy")]
    return [
        *([["privacy spent", costs[-1]]] if costs else []),
        ["aggregation error (largest)", show_error(totals["aggregation_error"])],
        [f"application error (largest{_rows_checked(history)})", show_error(totals["application_error"])],
        *([[f"rounding to {saved['dtype']}, saved", show_error(saved["rounding_error"])]] if saved else []),
        ["sent up, all rounds", show_bytes(totals["bytes_up"])],
        ["sent down, all rounds", show_bytes(totals["bytes_down"])],
        ["time in rounds", show_seconds(totals["seconds"])],
        ["peak memory", show_bytes(totals["peak_memory_bytes"])],
    ]
