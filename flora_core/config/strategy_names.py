"""The names of the built-in strategies, to check a name without importing torch."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any

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


# What other programs and papers call the same rule: FedAvg of the two factors is what FedIT does.
_OTHER_NAMES = {
    "fedavg": "fedit",
    "average": "fedit",
    "mean": "fedit",
    "stack": "flora",
    "stacking": "flora",
    "zeropadding": "zero_pad",
    "ffalora": "ffa",
    "fedexlora": "fedex",
}


def unknown_strategy(name: Any, known: Iterable[str]) -> ValueError:
    """Return the error for a strategy that is not among the known ones, with the name that may be meant."""
    known, word = list(known), re.sub(r"[^a-z0-9_]", "", str(name).lower())
    close = difflib.get_close_matches(word, known, n=1)
    meant = _OTHER_NAMES.get(word.replace("_", ""), close[0] if close else None)
    hint = f"did you mean {meant!r}? " if meant else ""
    return ValueError(
        f"unknown strategy {name!r}; {hint}known: {', '.join(known)} (docs/strategies.md); "
        "one of your own is FILE.py:NAME"
    )


def check_strategy_name(name: str) -> None:
    """Check a strategy's name early; strategies of a user's own are known once `flora_core.aggregation` is imported.

    Raises:
        ValueError: With the nearest name and all others.
    """
    loaded = sys.modules.get("flora_core.aggregation")  # with strategies that a program registered
    known = STRATEGY_NAMES if loaded is None else sorted(loaded.STRATEGIES)
    if ":" not in name and name not in known:
        raise unknown_strategy(name, known)
