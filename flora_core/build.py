"""Make of a recipe what `Federation` needs: the clients with their examples, held-out records, model, tokenizer."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from .checks import nearest, require
from .cohort import ClientSpec
from .data.partition import partition, partition_file
from .data.records import Record, load_records
from .device import pick_device, pick_dtype
from .distributed import RankError, Ranks, ranks
from .files import atomic_write_bytes, atomic_write_json
from .history import Event
from .loading import load_model, load_tokenizer, model_folder
from .seeds import derive
from .sharding import hold_base

if TYPE_CHECKING:
    from .recipes import DataRecipe, Recipe

Parts = dict[str, list[Record]]


def build(recipe: Recipe, spread: bool = False) -> tuple[Any, Any, list[ClientSpec], list[Record]]:
    """Load data, tokenizer and model of a recipe, in the order of what fails fastest.

    Args:
        recipe: The run.
        spread: Whether all ranks of torchrun call this, and may share the base as ``federation.base`` says.
    Returns:
        model, tokenizer, clients (one `ClientSpec` with its records each), held-out records.
    Raises:
        ValueError, TypeError: If the data do not fit the recipe.
        OSError: If a file or the model cannot be read.
    """
    clients, test_records = build_clients(recipe)
    return *build_model(recipe, spread), clients, test_records


def build_model(recipe: Recipe, spread: bool = False) -> tuple[Any, Any]:
    """Load model and tokenizer of a recipe; ``spread`` as in ``build``."""
    device = pick_device(recipe.device)
    folder = model_folder(recipe.model)
    dtype = pick_dtype(recipe.dtype, device)
    try:
        tokenizer = load_tokenizer(folder, recipe.trust_remote_code)
        if spread and recipe.federation.base != "replicated" and ranks().size > 1:
            return _load_between(ranks(), recipe, folder, device, dtype), tokenizer
        return load_model(folder, device, dtype, recipe.trust_remote_code), tokenizer
    except RankError:
        raise
    except OSError as error:
        raise OSError(f"model {recipe.model} could not be loaded from {folder}: {error}") from error


def _load_between(joined: Ranks, recipe: Recipe, folder: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model that the ranks may hold between them; where they surely do, one process of a machine at a time."""
    here, turns = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    base = recipe.federation.base
    model: Any = None
    for turn in range(max(joined.meet(turns)) if base == "sharded" else 1):
        if base == "auto" or turn == here:
            model = load_model(folder, torch.device("cpu"), dtype, recipe.trust_remote_code)
            model = model if hold_base(model, base, joined, device) else model.to(device)
        joined.meet()
    return model


def build_clients(recipe: Recipe) -> tuple[list[ClientSpec], list[Record]]:
    """Read and split a recipe's data; return the clients and the held-out records."""
    parts, test_records = split_data(recipe)
    for name in recipe.clients.overrides:
        require(name in parts, f"clients.overrides names {name!r}, who is no client; {nearest(name, parts)}")
    return [_client(recipe, name, index, parts[name]) for index, name in enumerate(parts)], test_records


def _client(recipe: Recipe, name: str, index: int, records: list[Record]) -> ClientSpec:
    override = recipe.clients.overrides.get(name)
    adapter = recipe.clients.adapter(name, index)
    return ClientSpec(name, records, adapter, train=override.train if override and override.train else None)


def client_names(recipe: Recipe) -> list[str]:
    """Names of a recipe's clients; no data are read where each has a file of its own."""
    if isinstance(recipe.data.path, dict):
        return (recipe.clients.names or list(recipe.data.path))[: recipe.clients.count]
    return [spec.name for spec in build_clients(recipe)[0]]


def build_client(recipe: Recipe, name: str) -> ClientSpec:
    """Build one client; where each has a file of its own, no other's is read: they lie elsewhere.

    Raises:
        ValueError: If the recipe has no such client, or its data do not fit.
        OSError: If its file cannot be read.
    """
    data, names = recipe.data, client_names(recipe)
    require(name in names, f"the node's recipe has no client {name!r}; it has {', '.join(names)}")
    index = names.index(name)
    if not isinstance(data.path, dict):
        return build_clients(recipe)[0][index]
    part, path = list(data.path.items())[index]
    records, _ = _hold_out(_load(path, data), data, recipe.seed, part)
    records = _draw(records, data.per_client, recipe.seed, "train", name)
    require(len(records) > 0, f"client {name!r} has no examples in {path}; give it data")
    return _client(recipe, name, index, records)


def build_held_out(recipe: Recipe) -> list[Record]:
    """Read the held-out records for a server; of clients whose files lie elsewhere nothing is needed."""
    data = recipe.data
    if isinstance(data.path, dict) and not all(Path(path).is_file() for path in data.path.values()):
        return _draw(_load(data.test, data), data.test_items, recipe.seed, "test") if data.test is not None else []
    return build_clients(recipe)[1]


