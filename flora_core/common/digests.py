"""Digests of tensors and of JSON values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

import torch

# Values of each tensor that count. Another base differs nearly everywhere; reading all of a large one takes minutes.
_SAMPLED = 16384


def tensor_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A sha256 over names, shapes, dtypes and 16384 evenly spaced values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, math.ceil(flat.numel() / _SAMPLED))].cpu().contiguous()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """A sha256 of a value as JSON; what JSON does not know counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
