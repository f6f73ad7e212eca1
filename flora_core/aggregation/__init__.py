"""Aggregation: strategies, their table, and the certificate of a round. Knows nothing of training.

Example:
    >>> from flora_core.aggregation import BOTH, STRATEGIES, Stack, norm
    >>> [name for name, strategy in STRATEGIES.items() if strategy.trainable({}) != BOTH]
    ['ffa', 'rolora']
    >>> stack: Stack = torch.eye(2), torch.eye(2), torch.tensor([3.0, 4.0])
    >>> round(norm(stack), 6)
    5.0
"""

from __future__ import annotations

from . import average, flora, flora_warm, frozen, redistribute
from .certificate import Certificate, Deviation, certify, norm, sample_rows, total, write_deviation
from .downlink import DeltaLog, wire_dtype
from .global_adapter import as_stack
from .norms import Norm, clip, clip_factor, norm_of, outliers, product_norm
from .strategy import BOTH, STRATEGIES, Strategy, aggregate, combine, get_strategy, load_strategy, register, table
from .svd import balanced, full_rank, stack_svd
from .terms import Stack, Term, check_adapters, check_updates, check_weights, join_stacks, round_terms, stack_of

__all__ = [
    "BOTH",
    "STRATEGIES",
    "Certificate",
    "DeltaLog",
    "Deviation",
    "Norm",
    "Stack",
    "Strategy",
    "Term",
    "aggregate",
    "as_stack",
    "balanced",
    "certify",
    "check_adapters",
    "check_updates",
    "check_weights",
    "clip",
    "clip_factor",
    "combine",
    "full_rank",
    "get_strategy",
    "join_stacks",
    "load_strategy",
    "norm",
    "norm_of",
    "outliers",
    "product_norm",
    "register",
    "round_terms",
    "sample_rows",
    "stack_of",
    "stack_svd",
    "table",
    "total",
    "wire_dtype",
    "write_deviation",
]
