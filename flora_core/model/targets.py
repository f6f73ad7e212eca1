"""The weights that an update is added to.

Letters: K in_features, N out_features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..common import FLOAT_DTYPES, nearest, require
from .layer import MultiLoRALinear
from .weights import is_conv1d, weight_view


def target_weights(model: torch.nn.Module, modules: Iterable[str]) -> dict[str, torch.Tensor]:
    """Find modules' weights as views (N, K) that can be written: a Conv1D's parameter is transposed.

    Raises:
        ValueError: If a module is unknown, not linear, quantised, or tied to another parameter; all unknown ones
            are listed at once.
    """
    known = {name: _original(module) for name, module in model.named_modules()}
    wanted = list(modules)
    unknown = [module for module in wanted if module not in known]
    linear = [name for name, module in known.items() if _is_linear(module)]
    require(
        not unknown,
        f"the model has no module {', '.join(map(repr, unknown))}; {nearest((unknown or [''])[0], linear)}",
    )
    owners = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return {module: _weight(module, known[module], owners) for module in wanted}


def _weight(name: str, module: Any, owners: Mapping[int, list[str]]) -> torch.Tensor:
    require(
        _is_linear(module),
        f"module {name!r} is a {type(module).__name__}; an adapter can be merged into nn.Linear and Conv1D only",
    )
    weight = module.weight
    plain = type(weight.data) is torch.Tensor and weight.dtype in FLOAT_DTYPES and weight.dim() == 2
    require(
        plain,
        f"module {name!r} has a quantised or sharded weight ({type(weight.data).__name__}, {weight.dtype}), which would"
        " lose the update; load the model in a floating-point dtype, or keep the adapter beside it",
    )
    tied = [other for other in owners[id(weight)] if other != f"{name}.weight"]
    require(
        not tied,
        f"module {name!r} shares its weight with {', '.join(tied)}, which the merge would change too;"
        " untie them first (tie_word_embeddings=False)",
    )
    return weight_view(module)


def _original(module: torch.nn.Module) -> torch.nn.Module:
    """The layer below a cohort's wrapper, which shares its parameters."""
    return module.original if isinstance(module, MultiLoRALinear) else module  # pyright: ignore[reportReturnType]


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)
