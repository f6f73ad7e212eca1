"""The processes that torchrun starts: a world of them, moving states between them, a base in shards."""

from __future__ import annotations

import warnings
from typing import Any

from .sharding import ShardedBase, check_plain, check_training, is_sharded, shard_base, shard_if_needed, sharded
from .world import World, WorldError, session

__all__ = [
    "ShardedBase",
    "World",
    "WorldError",
    "check_plain",
    "check_training",
    "is_sharded",
    "session",
    "shard_base",
    "shard_if_needed",
    "sharded",
]

_RENAMED = {"RankError": WorldError, "Ranks": World, "ranks": World.current}


def __getattr__(name: str) -> Any:
    """Give names of the first edition, for one release."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    new = _RENAMED[name].__qualname__
    warnings.warn(f"{__name__}.{name} is {new} now; the old name goes with the next release", DeprecationWarning, 2)
    return _RENAMED[name]
