"""Read the header of a safetensors file from somebody else, and believe none of it before it adds up.

    8 bytes     length of the header, little-endian
    header      JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}
    the rest    the tensors, which must lie one behind another and fill the file

The safetensors library checks most of this too; it takes the last of two entries of one name in silence, and its texts
do not name the file. Nothing but the header is read, and never more of it than the limit.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checks import require
from .formatting import show_bytes

# The format's own dtypes of whole bytes.
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
# The format's own bound; a header takes about 120 bytes a tensor.
MAX_HEADER_BYTES = 100_000_000
_MAX_NAME, _MAX_SIZE = 512, 1 << 62
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header has it; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(
    path: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    max_header_bytes: int = MAX_HEADER_BYTES,
    links: bool = True,
) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.
        max_bytes: Refuse a larger file before anything of it is read.
        max_header_bytes: Refuse a larger header before it is read.
        links: Whether the file may be a link.
    Returns:
        Name -> what the header says of each tensor, in the order of their bytes.
    Raises:
        ValueError: With the file's name, for whatever does not add up: it is no plain file, is too large, is cut, or
            the header's JSON, names, dtypes, shapes or offsets are wrong.
    """
    path = Path(path)
    with open_plain(path, max_bytes, links=links) as file:
        size = os.fstat(file.fileno()).st_size
        require(size >= 8, f"{path} is not a whole safetensors file: it has {size} bytes, a header's length takes 8")
        length = int.from_bytes(file.read(8), "little")
        room = size - 8
        require(
            length <= min(room, max_header_bytes),
            f"{path} is not a whole safetensors file: its header claims {length} bytes, and may have at most "
            f"{min(room, max_header_bytes)}; save or copy it again",
        )
        header = file.read(length)
    return _checked(path, parse_json(path, header), room - length)


def open_plain(path: Path, max_bytes: int | None = None, *, links: bool = True) -> Any:
    """Open a file that must be a plain one (a pipe or device may hang, a link may lead out of the folder) and not too
    large.

    Args:
        path: The file.
        max_bytes: Its largest size.
        links: Whether it may be a link to a plain file, as in the cache of a model hub.
    Raises:
        ValueError: If it is not such a file; nothing was read then.
        OSError: If it cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if links else getattr(os, "O_NOFOLLOW", 0))
    allowed = "" if links else "link, "
    try:
        handle = os.open(path, flags)
    except OSError as error:
        require(error.errno != errno.ELOOP, f"{path} must be a plain file, not a {allowed}pipe, folder or device")
        raise
    # Asked of what was opened: the name may be given to another file at any time.
    info = os.fstat(handle)
    try:
        plain = stat.S_ISREG(info.st_mode)
        require(plain, f"{path} must be a plain file, not a {allowed}pipe, folder or device")
        require(
            max_bytes is None or info.st_size <= max_bytes,
            f"{path} has {show_bytes(info.st_size)}, more than the {show_bytes(max_bytes)} that it may have",
        )
    except ValueError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parse a JSON object in which no key comes twice, however deep it is nested.

    Raises:
        ValueError: With the file's name.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold valid JSON ({str(error)[:200]}); save or copy it again") from None
    require(isinstance(value, dict), f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        require(key not in found, f"the key {key[:80]!r} comes twice")
        found[key] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _checked(path: Path, header: Mapping[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    metadata = header.get("__metadata__", {})
    plain = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    require(plain, f"{path}: __metadata__ must map text to text")
    entries = {name: _entry(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    filled = 0
    for name, info in ordered.items():
        require(
            info.begin == filled,
            f"{path}: tensor {name[:80]!r} begins at byte {info.begin}, the one before it ends at {filled}: tensors "
            "must lie one behind another, without overlap or gap",
        )
        filled = info.end
    require(
        filled == data_bytes,
        f"{path} is not a whole safetensors file: its tensors take {filled} bytes, and it has {data_bytes} for them; "
        "save or copy it again",
    )
    return ordered


def _entry(path: Path, name: str, entry: Any) -> TensorInfo:
    where = f"{path}: tensor {name[:80]!r}"
    # The engine makes no path of a name, but another program that unpacks the file may.
    steps = not {"", ".", ".."}.isdisjoint(name.split("/"))
    require(
        len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME and not steps and not _CONTROL.search(name),
        f"{where}: a name must have 1 to {_MAX_NAME} bytes, no control characters, backslashes and steps such as ..",
    )
    fields = {"dtype", "shape", "data_offsets"}
    require(isinstance(entry, dict) and set(entry) == fields, f"{where} must have dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = isinstance(dtype, str) and dtype in ITEM_BYTES
    require(known, f"{where}: dtype must be one of {', '.join(ITEM_BYTES)}, got {str(dtype)[:40]!r}")
    require(
        _are_sizes(shape) and len(shape) <= 8, f"{where}: shape must be at most 8 whole numbers, got {_some(shape)}"
    )
    require(
        _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1],
        f"{where}: data_offsets must be two whole numbers in order, got {_some(offsets)}",
    )
    size = ITEM_BYTES[dtype]
    for extent in shape:
        # Without the zeros, which would let an absurd shape take no bytes.
        size *= max(extent, 1)
        require(size < _MAX_SIZE, f"{where}: a shape of {_some(shape)} fits no memory")
    size = 0 if 0 in shape else size
    begin, end = offsets
    require(
        end - begin == size,
        f"{where}: shape {tuple(shape)} of {dtype} takes {size} bytes, its offsets have {end - begin}",
    )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_SIZE for value in values)


def _some(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
