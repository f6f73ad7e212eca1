"""Rounding for references that is the same on every processor."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flora_core.testing import budget_ratio, plain_product, plain_rounding


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)), dtype=dtype)


def by_hand(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """One number after another, each sum rounded to float32."""
    out = torch.zeros(left.shape[0], right.shape[1])
    for m in range(out.shape[0]):
        for n in range(out.shape[1]):
            for k in range(left.shape[1]):
                out[m, n] += left[m, k].float() * right[k, n].float()
    return out.to(left.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_plain_product_adds_one_number_after_another(dtype):
    left, right = random(4, 33).to(dtype), random(33, 3).to(dtype)
    assert torch.equal(plain_product(left, right), by_hand(left, right))


def test_every_spelling_of_a_product_is_the_plain_one():
    x, w, bias = random(4, 33), random(3, 33), random(3)
    want = by_hand(x, w.T)
    with plain_rounding():
        products = [x @ w.T, F.linear(x, w), (x[None] @ w.T)[0], torch.bmm(x[None], w.T[None])[0]]
        products += [torch.einsum("mk,nk->mn", x, w), torch.mm(x, w.T, out=torch.empty(4, 3))]
        scaled = torch.addmm(bias, x, w.T, alpha=3)
        sums = [F.linear(x, w, bias), torch.addmm(bias, x, w.T), bias.repeat(4, 1).addmm_(x, w.T)]
        with pytest.raises(NotImplementedError, match="with beta=1, got beta=2"):
            torch.addmm(bias, x, w.T, beta=2)
    assert all(torch.equal(product, want) for product in products)
    assert all(torch.equal(added, bias + want) for added in sums)
    assert torch.equal(scaled, bias + 3 * want)


def test_gradients_are_plain_products_too():
    x, w, dy = random(4, 33).requires_grad_(), random(3, 33).requires_grad_(), random(4, 3)
    with plain_rounding():
        dx, dw = torch.autograd.grad(x @ w.T, (x, w), dy)
    assert torch.equal(dx, by_hand(dy, w.detach()))
    assert torch.equal(dw, by_hand(dy.T, x.detach()))


def test_a_root_is_the_nearest_number():
    values = torch.tensor([65504.0, 1e-40, 2.0, 0.0, 3.39e38])
    with plain_rounding():
        roots = values.sqrt()
    assert roots[0].view(torch.int32) == 0x437FEFFF
    for neighbour in (0.0, torch.inf):
        other = torch.nextafter(roots, torch.tensor(neighbour)).double()
        assert ((roots.double() - values.double().sqrt()).abs() <= (other - values.double().sqrt()).abs()).all()


def test_float64_is_left_to_the_library():
    x, w = random(40, 300, dtype=torch.float64), random(300, 20, dtype=torch.float64)
    with plain_rounding():
        found = x @ w
    assert torch.equal(found, x @ w)


def test_a_library_rounds_less_than_the_plain_sum():
    """So that a budget out of plain sums is met by any other order."""
    for length in (64, 1030, 4096):
        x, w = random(16, length), random(length, 24)
        assert budget_ratio(x @ w, x.double() @ w.double(), plain_product(x, w)) <= 1
