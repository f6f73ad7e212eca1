"""The interface of an aggregation strategy, the table of them, and the one way to call them.

A third party adds a strategy in a file of its own (``docs/strategies.md`` has a whole one)::

    @register
    class Median(Strategy):
        '''One line on the rule: it is shown in the table.'''

        name = "median"

        def aggregate(self, updates, state, *, trim=0.1):
            return RoundResult(base_delta=...)
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..adapters import Adapters, ClientUpdate, RoundResult, TailPenalty
from ..common import nearest, require
from ..config import unknown_strategy
from .certificate import certify
from .downlink import smallest_form
from .terms import check_equal_ranks, check_same_modules, check_updates

BOTH = ("A", "B")


class Strategy:
    """One way to make a global model out of a round's updates. The docstring's first line is its rule.

    Attributes:
        name: What users call it.
        exact: Whether what it applies is the sum of p_k s_k B_k A_k itself.
        mixed_ranks: Whether clients may have different ranks in one module.
        mixed_modules: Whether clients may adapt different sets of modules.
        idle_safe: Whether a round in which no client trains leaves every client's effective model as it is, at any
            ranks that the strategy takes.
        paper: The name of the method and the paper that it is from; empty for one of your own.
        shared_start: Whether clients must start their first round from one common adapter (of which a smaller
            client takes the first rows), because factors are averaged separately.
    Example:
        >>> from flora_core.aggregation import Strategy, combine, round_terms, stack_of
        >>> class Largest(Strategy):
        ...     name = "largest"
        ...     def aggregate(self, updates, state):
        ...         terms = round_terms([max(updates, key=lambda update: update.weight)])
        ...         return flora.RoundResult({module: stack_of(parts) for module, parts in terms.items()})
        >>> combine(updates, Largest(), {}, {}).certificate.aggregation_error > 0
        True
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True
    mixed_modules: ClassVar[bool] = True
    idle_safe: ClassVar[bool] = True
    shared_start: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    def aggregate(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any], **options: Any) -> RoundResult:
        """Combine updates that were checked already.

        Args:
            updates: At least one; clients may adapt different modules; tensors of rank 0 are to be ignored.
            state: What this strategy returned as ``state`` last round; empty in the first.
            options: Keyword arguments named by the subclass; their names are checked against its signature.
        Returns:
            A result with base_delta, start, state and adapter; ``aggregate`` fills in the rest.
        """
        raise NotImplementedError

    def check_options(self, **options: Any) -> None:
        """Raise ``ValueError`` or ``TypeError`` for option values that make no sense; names are checked already."""

    def trainable(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Which factors the clients train in the round that starts from ``state``: "A", "B" or both."""
        return BOTH

    def penalty(
        self, state: Mapping[str, Any], client: str, ranks: Mapping[str, int], **options: Any
    ) -> TailPenalty | None:
        """Penalty that a client adds to its loss in the round that starts from ``state``; None for nothing."""
        return None

    def population_options(self, ranks: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """Options that follow from everybody who may ever take part: client -> module -> rank."""
        return {}

    def adapter_bytes(self, state: Mapping[str, Any], update: ClientUpdate, trained: Sequence[str]) -> int:
        """Bytes of the adapter that a round's client is sent beside the change of the base.

        Args:
            state: The state after the round.
            update: What the client sent.
            trained: The factors that the round trained.
        """
        return 0

    def next_adapter(
        self, state: Mapping[str, Any], client: str, ranks: Mapping[str, int], scaling: Mapping[str, float]
    ) -> Adapters | None:
        """Make a client's next starting point from the state alone, so that a run can resume without the result.

        Args:
            state: ``RoundResult.state`` of the last round.
            client: The client's name.
            ranks: Module -> the client's rank; modules of rank 0 are left out.
            scaling: Module -> the client's s.
        Returns:
            Module -> (A_RK, B_RN); a module that is not in it starts fresh; None if all do.
        """
        return None

    @property
    def rule(self) -> str:
        """The docstring's first line."""
        return (inspect.getdoc(self) or "").partition("\n")[0]

    @property
    def source(self) -> str:
        """The strategy's own ``paper``, not that of a class which it extends."""
        return vars(type(self)).get("paper", "")

    @property
    def options(self) -> list[str]:
        """Names of the keyword options that ``aggregate`` takes."""
        parameters = inspect.signature(self.aggregate).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]

    def check(self, options: Mapping[str, Any]) -> None:
        """Check names and values of options.

        Raises:
            ValueError or TypeError: For an option that is unknown (with the nearest name) or out of range.
        """
        for option in options:
            known = self.options
            require(option in known, f"strategy {self.name!r} has no option {option!r}; {nearest(option, known)}")
        self.check_options(**options)

    def check_fits(self, updates: Sequence[ClientUpdate]) -> None:
        """Refuse clients whose ranks or modules the strategy cannot take together; only shapes are looked at."""
        if not self.mixed_ranks:
            able = [other.name for other in _listed() if other.mixed_ranks]
            check_equal_ranks(updates, self.name, f"give these clients one rank, or use one of {', '.join(able)}")
        if not self.mixed_modules:
            able = [other.name for other in _listed() if other.mixed_modules]
            check_same_modules(updates, self.name, f"use one of {', '.join(able)}")


