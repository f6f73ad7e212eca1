"""Messages between the server and a party.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters import RoundResult
from ..common import json_digest, tensor_digest
from ..config import TrainConfig

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Terms:
    """Terms of a run for every party; JSON values.

    Args:
        run: Identifies the run: a copy of the model made for another one is not touched.
        rounds, seed: The federation's.
        base: Digest of the base that everybody starts with (``base_digest``).
        target_modules, backend, fuse: As in ``attach``.
        rounding: How rounds are written into the weights.
        train: Fields of ``TrainConfig``; the party's own settings override them.
    """

    run: str
    rounds: int
    seed: int
    base: str
    target_modules: Sequence[str] | str | None = None
    backend: str = "auto"
    fuse: str = "auto"
    rounding: str = "low_bits"
    train: Mapping[str, Any] = field(default_factory=dict)

    def train_config(self) -> TrainConfig:
        """The settings of local training."""
        return TrainConfig(**{**self.train, "betas": tuple(self.train["betas"])})


def base_digest(model: Any) -> str:
    """A sha256 of a model's configuration and of 16384 values of each of its tensors."""
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    for name in ("dtype", "torch_dtype", "transformers_version"):
        config.pop(name, None)
    return json_digest([config, tensor_digest(model.named_parameters())])


def round_tensors(
    result: RoundResult, weights: Mapping[str, torch.Tensor], low_bits: Mapping[str, torch.Tensor]
) -> Tensors:
    """Lay out a round's change as it travels: ``module/A``, ``/B``, ``/coef``, or ``/weight`` and ``/low_bits``.

    Args:
        result: The round's result; its ``forms`` say how each module travels.
        weights, low_bits: The model after the round, from which dense modules are copied.
    """
    found: Tensors = {}
    for module, stack in result.base_delta.items():
        kind = result.forms[module][0]
        if kind == "dense":
            found |= dense_tensors(module, weights, low_bits)
        elif kind != "none":
            found |= {f"{module}/{name}": part for name, part in zip(("A", "B", "coef"), stack, strict=True)}
    return found


def dense_tensors(module: str, weights: Mapping[str, torch.Tensor], low_bits: Mapping[str, torch.Tensor]) -> Tensors:
    """A copy of a module's weight, with its low bits."""
    found = {f"{module}/weight": weights[module].clone()}
    return found | ({f"{module}/low_bits": low_bits[module].clone()} if module in low_bits else {})


def weights_digest(weights: Mapping[str, torch.Tensor], modules: Iterable[str]) -> dict[str, Any]:
    """Names of modules, and a digest of 16384 values of each of their weights."""
    names = sorted(modules)
    return {"modules": names, "digest": tensor_digest((name, weights[name]) for name in names)}
