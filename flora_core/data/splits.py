"""Split a recipe's data: each client's training records, the held-out ones, and which of those are a client's own.

Records are held out of each client's own where the data name the clients (a source for each, or a column), else of all
records before they are dealt. No client loses its last training record.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

from ..common import data_files, derive, listed, require
from .partition import partition, partition_file
from .records import Record, load_records

if TYPE_CHECKING:
    from ..config import DataRecipe, Recipe

Parts = dict[str, list[Record]]


@dataclass(frozen=True)
class Split:
    """A recipe's records.

    Args:
        train: Client -> its training records.
        held_out: All held-out records.
        own: Client -> those of ``held_out`` that are its own; a client may have none.
        count: Records that were read, used or not.
    """

    train: Parts
    held_out: list[Record]
    own: Parts = field(default_factory=dict)
    count: int = 0

    @property
    def unused(self) -> int:
        """Records that were read, and neither train nor are held out."""
        return self.count - sum(map(len, self.train.values())) - len(self.held_out)


def split(recipe: Recipe, client: str | None = None) -> Split:
    """Read and split a recipe's data, cut down to the numbers that it asks for.

    Args:
        recipe: The run.
        client: Read this client's records alone. Where each client has a source of its own, no other's is touched:
            they are on other machines.
    Raises:
        ValueError: If the data do not fit the recipe; clients that the data name are all used, or it is refused.
        OSError: If a file cannot be read.
    """
    if client is not None:
        names = split_names(recipe)
        require(client in names, f"the node's recipe has no client {client!r}; it has {', '.join(names)}")
        if isinstance(recipe.data.path, dict):
            return _own_part(recipe, list(recipe.data.path)[names.index(client)], client)
    found = _all_parts(recipe)
    if client is None:
        return found
    own = {client: found.own[client]} if client in found.own else {}
    return replace(found, train={client: found.train[client]}, own=own)


def split_names(recipe: Recipe) -> list[str]:
    """Names of a recipe's clients; no data are read where each has a source of its own."""
    if isinstance(recipe.data.path, dict):
        return list(client_names_for(recipe, list(recipe.data.path)).values())
    return list(split(recipe).train)


def split_held_out(recipe: Recipe) -> list[Record]:
    """Read the held-out records for a server; of clients whose files are on other machines nothing is needed."""
    path = recipe.data.path
    if isinstance(path, dict) and not all(map(exists, path.values())):
        return _test_alone(recipe)
    return split(recipe).held_out


def _all_parts(recipe: Recipe) -> Split:
    data, seed = recipe.data, recipe.seed
    found = _whole(recipe)
    names = client_names_for(recipe, list(found.train))
    found = replace(found, train=_renamed(found.train, names), own=_renamed(found.own, names))
    if data.test is not None:
        found = _with_test(found, data)
    train = {name: _draw(part, data.per_client, seed, "train", name) for name, part in found.train.items()}
    for name, part in train.items():
        require(len(part) > 0, f"client {name!r} has no examples; give it data, or leave it out")
    held_out = _draw(found.held_out, data.test_items, seed, "test")
    kept = set(map(id, held_out))
    own = {name: [record for record in part if id(record) in kept] for name, part in found.own.items()}
    return replace(found, train=train, held_out=held_out, own={name: part for name, part in own.items() if part})


def _own_part(recipe: Recipe, part: str, client: str) -> Split:
    """The records of the client whose source is ``part`` of ``data.path``."""
    data = recipe.data
    source = data.path[part] if isinstance(data.path, dict) else data.path
    read = load(source, data)
    records, own = hold_out(read, data, recipe.seed, part)
    if isinstance(data.test, dict) and client in data.test:
        own = load(data.test[client], data)
    train = _draw(records, data.per_client, recipe.seed, "train", client)
    require(len(train) > 0, f"client {client!r} has no examples in {source}; give it data")
    return Split({client: train}, own, {client: own} if own else {}, len(read))


