"""The singular value decomposition of a stack, without ever forming N x K where the stack is smaller.

    B_PN.T diag(coef_P) A_PK = U_RN.T diag(S_R) V_RK

Letters: K in_features, N out_features, P the sum of ranks, R a rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..common import generator
from .terms import Stack

# Vectors that an iteration carries beyond the triplets that it is to find.
OVERSAMPLING = 10


class Svd(NamedTuple):
    """Singular triplets, largest first, as float64 rows: U_RN, S_R, V_RK."""

    U_RN: torch.Tensor
    S_R: torch.Tensor
    V_RK: torch.Tensor

    def cut(self, rank: int) -> Svd:
        """The leading triplets, at most ``rank``."""
        return Svd(self.U_RN[:rank], self.S_R[:rank], self.V_RK[:rank])


def stack_svd(stack: Stack) -> Svd:
    """Decompose a stack in float64: QR of both sides and an SVD of the P x P core, or of the product where P is large.

    Triplets whose singular value is rounding error are left out. Each
    right vector's largest entry is positive, so that the order of the clients changes no sign.

    Example:
        >>> from flora_core.aggregation import stack_svd
        >>> stack_svd((torch.eye(2), torch.eye(2), torch.tensor([3.0, 4.0]))).S_R.round()
        tensor([4., 3.], dtype=torch.float64)
    """
    A_PK, B_PN, coef_P = (tensor.double() for tensor in stack)
    left_NP, right_PK = B_PN.T * coef_P, A_PK
    if is_core_cheaper(stack):
        Q_NP, core_left = torch.linalg.qr(left_NP)
        Q_KP, core_right = torch.linalg.qr(right_PK.T)
        U, S, V = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
        U, V = Q_NP @ U, V @ Q_KP.T
    else:
        U, S, V = torch.linalg.svd(left_NP @ right_PK, full_matrices=False)
    return _finished(U, S, V, float(left_NP.norm() * right_PK.norm()))


def leading_svd(stack: Stack, rank: int) -> Svd:
    """The leading triplets of a stack by subspace iteration, at the price of a few thin products.

    As good as the gaps in the spectrum allow after four passes of ``rank + 10`` vectors (arXiv 0909.4061); where
    ``stack_svd`` costs less, exact. Deterministic: the vectors to start from are seeded.
    """
    A_PK, B_PN, coef_P = stack
    K, width = A_PK.shape[1], rank + OVERSAMPLING
    if is_whole_cheaper(stack, rank):
        return stack_svd(stack).cut(rank)
    left_NP, right_PK = B_PN.double().T * coef_P.double(), A_PK.double()
    start = torch.randn(K, width, generator=generator(0, "leading svd", K, width), dtype=torch.float64)
    Q_NR = torch.linalg.qr(left_NP @ (right_PK @ start.to(right_PK.device))).Q
    for _ in range(4):
        Q_KR = torch.linalg.qr(right_PK.T @ (left_NP.T @ Q_NR)).Q
        Q_NR = torch.linalg.qr(left_NP @ (right_PK @ Q_KR)).Q
    U, S, V = torch.linalg.svd((Q_NR.T @ left_NP) @ right_PK, full_matrices=False)
    return _finished(Q_NR @ U, S, V, float(left_NP.norm() * right_PK.norm())).cut(rank)


def is_whole_cheaper(stack: Stack, rank: int) -> bool:
    """Return whether a whole decomposition takes fewer operations than the leading triplets by iteration.

    Counts of both and times agreed on which to take, for P from 2 to 6 times the width (float64, one thread).
    """
    (P, K), N = stack[0].shape, stack[1].shape[1]
    S, width = N + K, rank + OVERSAMPLING
    if 2 * width >= min(P, N, K):
        return True
    return is_core_cheaper(stack) and 20 * P * S * width + 18 * S * width**2 >= 6 * P**2 * S + 24 * P**3


def is_core_cheaper(stack: Stack) -> bool:
    """Return whether two QR and an SVD of the P x P core take less time than an SVD of the N x K product.

    Operations, those of the core times 1.3: with that, they break even where measured times do, at P = 0.8 N for K = N
    and 0.95 K for N = 3 K, and give the ratios below it too (float64, one thread).
    """
    (P, K), N = stack[0].shape, stack[1].shape[1]
    few, many = min(N, K), max(N, K)
    core, dense = 6 * P**2 * (N + K) + 21 * P**3, 2 * N * K * P + 14 * many * few**2 + 8 * few**3
    return few >= P and 1.3 * core <= dense


def _finished(U: torch.Tensor, S: torch.Tensor, V: torch.Tensor, size: float) -> Svd:
    """Leave out rounding error and fix the signs; ``size`` bounds the products that were summed."""
    # Terms that cancel leave the rounding of their factors' products, which no singular value measures.
    scale = torch.clamp(S[:1] * max(U.shape[0], V.shape[1]), min=size)
    count = int((torch.finfo(S.dtype).eps * scale < S).sum())
    U_RN, S_R, V_RK = U.T[:count], S[:count], V[:count]
    peak = V_RK.gather(1, V_RK.abs().argmax(1, keepdim=True)) if count else V_RK[:, :1]
    sign = torch.where(peak < 0, -1.0, 1.0).to(V_RK)
    return Svd(U_RN * sign, S_R, V_RK * sign)


def is_smaller_than_dense(stack: Stack) -> bool:
    """Return whether the stack's P (N + K) numbers are fewer than the N K of its product."""
    (P, K), N = stack[0].shape, stack[1].shape[1]
    return P * (N + K) < N * K


