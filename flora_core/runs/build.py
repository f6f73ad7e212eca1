"""Make of a recipe what `Federation` needs: the clients with their examples, held-out records, model, tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common import atomic_write_bytes, atomic_write_json, folder_names, nearest, pick_device, pick_dtype, require
from ..data import Record, Split, split, split_names
from ..distributed import World, WorldError, shard_if_needed
from ..model import ClientSpec
from .events import Event
from .loading import load_model, load_tokenizer, model_folder

if TYPE_CHECKING:
    from ..config import Recipe


def build_run(recipe: Recipe, spread: bool = False) -> tuple[Any, Any, list[ClientSpec], list[Record]]:
    """Load data, tokenizer and model of a recipe, in the order of what fails fastest.

    Args:
        recipe: The run.
        spread: Whether all processes of torchrun call this, and may share the base as ``federation.base`` says.
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
        if spread and recipe.federation.base != "replicated" and World.current().size > 1:
            return _load_between(World.current(), recipe, folder, device, dtype), tokenizer
        return load_model(folder, device, dtype, recipe.trust_remote_code), tokenizer
    except WorldError:
        raise
    except OSError as error:
        raise OSError(f"model {recipe.model} could not be loaded from {folder}: {error}") from error


def _load_between(joined: World, recipe: Recipe, folder: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model that the processes may share; where they surely do, one process of a machine at a time."""
    here, turns = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    base = recipe.federation.base
    model: Any = None
    for turn in range(max(joined.barrier(turns)) if base == "sharded" else 1):
        if base == "auto" or turn == here:
            model = load_model(folder, torch.device("cpu"), dtype, recipe.trust_remote_code)
            model = model if shard_if_needed(model, base, joined, device) else model.to(device)
        joined.barrier()
    return model


def build_clients(recipe: Recipe) -> tuple[list[ClientSpec], list[Record]]:
    """Read and split a recipe's data; return the clients and the held-out records."""
    found = split(recipe)
    return specs_of(recipe, found), found.held_out


def specs_of(recipe: Recipe, found: Split) -> list[ClientSpec]:
    """Make the clients of a split.

    Raises:
        ValueError: If ``clients.overrides`` names another one.
    """
    names = list(found.train)
    for name in recipe.clients.overrides:
        require(name in names, f"clients.overrides names {name!r}, which is not a client; {nearest(name, names)}")
    return [
        _client(recipe, name, index, records, found.own.get(name))
        for index, (name, records) in enumerate(found.train.items())
    ]


def _client(
    recipe: Recipe, name: str, index: int, records: list[Record], own: list[Record] | None = None
) -> ClientSpec:
    override = recipe.clients.overrides.get(name)
    train = override.train if override and override.train else None
    return ClientSpec(name, records, recipe.clients.adapter(name, index), train, own)


def build_client(recipe: Recipe, name: str) -> ClientSpec:
    """Build one client; where each has a source of its own, no other's is read: they are on other machines.

    Raises:
        ValueError: If the recipe has no such client, or its data do not fit.
        OSError: If its file cannot be read.
    """
    found = split(recipe, name)
    return _client(recipe, name, split_names(recipe).index(name), found.train[name], found.own.get(name))


def save_inputs(event: Event, recipe: Recipe, clients: Sequence[ClientSpec], test_records: list[Record]) -> None:
    """When a run starts, keep beside its results the whole recipe and, of the demo, its data."""
    if event["event"] != "run_start" or recipe.out is None:
        return
    out = Path(recipe.out)
    atomic_write_json(out / "recipe.json", json.loads(json.dumps(asdict(recipe), default=str)))
    if recipe.data.path == "demo":
        folders = folder_names([spec.name for spec in clients], taken=("held-out",))
        for file, records in (*((folders[spec.name], spec.data) for spec in clients), ("held-out", test_records)):
            atomic_write_bytes(
                out / "data" / f"{file}.jsonl", "".join(json.dumps(dict(r)) + "\n" for r in records).encode()
            )
