"""Settings of client-level differential privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..common import check_number, require

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Privacy:
    """How private a run is; give ``epsilon`` or ``noise_multiplier``.

    Args:
        clip: C, the norm down to which each client's update of all modules together is scaled.
        epsilon: What the whole run may cost at ``delta``; the noise is calibrated to it.
        noise_multiplier: sigma: the noise on the sum has the standard deviation sigma C.
        delta: At most so likely is epsilon exceeded; well below one over the number of clients.
    Raises:
        ValueError or TypeError: If a value is out of range.
    """

    clip: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5

    def __post_init__(self) -> None:
        one = (self.epsilon is None) != (self.noise_multiplier is None)
        require(one, "privacy needs epsilon or noise_multiplier, and not both: the one gives the other")
        for name in ("clip", "epsilon", "noise_multiplier", "delta"):
            value = getattr(self, name)
            if value is not None:
                check_number(f"privacy.{name}", value, 0)
                require(value > 0, f"privacy.{name} must be above 0, got 0")
        require(self.delta < 1, f"privacy.delta must be below 1, got {self.delta}")
