"""Split one data set over clients: every example goes to exactly one client, the same way for the same seed."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from random import Random
from typing import Any

from ..common import check_choice, check_name, check_number, derive, nearest, require

SCHEMES = ("iid", "shard", "dirichlet", "natural")
_TRIES = 100

Row = Mapping[str, Any]
Clients = dict[str, list[int]]


def partition(
    records: Sequence[Row],
    num_clients: int | None,
    scheme: str,
    *,
    seed: int,
    label: str = "category",
    alpha: float = 0.5,
    shards_per_client: int = 2,
    min_examples: int = 1,
    client_column: str = "client",
) -> Clients:
    """Split records over clients.

    Args:
        records: The data set.
        num_clients: Number of clients; None under "natural", where the column decides.
        scheme: "iid": at random, in equal parts. "shard": sorted by label, cut into ``shards_per_client`` pieces
            for each client, dealt at random (McMahan et al. 2017). "dirichlet": each label is divided in
            proportions drawn from Dirichlet(alpha) (Hsu et al. 2019). "natural": by ``client_column``.
        seed: Seed of everything random.
        label: Column whose values "shard" and "dirichlet" separate.
        alpha: Dirichlet concentration; small means clients with few labels each.
        shards_per_client: Shards that each client gets.
        min_examples: Fewest examples a client may have; Dirichlet draws are repeated until it holds.
        client_column: Column that names the client under "natural".
    Returns:
        Client name -> sorted indices into ``records``; disjoint, covering all.
    Raises:
        ValueError: If the scheme or the column is unknown, a record's column is null (with its place), or there are too
            few examples.
    """
    check_choice("scheme", scheme, SCHEMES)
    check_number("min_examples", min_examples, 0, whole=True)
    if scheme == "natural":
        parts = _natural(records, num_clients, client_column)
    elif num_clients is None:
        raise TypeError(f"scheme={scheme!r} needs num_clients, got None")
    else:
        _check_count(len(records), num_clients, max(min_examples, 1))
        if scheme == "iid":
            split = _iid(len(records), num_clients, seed)
        elif scheme == "shard":
            split = _shard(_labels(records, label), num_clients, shards_per_client, seed)
        else:
            split = _dirichlet(_labels(records, label), num_clients, alpha, min_examples, seed)
        parts = {f"client-{number:0{len(str(num_clients - 1))}d}": sorted(part) for number, part in enumerate(split)}
    poor = [f"{name} ({len(part)})" for name, part in parts.items() if len(part) < min_examples]
    require(
        not poor,
        f"clients with fewer than min_examples={min_examples} examples: {', '.join(poor[:10])}; lower min_examples, or "
        "leave their records out",
    )
    return parts


def partition_file(
    path: str | os.PathLike[str], records: Sequence[Row], split: str, *, id_column: str = "id", test: str = "test"
) -> tuple[Clients, list[int]]:
    """Read a split from a file {split name: {client: [id, ...], ..., "test": [id, ...]}}.

    Args:
        path: JSON file.
        records: The data set whose ``id_column`` holds the ids; ids that the split leaves out are left out.
        split: Name of the split in the file.
        id_column: Column of the ids.
        test: Key of the held-out ids; it may be missing.
    Returns:
        Client name -> indices into ``records`` in the file's order, and the held-out indices.
    Raises:
        ValueError: If the split or an id is unknown, or an id is given twice.
    """
    splits = _read_json(path)
    require(split in splits, f"{path} has no split {split!r}; {nearest(split, splits)}")
    table = _column_index(records, id_column)
    seen: dict[int, str] = {}
    parts: Clients = {}
    for name, ids in splits[split].items():
        parts[name] = []
        for value in ids:
            index = table.get(str(value))
            if index is None:
                raise ValueError(f"{path}, {split}, {name}: no record has {id_column}={value!r}")
            if index in seen:
                raise ValueError(f"{path}, {split}: {id_column}={value!r} is given to {seen[index]} and to {name}")
            seen[index] = name
            parts[name].append(index)
    held_out = parts.pop(test, [])
    return parts, held_out


def _check_count(num_records: int, num_clients: int, least: int) -> None:
    """Check that there are enough examples for all clients."""
    check_number("num_clients", num_clients, 1, whole=True)
    need = num_clients * least
    require(
        need <= num_records,
        f"{num_clients} clients need at least {need} examples ({least} each), got {num_records}; give more data, or "
        "take fewer clients (num_clients, in a recipe clients.count)",
    )


def _iid(num_records: int, num_clients: int, seed: int) -> list[list[int]]:
    """Deal shuffled indices in turn."""
    order = list(range(num_records))
    Random(derive(seed, "iid")).shuffle(order)
    return [order[client::num_clients] for client in range(num_clients)]


def _shard(labels: dict[str, list[int]], num_clients: int, shards_per_client: int, seed: int) -> list[list[int]]:
    """Sort by label, cut into shards whose sizes differ by at most one, deal them at random."""
    check_number("shards_per_client", shards_per_client, 1, whole=True)
    random = Random(derive(seed, "shard"))
    order = []
    for indices in labels.values():
        order += random.sample(indices, len(indices))
    count = num_clients * shards_per_client
    require(
        count <= len(order),
        f"{num_clients} clients with shards_per_client={shards_per_client} need at least {count} examples, "
        f"got {len(order)}; lower one of them",
    )
    shards = [order[number * len(order) // count : (number + 1) * len(order) // count] for number in range(count)]
    random.shuffle(shards)
    return [list(chain.from_iterable(shards[client::num_clients])) for client in range(num_clients)]


def _dirichlet(
    labels: dict[str, list[int]], num_clients: int, alpha: float, min_examples: int, seed: int
) -> list[list[int]]:
    """Divide each label in Dirichlet(alpha) proportions, drawing again while a client has too few."""
    check_number("alpha", alpha, 1e-6)
    for attempt in range(_TRIES):
        random = Random(derive(seed, "dirichlet", attempt))
        parts: list[list[int]] = [[] for _ in range(num_clients)]
        for indices in labels.values():
            order = random.sample(indices, len(indices))
            cuts = [round(len(order) * share) for share in accumulate(_proportions(num_clients, alpha, random))]
            for part, (start, stop) in zip(parts, pairwise([0, *cuts[:-1], len(order)]), strict=True):
                part += order[start:stop]
        if min(map(len, parts)) >= min_examples:
            return parts
    raise ValueError(
        f"none of {_TRIES} Dirichlet draws with alpha={alpha} gave each of {num_clients} clients at least "
        f"min_examples={min_examples} examples; raise alpha, or lower min_examples or the number of clients "
        "(num_clients, in a recipe clients.count)"
    )


def _proportions(count: int, alpha: float, random: Random) -> list[float]:
    """Draw from a symmetric Dirichlet."""
    draws = [random.gammavariate(alpha, 1.0) for _ in range(count)]
    if sum(draws) == 0.0:
        # A tiny alpha underflows; in its limit one client takes all.
        draws[random.randrange(count)] = 1.0
    return [draw / sum(draws) for draw in draws]


def _natural(records: Sequence[Row], num_clients: int | None, column: str) -> Clients:
    """Group by the column that names the client."""
    parts = _labels(records, column)
    for name, part in parts.items():
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"{_place(records[part[0]], part[0])}, column {column!r}: {error}") from None
    require(
        num_clients in (None, len(parts)),
        f"column {column!r} names {len(parts)} clients, got num_clients={num_clients}; leave it out "
        "(in a recipe clients.count)",
    )
    return parts


def _labels(records: Sequence[Row], column: str) -> dict[str, list[int]]:
    """Group indices by a column's value, values in sorted order."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[str(_value(record, index, column))].append(index)
    return dict(sorted(groups.items()))