STRATEGIES: dict[str, Strategy] = {}
AnyStrategy = TypeVar("AnyStrategy", bound=type[Strategy])


def register(cls: AnyStrategy) -> AnyStrategy:
    """Add a ``Strategy`` subclass to the table (a class decorator).

    Raises:
        TypeError: If it is not a subclass of ``Strategy``.
        ValueError: If it has no name, or another strategy has it.
    Example:
        >>> from flora_core.aggregation import get_strategy, register
        >>> @register
        ... class Renamed(type(get_strategy("flora"))):
        ...     name = "renamed"
        >>> flora.aggregate(updates, "renamed").certificate.aggregation_error
        0.0
    """
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise TypeError(f"register takes a subclass of Strategy, got {cls!r}")
    require(bool(cls.name), f"{cls.__name__} must set name, what users will call the strategy")
    known = STRATEGIES.get(cls.name)
    same = known is None or (type(known).__module__, type(known).__qualname__) == (cls.__module__, cls.__qualname__)
    require(same, f"strategy {cls.name!r} is already registered by {type(known).__module__}; choose another name")
    STRATEGIES[cls.name] = cls()
    return cls


def _listed() -> list[Strategy]:
    return sorted(STRATEGIES.values(), key=lambda one: (not one.exact, one.name))


def table() -> str:
    """Describe the registered strategies, one a line: name, exactness, ranks, idle rounds, rule.

    Example:
        >>> from flora_core.aggregation import table
        >>> print(table()[:85])
        name        exact  mixed ranks  mixed modules  idle-safe  rule
        fedex       yes    no
    """
    yes_no = {True: "yes", False: "no"}
    rows: list[tuple[str, ...]] = [("name", "exact", "mixed ranks", "mixed modules", "idle-safe", "rule")]
    for one in _listed():
        flags = (one.exact, one.mixed_ranks, one.mixed_modules, one.idle_safe)
        rows.append((one.name, *(yes_no[flag] for flag in flags), one.rule))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def get_strategy(name: str) -> Strategy:
    """Look a strategy up by name.

    Raises:
        ValueError: If it is unknown; the message holds the nearest name and all of them.
    Example:
        >>> from flora_core.aggregation import get_strategy
        >>> get_strategy("fedit").mixed_ranks, get_strategy("flora").mixed_ranks
        (False, True)
    """
    if isinstance(name, str) and name in STRATEGIES:
        return STRATEGIES[name]
    raise unknown_strategy(name, sorted(STRATEGIES))


def load_strategy(text: str) -> str:
    """Give the name in ``FILE.py:NAME`` after running the file, which registers it; a plain name comes back as it is.

    Raises:
        ValueError: If there is no such file, or no strategy of this name is registered then.
    Example:
        >>> from flora_core.aggregation import load_strategy
        >>> load_strategy("flora")
        'flora'
    """
    path, colon, name = text.rpartition(":")
    if colon:
        spec = spec_from_file_location(Path(path).stem, path) if Path(path).is_file() else None
        if spec is None or spec.loader is None:
            raise ValueError(f"strategy {text!r} is FILE.py:NAME, and {path!r} is no Python file; give its path")
        spec.loader.exec_module(module_from_spec(spec))
    return get_strategy(name).name


