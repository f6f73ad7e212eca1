"""Hostile files: safetensors headers that lie, and a seeded mutator of adapters and checkpoints."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

HUGE = (1 << 62, 1 << 63, (1 << 64) - 1, 1 << 200, 10**400)


def safetensors_bytes(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A file with this header (text, or what becomes JSON), these bytes behind it, and this claimed length."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: str = "F32") -> dict[str, Any]:
    """A header's entry, of one dimension unless given."""
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def _duplicate() -> bytes:
    one, two = (json.dumps(entry(0, end)) for end in (4, 8))
    return safetensors_bytes(f'{{"a": {one}, "a": {two}}}', bytes(8))


# What lies, and the words of its refusal.
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has 0 bytes"),
    "seven bytes": (bytes(7), "it has 7 bytes"),
    "length of 2^64": (struct.pack("<Q", 2**64 - 1) + b"{}", "claims 18446744073709551615 bytes"),
    "length of 99 MB": (safetensors_bytes("{}", bytes(9), 99_000_000), "claims 99000000 bytes, and may"),
    "length of 0": (safetensors_bytes("", b"", 0), "does not hold valid JSON"),
    "no JSON": (safetensors_bytes("{]", b""), "does not hold valid JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}', b""), "does not hold valid JSON"),
    "nested 100,000 deep": (safetensors_bytes("[" * 100_000, b""), "does not hold valid JSON"),
    "a list": (safetensors_bytes([], b""), "must hold a JSON object, got list"),
    "NaN": (safetensors_bytes('{"a": NaN}', b""), "NaN is not JSON"),
    "duplicate key": (_duplicate(), "the key 'a' comes twice"),
    "overlap": (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "without overlap or gap"),
    "same bytes twice": (safetensors_bytes({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "without overlap or gap"),
    "gap": (safetensors_bytes({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "without overlap or gap"),
    "offset behind the end": (safetensors_bytes({"a": entry(0, 1 << 40)}, bytes(8)), "take 1099511627776 bytes"),
    "offset of 2^63": (safetensors_bytes({"a": entry(0, 1 << 63)}, bytes(8)), "data_offsets must be two"),
    "negative offset": (safetensors_bytes({"a": entry(-4, 0)}, b""), "data_offsets must be two"),
    "offsets reversed": (safetensors_bytes({"a": entry(8, 4, [1])}, bytes(8)), "data_offsets must be two"),
    "three offsets": (
        safetensors_bytes({"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, bytes(4)),
        "data_offsets must be two",
    ),
    "offsets as text": (
        safetensors_bytes({"a": {**entry(0, 4), "data_offsets": ["0", "4"]}}, bytes(4)),
        "data_offsets must be two",
    ),
    "bytes left over": (safetensors_bytes({"a": entry(0, 4)}, bytes(8)), "its tensors take 4 bytes, and it has 8"),
    "absurd shape": (safetensors_bytes({"a": entry(0, 4, [1 << 40, 1 << 40])}, bytes(4)), "fits no memory"),
    "absurd shape of no bytes": (safetensors_bytes({"a": entry(0, 0, [0, 1 << 61])}, b""), "fits no memory"),
    "shape beyond 64 bits": (safetensors_bytes({"a": entry(0, 4, [10**400])}, bytes(4)), "shape must be at most 8"),
    "negative shape": (safetensors_bytes({"a": entry(0, 4, [-1, -1])}, bytes(4)), "shape must be at most 8"),
    "true as a size": (safetensors_bytes({"a": entry(0, 4, [True])}, bytes(4)), "shape must be at most 8"),
    "1000 dimensions": (safetensors_bytes({"a": entry(0, 4, [1] * 1000)}, bytes(4)), "shape must be at most 8"),
    "shape against offsets": (safetensors_bytes({"a": entry(0, 8, [3])}, bytes(8)), "takes 12 bytes, its "),
    "unknown dtype": (safetensors_bytes({"a": entry(0, 4, dtype="PICKLE")}, bytes(4)), "dtype must be one of F64"),
    "entry of another form": (safetensors_bytes({"a": 3}, b""), "must have dtype, shape and data_offsets alone"),
    "entry with more": (
        safetensors_bytes({"a": {**entry(0, 4), "code": "x"}}, bytes(4)),
        "must have dtype, shape and data_offsets alone",
    ),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}, b""), "__metadata__ must map text to text"),
    "a path for a name": (safetensors_bytes({"../../etc/passwd": entry(0, 4)}, bytes(4)), "and steps such as .."),
    "a root for a name": (safetensors_bytes({"/etc/passwd": entry(0, 4)}, bytes(4)), "and steps such as .."),
    "a backslash in a name": (safetensors_bytes({"..\\up": entry(0, 4)}, bytes(4)), "and steps such as .."),
    "a zero in a name": (safetensors_bytes({"a\0b": entry(0, 4)}, bytes(4)), "and steps such as .."),
    "no name": (safetensors_bytes({"": entry(0, 4)}, bytes(4)), "and steps such as .."),
    "a name of a megabyte": (safetensors_bytes({"a" * 1_000_000: entry(0, 4)}, bytes(4)), "1 to 512 bytes"),
}  # fmt: skip


def mutate(data: bytes, random: Random) -> bytes:
    """Change a few bytes of a file: flipped, cut, grown, moved, or within its JSON."""
    kind = random.randrange(8)
    place = random.randrange(len(data)) if data else 0
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data + random.randbytes(random.randrange(1, 64))
    if kind == 2:
        end = place + random.randrange(1, 64)
        return data[:place] + data[end:]
    if kind == 3:
        end = place + random.randrange(1, 64)
        return data[:end] + data[place:]
    changed = bytearray(data)
    for _ in range(random.randrange(1, 5) if data else 0):
        # Most of what can go wrong is at the beginning.
        at = random.randrange(min(len(data), 8 if kind == 4 else 600)) if kind < 7 else random.randrange(len(data))
        changed[at] = random.choice(b'0123456789{}[]:,"\\\xff\x00-eA') if kind == 5 else changed[at] ^ 1 << place % 8
    return bytes(changed)


def mutate_json(value: Any, random: Random) -> Any:
    """Change one value somewhere in a JSON value, or its key."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.9:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if random.random() < 0.15:
            del copy[key]  # pyright: ignore
        elif isinstance(copy, dict) and isinstance(key, str) and random.random() < 0.15:
            copy[random.choice(["../" + key, key * 3, "", "__metadata__", key.upper()])] = copy.pop(key)
        else:
            copy[key] = mutate_json(copy[key], random)  # pyright: ignore
        return copy
    others = [None, True, -1, 0, 1, 0.5, 1e308, "", "x", "..", [], {}, [value], {"a": value}, "F64", "BOOL", *HUGE]
    return random.choice(others)


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Change a file's bytes, or its header so that the length is right."""
    if random.random() < 0.5:
        return mutate(data, random)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return safetensors_bytes(mutate_json(header, random), data[8 + length :])


def overwrite(path: Path, data: bytes) -> None:
    """Other content for a file, in its place: ext4 writes a file that is emptied first to disk at once, in 7 ms."""
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate(len(data))


def tree(folder: Path) -> dict[str, float]:
    """Every entry below a folder with the time of its last change."""
    return {str(path): os.lstat(path).st_mtime_ns for path in sorted(folder.rglob("*"))}
