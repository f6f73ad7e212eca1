"""A client's LoRA adapter as it is configured, and how PEFT's patterns and target lists name modules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..common import check_flag, check_number, require
from .other_names import ADAPTER_FIELDS, refuses_other_names

Value = TypeVar("Value")


@refuses_other_names(ADAPTER_FIELDS)
@dataclass(frozen=True)
class AdapterConfig:
    """One client's LoRA adapter; the fields mean what they mean in PEFT's ``LoraConfig``.

    Args:
        rank: Rank in every target module; 0 means that the client does not adapt it.
        alpha: LoRA alpha; the scale is alpha / rank, or alpha / sqrt(rank) with ``use_rslora``.
        dropout: Probability with which an input element of the LoRA branch is dropped in training.
        use_rslora: Rank-stabilised scaling (arXiv 2312.03732).
        rank_pattern, alpha_pattern: Other values for modules whose path matches ``(.*\\.)?key$``; first match wins.
        target_modules: The client's own targets (names, or one regex over the whole path); None: the cohort's.
    Raises:
        ValueError, TypeError: If a number is out of range, or a pattern is no regular expression.
    Example:
        >>> adapter = flora.AdapterConfig(rank=8, alpha=16, rank_pattern={"v_proj": 4})
        >>> adapter.rank_of("layers.0.self_attn.v_proj"), adapter.scaling_of("layers.0.self_attn.q_proj")
        (4, 2.0)
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    target_modules: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        check_number("rank", self.rank, 0, whole=True)
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(2 * self.rank))
        check_number("alpha", self.alpha, 0)
        check_number("dropout", self.dropout, 0)
        require(self.dropout < 1, f"dropout must be below 1, got {self.dropout}")
        check_flag("use_rslora", self.use_rslora)
        for field, whole in (("rank_pattern", True), ("alpha_pattern", False)):
            patterns = getattr(self, field)
            if not isinstance(patterns, Mapping | None):
                raise TypeError(f"{field} must map patterns of module paths to numbers, got {patterns!r:.80}")
            for key, number in (patterns or {}).items():
                check_number(f"{field}[{key!r}]", number, 0, whole=whole)
                _check_pattern(field, key)
        if self.target_modules is not None:
            check_targets(self.target_modules)

    def rank_of(self, module: str) -> int:
        """The rank in one module."""
        return match_pattern(self.rank_pattern or {}, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The scale s in one module; 0 where the rank is 0."""
        rank, alpha = self.rank_of(module), match_pattern(self.alpha_pattern or {}, module, self.alpha or 0.0)
        if rank == 0:
            return 0.0
        return float(alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str, default: Sequence[str] | str) -> bool:
        """Return whether the client adapts a module: in its own target list, with a rank above 0."""
        wanted = self.target_modules if self.target_modules is not None else default
        return self.rank_of(module) > 0 and matches_target(wanted, module)


def check_targets(wanted: Sequence[str] | str) -> None:
    """Make sure that ``target_modules`` is a list of names, or a regex that compiles."""
    if isinstance(wanted, str):
        _check_pattern("target_modules", wanted)
    elif not isinstance(wanted, Iterable) or not all(isinstance(name, str) for name in wanted):
        raise TypeError(f"target_modules must be a list of names, a regex or 'all-linear', got {wanted!r:.80}")


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{field}: {pattern!r} is not a regular expression ({error}); write .* for any text and \\. for a dot"
        ) from None


def match_pattern(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first pattern that matches a module path, as PEFT reads rank_pattern and alpha_pattern."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def matches_target(wanted: Sequence[str] | str, module: str) -> bool:
    """Return whether target_modules names a module path: a list by name or suffix, a string as a regex over the
    path."""
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)
