"""The processes that torchrun starts: meeting, moving states, a base in shards."""

from __future__ import annotations

from .sharding import ShardedBase, check_plain, check_training, hold_base, is_sharded, shard_base, sharded
from .world import RankError, Ranks, ranks, session

__all__ = [
    "RankError",
    "Ranks",
    "ShardedBase",
    "check_plain",
    "check_training",
    "hold_base",
    "is_sharded",
    "ranks",
    "session",
    "shard_base",
    "sharded",
]
