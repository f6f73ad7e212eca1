"""Nested states as JSON and tensors: each tensor is replaced by a reference to its name."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from .checks import require

_TENSOR = "$tensor"
_LONGEST_LABEL = 200
_NO_LABEL = re.compile(r"[\x00-\x1f\x7f\\/]")


def take_out(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """Replace every tensor in nested dicts and lists by its name among ``tensors``."""
    if isinstance(value, torch.Tensor):
        require(path not in tensors, f"two tensors of the state have one name: {path}")
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        require(all(isinstance(key, str) for key in value), f"the state's keys must be text, got {list(value)[:3]}")
        return {key: take_out(part, tensors, f"{path}/{_label(key)}".lstrip("/")) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [take_out(part, tensors, f"{path}/{index}") for index, part in enumerate(value)]
    return value


def _label(key: str) -> str:
    """A key as a part of a tensor's name: itself, or a digest of a name of a client that no tensor may have."""
    plain = key not in ("", ".", "..") and len(key.encode("utf-8", "surrogatepass")) <= _LONGEST_LABEL
    if plain and not _NO_LABEL.search(key):
        return key
    return f"~{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def put_in(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Undo ``take_out``."""
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: put_in(part, tensors) for key, part in value.items()}
    return [put_in(part, tensors) for part in value] if isinstance(value, list) else value


def on_device(value: Any, device: torch.device | str) -> Any:
    """A state with its tensors on a device."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = take_out(value, tensors)
    return put_in(skeleton, {name: tensor.to(device) for name, tensor in tensors.items()})


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become None."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
