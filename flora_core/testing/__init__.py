"""Cases, input makers, oracles and the error budget: one set for the tests and benchmarks of every backend.

Example:
    >>> from flora_core.testing import DTYPES, LINEAR_FAULTS, LINEAR_SHAPES, MERGE_FAULTS, MERGE_SHAPES, NAME_OF
    >>> LINEAR_SHAPES[1].why, MERGE_SHAPES[1].why, NAME_OF[DTYPES["bf16"]]
    ('one token, alone', 'one row, one column of rank', 'bf16')
    >>> from flora_core.testing import DROPOUT_FAULTS, Results, make_linear, oracle_linear
    >>> DROPOUT_FAULTS[0], LINEAR_FAULTS[1], MERGE_FAULTS[0]
    ('mask one row off', 'scale twice', 'client missing')
    >>> results: Results = oracle_linear(make_linear(LINEAR_SHAPES[0]), fault=LINEAR_FAULTS[1])
    >>> list(results)
    ['y', 'dx', 'dA', 'dB']
"""

from .budget import Results, budget_ratio, budget_ratios, check_budget, nan_filled, saved_bytes, ulp
from .cases import DTYPES, NAME_OF, backends, in_dtypes, lay_out
from .dropout import keep_mask, philox4x32
from .linear import (
    DROPOUT_FAULTS,
    LINEAR_FAULTS,
    LINEAR_SHAPES,
    LinearCase,
    LinearInputs,
    check_linear,
    make_linear,
    oracle_linear,
    run_linear,
)
from .merge import MERGE_FAULTS, MERGE_SHAPES, MergeCase, MergeInputs, make_merge, oracle_merge
from .rounding import plain_product, plain_rounding

__all__ = [
    "DROPOUT_FAULTS",
    "DTYPES",
    "LINEAR_FAULTS",
    "LINEAR_SHAPES",
    "MERGE_FAULTS",
    "MERGE_SHAPES",
    "NAME_OF",
    "LinearCase",
    "LinearInputs",
    "MergeCase",
    "MergeInputs",
    "Results",
    "backends",
    "budget_ratio",
    "budget_ratios",
    "check_budget",
    "check_linear",
    "in_dtypes",
    "keep_mask",
    "lay_out",
    "make_linear",
    "make_merge",
    "nan_filled",
    "oracle_linear",
    "oracle_merge",
    "philox4x32",
    "plain_product",
    "plain_rounding",
    "run_linear",
    "saved_bytes",
    "ulp",
]
