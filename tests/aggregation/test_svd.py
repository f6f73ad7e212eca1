"""Decompositions of a stack, against the textbook's on the dense product.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flora_core.aggregation.svd import energy_rank, is_core_cheaper, leading_svd, stack_svd


def test_energy_rank_at_the_edges():
    S = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert [energy_rank(S, tau) for tau in (1, 1e-9, 4 / 6, 4.1 / 6, 5.1 / 6)] == [4, 1, 1, 2, 3]
    assert energy_rank(S[:0], 0.5) == 0


@pytest.mark.parametrize(
    ("p", "n", "k"), [(3, 24, 16), (13, 24, 16), (14, 24, 16), (40, 24, 16), (5, 3, 30), (0, 4, 5)]
)
def test_stack_svd_equals_the_dense_one(p, n, k):
    """Few rows and just fewer and just more than what makes the core cheaper, above min(N, K), and none."""
    A, B, coef = (torch.randn(*shape, dtype=torch.float64) for shape in ((p, k), (p, n), (p,)))
    matrix = (B.T * coef) @ A
    svd = stack_svd((A, B, coef))
    torch.testing.assert_close(
        (svd.U_RN.T * svd.S_R) @ svd.V_RK, matrix, rtol=0, atol=1e-12 * (1 + float(matrix.norm()))
    )
    assert len(svd.S_R) == min(p, n, k)
    for rows in (svd.U_RN, svd.V_RK):
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)
    if p:
        torch.testing.assert_close(svd.S_R, torch.linalg.svdvals(matrix)[: len(svd.S_R)], rtol=0, atol=1e-11)
        assert bool((svd.V_RK.gather(1, svd.V_RK.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize(("n", "k"), [(4, 2000), (2000, 4), (2000, 2000)])
def test_triplets_of_rounding_error_are_left_out_as_numpy_counts_the_rank(n: int, k: int):
    """Rounding is relative to the largest singular value times the longer side: 4.4e-13 here."""
    for second, rank in ((4e-13, 1), (5e-13, 2)):
        A, B = torch.eye(2, k, dtype=torch.float64), torch.eye(2, n, dtype=torch.float64)
        coef = torch.tensor([1.0, second], dtype=torch.float64)
        assert len(stack_svd((A, B, coef)).S_R) == np.linalg.matrix_rank((B.T * coef) @ A) == rank


def test_the_core_is_decomposed_where_that_costs_less():
    def chosen(p, n, k):
        return is_core_cheaper((torch.empty(p, k), torch.empty(p, n), torch.empty(p)))

    assert [chosen(p, 1000, 1000) for p in (0, 1, 500, 790, 800, 1000, 1001)] == [True] * 4 + [False] * 3
    assert [chosen(p, 3000, 1000) for p in (900, 980, 990, 1000)] == [True, True, False, False]
    assert [chosen(p, 1000, 3000) for p in (900, 980, 990, 1000)] == [True, True, False, False]
    assert chosen(13, 24, 16)
    assert not chosen(14, 24, 16), "the sizes of test_stack_svd_equals_the_dense_one lie on both sides"


def test_leading_svd_finds_what_the_whole_one_does_where_the_spectrum_falls():
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(80, width, generator=generator, dtype=torch.float64) for width in (120, 100))
    fall = 2.0 ** -torch.arange(80, dtype=torch.float64)
    stack = torch.linalg.qr(A.T).Q.T.contiguous(), torch.linalg.qr(B.T).Q.T.contiguous(), fall
    fast, whole = leading_svd(stack, 12), stack_svd(stack).cut(12)
    torch.testing.assert_close(fast.S_R, whole.S_R, rtol=1e-10, atol=0)
    torch.testing.assert_close((fast.U_RN.T * fast.S_R) @ fast.V_RK, (whole.U_RN.T * whole.S_R) @ whole.V_RK)
    again = leading_svd(stack, 12)
    assert all(torch.equal(one, other) for one, other in zip(fast, again, strict=True))
    assert len(leading_svd((A, B, 0 * fall), 12).S_R) == 0
