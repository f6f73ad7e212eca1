"""A recipe as a run takes it: read, and its strategy loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..aggregation import get_strategy, load_strategy
from ..config import Recipe, load


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (see ``config.load``) and load its strategy."""
    found = load(recipe, overrides)
    use_strategy(found)
    return found


def use_strategy(recipe: Recipe) -> None:
    """Load a recipe's strategy and check its options.

    It is a step of its own because it needs torch, whose import takes seconds: whatever else is wrong with a recipe is
    found before.

    Raises:
        ValueError, TypeError: If the strategy's file or one of its options is not right.
    """
    recipe.strategy = load_strategy(recipe.strategy)
    get_strategy(recipe.strategy).check(recipe.federation.strategy_options)