def aggregate(
    updates: Sequence[ClientUpdate],
    strategy: str = "flora",
    state: Mapping[str, Any] | None = None,
    **options: Any,
) -> RoundResult:
    """Combine a round's updates into one change of the global model.

    The exact value is ``sum_k p_k s_k B_k A_k`` with p_k = n_k / sum n over the clients of the round, also for
    a module that some of them do not adapt (their part is zero there). How far the strategy is from it stands in
    ``result.certificate``.

    Args:
        updates: One ``ClientUpdate`` per client; ranks and sets of modules may differ.
        strategy: A name from the table (``docs/strategies.md``), or one of your own.
        state: ``RoundResult.state`` of the round before; None in the first round.
        options: The strategy's own options.
    Returns:
        What to add to the base, what each client starts from, the state to carry on, certificate and bytes.
    Raises:
        ValueError: For updates that do not fit together, an unknown strategy or option, the state of another
            strategy, or mixed ranks or modules where the strategy cannot take them.
    Deterministic: yes. Source: arXiv 2409.05976.
    Example:
        >>> result = flora.aggregate(updates, strategy="flora")
        >>> [(A_PK, B_PN, coef_P)] = result.base_delta.values()
        >>> coef_P, result.certificate.aggregation_error
        (tensor([0.5000, 0.5000, 0.7500, 0.7500, 0.7500], dtype=torch.float64), 0.0)
    """
    chosen = get_strategy(strategy)
    chosen.check(options)
    if not isinstance(state, Mapping | None):
        raise TypeError(f"state must be what RoundResult.state was, or None, got {type(state).__name__}")
    owner = (state or {}).get("strategy", strategy)
    require(owner == strategy, f"state must be that of strategy {strategy!r}, got {owner!r}; start with state=None")
    if isinstance(updates, (ClientUpdate, Mapping)) or not isinstance(updates, Iterable):
        told = "one alone; put it into a list" if isinstance(updates, ClientUpdate) else type(updates).__name__
        raise TypeError(f"updates must be a sequence of ClientUpdate, got {told}")
    updates = list(updates)
    check_updates(updates)
    chosen.check_fits(updates)
    return combine(updates, chosen, state or {}, options)


def combine(
    updates: Sequence[ClientUpdate], strategy: Strategy, state: Mapping[str, Any], options: Mapping[str, Any]
) -> RoundResult:
    """``aggregate`` for updates, state and options that were checked where they came in.

    Example:
        >>> from flora_core.aggregation import combine, get_strategy
        >>> combine(updates, get_strategy("flora"), state={}, options={}).certificate.aggregation_error
        0.0
    """
    trained, began = strategy.trainable(state), time.perf_counter()
    result = strategy.aggregate(updates, state, **options)
    result.state = {**result.state, "strategy": strategy.name}
    chosen_forms = {module: smallest_form(stack) for module, stack in result.base_delta.items()}
    result.base_delta = {module: stack for module, (stack, _) in chosen_forms.items()}
    result.forms = {module: form for module, (_, form) in chosen_forms.items()}
    done = time.perf_counter()
    result.certificate = result.certificate or certify(updates, result)
    result.seconds |= {"aggregate": done - began, "certify": time.perf_counter() - done}
    base = sum(form.size_bytes for form in result.forms.values())
    result.up = {one.client: _sent_bytes(one, trained) for one in updates}
    result.down = {one.client: base + strategy.adapter_bytes(result.state, one, trained) for one in updates}
    return result


def _sent_bytes(update: ClientUpdate, trained: Sequence[str]) -> int:
    """Bytes of the factors that were trained: a frozen one does not travel."""
    chosen = [BOTH.index(name) for name in trained]
    return sum(pair[i].numel() * pair[i].element_size() for pair in update.adapters.values() for i in chosen)
