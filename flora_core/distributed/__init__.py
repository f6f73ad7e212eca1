"""The processes that torchrun starts: meeting, moving states, a base in shards."""

from __future__ import annotations

from .sharding import ShardedBase, check_plain, check_training, is_sharded, shard_base, shard_if_needed, sharded
from .world import RankError, Ranks, ranks, session

__all__ = [
    "RankError",
    "Ranks",
    "ShardedBase",
    "check_plain",
    "check_training",
    "is_sharded",
    "ranks",
    "session",
    "shard_base",
    "shard_if_needed",
    "sharded",
]
