"""Updates that were refused, kept for inspection."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters import CONFIG, WEIGHTS, ClientUpdate
from ..common import atomic_dir, atomic_write_json, open_plain, write_safetensors
from .callable_clients import ROOM_BYTES, numbers_of

QUARANTINE, REASON = "quarantine", "reason.json"


def quarantine(
    home: Path,
    round: int,
    client: str,
    reason: str,
    answer: Any = None,
    expected: ClientUpdate | None = None,
    folder: str | None = None,
) -> Path:
    """Keep a refused update in quarantine, with the reason, for inspection: nothing reads it again.

    Args:
        home: The run's folder; the place is ``quarantine/<round>/<client>`` in it, whatever the client calls itself.
        round, client, reason: What goes into ``reason.json``.
        answer: What the client sent: an update, whose factors are kept as safetensors, or a folder, of which the two
            files of an adapter are copied. At most four times the size of what was promised is kept.
        expected: What was promised.
        folder: Name of its folder, for a client of the run.
    Returns:
        The folder.
    Raises:
        SaveError: If writing fails.
    """
    place = home / QUARANTINE / f"{round:04d}" / (folder or _folder_name(client))
    limit = 4 * (8 * numbers_of(expected) + ROOM_BYTES) if expected else ROOM_BYTES
    present = os.listdir(place) if place.is_dir() else []
    with atomic_dir(place, replaceable=present) as new:
        kept = _keep(answer, new, limit)
        atomic_write_json(new / REASON, {"round": round, "client": str(client), "reason": reason, "kept": kept})
    return place


def _folder_name(client: Any) -> str:
    """The client's name if it can be a folder's, else a digest of it: a client cannot choose a path."""
    name = str(client)
    if re.fullmatch(r"[\w-][\w.-]{0,99}", name, re.ASCII):
        return name
    return f"unnamed-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _keep(answer: Any, folder: Path, limit: int) -> list[str]:
    """Put what was sent into a folder if it is not too large; the names of the files."""
    if isinstance(answer, ClientUpdate):
        tensors = _tensors(answer)
        if not tensors or sum(t.numel() * t.element_size() for t in tensors.values()) > limit:
            return []
        # Clones: what was sent may share memory, which safetensors refuses.
        write_safetensors(folder / "update.safetensors", {name: t.clone() for name, t in tensors.items()})
        return ["update.safetensors"]
    if not isinstance(answer, (str, os.PathLike)):
        return []
    return [name for name in (CONFIG, WEIGHTS) if _copied(Path(answer) / name, folder / name, limit)]


def _copied(source: Path, target: Path, limit: int) -> bool:
    try:
        with open_plain(source, limit, links=False) as old:
            data = old.read(limit)
    except (OSError, ValueError):
        return False
    target.write_bytes(data)
    return True


def _tensors(update: ClientUpdate) -> dict[str, torch.Tensor]:
    """The tensors of an update that may be anything, under names of ours."""
    pairs = update.adapters.items() if isinstance(update.adapters, Mapping) else ()
    found = {}
    for module, factors in pairs:
        for number, factor in enumerate(factors if isinstance(factors, (tuple, list)) else ()):
            if isinstance(factor, torch.Tensor) and factor.layout is torch.strided and not factor.is_meta:
                found[f"{str(module)[:200]}/{number}"] = factor
    return found
