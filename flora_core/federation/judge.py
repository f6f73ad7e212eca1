"""Judge untrusted updates: what a client sends is used only if it is what its configuration promised.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch

from ..adapters import ClientUpdate
from ..aggregation import Norm, clip, norm_of, outliers
from ..common import FLOAT_DTYPES, listed
from ..config import FederationConfig
from ..model import Cohort


def promised(cohort: Cohort, client: str) -> ClientUpdate:
    """Describe the update that a client's configuration promises: tensors without storage, and the scalings."""
    shapes = {m: (A_RK.to("meta"), B_RN.to("meta")) for m, (A_RK, B_RN) in cohort.bank.adapters(client).items()}
    return ClientUpdate(client, shapes, cohort.bank.scaling(client))


@dataclass
class Verdict:
    """A judged round.

    Args:
        good: The updates that may be used, in their order.
        refused: Client -> reason for each of the others.
        norms: Client -> the size of each good one, as it is used.
        clipped: Client -> its norm before it was clipped.
    """

    good: list[ClientUpdate]
    refused: dict[str, str]
    norms: dict[str, Norm] = field(default_factory=dict)
    clipped: dict[str, float] = field(default_factory=dict)


class Judge:
    """The only door through which a client's update becomes one that is used; each is read through once here.

    Args:
        config: ``max_norm``, ``outlier_factor``, ``clip_update`` and ``weights``.
        largest: The largest number that the target weights can hold, which bounds the norm too.
    """

    def __init__(self, config: FederationConfig, largest: float):
        self.config = config
        self.bound = largest if config.max_norm is None else min(largest, config.max_norm)

    def each(self, updates: Sequence[ClientUpdate], expected: Mapping[str, ClientUpdate]) -> Verdict:
        """Judge updates by themselves and weigh them, in the process where they are."""
        return self._weighed(judge_updates(updates, expected, self.bound))

    def round(
        self,
        updates: Sequence[ClientUpdate],
        expected: Mapping[str, ClientUpdate],
        norms: Mapping[str, Norm] | None = None,
    ) -> Verdict:
        """Judge a round: each update and all of them beside each other; clip and weigh the good ones.

        Args:
            updates: What the clients sent.
            expected: Client -> what it promised, for those who were asked.
            norms: Those of updates that were judged by themselves already.
        """
        verdict = judge_updates(updates, expected, self.bound, self.config.outlier_factor, norms)
        if self.config.clip_update is not None:
            verdict = _clipped(verdict, self.config.clip_update)
        return self._weighed(verdict)

    def _weighed(self, verdict: Verdict) -> Verdict:
        for update in verdict.good:
            update.weight = weight_of(update, self.config.weights)
        return verdict


def _clipped(verdict: Verdict, bound: float) -> Verdict:
    new = [clip(update, bound, verdict.norms[update.client]) for update in verdict.good]
    large = [old.client for old, one in zip(verdict.good, new, strict=True) if one is not old]
    norms = {**verdict.norms, **dict.fromkeys(large, Norm(bound, bound))}
    return Verdict(new, verdict.refused, norms, {name: verdict.norms[name].value for name in large})


def judge_updates(
    updates: Sequence[ClientUpdate],
    expected: Mapping[str, ClientUpdate],
    max_norm: float | None = None,
    outlier_factor: float | None = None,
    norms: Mapping[str, Norm] | None = None,
) -> Verdict:
    """Part the good updates from those that must not be used.

    Args:
        updates: What the clients of a round sent.
        expected: Client -> what ``promised`` gives for it; no other client may take part.
        max_norm: Bound on the norm of a client's product, see ``examine``.
        outlier_factor: A norm more than so many times the median of the good updates is refused too, where there are
            at least three.
        norms: Those of updates that were judged by themselves already, where they were trained.
    """
    sent = Counter(update.client for update in updates)
    good, refused, sizes = [], {}, dict(norms or {})
    for update in updates:
        name = update.client
        if name not in expected:
            refused[name] = "it was not asked to take part in this round"
        elif sent[name] > 1:
            refused[name] = f"it sent {sent[name]} updates in one round"
        elif name not in sizes:
            found = examine(update, expected[name], max_norm)
            if isinstance(found, str):
                refused[name] = found
            else:
                sizes[name] = found
        if name not in refused:
            good.append(update)
    sizes = {update.client: sizes[update.client] for update in good}
    if outlier_factor is not None:
        refused |= outliers({name: norm.value for name, norm in sizes.items()}, outlier_factor)
    good = [update for update in good if update.client not in refused]
    return Verdict(good, refused, {update.client: sizes[update.client] for update in good})


