"""Rows of data from wherever they lie: files of several kinds, folders, globs, lists, and objects of Python.

    JSON lines     one object a line                      place: a.jsonl, line 14
    JSON lists     [{...}, ...], on one line or many      place: a.json, line 14, record 3
    CSV, TSV       the first line names the columns       place: a.csv, line 14
    parquet, arrow by pyarrow, which ``datasets`` brings  place: a.parquet, row 14
    Python         iterables of dicts, ``datasets.Dataset``, a dict of columns; place: data, record 3

Text may be gzipped. Binary kinds and gzip are recognised by their first bytes, CSV and TSV by their suffix, and all
else is JSON. Lines and rows count from 1, records of a list from 0.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..common import KINDS, data_files, install_command, is_path, kind_of, missing

_BOM = b"\xef\xbb\xbf"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or spreadsheet",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
}
_LONGEST_CELL = (1 << 31) - 1


class Row(NamedTuple):
    """One row of a source: its place in error messages, and its fields."""

    place: str
    fields: Mapping[str, Any]


def read_rows(source: Any, name: str = "data") -> Iterator[Row]:
    """Read the rows of a source in their order.

    Args:
        source: A path of a file, a folder or a glob; a list of paths; or an iterable of dicts (generators and
            ``datasets.Dataset`` too) or a dict of columns.
        name: Names a source that is no file in places.
    Yields:
        Each row with its place, such as ``a.jsonl, line 14``.
    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If a parquet or arrow file is given, and no package that reads it is installed.
        ValueError: If a file is empty, damaged, or of another kind, with file and line.
        TypeError: If the source is none of these.

    Example:
        ``[row.fields["text"] for row in read_rows("corpus/*.jsonl.gz")]``
    """
    if is_path(source):
        for path in data_files(source):
            yield from _read_file(path)
    else:
        yield from _read_objects(source, name)


def _read_file(path: Path) -> Iterator[Row]:
    """Read one file by what it holds."""
    with open(path, "rb") as file:
        head = file.read(6)
    kind = kind_of(path)
    if head.startswith(b"PAR1"):
        return _parquet_rows(path)
    if head == b"ARROW1" or (head.startswith(b"\xff\xff\xff\xff") and kind == ".arrow"):
        return _arrow_rows(path, stream=head != b"ARROW1")
    if kind in (".parquet", ".arrow", ".feather"):
        raise ValueError(
            f"{path}: the file is empty" if not head else f"{path} is named {kind}, but holds something else"
        )
    data = _unpacked(path).removeprefix(_BOM)
    if not data.strip():
        raise ValueError(f"data file {path} is empty; it needs {KINDS}")
    _check_text(path, data)
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, data, "\t" if kind == ".tsv" else ",")
    return _list_rows(path, data) if _is_list(data) else _line_rows(path, data)


def _unpacked(path: Path) -> bytes:
    """Read a file, through gzip where its first bytes are gzip's."""
    data = path.read_bytes()
    if not data.startswith(b"\x1f\x8b"):
        if path.suffix.lower() == ".gz" and not _is_text(data[:1024]):
            raise ValueError(f"{path}: neither gzip, as its name says, nor text; copy the file again")
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip ({error}); copy the file again, or unpack it with gunzip") from None


def _is_text(start: bytes) -> bool:
    """Return whether a file's first bytes are UTF-8, of which the last character may be cut."""
    return len(start.decode("utf-8", "ignore").encode()) > len(start) - 4


def _check_text(path: Path, data: bytes) -> None:
    """Refuse kinds of files that are recognisable and not read."""
    for magic, kind in _FOREIGN.items():
        if data.startswith(magic):
            raise ValueError(f"{path} is {kind}; unpack or export it to {KINDS} (gzip is read as it stands)")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise ValueError(f"{path}, line 1: not UTF-8, but UTF-16 or UTF-32 or binary; save the file as UTF-8")


def _is_list(data: bytes) -> bool:
    return data.lstrip()[:1] == b"["


