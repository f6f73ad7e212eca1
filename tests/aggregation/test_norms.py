"""Norms through Gram matrices, clipping that holds whatever was sent, and outliers.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation.norms import clip, clip_factor, norm_bound, norm_of, outliers, product_norm
from tests.federation.test_judge import K, N, make_update

EPS = torch.finfo(torch.float64).eps


def dense_norm(update: ClientUpdate) -> float:
    products = [update.scaling[m] * (B.double().T @ A.double()) for m, (A, B) in update.adapters.items()]
    return math.sqrt(sum(float((product**2).sum()) for product in products))


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e15])
def test_the_norm_is_that_of_the_dense_product(size):
    update = make_update(size=size)
    assert product_norm(update) == pytest.approx(dense_norm(update), rel=1e-12)


def test_the_norm_of_a_product_that_cancels_is_nearly_zero_and_not_a_nan():
    below_zero = 0
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        A_2K, b_N = torch.randn(2, K, generator=random).double(), torch.randn(N, generator=random).double()
        A, B = torch.cat([A_2K, -A_2K.sum(0, keepdim=True)]), torch.stack([b_N] * 3)
        below_zero += float(((A @ A.T) * (B @ B.T)).sum()) < 0
        norm = product_norm(ClientUpdate("ann", {"x": (A, B)}, {"x": 1.0}))
        # The square is good to float64, so its root is to half the digits.
        eps = torch.finfo(torch.float64).eps
        assert 0 <= norm <= (10 * eps) ** 0.5 * float(A.norm() * B.norm())
    assert below_zero, "some of these must need it"


def cancelling(seed: int, size: float = 1.0) -> ClientUpdate:
    """Factors whose products cancel to their last digits, as somebody would make them to slip under a bound."""
    random = torch.Generator().manual_seed(seed)
    A_1K, B_1N = (size * torch.randn(1, n, generator=random, dtype=torch.float64) for n in (K, N))
    odd = 1 + 3 * EPS * torch.rand(1, N, generator=random, dtype=torch.float64)
    return ClientUpdate("eve", {"x": (torch.cat([A_1K, A_1K]), torch.cat([B_1N, -B_1N * odd]))}, {"x": 1.0})


def test_the_bound_holds_where_rounding_hides_the_norm():
    hidden = 0
    for seed in range(50):
        update = cancelling(seed, 1e12)
        norm = dense_norm(update)
        hidden += product_norm(update) < norm
        assert norm_bound(update) >= norm
        assert dense_norm(clip(update, 1.0)) <= 1.0
    assert hidden, "some of these must need it"


def test_the_bound_is_tight_where_nothing_cancels():
    update = make_update()
    assert 0 <= norm_bound(update) / dense_norm(update) - 1 < 1e-10
    assert norm_bound(replace(update, adapters={m: (A * 1e200, B) for m, (A, B) in double(update).items()})) == math.inf


def double(update: ClientUpdate) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {module: (A.double(), B.double()) for module, (A, B) in update.adapters.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [0.5, 3.0, 1e-30])
def test_what_is_clipped_has_the_bound_s_norm_and_its_own_direction(dtype, bound):
    update = make_update(size=5.0)
    update.adapters = {module: (A.to(dtype), B.to(dtype)) for module, (A, B) in update.adapters.items()}
    new, wide = clip(update, bound), torch.promote_types(dtype, torch.float32)
    # What the bound adds to the norm, and the rounding of B.
    slack = norm_bound(update) / dense_norm(update) - 1 + 2 * torch.finfo(wide).eps + 16 * EPS
    assert 1 - slack <= dense_norm(new) / bound <= 1
    factor = bound / dense_norm(update)
    for module, (A, B) in new.adapters.items():
        old_A, old_B = update.adapters[module]
        assert A is old_A
        assert B.dtype == wide
        off = (B.double() - factor * old_B.double()).abs()
        assert (off <= slack * factor * old_B.double().abs()).all()
    assert new.scaling == update.scaling


def test_what_is_within_the_bound_stays_as_it_is():
    update = make_update()
    assert clip(update, 1.0001 * product_norm(update)) is update


def test_what_has_no_finite_norm_counts_nothing():
    factor = torch.full((1, 2), 1e200, dtype=torch.float64)
    update = ClientUpdate("eve", {"x": (factor, factor)}, {"x": 1.0})
    assert clip_factor(norm_of(update), 1.0) == 0.0
    assert dense_norm(clip(update, 1.0)) == 0.0


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_none(bound):
    with pytest.raises(ValueError, match="bound must be"):
        clip(make_update(), bound)


@pytest.mark.parametrize(
    ("norms", "named"),
    [
        ([1.0, 1.0, 5.1], [2]),
        ([1.0, 1.0, 5.0], []),
        ([1.0, 9.0], []),
        ([1.0], []),
        ([], []),
        ([1.0, 1.0, 99.0, 99.0], [2, 3]),
        ([0.0, 0.0, 1.0], []),
        ([0.01, 1.0, 1.0], []),
        ([1.0, 2.0, math.inf, 3.0], [2]),
    ],
)
def test_outliers(norms, named):
    assert list(outliers({str(i): norm for i, norm in enumerate(norms)}, 5.0)) == [str(i) for i in named]
