"""A checkpoint of safetensors shards as it lies on disk: which tensor has which bytes, without reading any of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..common import listed, parse_json, read_header, require

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
RECORD = "flora_merge.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Weights in any other form would still be the base's beside merged ones, and some loaders prefer them.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl", ".npz"}
# What describes the base or its training and not the result: an adapter's config makes loaders look for its weights.
_STALE = {
    "README.md", INDEX, RECORD, "adapter_config.json", "trainer_state.json", "trainer_config.yaml", "all_results.json",
    "train_results.json", "eval_results.json", "training_args.json",
}  # fmt: skip
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+")
_MAX_JSON = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its bytes are ``start:stop`` of the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in the order of their bytes; ``entries[0].start`` is where the header ends."""

    path: Path
    size: int
    entries: tuple[Entry, ...]

    @property
    def header_bytes(self) -> int:
        """Bytes before the first tensor."""
        return self.entries[0].start if self.entries else self.size


@dataclass(frozen=True)
class Checkpoint:
    """A folder's shards, its ``config.json`` and the other files that a copy of it needs."""

    folder: Path
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    others: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def index(self) -> bytes | None:
        """The index: the base's own, or one made of the headers of shards that came without; None for one file."""
        path = self.folder / INDEX
        if path.is_file():
            return path.read_bytes()
        if [shard.path.name for shard in self.shards] == [SINGLE]:
            return None
        weight_map = {entry.name: shard.path.name for shard in self.shards for entry in shard.entries}
        size = sum(entry.stop - entry.start for shard in self.shards for entry in shard.entries)
        return json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2).encode() + b"\n"

    @property
    def without_index(self) -> bool:
        """True where there are shards and no index."""
        return self.index is not None and not (self.folder / INDEX).is_file()

    @property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor by its name."""
        return {entry.name: entry for shard in self.shards for entry in shard.entries}

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def read_shard(path: Path) -> Shard:
    """Read a safetensors file's header."""
    header, size = read_header(path), path.stat().st_size
    data = size - max((info.end for info in header.values()), default=0)
    entries = (Entry(n, path, i.dtype, i.shape, data + i.begin, data + i.end) for n, i in header.items())
    return Shard(path, size, tuple(entries))


def read_tensor(file: Any, entry: Entry) -> torch.Tensor:
    """Read one whole tensor of an open file into memory of its own."""
    buffer = bytearray(entry.stop - entry.start)
    read_into(file, entry.start, memoryview(buffer))
    flat = torch.frombuffer(buffer, dtype=DTYPES[entry.dtype]) if buffer else torch.empty(0, dtype=DTYPES[entry.dtype])
    return flat.view(entry.shape)


def read_into(file: Any, start: int, view: memoryview) -> None:
    """Fill a buffer from a place in a file.

    Raises:
        ValueError: If the file ends before: somebody has shortened it since its header was read.
    """
    file.seek(start)
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        require(bool(count), f"{file.name} became shorter while it was read; leave it alone and start again")
        filled += count


def same_values(one: Entry, other: Entry) -> bool:
    """True where two tensors have the same numbers, of which one may be rounded to the dtype of the other.

    At most a few MiB of each are in memory.
    """
    if one.shape != other.shape or not {one.dtype, other.dtype} <= set(DTYPES):
        return (one.shape, one.dtype) == (other.shape, other.dtype) and _same_bytes(one, other)
    if one.dtype == other.dtype:
        return _same_bytes(one, other)
    pairs = zip(_numbers(one), _numbers(other), strict=True)
    return all(torch.equal(mine, theirs.to(mine)) or torch.equal(theirs, mine.to(theirs)) for mine, theirs in pairs)


def _same_bytes(one: Entry, other: Entry) -> bool:
    return all(mine == theirs for mine, theirs in zip(_pieces(one, 1), _pieces(other, 1), strict=True))


def _numbers(entry: Entry) -> Iterator[torch.Tensor]:
    for piece in _pieces(entry, DTYPES[entry.dtype].itemsize):
        yield torch.frombuffer(piece, dtype=DTYPES[entry.dtype])


def _pieces(entry: Entry, item_bytes: int) -> Iterator[bytearray]:
    """A tensor's bytes, the same number of items at a time for every dtype."""
    with open(entry.path, "rb", buffering=0) as file:
        for start in range(entry.start, entry.stop, item_bytes << 19):
            piece = bytearray(min(item_bytes << 19, entry.stop - start))
            read_into(file, start, memoryview(piece))
            yield piece


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a checkpoint's shards and check them against its index.

    Raises:
        FileNotFoundError: If a file is missing, or the weights are in a format that is not read.
        ValueError: If a file is damaged, or index and shards disagree.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"base {folder} is no folder; give the folder of a checkpoint that transformers saved")
    config_path = folder / CONFIG
    if not config_path.is_file():
        raise FileNotFoundError(
            f"base {folder} holds no {CONFIG}; give the folder of a whole checkpoint, as save_pretrained writes it"
        )
    names = _shard_names(folder)
    shards = tuple(read_shard(folder / name) for name in names)
    if (folder / INDEX).is_file():
        _check_index(folder, shards)
    else:
        _check_homes(folder, shards)
    files = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file() and not _is_hidden(folder, p)]
    rest = [name for name in files if name not in names]
    left_out = tuple(n for n in rest if n != INDEX and _is_stale(folder, n))
    others = tuple(name for name in rest if name not in left_out and name != INDEX)
    return Checkpoint(folder, shards, parse_json(config_path, config_path.read_bytes()), others, left_out)