def _line_rows(path: Path, data: bytes) -> Iterator[Row]:
    """Read JSON lines."""
    # Bytes, not text, are split into lines: U+2028 ends a line of text, and JSON strings may hold it.
    for line, raw in enumerate(data.splitlines(), start=1):
        # Joined files keep the byte order mark of each.
        raw = raw.removeprefix(_BOM)
        if raw.strip():
            place = f"{path}, line {line}"
            text = _decode(raw, place)
            yield Row(place, _object(_parsed(_JSON.decode, place, text), place))


def _list_rows(path: Path, data: bytes) -> Iterator[Row]:
    """Read a JSON list item by item, so that each has its line."""
    text = _decode(data, str(path))
    at = _skip_blank(text, text.index("[") + 1)
    line, counted, index = 1, 0, 0
    if text.startswith("]", at):
        raise ValueError(f"data file {path} is empty: its list has no records")
    while not text.startswith("]", at):
        line += text.count("\n", counted, at)
        counted = at
        place = f"{path}, line {line}, record {index}"
        value, after = _parsed(_JSON.raw_decode, place, text, at)
        yield Row(place, _object(value, place))
        index += 1
        at = _next_item(text, _skip_blank(text, after), place)
    if text[at + 1 :].strip():
        raise ValueError(f"{path}: something follows the list; a JSON file holds one list, and JSON lines no list")


def _next_item(text: str, at: int, place: str) -> int:
    """Step over the comma after an item, to the next item or the end of the list."""
    if text.startswith("]", at):
        return at
    if not text.startswith(",", at):
        raise ValueError(f"{place}: after it the list has neither a comma nor its end; the file is cut off or damaged")
    at = _skip_blank(text, at + 1)
    if text.startswith("]", at):
        raise ValueError(f"{place}: malformed JSON: a comma after the last item of the list; remove it")
    return at


def _skip_blank(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = "" if ", line " in place else f", line {raw.count(10, 0, error.start) + 1}"
        raise ValueError(
            f"{place}{line}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None


def _parsed(parse: Callable[..., Any], place: str, text: str, *at: int) -> Any:
    """Parse JSON, with the place in each of its errors."""
    try:
        return parse(text, *at)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        hint = f"; give {KINDS}; JSON lines have one object a line" if _is_no_object(text) else ""
        hint = "; it holds zero bytes, of a damaged file or of UTF-16" if "\0" in text else hint
        raise ValueError(f"{place}: malformed JSON: {error.msg} at {line}column {error.colno}{hint}") from None
    except RecursionError:
        raise ValueError(f"{place}: its lists or objects are nested too deeply to be read; flatten them") from None
    except ValueError as error:
        too_long = "integer string conversion" in str(error)
        problem = "a number with more digits than can be read; write it as a string" if too_long else str(error)
        raise ValueError(f"{place}: {problem}") from None


def _is_no_object(text: str) -> bool:
    """Return whether a line does not begin as an object, or begins one that is written over several lines."""
    return text.strip() == "{" or not text.lstrip().startswith(("{", "["))


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys, each of which may stand once: json would drop the first of two in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object; keep one of them")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_pairs)


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a record must be a JSON object, got {type(value).__name__}")
    return value


def _csv_rows(path: Path, data: bytes, delimiter: str) -> Iterator[Row]:
    """Read CSV: each cell is text, an empty one the empty text."""
    text = _decode(data, str(path))
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        # All at once: the limit is the whole process's.
        rows = _csv_cells(path, text, delimiter)
    finally:
        csv.field_size_limit(limit)
    (_, header), *rest = rows
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"{path}, line 1: two columns are named {twice!r}; names of columns must differ")
    for line, cells in rest:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {line}: {len(cells)} cells, and the first line names {len(header)} columns; "
                "quote cells that hold commas or line ends"
            )
        yield Row(f"{path}, line {line}", dict(zip(header, cells, strict=True)))


