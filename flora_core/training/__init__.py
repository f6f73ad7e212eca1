"""A cohort's training: steps of all clients in one batch, their optimizer, memory, and pauses."""

from __future__ import annotations

from . import planner
from .client import LocalClient
from .explanation import explain
from .optimizer import CohortAdamW
from .pause import Paused, stopping
from .planner import spread
from .trainer import CohortTrainer

__all__ = ["CohortAdamW", "CohortTrainer", "LocalClient", "Paused", "explain", "planner", "spread", "stopping"]
