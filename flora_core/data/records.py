"""Records: rows of data, each normalised once into a conversation, a text or a multiple-choice question.

``forms`` and ``messages`` say which columns are read; `docs/data.md` has the table. A column is read, or describes the
record (`METADATA`, and the columns that a run splits and groups by), or is unknown: reported once a file, or refused.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common import check_choice, listed
from .forms import ACCEPTED, read_form
from .messages import METADATA
from .sources import read_rows

UNKNOWN = ("warn", "refuse")
_PLACE_IN_FILE = re.compile(r", (?:line|row|record) \d")


@dataclass(frozen=True, slots=True, eq=False)
class Record(Mapping[str, Any]):
    """A checked record. As a mapping it is its own columns, as they were read: ``record["category"]``.

    Attributes:
        fields: The columns.
        place: File and line, or the position in a list; errors begin with it.
        messages: The conversation, as ``apply_chat_template`` takes it; None for a text and a question of choices.
        loss: For each message, whether its tokens are learned.
        text: A plain text, or the question of ``choices``.
        tools, documents, template_kwargs: Further arguments of the chat template.
        choices, correct: Of a multiple-choice question, which is for evaluation only.
        unknown: Columns that nothing reads.
    """

    fields: Mapping[str, Any]
    place: str
    messages: list[dict[str, Any]] | None = None
    loss: list[bool] = field(default_factory=list)
    text: str | None = None
    choices: list[str] | None = None
    correct: int = 0
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def __getitem__(self, column: str) -> Any:
        return self.fields[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


def normalise(fields: Mapping[str, Any], place: str) -> Record:
    """Check a record's columns and read them by their form; a ``Record`` is returned as it is.

    Args:
        fields: Column -> value; null values count as absent.
        place: File and line, or what else names the record in errors.
    Returns:
        The record; ``unknown`` still lists columns that describe it.
    Raises:
        ValueError: With the place, if it has no known form, or a column cannot be read.

    Example:
        >>> from flora_core.data.records import normalise
        >>> normalise({"question": "1+1?", "answer": "2", "id": 7}, "a.jsonl, line 3").messages[1]["content"]
        '2'
    """
    if isinstance(fields, Record):
        return fields
    if not isinstance(fields, Mapping):
        raise ValueError(f"{place}: a record must be a JSON object, got {type(fields).__name__}")
    try:
        parts = read_form(fields)
        if parts.messages is not None:
            _check_answers(parts.messages, parts.loss)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    unknown = tuple(name for name in parts.unknown if name not in METADATA)
    return Record(fields, place, **{**vars(parts), "unknown": unknown})


def load_records(
    source: Any,
    unknown: str = "warn",
    *,
    name: str = "data",
    known: Iterable[str] = (),
    warn: Callable[[str], None] | None = None,
) -> list[Record]:
    """Read records and normalise them.

    Args:
        source: Whatever ``sources.read_rows`` reads: a file, a folder, a glob, a list of these, an iterable of dicts or
            records, a ``datasets.Dataset``.
        unknown: What to do about columns that nothing reads: "warn" once a file, with names and counts, or "refuse".
        name: Names a source that is no file in errors.
        known: Columns that are used for something else: labels, client names, ids.
        warn: Gets the warning; None: ``warnings.warn``.
    Returns:
        The records in their order.
    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are no records or they cannot be parsed, or one cannot be trained on (with file and line).

    Example:
        ``[record["category"] for record in load_records("a.jsonl")]``
    """
    check_choice("unknown", unknown, UNKNOWN)
    used, records = frozenset(known), []
    totals: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {}
    for place, fields in read_rows(source, name):
        record = normalise(fields, place)
        records.append(record)
        # A record that came as one was reported when it was read.
        left = [] if record is fields else [column for column in record.unknown if column not in used]
        if left and unknown == "refuse":
            raise ValueError(f"{place}: unknown fields: {listed(left)}; remove them, or set data.unknown to 'warn'")
        file = _PLACE_IN_FILE.split(place)[0]
        totals[file] += 1
        if left:
            counts.setdefault(file, Counter()).update(left)
    if not records:
        raise ValueError(f"{name} has no records; accepted fields: {ACCEPTED}")
    for file, columns in counts.items():
        text = listed((f"{column} (in {count} of {totals[file]})" for column, count in columns.items()), 12)
        _warn(f"{file}: fields that nothing reads, so they are neither trained on nor seen: {text}", warn)
    return records


def check_records(records: Any, name: str, unknown: str = "warn", **options: Any) -> list[Record]:
    """Normalise records that are given by path or as they are; the arguments are those of ``load_records``."""
    return load_records(records, unknown, name=name, **options)


def _warn(message: str, warn: Callable[[str], None] | None) -> None:
    if warn is None:
        warnings.warn(message, stacklevel=3)
    else:
        warn(message)


def _check_answers(messages: Sequence[Mapping[str, Any]], loss: Sequence[bool]) -> None:
    """Check that a conversation has an answer to learn."""
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"the conversation has no answer: its roles are {', '.join(m['role'] for m in messages)[:80]}; "
            "add the assistant's turn or remove the record"
        )
    if not any(loss):
        raise ValueError("every answer of the conversation is masked, so nothing is learned; unmask one or remove it")
