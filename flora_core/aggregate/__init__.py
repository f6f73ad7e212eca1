"""Aggregation: strategies, their table, and the certificate of a round. Knows nothing of training."""

from __future__ import annotations

from . import average, product  # their strategies register themselves
from .certificate import Certificate, Deviation, certify, norm, sample_rows, total, write_deviation
from .strategy import STRATEGIES, Strategy, aggregate, get_strategy, register, table

__all__ = [
    "STRATEGIES",
    "Certificate",
    "Deviation",
    "Strategy",
    "aggregate",
    "average",
    "certify",
    "get_strategy",
    "norm",
    "product",
    "register",
    "sample_rows",
    "table",
    "total",
    "write_deviation",
]