def _is_stale(folder: Path, name: str) -> bool:
    """True where a file holds weights, or belongs to an adapter, a trainer or an earlier merge."""
    parents = list(Path(name).parents)[:-1]
    return (
        name in _STALE
        or _is_weights(name)
        or any(_TRAINER_FOLDER.fullmatch(part) for part in Path(name).parts[:-1])
        or any((folder / parent / "adapter_config.json").is_file() for parent in parents)
    )


def _is_hidden(folder: Path, path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_weights(name: str) -> bool:
    whole = name.removesuffix(".index.json")
    return Path(whole).suffix in _WEIGHTS


def _shard_names(folder: Path) -> list[str]:
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        require(
            not single.is_file(),
            f"base {folder} holds both {SINGLE} and {INDEX}, and loaders differ in which they take; remove one",
        )
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            found = sorted(path.name for path in folder.glob("*.safetensors"))
            raise FileNotFoundError(
                f"base {folder}: {INDEX} names {len(names)} shards, and {len(missing)} of them are missing: "
                f"{listed(missing)} (there are: {listed(found)}); fetch the checkpoint again"
            )
        _check_all_named(folder, names)
        return names
    if single.is_file():
        return [SINGLE]
    return _numbered_shards(folder) or _refuse_other_formats(folder)


def _check_all_named(folder: Path, names: Collection[str]) -> None:
    """Check that the index names every shard of its series: what is in another would be lost."""
    series = {(match["stem"], match["count"]) for name in names if (match := _NUMBERED.fullmatch(name))}
    there = [match for path in folder.glob("*.safetensors") if (match := _NUMBERED.fullmatch(path.name))]
    unnamed = sorted(m.string for m in there if (m["stem"], m["count"]) in series and m.string not in names)
    unnamed = [name for name in unnamed if read_header(folder / name)]
    require(
        not unnamed,
        f"base {folder}: {INDEX} names {len(names)} shards and not {listed(unnamed)}, whose tensors would be lost;"
        " fetch the checkpoint again, or remove the index and let it be made of the shards' headers",
    )


def _numbered_shards(folder: Path) -> list[str]:
    """The shards 1 to N of N that a folder without an index holds; empty where it has no such files.

    Raises:
        FileNotFoundError: If some of them are missing.
        ValueError: If there are several such models.
    """
    found: dict[tuple[str, int], set[int]] = {}
    for path in folder.glob("*.safetensors"):
        match = _NUMBERED.fullmatch(path.name)
        if match is not None and not path.name.startswith("adapter_model"):
            found.setdefault((match["stem"], int(match["count"])), set()).add(int(match["number"]))
    names = [f"{stem}-*-of-{count:05}.safetensors" for stem, count in found]
    require(
        len(found) <= 1,
        f"base {folder} holds no {INDEX} and several sets of shards: {listed(names)}; remove all but one of them",
    )
    for (stem, count), numbers in found.items():
        missing = [f"{stem}-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1) if n not in numbers]
        if missing:
            raise FileNotFoundError(
                f"base {folder} holds no {INDEX}, and {len(missing)} of the {count} shards that its files' names count"
                f" are missing: {listed(missing)}; fetch the checkpoint again"
            )
        return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in sorted(numbers)]
    return []


def _refuse_other_formats(folder: Path) -> NoReturn:
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise FileNotFoundError(
            f"base {folder} holds {pickled[0]}, a pickle, which could run code and is not read; load it with"
            " transformers where you trust it and save it again with save_pretrained, which writes safetensors"
        )
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    found = [name for name in found if not name.startswith("adapter_model")]
    hint = ""
    if len(found) == 1:
        hint = f"; it has {found[0]}: rename it to {SINGLE} if that is the complete model"
    elif found:
        hint = f"; it has {listed(found)}: load it with transformers and save it again, which writes the index"
    if (folder / "adapter_config.json").is_file():
        hint += "; it holds a PEFT adapter, which is no base: give the base that its config names"
    raise FileNotFoundError(f"base {folder} holds neither {SINGLE} nor {INDEX}{hint}")


def _weight_map(index: Path) -> dict[str, str]:
    require(index.stat().st_size <= _MAX_JSON, f"{index} has more than {_MAX_JSON} bytes; fetch the checkpoint again")
    found = parse_json(index, index.read_bytes()).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{index} must have a weight_map from tensors to files; fetch the checkpoint again")
    for name in found.values():
        plain = name == os.path.basename(name) and name.endswith(".safetensors") and not name.startswith(".")
        require(plain, f"{index}: {name[:80]!r} must be the name of a safetensors file in the same folder")
    return found


def _check_homes(folder: Path, shards: Iterable[Shard]) -> dict[str, str]:
    """Check that no tensor is in two shards: tensor -> file."""
    homes: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            other = homes.setdefault(entry.name, shard.path.name)
            require(
                other == shard.path.name,
                f"base {folder}: tensor {entry.name!r} is in two shards, {other} and {shard.path.name}",
            )
    return homes


def _check_index(folder: Path, shards: Iterable[Shard]) -> None:
    """Check that index and shards agree: every tensor in the one file that the index names."""
    expected, homes = _weight_map(folder / INDEX), _check_homes(folder, shards)
    wrong = [
        f"{name!r} is in {homes.get(name, 'none')}, the index says {expected.get(name, 'nothing of it')}"
        for name in sorted({*homes, *expected})
        if homes.get(name) != expected.get(name)
    ]
    require(
        not wrong,
        f"base {folder}: {INDEX} disagrees with the shards on {len(wrong)} tensors: {'; '.join(wrong[:3])};"
        " they are not of one download: fetch the checkpoint again",
    )
