"""Judge untrusted updates: what a client sends is used only if it is what its configuration promised.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real

import torch

from ..adapters import ClientUpdate
from ..aggregation import outliers, product_norm
from ..common import FLOAT_DTYPES, listed
from ..model import Cohort


def promised(cohort: Cohort, client: str) -> ClientUpdate:
    """Describe the update that a client's configuration promises: tensors without storage, and the scalings."""
    shapes = {m: (A_RK.to("meta"), B_RN.to("meta")) for m, (A_RK, B_RN) in cohort.bank.adapters(client).items()}
    return ClientUpdate(client, shapes, cohort.bank.scaling(client))


def judge_updates(
    updates: Sequence[ClientUpdate],
    expected: Mapping[str, ClientUpdate],
    max_norm: float | None = None,
    outlier_factor: float | None = None,
) -> tuple[list[ClientUpdate], dict[str, str]]:
    """Part the good updates from those that must not be used.

    Args:
        updates: What the clients of a round sent.
        expected: Client -> what ``promised`` gives for it; no other client may take part.
        max_norm: Bound on the norm of a client's product, see ``why_refused``.
        outlier_factor: A norm more than so many times the median of the good updates is refused too, where there are
            at least three.
    Returns:
        The good updates in their order, and client -> reason for each of the others.
    """
    sent = Counter(update.client for update in updates)
    good, refused = [], {}
    for update in updates:
        name = update.client
        if name not in expected:
            reason = "it was not asked to take part in this round"
        elif sent[name] > 1:
            reason = f"it sent {sent[name]} updates in one round"
        else:
            reason = why_refused(update, expected[name], max_norm)
        if reason is None:
            good.append(update)
        else:
            refused[name] = reason
    if outlier_factor is not None:
        refused |= outliers({update.client: product_norm(update) for update in good}, outlier_factor)
    return [update for update in good if update.client not in refused], refused


def why_refused(update: ClientUpdate, expected: ClientUpdate, max_norm: float | None = None) -> str | None:
    """Say why an update must not be used; None if it may.

    Args:
        update: What the client sent.
        expected: What it promised: modules, shapes and scalings.
        max_norm: Bound on ``sqrt(sum over modules ||s B_RN.T A_RK||_F^2)``; None bounds it by the largest float32,
            beyond which the weights themselves would overflow.
    Returns:
        The reason: a module that is unknown or missing, a shape, rank or scaling that the configuration denies,
        values that are not finite, or a product beyond the bound.
    """
    reason = _wrong_modules(update, expected)
    for module in expected.adapters:
        reason = reason or _wrong_factors(update, expected, module)
    if reason is not None:
        return reason
    if not _is_number(update.weight) or update.weight < 0:
        return f"its weight must be a finite number of at least 0, got {update.weight!r}"
    norm = product_norm(update)
    bound = torch.finfo(torch.float32).max if max_norm is None else max_norm
    if norm > bound:
        return f"the norm of its product is {norm:.3g}, above the bound of {bound:.3g} (max_norm)"
    return None


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