def _column_index(records: Sequence[Row], column: str) -> dict[str, int]:
    """Map a column's values, which must differ, to indices."""
    table: dict[str, int] = {}
    for index, record in enumerate(records):
        value = str(_value(record, index, column))
        if value in table:
            first = table[value]
            places = f"{_place(records[first], first)} and {_place(record, index)}"
            raise ValueError(f"{places} have the same {column}={value!r}; ids must differ")
        table[value] = index
    return table


def _value(record: Row, index: int, column: str) -> object:
    """Read a column that every record must have."""
    place = _place(record, index)
    if column not in record:
        found = ", ".join(map(str, record)) or "none"
        raise ValueError(f"{place} has no column {column!r}; its columns: {found}")
    value = record[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        what = "null" if value is None else "empty"
        raise ValueError(f"{place}: column {column!r} is {what}; fill it in, or remove the record")
    if isinstance(value, (list, dict)) or value != value:
        raise ValueError(f"{place}: column {column!r} must be text or a number, got {value!r:.60}")
    return value


def _place(record: Any, index: int) -> str:
    """File and line of a record, or its number."""
    return getattr(record, "place", None) or f"record {index}"


def _read_json(path: str | os.PathLike[str]) -> dict[str, dict[str, list]]:
    """Read a partition file and check its nesting."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"partition file {path} does not exist (relative paths start at {Path.cwd()})")
    try:
        splits = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: malformed JSON: {error}") from None
    good = isinstance(splits, dict) and all(
        isinstance(split, dict) and all(isinstance(ids, list) for ids in split.values()) for split in splits.values()
    )
    require(good, f"{path} must be {{split: {{client: [id, ...]}}}}")
    return splits
