"""Every setting: adapters, training, federation, privacy, recipes; YAML files and overrides."""

from __future__ import annotations

from . import recipe
from .adapter import AdapterConfig, check_targets, match_pattern, matches_target
from .federation import ROUNDINGS, FederationConfig
from .privacy import Privacy
from .recipe import DataRecipe, Recipe, load
from .strategy_names import check_strategy_name, unknown_strategy
from .training import TrainConfig

__all__ = [
    "ROUNDINGS",
    "AdapterConfig",
    "DataRecipe",
    "FederationConfig",
    "Privacy",
    "Recipe",
    "TrainConfig",
    "check_strategy_name",
    "check_targets",
    "load",
    "match_pattern",
    "matches_target",
    "recipe",
    "unknown_strategy",
]
