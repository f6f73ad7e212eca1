"""What ``explain`` says of a target: backend, kernels, the way to fuse, tile configurations, and why.

Letters: K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from . import tuning
from .backends import resolve
from .linear import MultiLoRALinear

_KERNELS = {
    "reference": "torch, client by client",
    "triton": "Triton, all clients in one launch",
    "native": "C++, all clients in one call",
}


def describe(layer: MultiLoRALinear, group: Sequence[MultiLoRALinear]) -> dict[str, str]:
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
    return tuning.choices_for(device).told(layer.out_features, layer.in_features, layer.weight.dtype)


def _tiles(kernels: ModuleType, dtype: torch.dtype, targets: int) -> str:
    if not hasattr(kernels, "tiles"):
        return "none"
    return "; ".join(f"{op}: {tile}" for op, tile in kernels.tiles(dtype, targets).items())


__all__ = ["describe"]
