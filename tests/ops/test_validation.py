"""Sound arguments are not checked twice: sound calls take kernels with less host time, and nothing else does.

Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flora_core import testing
from flora_core.common.segments import Segments
from flora_core.ops import dispatch
from flora_core.ops.api import lora_linear
from flora_core.ops.backends import resolve, without_checks
from flora_core.ops.types import LoraWeights
from flora_core.ops.validation import is_sound

M, K, N = 7, 24, 17
TOKENS, RANKS, SCALES = Segments([4, 0, 3]), Segments([3, 2, 0]), (0.5, 2.0, 1.0)

pytestmark = pytest.mark.skipif("native" not in testing.backends("shrink"), reason="needs the compiled module")


def target(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, LoraWeights]:
    """x and one target with a bias."""
    made = torch.Generator().manual_seed(3)
    x, weight, bias, A, B = (
        torch.randn(shape, generator=made).to(dtype) for shape in ((M, K), (N, K), (N,), (5, K), (5, N))
    )
    return x, LoraWeights(weight, bias, A, B, RANKS, SCALES)


def test_a_sound_call_takes_the_kernels_without_checks():
    x, one = target()
    kernels, _ = resolve("native", "shrink", x)
    assert dispatch.plan_linears(x, [one], TOKENS).kernels is without_checks(kernels) is not kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
def test_kernels_without_checks_have_the_bits_of_native(dtype: torch.dtype, drops: bool):
    x, one = target(dtype)
    native, _ = resolve("native", "shrink", x)
    fast, dropout, wide = without_checks(native), None, torch.promote_types(dtype, torch.float32)
    if drops:
        dropout = native.Dropout((6000, 0, 30000), torch.tensor([-5, 2**62, 1]), [3, 0, 2**31 - 1])
    for scaling in (None, SCALES, list(SCALES), torch.tensor(SCALES, dtype=torch.float64)):
        rest = TOKENS, RANKS, scaling, dropout
        s = native.shrink(x, one.A, *rest)
        assert s.numel() == 12
        assert torch.equal(fast.shrink(x, one.A, *rest), s)
        ys = [kernels.expand_(torch.ones(M, N, dtype=dtype), s, one.B, *rest) for kernels in (fast, native)]
        assert torch.equal(*ys)
        assert not torch.equal(ys[0], torch.ones(M, N, dtype=dtype))
        arguments = s, x, s, torch.ones(M, N, dtype=dtype), TOKENS, RANKS, scaling, wide, dropout
        for mine, theirs in zip(fast.wgrad(*arguments), native.wgrad(*arguments), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.dtype is wide


def changes(x: torch.Tensor, one: LoraWeights) -> dict[str, tuple[Any, LoraWeights]]:
    """Unsound arguments, one at a time."""
    return {
        "columns of x": (x[:, 1:], one),
        "rows of A": (x, replace(one, A=one.A[1:])),
        "columns of B": (x, replace(one, B=one.B[:, 1:])),
        "length of bias": (x, replace(one, bias=torch.zeros(N + 1))),
        "dtype of weight": (x, replace(one, weight=one.weight.double())),
        "dtype of A": (x, replace(one, A=one.A.half())),
        "dtype of bias": (x, replace(one, bias=torch.zeros(N, dtype=torch.float64))),
        "device of B": (x, replace(one, B=one.B.to("meta"))),
        "a weight that learns": (x, replace(one, weight=one.weight.clone().requires_grad_())),
        "a bias that learns": (x, replace(one, bias=torch.zeros(N, requires_grad=True))),
        "axes of weight": (x, replace(one, weight=one.weight[None])),
        "no tensor": (x, replace(one, weight=one.weight.tolist())),
        "ranks of others": (x, replace(one, ranks=Segments([5]))),
        "a scale too few": (x, replace(one, scaling_C=SCALES[1:])),
        "negated x": (torch.ops.aten._neg_view(x), one),
        "negated A": (x, replace(one, A=torch.ops.aten._neg_view(one.A))),
        "sparse B": (x, replace(one, B=one.B.to_sparse())),
    }


@pytest.mark.parametrize("name", changes(*target()))
def test_what_is_not_sound_is_refused_as_before(name: str):
    x, one = changes(*target())[name]
    assert not is_sound(x, one, len(TOKENS))
    with torch.no_grad(), pytest.raises((ValueError, TypeError)):
        lora_linear(x, one.weight, one.bias, one.A, one.B, TOKENS, one.ranks, one.scaling_C, backend="native")


def test_a_negated_gradient_is_read_as_what_it_is():
    x, one = target()
    x.requires_grad_()
    leaves = x, one.A.requires_grad_(), one.B.requires_grad_()
    y = lora_linear(x, one.weight, one.bias, one.A, one.B, TOKENS, RANKS, SCALES, backend="native")
    dy = torch.randn(M, N)
    wanted = torch.autograd.grad(y, leaves, -dy, retain_graph=True)
    for mine, theirs in zip(torch.autograd.grad(y, leaves, torch.ops.aten._neg_view(dy)), wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_without_gradients_the_result_is_the_same_and_has_no_graph():
    x, one = target()
    one.A.requires_grad_()
    call = (x, one.weight, one.bias, one.A, one.B, TOKENS, RANKS, SCALES)
    with torch.no_grad():
        y = lora_linear(*call)
    assert y.grad_fn is None
    assert not y.requires_grad
    assert torch.equal(y, lora_linear(*call))
