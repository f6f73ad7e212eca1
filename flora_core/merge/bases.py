"""The comparison of a checkpoint with the base that adapters were trained on, where they carry values of its weights.

Letters: K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters import RECORD, Base, check_base, read_base
from .shards import read_tensor
from .sources import Adapter
from .targets import Target


def check_bases(folder: Path, adapters: Sequence[Adapter], targets: Mapping[str, Target]) -> Base | None:
    """Compare the weights of a checkpoint with the values that each adapter carries.

    Args:
        folder: The checkpoint's, for the error.
        adapters: From ``open_adapters``; one without values is not checked.
        targets: From ``match_targets``.
    Returns:
        What the adapters know of this base together; None unless all of them know it.
    Raises:
        ValueError: If an adapter was trained on another base; with the base, and with what rewrites the adapter.
    """
    of_module = {target.module: target for target in targets.values()}

    def weight_of(module: str) -> torch.Tensor:
        target = of_module[module]
        with open(target.entry.path, "rb", buffering=0) as file:
            weight = read_tensor(file, target.entry)
        return weight.T if target.transposed else weight

    known: list[Base] = []
    records = [read_base(adapter.folder) for adapter in adapters]
    for adapter, base in zip(adapters, records, strict=True):
        if base is None or any(_is_part(base, other) for other in known):
            continue
        advice = f" (without its {RECORD} an adapter is merged into any base whose shapes fit)"
        check_base(base.of(of_module), weight_of, f"adapter {adapter.name}", str(folder), advice)
        known.append(base)
    if not known or None in records:
        return None
    return replace(known[0], weights={module: kept for base in known for module, kept in base.weights.items()})


def _is_part(base: Base, other: Base) -> bool:
    """True where another record, already checked, has the same values: one round's adapters share them."""
    return all(m in other.weights and torch.equal(kept, other.weights[m]) for m, kept in base.weights.items())
