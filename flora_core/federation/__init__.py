"""Rounds of federated training: clients, the judge of their updates, the server, privacy, resuming."""

from __future__ import annotations

from .clients import Clients, Round, RunSetup, Trained
from .parties import Answers, Order, Parties, metrics_of, spec_of
from .party import Site
from .protocol import Tensors, Terms
from .rebase import RebaseReport, rebase_adapter
from .result import FederationResult
from .rounds import Federation, FederationConfig

__all__ = [
    "Answers",
    "Clients",
    "Federation",
    "FederationConfig",
    "FederationResult",
    "Order",
    "Parties",
    "RebaseReport",
    "Round",
    "RunSetup",
    "Site",
    "Tensors",
    "Terms",
    "Trained",
    "metrics_of",
    "rebase_adapter",
    "spec_of",
]
