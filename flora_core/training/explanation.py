"""Explain what runs: op, backend, kernel, way to fuse and tiles of each target, and why no faster one.

Letters: K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

from ..config import TrainConfig
from ..distributed import sharded
from ..model import MultiLoRALinear, attention, cohort_of
from ..ops import autotune, merging, resolve
from .static_steps import why_not

_KERNELS = {
    "reference": "torch, client by client",
    "triton": "Triton, all clients in one launch",
    "native": "C++, all clients in one call",
}


@dataclass(frozen=True)
class Explanation:
    """Result of ``explain``: one row per target and one line per decision about the whole model."""

    rows: tuple[dict[str, str], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        columns = list(self.rows[0]) if self.rows else []
        table = [columns, *([row[column] for column in columns] for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*self.notes, *lines])


def explain(model: nn.Module) -> Explanation:
    """Tell for every target which op, backend, kernel, way to fuse and tiles run and why, and which path is slower.

    Args:
        model: A model with a cohort attached.
    Returns:
        One row per target and notes on the whole model; ``print`` shows them as a table.
    Raises:
        ValueError: If the model has no cohort attached.
    Example:
        >>> cohort = flora.attach(model, clients, ["q_proj", "v_proj"])
        >>> explanation = flora.explain(model)
        >>> explanation.rows[0]["op"], explanation.rows[0]["ranks"]
        ('lora_linears with v_proj', '4,2,3')
    """
    cohort = cohort_of(model)
    _, reason = resolve(cohort.backend, "shrink", next(iter(cohort.layers.values())).weight)
    rows = tuple(
        {
            "module": path,
            "shape": f"{layer.out_features}x{layer.in_features} {str(layer.weight.dtype).removeprefix('torch.')}",
            "ranks": ",".join(str(rank) for rank in cohort.bank.modules[path].ranks.lengths),
            **_describe(layer, cohort.route.groups.get(path, (layer,))),
        }
        for path, layer in cohort.layers.items()
    )
    way, why = attention.way_of(model)
    packing = f"packed without padding, attention: {way} ({why})" if cohort.packs else "padded"
    head = {
        "linear": "hidden @ W^T in chunks, gradient written out",
        "model": "the model's own head in chunks: it transforms logits after the product",
    }[cohort.head.kind]
    against, base = why_not(cohort, TrainConfig()), sharded(model)
    notes = (
        f"batches: {packing}{f' ({cohort.packing_reason})' if cohort.packing_reason else ''}",
        *([] if base is None else [f"base: {base}"]),
        f"loss: {head}",
        f"backend: {reason}",
        f"CUDA graphs: {f'off ({against})' if against else 'on, for shapes that come again'}",
        f"merge: {merging.describe(next(iter(cohort.layers.values())).weight)}",
    )
    return Explanation(rows, notes)


def _describe(layer: MultiLoRALinear, group: Sequence[MultiLoRALinear]) -> dict[str, str]:
    """Op, backend, kernel, fuse and tiles of one target, in words; ``group`` holds those that share its input."""
    kernels, _ = resolve(layer.backend, "shrink", layer.weight)
    name = kernels.__name__.rsplit(".", 1)[-1]
    others = [other.path.rsplit(".", 1)[-1] for other in group if other is not layer]
    return {
        "op": f"lora_linears with {', '.join(others)}" if others else "lora_linear",
        "backend": name,
        "kernel": _KERNELS.get(name, name),
        "fuse": _fuse(layer),
        "tiles": _tiles(kernels, layer.weight.dtype, len(group)),
    }


def _fuse(layer: MultiLoRALinear) -> str:
    device = layer.weight.device
    if layer.fuse != "auto":
        return f"{layer.fuse} (fixed)"
    if device.type != "cuda":
        return f"separate (nothing is measured on a {device.type.upper()})"
    return autotune.choices_for(device).describe(layer.out_features, layer.in_features, layer.weight.dtype)


def _tiles(kernels: ModuleType, dtype: torch.dtype, targets: int) -> str:
    if not hasattr(kernels, "tiles"):
        return "none"
    return "; ".join(f"{op}: {tile}" for op, tile in kernels.tiles(dtype, targets).items())