def split_data(recipe: Recipe) -> tuple[Parts, list[Record]]:
    """Return each client's records and the held-out ones, cut down to the numbers that the recipe asks for."""
    data, clients = recipe.data, recipe.clients
    if data.path == "demo":
        parts, test_records = _demo(recipe)
    elif isinstance(data.path, dict):
        parts, test_records = _one_file_each(data, data.path, recipe.seed)
    else:
        parts, test_records = _split_file(recipe, _load(data.path, data))
    if data.test is not None:
        test_records = _load(data.test, data)
    wanted = clients.count or (len(clients.names) if clients.names else len(parts))
    require(
        wanted <= len(parts),
        f"clients.count asks for {wanted} clients, and the data has {len(parts)} ({', '.join(list(parts)[:12])}); "
        "lower it, or set it to null for all of them",
    )
    names = clients.names or list(parts)
    parts = dict(zip(names, list(parts.values())[:wanted], strict=False))
    parts = {name: _draw(records, data.per_client, recipe.seed, "train", name) for name, records in parts.items()}
    for name, records in parts.items():
        require(len(records) > 0, f"client {name!r} has no examples; give it data, or fewer clients.count")
    return parts, _draw(test_records, data.test_items, recipe.seed, "test")


def _load(path: str, data: DataRecipe) -> list[Record]:
    """Read records; the columns that the recipe splits and groups by have a use."""
    return load_records(path, data.unknown, known=(data.label, data.client_column, data.id_column))


def _demo(recipe: Recipe) -> tuple[Parts, list[Record]]:
    from .data.demo import make_demo

    count = recipe.clients.count or len(recipe.clients.names or recipe.clients.ranks)
    with tempfile.TemporaryDirectory() as folder:
        made = make_demo(
            folder,
            clients=count,
            train_per_client=recipe.data.per_client or 40,
            test_items=recipe.data.test_items or 100,
            seed=recipe.seed,
        )
        return {name: load_records(path) for name, path in made.clients.items()}, load_records(made.test)


def _one_file_each(data: DataRecipe, paths: dict[str, str], seed: int) -> tuple[Parts, list[Record]]:
    """Read every client's own file; each client holds out the same fraction unless there is a test file."""
    parts, held_out = {}, []
    for name, path in paths.items():
        parts[name], held = _hold_out(_load(path, data), data, seed, name)
        held_out += held
    return parts, held_out


def _split_file(recipe: Recipe, records: list[Record]) -> tuple[Parts, list[Record]]:
    data = recipe.data
    if data.partitions is not None:
        # Without a split its error lists those of the file.
        parts, held = partition_file(data.partitions, records, data.split or "", id_column=data.id_column)
        named = {name: [records[i] for i in part] for name, part in parts.items()}
        return named, [records[i] for i in held]
    count = recipe.clients.count or len(recipe.clients.names or recipe.clients.ranks)
    rest, held_out = _hold_out(records, data, recipe.seed, "all")
    parts = partition(
        rest,
        None if data.partition == "natural" else count,
        data.partition,
        seed=derive(recipe.seed, "partition"),
        label=data.label,
        alpha=data.alpha,
        shards_per_client=data.shards_per_client,
        client_column=data.client_column,
    )
    return {name: [rest[i] for i in part] for name, part in parts.items()}, held_out


def _hold_out(records: list[Record], data: DataRecipe, seed: int, part: str) -> tuple[list[Record], list[Record]]:
    """Divide into training and held-out records, in the order of the file."""
    if data.test is not None or data.test_fraction == 0:
        return records, []
    size = max(1, round(len(records) * data.test_fraction)) if len(records) > 1 else 0
    chosen = set(Random(derive(seed, "held-out", part)).sample(range(len(records)), size))
    kept = [record for index, record in enumerate(records) if index not in chosen]
    return kept, [records[index] for index in sorted(chosen)]


def _draw(records: Sequence[Record], most: int | None, seed: int, *part: str) -> list[Record]:
    """Draw at most so many records, in their order."""
    if most is None or len(records) <= most:
        return list(records)
    return [records[i] for i in sorted(Random(derive(seed, "draw", *part)).sample(range(len(records)), most))]


def save_inputs(event: Event, recipe: Recipe, clients: Sequence[ClientSpec], test_records: list[Record]) -> None:
    """When a run starts, keep beside its results the whole recipe and, of the demo, its data."""
    if event["event"] != "run_start" or recipe.out is None:
        return
    out = Path(recipe.out)
    atomic_write_json(out / "recipe.json", json.loads(json.dumps(asdict(recipe), default=str)))
    if recipe.data.path == "demo":
        for name, records in (*((spec.name, spec.data) for spec in clients), ("held-out", test_records)):
            atomic_write_bytes(
                out / "data" / f"{name}.jsonl", "".join(json.dumps(dict(r)) + "\n" for r in records).encode()
            )
