"""The base that an adapter belongs to: some values of its target weights, and how a model is compared with them.

An adapter of round t was trained on the base after the rounds before it. Its factors fit every base of these shapes,
so only the weights can say which one is right. 256 values of each weight are kept, evenly spaced, in the dtype that the
clients trained on. A checkpoint in another dtype is compared in the coarser of both. A round's low-rank
change reaches nearly every value, while the same sum made by another program differs in the last bits alone:

    ||found - kept|| <= tolerance ||kept||         over the values of all modules

    float64, float32    8 eps of float32: any larger difference is a change of the weights
    bfloat16, float16   eps / 20: one value in 500 rounded to its other side; sums rounded several times differ more

Letters: K in_features, N out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..common import FLOAT_DTYPES, require

_VALUES = 256


class Comparison(NamedTuple):
    """The distance of a base from the one of a record, and the largest that rounding explains."""

    distance: float
    tolerance: float

    @property
    def same(self) -> bool:
        """True where rounding explains the distance."""
        return self.distance <= self.tolerance


@dataclass(frozen=True)
class Base:
    """The base that an adapter was trained on.

    Args:
        name: The name or folder of the run's original base; None where it has none.
        round: The newest round that had changed the base by then; 0 is the original base.
        weights: Module -> values of its weight (N, K), from ``values_of``.

    Example:
        >>> from flora_core.adapters.base import Base, values_of
        >>> base = Base("owner/name", 0, values_of([("q_proj", torch.ones(2, 3))]))
        >>> base.distance(lambda module: torch.ones(2, 3))
        0.0
    """

    name: str | None = None
    round: int = 0
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def label(self) -> str | None:
        """The name in an adapter's config: no name that can be loaded where the base is not the original one."""
        if self.round == 0:
            return self.name
        return f"the base after round {self.round} of a run on {self.name or 'a base without a name'}, see README.md"

    def of(self, modules: Iterable[str]) -> Base:
        """The same base, for an adapter of these modules."""
        return replace(self, weights={module: self.weights[module] for module in modules if module in self.weights})

    def distance(self, weight_of: Callable[[str], torch.Tensor]) -> float:
        """``||found - kept|| / ||kept||`` over the values of all modules; see ``compare``."""
        return self.compare(weight_of).distance

    def compare(self, weight_of: Callable[[str], torch.Tensor]) -> Comparison:
        """Measure how far a base is from this one, in the coarser dtype of both.

        Args:
            weight_of: Gives a module's weight (N, K) in the base to compare, in any floating-point dtype.
        """
        difference = norm = eps = 0.0
        for module, kept in self.weights.items():
            found = values(weight_of(module))
            dtype = max(kept.dtype, found.dtype, key=lambda one: torch.finfo(one).eps)
            eps = max(eps, torch.finfo(dtype).eps)
            wanted, found = kept.to(dtype).double(), found.to(dtype).double()
            difference += float((found - wanted).square().sum())
            norm += float(wanted.square().sum())
        distance = (difference / norm) ** 0.5 if norm else float(difference > 0)
        return Comparison(distance, eps / 20 if eps > 1e-4 else 8 * torch.finfo(torch.float32).eps)

    def to_json(self) -> dict[str, Any]:
        """All but the values."""
        return {"name": self.name, "round": self.round}

    @classmethod
    def from_json(cls, value: Any, weights: Mapping[str, torch.Tensor], where: str = "the record of a base") -> Base:
        """Read what ``to_json`` gave, and check the values; ``where`` names the record in the error.

        Raises:
            ValueError: If it is anything else.
        """
        fine = isinstance(value, Mapping) and set(value) == {"name", "round"}
        fine = fine and isinstance(value["name"], str | None) and type(value["round"]) is int
        require(fine, f"{where} must hold name and round of an adapter's base, got {str(value)[:80]}; copy it again")
        for module, kept in weights.items():
            fine = isinstance(kept, torch.Tensor) and kept.dim() == 1 and kept.dtype in FLOAT_DTYPES
            require(fine, f"{where}: {module!r} must be values of a weight; copy it again")
        return cls(value["name"], value["round"], dict(weights))


def values(weight_NK: torch.Tensor) -> torch.Tensor:
    """At most 256 evenly spaced values of a weight, on the CPU."""
    row, column = (index.to(weight_NK.device) for index in place_of(*weight_NK.shape))
    return weight_NK.detach()[row, column].cpu()


def place_of(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the values that ``values`` takes of an N x K weight."""
    # An odd step: an even one may stay in one column.
    place = torch.arange(0, N * K, (N * K // _VALUES) | 1)
    return place // K, place % K


def values_of(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Module -> ``values`` of its weight (N, K)."""
    return {module: values(weight_NK) for module, weight_NK in weights}


def check_base(
    base: Base | None, weight_of: Callable[[str], torch.Tensor], adapter: str, given: str, advice: str = ""
) -> None:
    """Refuse a base that an adapter was not trained on; without a record nothing is known, and nothing is refused.

    Args:
        base: The adapter's record.
        weight_of: Gives a module's weight (N, K) in the base that is given.
        adapter, given: Names of both in the error.
        advice: Another remedy.
    Raises:
        ValueError: With the base that is needed, how far the given one is from it, and the remedy.
    """
    if base is None:
        return
    distance, tolerance = found = base.compare(weight_of)
    if found.same:
        return
    remedy = "give the base that it was trained on"
    if base.round:
        name = repr(base.name) if base.name else "its run's original base"
        needed = f"{name} as round {base.round} of its run left it"
        remedy = f"`flora adapter RUN --round ROUND --client NAME --out DIR` writes it for {name}, exactly"
    else:
        needed = f"{base.name!r} itself" if base.name else "a base that it does not name"
    raise ValueError(
        f"{adapter} was trained on {needed}, and {given} is another base: its weights are {distance:.1e} of their norm "
        f"away, where rounding explains {tolerance:.0e}; {remedy}{advice}"
    )
