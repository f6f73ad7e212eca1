"""Facts about the adapters of a merge for its record, and what of them a user should look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common import listed
from .shards import Checkpoint
from .sources import Adapter, Sum
from .targets import Fit


def adapter_facts(sums: Sum, fits: Mapping[str, Fit]) -> list[dict[str, Any]]:
    """Each adapter's name, share of the sum, ranks, scalings alpha / r, named base, and what it lacks."""
    shares = sums.shares
    return [
        {
            "name": one.folder.resolve().name,
            "share": shares[one.name],
            "ranks": sorted({shape[0] for shape in one.shapes.values()}),
            "scaling": sorted(set(one.scaling.values())),
            "base": one.base,
            "paths": fits[one.name].reading,
            "missing": list(fits[one.name].missing),
        }
        for one in sums.adapters
    ]


def find_notes(checkpoint: Checkpoint, sums: Sum, fits: Mapping[str, Fit]) -> list[str]:
    """Describe facts that leave a merge exact and may not be intended; after ``Sum.check``."""
    notes = _base_notes(checkpoint, sums.adapters)
    for one in sums.adapters:
        fit, where = fits[one.name], f"adapter {one.name}"
        if fit.reading:
            notes.append(f"{where}: module paths are read as the base's: {fit.reading}")
        if fit.missing:
            notes.append(f"{where} is partial: {len(fit.missing)} modules have no factors: {listed(fit.missing)}")
        if fit.doubt:
            notes.append(f"{where}: {fit.doubt}")
        if fit.copies:
            notes.append(f"{where}: {listed(fit.copies, 3)} are equal to the base's and were not needed")
        dead = sums.dead.get(one.name, [])
        if len(dead) == len(one.shapes):
            notes.append(
                f"{where} changes nothing: lora_A, lora_B or alpha is 0 in all of its modules; was it trained?"
            )
        elif dead:
            notes.append(f"{where}: {len(dead)} of its {len(one.shapes)} modules change nothing: {listed(dead, 3)}")
    if checkpoint.without_index:
        count = len(checkpoint.shards)
        notes.append(f"base {checkpoint.folder} has {count} shards without an index; it was made of their headers")
    return notes


def _base_notes(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> list[str]:
    """Adapters that name another base than each other, or than this one."""
    named = {one.name: one.base for one in adapters if one.base}
    if len(set(named.values())) > 1:
        which = [f"{name}: {base!r}" for name, base in named.items()]
        return [f"the adapters' configs name different bases ({listed(which)}), and all are merged into one"]
    own = checkpoint.config.get("_name_or_path") or None
    other = [name for name, base in named.items() if not _is_named(checkpoint.folder, own, base)]
    if not other:
        return []
    stated = f" ({own!r})" if own else ""
    note = (
        f"the config of adapter {listed(other)} names base {named[other[0]]!r}, and it is merged into"
        f" {str(checkpoint.folder)!r}{stated}; check that they are one"
    )
    return [note]


def _is_named(folder: Path, own: str | None, base: str) -> bool:
    """True where a base's name is this folder, its own name, or the repository of a hub's cache that it lies in."""
    if base == own or Path(base).resolve() == folder.resolve():
        return True
    names = {folder.resolve().name, *(part for part in folder.resolve().parts if part.startswith("models--"))}
    return Path(base).name in names or f"models--{base.replace('/', '--')}" in names
