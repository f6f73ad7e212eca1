"""Share of ten rounds of small updates that bfloat16 weights keep, by rounding.

Per way: the share of the update that arrived (its projection on the exact one), and the relative error.
Letters: K in_features, N out_features, P sum of ranks.
"""

from __future__ import annotations

import pytest
import torch

from flora_kernels.reference import join_master

native = pytest.importorskip("flora_kernels.native", exc_type=ImportError)
ROUNDS, CLIENTS, P = 10, 10, 160
# One rounding a round, and ten clients merged one after another: the shares that a simulation gave.
EXPECTED = {1e-5: (0.28, 0.03), 3e-5: (0.69, 0.08), 1e-4: (0.99, 0.27)}


class Run:
    """Ten rounds on W of std 0.02; every round adds an update of the given std, drawn once for all ways."""

    def __init__(self, std: float, n: int, k: int):
        random = torch.Generator().manual_seed(0)
        self.start = (torch.randn(n, k, generator=random) * 0.02).bfloat16()
        # The same direction each round, as training has: what rounding to nearest loses, it loses every time.
        self.A = torch.randn(P, k, generator=random)
        self.B = torch.randn(P, n, generator=random)
        self.coef = torch.full((P,), std * P**-0.5)
        self.exact = ROUNDS * (self.B.double().T @ (self.coef.double()[:, None] * self.A.double()))

    def arrived(self, weight: torch.Tensor) -> tuple[float, float]:
        change = weight.double() - self.start.double()
        share = (change * self.exact).sum() / (self.exact * self.exact).sum()
        return float(share), float((change - self.exact).norm() / self.exact.norm())

    def merge(self, weight: torch.Tensor, share: float = 1.0, **options) -> None:
        native.merge_(weight, self.A, self.B, self.coef * share, **options)


@pytest.mark.parametrize("std", list(EXPECTED))
def test_what_ten_rounds_leave(std, scale):
    run = Run(std, *(scale(256, 1024, "rows and columns"),) * 2)
    low_bits = torch.zeros(run.start.shape, dtype=torch.int16)
    W = {name: run.start.clone() for name in ("low bits", "stochastic", "nearest", "sequential")}
    for number in range(ROUNDS):
        run.merge(W["low bits"], low_bits_NK=low_bits, accumulate="float64")
        run.merge(W["stochastic"], rounding="stochastic", seed=number)
        run.merge(W["nearest"])
        # Ten clients of one mind, each with a tenth of the update.
        for _ in range(CLIENTS):
            run.merge(W["sequential"], share=1 / CLIENTS)
    found = {name: run.arrived(weight) for name, weight in W.items()}
    found["low bits"] = run.arrived(join_master(W["low bits"], low_bits))
    print(std, {name: f"{share:.3f}, error {error:.3f}" for name, (share, error) in found.items()})

    share, error = found["low bits"]
    assert abs(share - 1) <= 0.01
    # A master of size 0.02 is rounded once a round, to half a unit.
    assert error <= torch.finfo(torch.float32).eps * 0.02 / std
    share, error = found["stochastic"]
    # Unbiased, so its mean error is far below its size; the standard error follows from the error itself.
    assert abs(share - 1) <= 3 * error / run.exact.numel() ** 0.5
    once, one_by_one = EXPECTED[std]
    assert found["nearest"][0] == pytest.approx(once, abs=0.03)
    assert found["sequential"][0] == pytest.approx(one_by_one, abs=0.03)
    assert found["low bits"][1] < found["stochastic"][1] < found["nearest"][1] < found["sequential"][1]


def test_stochastic_rounding_is_unbiased_element_by_element(scale):
    """Many roundings of one sum: all but the few that chance allows have it as their mean, within 3 standard errors."""
    run, draws = Run(1e-4, 64, 96), scale(200, 2000, "draws")
    exact = run.start.double() + run.exact / ROUNDS
    total, squares = torch.zeros_like(exact), torch.zeros_like(exact)
    for seed in range(draws):
        W = run.start.clone()
        run.merge(W, rounding="stochastic", seed=seed, accumulate="float64")
        total += W.double() - exact
        squares += (W.double() - exact) ** 2
    standard_error = (squares / draws).sqrt() / draws**0.5
    beyond = ((total / draws).abs() > 3 * standard_error).double().mean()
    # Of normal errors 0.27 % lie beyond three; those of two values have longer tails where the odds are small.
    assert beyond < 0.02
    overall = total.sum() / squares.sum().sqrt()
    assert abs(overall) <= 3