def _csv_cells(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Split CSV into rows of cells, each with the line that it begins in; blank lines are left out."""
    if text.lstrip().startswith(("{", "[")):
        raise ValueError(f"{path} is named {kind_of(path)}, but holds JSON; name it .jsonl or .json")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for cells in reader:
            rows += [(line, cells)] if cells else []
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: malformed CSV: {error}") from None
    if len(rows) < 2:
        raise ValueError(f"data file {path} is empty: it needs a line of column names and at least one row")
    return rows


def _parquet_rows(path: Path) -> Iterator[Row]:
    _require_pyarrow(path)
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    try:
        with parquet.ParquetFile(path) as file:
            yield from _batch_rows(path, file.iter_batches())
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged parquet ({error}); copy or export the file again") from None


def _arrow_rows(path: Path, stream: bool) -> Iterator[Row]:
    """Read arrow's file format (feather too) or its stream format, which ``datasets`` saves."""
    _require_pyarrow(path)
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import ipc  # pyright: ignore[reportMissingImports]

    try:
        with pyarrow.memory_map(str(path)) as file:
            if stream:
                batches: Iterable[Any] = ipc.open_stream(file)
            else:
                opened = ipc.open_file(file)
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            yield from _batch_rows(path, batches)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged arrow file ({error}); copy or export it again") from None


def _batch_rows(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    count = 0
    for batch in batches:
        for fields in batch.to_pylist():
            count += 1
            yield Row(f"{path}, row {count}", fields)
    if not count:
        raise ValueError(f"data file {path} is empty: it has no rows")


def _require_pyarrow(path: Path) -> None:
    """Check that pyarrow is there before its file is opened.

    Raises:
        ImportError: With the command that installs it.
    """
    try:
        import pyarrow  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{path} holds {kind_of(path).lstrip('.') or 'parquet or arrow'} data, which needs pyarrow ({error}): run "
            f"{install_command(missing('data'))}, or export it as JSON lines"
        ) from error


def _read_objects(source: Any, name: str) -> Iterator[Row]:
    """Read rows that are objects of Python."""
    if isinstance(source, Mapping):
        source = _columns(source, name)
    elif hasattr(source, "iterrows"):
        raise TypeError(f"{name} is a data frame; pass datasets.Dataset.from_pandas(frame), or its rows as dicts")
    elif hasattr(source, "to_pylist"):
        source = source.to_pylist()
    elif not hasattr(source, "__iter__") and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        # A map-style data set: len() and items alone.
        source = map(source.__getitem__, range(len(source)))
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise TypeError(
            f"{name} must be a path, a list of paths, an iterable of dicts, a datasets.Dataset or a dict of columns, "
            f"got {type(source).__name__}"
        )
    for index, fields in enumerate(source):
        place = f"{name}, record {index}"
        if not isinstance(fields, Mapping):
            raise ValueError(f"{place}: a record must be a dict, got {type(fields).__name__}")
        yield Row(place, fields)


def _columns(source: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Turn a dict of columns into rows.

    Raises:
        TypeError: If it is not: one record, or a data set of several splits.
        ValueError: If the columns have different lengths.
    """
    splits = [str(key) for key, value in source.items() if hasattr(value, "column_names")]
    if splits:
        raise TypeError(f"{name} holds the splits {', '.join(splits)}; pass one of them, such as data[{splits[0]!r}]")
    single = [key for key, value in source.items() if isinstance(value, (str, bytes)) or not hasattr(value, "__len__")]
    if single or not source:
        got = f"{single[0]!r} is a {type(source[single[0]]).__name__}" if single else "it has no columns"
        raise TypeError(
            f"{name} is a dict, which must map columns to lists, and {got}; put a single record into a list"
        )
    lengths = {key: len(value) for key, value in source.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ValueError(f"{name}: columns must be of equal length, but {found}")
    return (dict(zip(source, values, strict=True)) for values in zip(*source.values(), strict=True))