def client_names_for(recipe: Recipe, found: Sequence[str]) -> dict[str, str]:
    """Name the clients.

    Args:
        recipe: Its ``clients`` may have names and a count.
        found: The names that the data have, or the numbered ones of a dealt data set.
    Returns:
        Name in the data -> name of the client, in the order of the run.
    Raises:
        ValueError: If there are more or fewer of them than the recipe asks for.
    """
    clients, data = recipe.clients, recipe.data
    wanted = clients.count or (len(clients.names) if clients.names else len(found))
    if wanted != len(found):
        key = "clients.count" if clients.count else "clients.names"
        fix = "lower it" if wanted > len(found) else "the records of the others would train nothing: remove them"
        raise ValueError(
            f"{key} asks for {wanted} clients, and the data has {len(found)} ({listed(found, 12)}); {fix}, or set "
            f"{key}=null for all of them"
        )
    if clients.names is None:
        return {name: name for name in found}
    if data.partition == "natural" and not isinstance(data.path, dict) and data.partitions is None:
        odd = sorted(set(clients.names) ^ set(found))
        require(
            not odd,
            f"clients.names must be the values of column {data.client_column!r} in the order that the run is to have; "
            f"missing or unknown: {listed(odd)}",
        )
        return {name: name for name in clients.names}
    return dict(zip(found, clients.names, strict=True))


def _test_alone(recipe: Recipe) -> list[Record]:
    """Read ``data.test`` alone; nothing where a client's part of it is not here."""
    data = recipe.data
    sources = list(data.test.values()) if isinstance(data.test, dict) else [data.test]
    if data.test is None or (isinstance(data.test, dict) and not all(map(exists, sources))):
        return []
    held_out = [record for source in sources for record in load(source, data)]
    return _draw(held_out, data.test_items, recipe.seed, "test")


def exists(source: Any) -> bool:
    """Return whether all files of a source are on this machine."""
    try:
        return bool(data_files(source))
    except FileNotFoundError:
        return False


def load(source: Any, data: DataRecipe) -> list[Record]:
    """Read records; the columns that the recipe splits and groups by have a use."""
    return load_records(source, data.unknown, known=(data.label, data.client_column, data.id_column))


def hold_out(records: Sequence[Record], data: DataRecipe, seed: int, part: str) -> tuple[list[Record], list[Record]]:
    """Divide into training and held-out records, in their order; one is left to train on."""
    if data.test is not None or data.test_fraction == 0 or len(records) < 2:
        return list(records), []
    size = min(max(1, round(len(records) * data.test_fraction)), len(records) - 1)
    chosen = set(Random(derive(seed, "held-out", part)).sample(range(len(records)), size))
    return _divide(records, chosen)


def _divide(records: Sequence[Record], chosen: Collection[int]) -> tuple[list[Record], list[Record]]:
    kept = [record for index, record in enumerate(records) if index not in chosen]
    return kept, [records[index] for index in sorted(chosen)]


def _whole(recipe: Recipe) -> Split:
    """Read and split all data, held-out records of the recipe's own test data aside."""
    data = recipe.data
    if data.path == "demo":
        return _demo(recipe)
    if isinstance(data.path, dict):
        return _of_each({name: load(source, data) for name, source in data.path.items()}, recipe)
    records = load(data.path, data)
    if data.partitions is not None:
        return _partition_file(recipe, data.partitions, records)
    by_client = data.hold_out == "client" or (data.hold_out == "auto" and data.partition == "natural")
    if by_client:
        return _of_each(_dealt(recipe, records), recipe)
    return _of_all(recipe, records)


def _demo(recipe: Recipe) -> Split:
    from .demo import make_demo

    count = recipe.clients.count or len(recipe.clients.names or recipe.clients.ranks)
    with tempfile.TemporaryDirectory() as folder:
        made = make_demo(
            folder,
            clients=count,
            train_per_client=recipe.data.per_client or 40,
            test_items=recipe.data.test_items or 100,
            seed=recipe.seed,
        )
        train, held_out = {name: load_records(path) for name, path in made.clients.items()}, load_records(made.test)
    return Split(train, held_out, count=sum(map(len, train.values())) + len(held_out))


