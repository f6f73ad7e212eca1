"""Sizes of updates, and what is done about large ones: clip them, or leave out what is far from the others.

A client's size is the Frobenius norm of all its products ``s_k B_k A_k`` together, through R x R Gram matrices:

    ||B.T A||^2 = sum((A A.T) * (B B.T))                       no N x K matrix is made

Where products cancel, rounding may hide what is left, so a bound that must hold is taken from above: the rounding
error of the sum is at most ``gamma sum((|A| |A|.T) * (|B| |B|.T))``.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..adapters import ClientUpdate
from ..common import check_number, require

_EPS = torch.finfo(torch.float64).eps


class Norm(NamedTuple):
    """An update's size: the Frobenius norm of all its products, and a number that it surely does not exceed.

    Example:
        >>> from flora_core.aggregation import Norm, norm_of
        >>> size: Norm = norm_of(updates[0])
        >>> size.value <= size.bound <= 1.001 * size.value
        True
    """

    value: float
    bound: float


def norm_of(update: ClientUpdate) -> Norm:
    """Measure the products ``s B_RN.T A_RK`` of all modules together, in float64; infinite where float64 overflows.

    The bound is the norm plus its rounding error at most, whoever made the factors: above the norm by about 1e-11 of
    it, and by more only where the products nearly cancel.

    Example:
        >>> from flora_core.aggregation import norm_of
        >>> update = flora.ClientUpdate("a", {"q_proj": (torch.eye(4), torch.eye(4))}, {"q_proj": 3.0})
        >>> norm_of(update).value
        6.0
    """
    squares, bounds = [], []
    for module, (A_RK, B_RN) in update.adapters.items():
        A, B = A_RK.double(), B_RN.double()
        (R, K), N = A.shape, B.shape[1]
        # What cancels may leave a rounding error below zero.
        square = float(((A @ A.T) * (B @ B.T)).sum())
        square = 0.0 if square < 0 else square
        size = float(((A.abs() @ A.abs().T) * (B.abs() @ B.abs().T)).sum())
        # Each entry of a Gram matrix is off by at most K or N roundings, their product by one, the sum by R^2.
        error = 1.01 * (K + N + R * R + 4) * _EPS * size
        factor = update.scaling[module] ** 2
        squares.append(factor * square)
        bounds.append(factor * (square + error))
    return Norm(_root(squares), _root(bounds) * (1 + 8 * _EPS))


def _root(squares: Sequence[float]) -> float:
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf


def product_norm(update: ClientUpdate) -> float:
    """The Frobenius norm of all products ``s B_RN.T A_RK`` together; see ``norm_of``.

    Example:
        >>> from flora_core.aggregation import product_norm
        >>> product_norm(flora.ClientUpdate("a", {"q_proj": (torch.eye(4), torch.eye(4))}, {"q_proj": 3.0}))
        6.0
    """
    return norm_of(update).value


def norm_bound(update: ClientUpdate) -> float:
    """A number that the norm of all products surely does not exceed; see ``norm_of``."""
    return norm_of(update).bound


def clip_factor(norm: Norm, bound: float) -> float:
    """The largest factor of at most 1 with which a norm surely is within the bound; 0 for an infinite one.

    Raises:
        ValueError: If the bound is not above 0.
    Example:
        >>> from flora_core.aggregation import Norm, clip_factor
        >>> round(clip_factor(Norm(value=4.0, bound=4.0), 1.0), 6), clip_factor(Norm(value=0.5, bound=0.5), 1.0)
        (0.25, 1.0)
    """
    check_number("bound", bound, 0)
    require(bound > 0, "bound must be above 0, got 0")
    return 1.0 if norm.bound <= bound else bound / norm.bound * (1 - 8 * _EPS)


def clip(update: ClientUpdate, bound: float, norm: Norm | None = None) -> ClientUpdate:
    """Scale an update down, if it is too large, so that the norm of its products is at most ``bound``.

    B is scaled, in float32 at least, so that all modules keep their directions and their scalings; an update within
    the bound is given back as it is. ``norm`` is what ``norm_of`` gives, where it is known.

    Example:
        >>> from flora_core.aggregation import clip, norm_of
        >>> norm_of(clip(updates[0], 0.5)).bound <= 0.5
        True
    """
    factor = clip_factor(norm or norm_of(update), bound)
    if factor == 1.0:
        return update
    adapters = {}
    for module, (A_RK, B_RN) in update.adapters.items():
        dtype = torch.promote_types(B_RN.dtype, torch.float32)
        # Rounding B may not bring it back above the bound.
        adapters[module] = A_RK, (B_RN.double() * (factor * (1 - torch.finfo(dtype).eps))).to(dtype)
    return replace(update, adapters=adapters)


def outliers(norms: Mapping[str, float], factor: float) -> dict[str, str]:
    """Name the clients whose norm is more than ``factor`` times the median of the round.

    The median is one of honest clients' as long as they are more than half. Below three clients it says nothing, nor
    where it is zero, and no client is named.

    Args:
        norms: Client -> norm of its products.
        factor: Above 1.
    Returns:
        Client -> the reason, for those that are to be refused.
    Example:
        >>> from flora_core.aggregation import outliers
        >>> list(outliers({"a": 1.0, "b": 1.2, "c": 50.0}, factor=10))
        ['c']
    """
    if len(norms) < 3:
        return {}
    # The lower one of two: an even half of large updates does not lift it.
    middle = statistics.median_low(norms.values())
    if middle == 0:
        return {}
    text = "the norm of its product is {:.3g}, more than {:g} times the round's median of {:.3g} (outlier_factor)"
    return {name: text.format(norm, factor, middle) for name, norm in norms.items() if norm > factor * middle}
