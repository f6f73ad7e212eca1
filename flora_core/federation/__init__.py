"""Rounds of federated training: clients, the judge of their updates, the server, privacy, resuming."""

from __future__ import annotations

from .parties import Answers, RemoteFederation, metrics_of, spec_of
from .party import Site
from .protocol import Tensors, Terms
from .rebase import RebaseReport, rebase_adapter
from .result import FederationResult
from .rounds import Federation, FederationConfig

__all__ = [
    "Answers",
    "Federation",
    "FederationConfig",
    "FederationResult",
    "RebaseReport",
    "RemoteFederation",
    "Site",
    "Tensors",
    "Terms",
    "metrics_of",
    "rebase_adapter",
    "spec_of",
]