def examine(update: ClientUpdate, expected: ClientUpdate, max_norm: float | None = None) -> Norm | str:
    """Examine one update: its size if it may be used, else the reason why it must not.

    Args:
        update: What the client sent.
        expected: What it promised: modules, shapes and scalings.
        max_norm: Bound on ``sqrt(sum over modules ||s B_RN.T A_RK||_F^2)``; None bounds it by the largest float32,
            beyond which the weights themselves would overflow.
    Returns:
        Its norm, or the reason: a module that is unknown or missing, a shape, rank or scaling that the configuration
        denies, values that are not finite, or a product beyond the bound.
    """
    reason = _wrong_modules(update, expected)
    for module in expected.adapters:
        reason = reason or _wrong_factors(update, expected, module)
    if reason is not None:
        return reason
    if not _is_number(update.weight) or update.weight < 0:
        return f"its weight must be a finite number of at least 0, got {update.weight!r}"
    norm = norm_of(update)
    bound = torch.finfo(torch.float32).max if max_norm is None else max_norm
    if norm.value > bound:
        return f"the norm of its product is {norm.value:.3g}, above the bound of {bound:.3g} (max_norm)"
    return norm


def _wrong_modules(update: ClientUpdate, expected: ClientUpdate) -> str | None:
    unknown = sorted(set(update.adapters) - set(expected.adapters))
    if unknown:
        return f"it has modules that its configuration does not name: {listed(unknown, 3)}"
    missing = sorted(set(expected.adapters) - set(update.adapters))
    if missing:
        return f"it lacks modules that its configuration names: {listed(missing, 3)}"
    return None


def _wrong_factors(update: ClientUpdate, expected: ClientUpdate, module: str) -> str | None:
    pair = update.adapters[module]
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return (
            f"{module} must have two factors, A and B, got {len(pair) if isinstance(pair, (tuple, list)) else pair!r}"
        )
    for name, got, want in zip("AB", pair, expected.adapters[module], strict=True):
        if not isinstance(got, torch.Tensor) or got.dtype not in FLOAT_DTYPES:
            return (
                f"{name} of {module} must be a floating-point tensor, got {getattr(got, 'dtype', type(got).__name__)}"
            )
        if got.layout is not torch.strided or got.is_meta or got.dtype.itemsize > want.dtype.itemsize:
            return f"{name} of {module} must be a plain tensor of at most {want.dtype}, got {got.dtype}, {got.layout}"
        if got.shape != want.shape:
            shapes = f"{tuple(want.shape)} by its configuration, rank first, got {tuple(got.shape)}"
            return f"{name} of {module} must be {shapes}"
        bad = got.numel() - int(torch.isfinite(got).sum())
        if bad:
            return f"{name} of {module} is not finite: {bad} of {got.numel()} values are NaN or infinite"
    scaling, right = update.scaling.get(module), expected.scaling[module]
    if scaling is None or not _is_number(scaling) or not math.isclose(scaling, right, rel_tol=1e-6):
        return f"the scaling of {module} must be {right:g} by its configuration, got {scaling!r}"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def weight_of(update: ClientUpdate, weights: str | Mapping[str, float]) -> float:
    """A client's weight in its round, before normalising."""
    if isinstance(weights, Mapping):
        return float(weights[update.client])
    return 1.0 if weights == "uniform" else float(update.metrics[weights])
