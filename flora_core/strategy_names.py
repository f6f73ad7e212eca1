"""The names of the built-in strategies, to check a name without importing torch."""

from __future__ import annotations

import sys

from .checks import nearest, require

STRATEGY_NAMES = (
    "fedex",
    "fedit",
    "ffa",
    "flexlora",
    "flora",
    "flora_svd",
    "flora_warm",
    "hetlora",
    "raflora",
    "rolora",
    "zero_pad",
)


def check_strategy_name(name: str) -> None:
    """Check a strategy's name early; strategies of a user's own are known once `flora_core.aggregate` is imported.

    Raises:
        ValueError: With the nearest name and all others.
    """
    is_own = ":" in name or f"{__package__}.aggregate" in sys.modules
    require(
        is_own or name in STRATEGY_NAMES,
        f"unknown strategy {name!r}; {nearest(name, STRATEGY_NAMES)} (docs/strategies.md describes "
        f"{', '.join(STRATEGY_NAMES)}; one of your own is FILE.py:NAME)",
    )


__all__ = ["STRATEGY_NAMES", "check_strategy_name"]
