"""Differences between two nested configurations, by dotted key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the fields that are not what they were, with both values where they are short."""
    now = as_json(now)
    changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return [_difference(name, was.get(name), now.get(name)) for name in changed]


def dotted(prefix: str, value: Any) -> dict[str, Any]:
    """Flatten nested mappings: each leaf by its dotted key, below a prefix."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    return {name: leaf for key, part in value.items() for name, leaf in dotted(f"{prefix}.{key}", part).items()}


def as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts as they read after a trip through JSON; other types become text."""
    return json.loads(json.dumps(facts, default=str))


def _difference(name: str, was: Any, now: Any) -> str:
    texts = [json.dumps(value) for value in (was, now)]
    return f"{name} differs" if max(map(len, texts)) > 60 else f"{name} was {texts[0]}, is {texts[1]}"
