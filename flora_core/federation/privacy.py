"""Client-level differential privacy of the global model: one clip, one noisy sum a round, and what it has cost.

Each round draws every client by itself with probability q (Poisson sampling) and releases

    W += (sum_k w_k min(1, C / ||D_k||) D_k + N(0, (sigma C)^2)) / (q sum w),     D_k = s_k B_k A_k of all modules

with one joint Frobenius norm over all modules, fixed weights w_k <= 1 and a fixed denominator, so that adding or
removing a client changes the sum by at most C. The noise is on every element of every target weight, so a round goes
down dense. Epsilon is that of the accountant of dp-accounting for all releases so far, also those of rounds that were
redone after a crash.

Noise and draws come from the system's own generator: there is no seed that could be kept, logged or drawn from twice.
``docs/robustness.md`` says what is protected and what is not.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import ClientUpdate, RoundResult
from ..aggregation import Norm, Stack, Term, clip_factor, stack_of
from ..common import atomic_write_json, extras, parse_json, require
from ..config import Privacy

if TYPE_CHECKING:
    from .server import Server

LEDGER = "privacy.json"
_ORDERS = [*range(2, 65), 80, 96, 128, 192, 256, 512, 1024]
_ROWS = 1024
# One draw of Box and Muller in float64 gives its uniforms away where its result is known to the last bit; the sum of
# several does not (arXiv 2107.10138).
_SUMMED = 4


def _event(fraction: float, noise_multiplier: float, releases: int) -> Any:
    dp = accounting()
    gaussian = dp.GaussianDpEvent(noise_multiplier)
    one = gaussian if fraction == 1 else dp.PoissonSampledDpEvent(fraction, gaussian)
    return dp.SelfComposedDpEvent(one, releases)


def accounting() -> Any:
    """The module dp_accounting.

    Raises:
        ImportError: With what to install.
    """
    extras.require_extras("differential privacy", "privacy")
    import dp_accounting

    return dp_accounting


def _accountant() -> Any:
    accounting()
    from dp_accounting import rdp

    return rdp.RdpAccountant(orders=_ORDERS)


def spent(releases: int, fraction: float, noise_multiplier: float, delta: float) -> float:
    """Epsilon after so many releases, an upper bound by Renyi differential privacy; neighbours differ by one client."""
    if releases == 0:
        return 0.0
    return float(_accountant().compose(_event(fraction, noise_multiplier, releases)).get_epsilon(delta))


def calibrated(epsilon: float, releases: int, fraction: float, delta: float) -> float:
    """The smallest noise multiplier, to 1e-4, with which so many releases cost at most ``epsilon``."""
    dp = accounting()
    bracket = dp.LowerEndpointAndGuess(0.0, 1.0)
    noise = dp.calibrate_dp_mechanism(
        _accountant, lambda sigma: _event(fraction, sigma, releases), epsilon, delta, bracket_interval=bracket, tol=1e-4
    )
    return float(noise)


def secret_normals(count: int) -> torch.Tensor:
    """Standard normals in float64 from the system's own generator, by the method of Box and Muller."""
    pairs = -(-count * _SUMMED // 2)
    bits = torch.frombuffer(bytearray(os.urandom(16 * pairs)), dtype=torch.int64).view(2, pairs)
    uniform = (bits >> 11).bitwise_and(2**53 - 1).double() * 2.0**-53
    radius, angle = torch.sqrt(-2 * torch.log1p(-uniform[0])), 2 * math.pi * uniform[1]
    normals = torch.cat([radius * angle.cos(), radius * angle.sin()])
    return normals[: count * _SUMMED].view(_SUMMED, count).sum(0) / math.sqrt(_SUMMED)


def secret_draw(names: Sequence[str], fraction: float) -> list[str]:
    """Poisson sampling: each name by itself with this probability; the draw can be neither known nor repeated."""
    words = [int.from_bytes(os.urandom(7), "little") >> 3 for _ in names]
    return [name for name, word in zip(names, words, strict=True) if word * 2.0**-53 < fraction]


class PrivateSum:
    """The private sum that replaces a strategy, and the ledger of its releases.

    Args:
        privacy: How private.
        fraction, rounds: The federation's.
        weights: Client -> fixed weight; the largest counts as 1.
        home: The run's folder, where the book lies; None keeps it in memory.
    Raises:
        ImportError: Without dp-accounting.
    """

    def __init__(
        self, privacy: Privacy, fraction: float, rounds: int, weights: Mapping[str, float], home: Path | None = None
    ):
        accounting()
        self.privacy, self.fraction, self.home = privacy, fraction, home
        most = max(weights.values())
        self.weights = {name: weight / most for name, weight in weights.items()}
        self.denominator = fraction * math.fsum(self.weights.values())
        epsilon, sigma = privacy.epsilon, privacy.noise_multiplier
        self.sigma = calibrated(epsilon, rounds, fraction, privacy.delta) if epsilon else float(sigma or 0.0)
        self.releases: list[int] = []

    def open(self, rounds_done: int) -> None:
        """Read the book of a run that is resumed after so many rounds.

        Raises:
            ValueError: If it is missing or damaged, or has less in it than was released.
        """
        path = self.home / LEDGER if self.home else None
        if path is not None and path.is_file():
            releases = parse_json(path, path.read_bytes()).get("releases")
            fine = isinstance(releases, list) and all(type(number) is int for number in releases)
            require(fine, f"{path} is damaged: it must list the rounds that were released; put it back")
            self.releases = list(releases or [])
        require(
            len(set(self.releases)) >= rounds_done or not self.affordable,
            f"{path} has {len(self.releases)} releases, and {rounds_done} rounds are done: what the run has cost is "
            "not known any more; put the file back, or choose another out",
        )

    @property
    def affordable(self) -> bool:
        """Return whether one more release stays within epsilon, where that is bounded."""
        most = self.privacy.epsilon
        # The noise was calibrated by this same bound, to a tolerance of 1e-4 from below.
        return most is None or self._spent(len(self.releases) + 1) <= most * (1 + 1e-9)

    def _spent(self, releases: int) -> float:
        return spent(releases, self.fraction, self.sigma, self.privacy.delta)

    def report(self) -> dict[str, Any]:
        """Report the privacy spent, for events and reports."""
        facts = {"delta": self.privacy.delta, "noise_multiplier": self.sigma, "clip": self.privacy.clip}
        return {"epsilon": self._spent(len(self.releases)), "releases": len(self.releases), **facts}

    def sample(self, names: Sequence[str]) -> list[str]:
        """A round's clients, perhaps none."""
        return list(names) if self.fraction == 1 else secret_draw(names, self.fraction)

    def apply(
        self, server: Server, updates: Sequence[ClientUpdate], number: int, norms: Mapping[str, Norm]
    ) -> RoundResult:
        """Write a round's noisy sum into every target weight, one rounding, noise and all.

        ``norms`` are the sizes of the updates, from which each is clipped.

        The release is in the book, and on the disk, before any noise exists: a round that is redone after a crash is
        paid for again, with noise of its own.
        """
        began = time.perf_counter()
        self.releases.append(number)
        if self.home is not None:
            atomic_write_json(self.home / LEDGER, {**self.report(), "releases": self.releases})
        stacks, std = self.stacks(updates, norms), self.sigma * self.privacy.clip / self.denominator
        for module, weight in server.model.weights.items():
            _write(weight, server.model.low_bits.get(module), stacks.get(module), std)
        forms = {m: ("dense", w.numel() * w.element_size()) for m, w in server.model.weights.items()}
        size = sum(each for _, each in forms.values())
        clients = [update.client for update in updates]
        server.log.record(number, size, clients)
        up = {update.client: update.size_bytes for update in updates}
        down, seconds = dict.fromkeys(clients, size), {"write": time.perf_counter() - began}
        return RoundResult({}, forms=forms, up=up, down=down, seconds=seconds)

    def stacks(self, updates: Sequence[ClientUpdate], norms: Mapping[str, Norm]) -> dict[str, Stack]:
        """The clipped and weighted sum without noise, over the fixed denominator, as one stack a module."""
        terms: dict[str, list[Term]] = {}
        for update in updates:
            share = (
                self.weights[update.client] * clip_factor(norms[update.client], self.privacy.clip) / self.denominator
            )
            for module, (A_RK, B_RN) in update.adapters.items():
                terms.setdefault(module, []).append(Term(update.client, share, update.scaling[module], A_RK, B_RN))
        return {module: stack_of(parts) for module, parts in terms.items()}


def _write(weight_NK: torch.Tensor, low_NK: torch.Tensor | None, stack: Stack | None, std: float) -> None:
    """Add a stack and noise to a weight and its low bits in place, summed in float64, some rows at a time."""
    from flora_kernels.reference import join_master, split_master

    N, K = weight_NK.shape
    for first in range(0, N, _ROWS):
        rows = slice(first, min(first + _ROWS, N))
        old = weight_NK[rows] if low_NK is None else join_master(weight_NK[rows], low_NK[rows])
        noise = secret_normals(old.shape[0] * K).view(old.shape[0], K).to(old.device)
        total = old.double() + std * noise
        if stack is not None:
            A_PK, B_PN, coef_P = (part.double() for part in stack)
            total += (B_PN[:, rows].T * coef_P) @ A_PK
        if low_NK is None:
            weight_NK[rows] = total.to(weight_NK.dtype)
        else:
            weight_NK[rows], low_NK[rows] = split_master(total.float())