def _of_each(parts: Parts, recipe: Recipe) -> Split:
    """Hold out the same fraction of every client's records."""
    divided = {name: hold_out(records, recipe.data, recipe.seed, name) for name, records in parts.items()}
    own = {name: held for name, (_, held) in divided.items()}
    train = {name: kept for name, (kept, _) in divided.items()}
    return Split(train, [record for held in own.values() for record in held], own, sum(map(len, parts.values())))


def _of_all(recipe: Recipe, records: list[Record]) -> Split:
    """Hold out a fraction of all records, then deal the others; a client whose last record it was gets it back."""
    data = recipe.data
    rest, held_out = hold_out(records, data, recipe.seed, "all")
    if data.partition != "natural":
        return Split(_dealt(recipe, rest), held_out, count=len(records))
    whole = _dealt(recipe, records)
    held = set(map(id, held_out))
    for part in whole.values():
        if all(id(record) in held for record in part):
            held.remove(id(part[0]))
    kept, held_out = _divide(records, [index for index, record in enumerate(records) if id(record) in held])
    own = {name: [record for record in part if id(record) in held] for name, part in whole.items()}
    return Split(_dealt(recipe, kept), held_out, own, len(records))


def _dealt(recipe: Recipe, records: list[Record]) -> Parts:
    """Deal records to the clients by the recipe's scheme."""
    data = recipe.data
    count = recipe.clients.count or len(recipe.clients.names or recipe.clients.ranks)
    parts = partition(
        records,
        None if data.partition == "natural" else count,
        data.partition,
        seed=derive(recipe.seed, "partition"),
        label=data.label,
        alpha=data.alpha,
        shards_per_client=data.shards_per_client,
        client_column=data.client_column,
    )
    return {name: [records[i] for i in part] for name, part in parts.items()}


def _partition_file(recipe: Recipe, file: str, records: list[Record]) -> Split:
    data = recipe.data
    # Without a split its error lists those of the file.
    parts, held = partition_file(file, records, data.split or "", id_column=data.id_column)
    train, held_out = {name: [records[i] for i in part] for name, part in parts.items()}, [records[i] for i in held]
    if data.hold_out == "client":
        require(
            not held,
            f"{file} names the held-out records of split {data.split!r}; leave data.hold_out out",
        )
        return replace(_of_each(train, recipe), count=len(records))
    return Split(train, held_out, count=len(records))


def _renamed(parts: Parts, names: dict[str, str]) -> Parts:
    return {new: parts[old] for old, new in names.items() if old in parts}


def _with_test(split: Split, data: DataRecipe) -> Split:
    """Put the recipe's own test data in the place of held-out records; of each client where it has some."""
    names = list(split.train)
    if isinstance(data.test, dict):
        odd = sorted(set(data.test) - set(names))
        require(not odd, f"data.test names {listed(odd)}, no client; the clients: {listed(names, 12)}")
        own = {name: load(source, data) for name, source in data.test.items()}
        held_out = [record for part in own.values() for record in part]
    else:
        held_out = load(data.test, data)
        # Only a natural partition's clients have the names that the column holds.
        names, column = (names if data.partition == "natural" else []), data.client_column
        own = {name: [record for record in held_out if str(record.get(column)) == name] for name in names}
    return replace(split, held_out=held_out, own=own, count=split.count - len(split.held_out) + len(held_out))


def _draw(records: Sequence[Record], most: int | None, seed: int, *part: str) -> list[Record]:
    """Draw at most so many records, in their order."""
    if most is None or len(records) <= most:
        return list(records)
    return [records[i] for i in sorted(Random(derive(seed, "draw", *part)).sample(range(len(records)), most))]
