"""A state on the disk: a folder that holds its tensors, the rest of it as JSON, and a sha256 of every file in it.

    state.safetensors   the tensors
    round.json          the state with names in the tensors' places, the round's events, a sha256 of every file

A state is nested dicts and lists of tensors and JSON values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common import finite, parse_json, put_in, read_header, require, take_out, write_safetensors
from .events import Event

STATE, ROUND = "state.safetensors", "round.json"
# What reading a damaged state may raise.
DAMAGE = (OSError, ValueError, KeyError, TypeError)


@dataclass
class Snapshot:
    """A round that is on disk: its number, the state after it, and its events."""

    round: int
    state: dict[str, Any]
    events: list[Event]


def taken_apart(state: Mapping[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A state as JSON with names for its tensors, and the tensors; a state that has no such form is an error."""
    tensors: dict[str, torch.Tensor] = {}
    return take_out(state, tensors), tensors


def write_snapshot(
    folder: Path, number: int, skeleton: Any, tensors: Mapping[str, torch.Tensor], events: Sequence[Event]
) -> None:
    """Write a state that was ``taken_apart`` into a folder that is being made, which may hold other files already."""
    write_safetensors(folder / STATE, tensors)
    body = {"round": number, "state": skeleton, "events": finite(events), "files": _digests(folder)}
    # Not sorted: the order of a state's entries may be that of a strategy's sums.
    (folder / ROUND).write_text(json.dumps({**body, "sha256": _sha256_of(body)}, allow_nan=False), "utf-8")


def read_snapshot(folder: Path, device: torch.device | str) -> Snapshot:
    """Read a snapshot, its tensors onto a device.

    Raises:
        OSError, ValueError, KeyError, TypeError: If anything in the folder is not what was saved (``DAMAGE``).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    body = read_body(folder)
    _check_all(folder, body["files"])
    read_header(folder / STATE)
    # Copies: the mapped file's addresses are aligned otherwise, which products may round differently for.
    try:
        tensors = {name: tensor.to(device, copy=True) for name, tensor in load_file(folder / STATE).items()}
    except SafetensorError as error:
        raise ValueError(f"{STATE} cannot be read: {error}") from error
    return Snapshot(body["round"], put_in(body["state"], tensors), body["events"])


def read_events(folder: Path) -> list[Event]:
    """Read the events alone; the snapshot's other files may be gone.

    Raises:
        OSError, ValueError, KeyError, TypeError: If they are not what was saved (``DAMAGE``).
    """
    return read_body(folder)["events"]


def check_files(folder: Path, part: str) -> None:
    """Check the files in one folder of a state's against what was saved.

    Raises:
        OSError, ValueError, KeyError, TypeError: If one is missing or another (``DAMAGE``).
    """
    files = read_body(folder)["files"]
    _check_all(folder, {name: digest for name, digest in files.items() if name.startswith(f"{part}/")})


def _check_all(folder: Path, files: Mapping[str, str]) -> None:
    for name, digest in files.items():
        require((folder / name).is_file(), f"{name} is not there")
        require(_sha256(folder / name) == digest, f"{name} is not what was saved")


def read_body(folder: Path) -> dict[str, Any]:
    """Read a state's JSON, with names in the tensors' places; none of its files.

    Raises:
        OSError, ValueError, KeyError, TypeError: If it is not what was saved (``DAMAGE``).
    """
    body = parse_json(folder / ROUND, (folder / ROUND).read_bytes())
    require(body.pop("sha256") == _sha256_of(body), f"{ROUND} is not what was saved")
    return body


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
