"""A tiny Llama, a client with an adapter of rank 2, and what both need."""

from __future__ import annotations

from typing import Any

import torch

import flora_core as flora
from tests.support import models

TARGETS = ["q_proj", "v_proj"]


def client(name: str = "a", **adapter: Any) -> flora.ClientSpec:
    return flora.ClientSpec(name, adapter=flora.AdapterConfig(**{"rank": 2, **adapter}))


def llama(**fields: Any) -> Any:
    return models.tiny("llama", torch.float32, **fields)


def ids(length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.tensor([models.examples(seed, [length])[0].input_ids])