def energy_rank(S_R: torch.Tensor, tau: float) -> int:
    """The smallest rank whose squared singular values add up to the share ``tau`` of all; all of them at tau = 1."""
    if tau == 1 or not S_R.numel():
        return S_R.numel()
    energy = S_R.square().cumsum(0)
    return int((energy < tau * energy[-1]).sum()) + 1


def balanced(svd: Svd) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a decomposition evenly: A = sqrt(S) V and B = sqrt(S) U.

    Example:
        >>> from flora_core.aggregation import balanced, stack_svd
        >>> A, B = balanced(stack_svd((torch.eye(2), torch.eye(2), torch.tensor([3.0, 4.0]))))
        >>> (B.T @ A).diagonal().round()
        tensor([3., 4.], dtype=torch.float64)
    """
    root = svd.S_R.sqrt()[:, None]
    return root * svd.V_RK, root * svd.U_RN


def as_fresh(svd: Svd) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a decomposition as training finds it: rows of A as long as fresh ones, the rest in B.

    A fresh row is uniform within 1 / sqrt(K), so the mean square of its norm is 1/3.
    """
    length = 1 / math.sqrt(3)
    return length * svd.V_RK, (svd.S_R / length)[:, None] * svd.U_RN


def full_rank(rows_PK: torch.Tensor) -> bool:
    """Return whether rows are independent by a wide margin: the Cholesky factor of their cosines has no small pivot.

    One symmetric product, far cheaper than an SVD, in float32 where the margin allows it; False only means that an SVD
    must decide.

    Example:
        >>> from flora_core.aggregation import full_rank
        >>> full_rank(torch.eye(3)), full_rank(torch.ones(2, 3))
        (True, False)
    """
    if rows_PK.shape[0] > rows_PK.shape[1]:
        return False
    # A pivot's square is off by some P eps: 1e-5 in float32, 1e-14 in float64.
    return _smallest_pivot(rows_PK.float()) > 3e-2 or _smallest_pivot(rows_PK.double()) > 1e-4


def _smallest_pivot(rows_PK: torch.Tensor) -> float:
    """Of the Cholesky factor of the rows' cosines; 0 where there is none, 1 for no rows."""
    unit = rows_PK / rows_PK.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows_PK.dtype).tiny)
    factor, info = torch.linalg.cholesky_ex(unit @ unit.T)
    return min(factor.diagonal().tolist(), default=1.0) if int(info) == 0 else 0.0
