"""Aggregation: strategies, their table, and the certificate of a round. Knows nothing of training."""

from __future__ import annotations

from . import average, flora, flora_warm, frozen, redistribute  # noqa: F401 (their strategies register themselves)
from .certificate import Certificate, Deviation, certify, norm, sample_rows, total, write_deviation
from .strategy import STRATEGIES, Strategy, aggregate, get_strategy, load_strategy, register, table

__all__ = [
    "STRATEGIES",
    "Certificate",
    "Deviation",
    "Strategy",
    "aggregate",
    "certify",
    "get_strategy",
    "load_strategy",
    "norm",
    "register",
    "sample_rows",
    "table",
    "total",
    "write_deviation",
]
