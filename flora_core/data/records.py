"""Records: JSONL files read into checked dicts, in four forms that are told apart record by record.

    alpaca  {"instruction": ..., "input": ..., "output": ...}         input may be missing, empty or null
    dolly   {"instruction": ..., "context": ..., "response": ...}     context likewise
    chat    {"messages": [{"role": ..., "content": ...}, ...]}        the last message is the assistant's
    text    {"text": ...}

Other keys (id, category, client, ...) are kept; alpaca and dolly records may have a ``system`` message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# The fields that tell a form; the first form whose fields are all there wins.
FORMS = {
    "chat": ("messages",),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "text": ("text",),
}
ROLES = ("system", "user", "assistant")
ACCEPTED = "messages | instruction, output (and input) | instruction, response (and context) | text"
_OPTIONAL = ("system", "input", "context")


def load_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read a JSONL file and check that every record can be trained on.

    Args:
        path: UTF-8 file with one JSON object a line; blank lines are skipped.
    Returns:
        The records in the order of the file, with all their keys.
    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, a line is not a JSON object, or a record lacks the fields of every form
            (with file, line and fields).
    """
    records = []
    for line, record in _lines(path):
        check_record(record, f"{path}, line {line}")
        records.append(record)
    return records


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """Read the objects of a JSONL file, whatever their fields (benchmarks have forms of their own)."""
    return [record for _, record in _lines(path)]


def check_records(records: Sequence[Record], source: str) -> None:
    """Check records that were not read from a file; ``source`` names them in errors.

    Raises:
        ValueError: If there are none, or one has no known form.
    """
    if not records:
        raise ValueError(f"{source} has no records; accepted fields: {ACCEPTED}")
    for index, record in enumerate(records):
        check_record(record, f"{source}, record {index}")


def check_record(record: Record, place: str) -> str:
    """Check one record and return its form; ``place`` says in errors where it stands.

    Raises:
        ValueError: If it has no known form, or a field is no text.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a record must be a JSON object, got {type(record).__name__}")
    form = record_form(record)
    if form is None:
        found = ", ".join(map(str, record)) or "none"
        raise ValueError(f"{place}: the record lacks the needed fields; found: {found}; accepted: {ACCEPTED}")
    if form == "chat":
        _check_messages(record["messages"], place)
        return form
    for key in FORMS[form]:
        _check_text(record[key], key, place)
    for key in _OPTIONAL:
        if record.get(key) is not None:
            _check_text(record[key], key, place)
    return form


def record_form(record: Record) -> str | None:
    """Tell a record's form by its fields: chat, alpaca, dolly, text, or None."""
    return next((form for form, keys in FORMS.items() if all(key in record for key in keys)), None)


def to_messages(record: Record) -> list[dict[str, str]]:
    """Give an alpaca, dolly or chat record as chat messages; input or context follows the instruction."""
    if record_form(record) == "chat":
        return record["messages"]
    extra = record.get("input") if "output" in record else record.get("context")
    answer = record["output"] if "output" in record else record["response"]
    question = f"{record['instruction']}\n\n{extra}" if extra else record["instruction"]
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Record]]:
    """Yield (line number, object) of a JSONL file."""
    if not Path(path).is_file():
        what = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"data file {path} {what}; give a JSONL file (relative paths start at {Path.cwd()})")
    empty = True
    # Bytes, not text, are split into lines: U+2028 ends a line of text, and JSON strings may hold it.
    for line, raw in enumerate(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if raw.strip():
            empty = False
            yield line, _parse(raw, f"{path}, line {line}")
    if empty:
        raise ValueError(f"data file {path} is empty; it needs one JSON object a line")


def _parse(raw: bytes, place: str) -> Record:
    """Parse one line into an object."""
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        hint = "; a JSONL file has one object a line" if raw.strip() in (b"[", b"{") else ""
        raise ValueError(f"{place}: malformed JSON: {error.msg} at column {error.colno}{hint}") from None
    if not isinstance(record, dict):
        hint = "; write the list's items one a line" if isinstance(record, list) else ""
        raise ValueError(f"{place}: each line must be a JSON object, got {type(record).__name__}{hint}")
    return record


def _check_text(value: Any, name: str, place: str) -> None:
    """Check that a field is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {name} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{place}: {name} holds half of a surrogate pair, which is no text; remove it") from None


def _check_messages(messages: Any, place: str) -> None:
    """Check a conversation: known roles, text contents, the last message from the assistant."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: messages must be a list of at least one message, got {messages!r:.80}")
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{place}: {name} must have role and content, got {message!r:.80}")
        if message["role"] not in ROLES:
            raise ValueError(f"{place}: the role of {name} must be one of {', '.join(ROLES)}, got {message['role']!r}")
        _check_text(message["content"], f"{name}.content", place)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{place}: the last message must be the assistant's, got {messages[-1]['role']!r}")


__all__ = [
    "FORMS",
    "Record",
    "check_record",
    "check_records",
    "load_records",
    "read_jsonl",
    "record_form",
    "to_messages",
]
