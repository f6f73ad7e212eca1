"""Targets that share their input: X read once, dX written once, and what backward keeps of it.

Letters: M packed tokens, K in_features, N out_features, C clients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core import LoraWeights, lora_linears, testing
from flora_core.data.pack import lay_out
from flora_core.model import layer as linear
from flora_core.testing import DTYPES, LINEAR_SHAPES, LinearInputs, make_linear
from tests.support import models

SHARED = [LINEAR_SHAPES[i] for i in (0, 2, 4, 6)]


def three(case: Any, dropout: bool, device: str = "cpu") -> list[LinearInputs]:
    """Inputs of q, k, v: one x, other weights, factors and keys, k and v narrower."""
    found = []
    for t, n in enumerate((case.N, case.N // 2, case.N // 2)):
        one = make_linear(replace(case, N=n), seed=t, dropout=dropout, masters=True, device=device)
        keys = one.dropout_seed_C and [key + t for key in one.dropout_seed_C]
        found.append(replace(one, x=found[0].x if found else one.x, dropout_seed_C=keys))
    return found


def run(inputs: list[LinearInputs], backend: str) -> list[dict[str, torch.Tensor]]:
    """Every target's y, dA and dB, and the one dx in the first."""
    x = inputs[0].x.detach().requires_grad_()
    factors = [tensor.detach().requires_grad_() for one in inputs for tensor in (one.A, one.B)]
    targets = [
        LoraWeights(one.weight, one.bias, A, B, one.ranks, one.scaling_C, one.dropout_seed_C)
        for one, A, B in zip(inputs, factors[::2], factors[1::2], strict=True)
    ]
    first = inputs[0]
    options: dict[str, Any] = dict(dropout_C=first.dropout_C, row_C=first.row_C, backend=backend, fuse="separate")
    ys = lora_linears(x, targets, first.tokens, **options)
    dx, *grads = torch.autograd.grad(ys, [x, *factors], [one.dy for one in inputs])
    found = [{"y": y.detach(), "dA": dA, "dB": dB} for y, dA, dB in zip(ys, grads[::2], grads[1::2], strict=True)]
    found[0]["dx"] = dx
    return found


def check(inputs: list[LinearInputs], found: list[dict[str, torch.Tensor]]) -> None:
    """Against each target's oracle alone; dx is the sum of theirs."""
    exact = [testing.oracle_linear(one) for one in inputs]
    low = [testing.oracle_linear(one, one.x.dtype) for one in inputs]
    for oracles in (exact, low):
        oracles[0]["dx"] = torch.stack([oracle["dx"] for oracle in oracles]).sum(0)
    for one, out, right, rounded in zip(inputs, found, exact, low, strict=True):
        testing.check_budget(out, right, rounded, one.parts)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.id)
def test_shared_targets(case, dtype, dropout):
    inputs = three(replace(case, dtype=dtype), dropout)
    with testing.nan_filled():
        found = run(inputs, "reference")
    check(inputs, found)


def test_ranks_may_differ_by_target():
    inputs = three(SHARED[0], True)
    other = make_linear(replace(SHARED[0], N=24, ranks=(3, 0, 5)), seed=1, dropout=True)
    inputs[1] = replace(other, x=inputs[0].x)
    check(inputs, run(inputs, "reference"))


def test_a_neighbour_s_dx_would_be_seen():
    inputs = three(SHARED[0], True)
    found = run(inputs, "reference")
    found[0]["dx"] = found[0]["dx"] - testing.oracle_linear(inputs[2])["dx"].to(found[0]["dx"].dtype)
    with pytest.raises(AssertionError, match="dx of client 0"):
        check(inputs, found)


def attached(dtype: torch.dtype = torch.float64, dropout: float = 0.1) -> flora.Cohort:
    model = models.tiny("llama", dtype).eval()
    adapter = flora.AdapterConfig(4, 8, dropout=dropout)
    return flora.attach(model, [flora.ClientSpec(name, adapter=adapter) for name in "ab"], "all-linear")


def test_attach_finds_who_shares():
    groups = attached().route.groups
    names = {tuple(layer.path.rsplit(".", 1)[-1] for layer in group) for group in groups.values()}
    assert names == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}


def results(cohort: flora.Cohort) -> tuple[list[torch.Tensor], list[int]]:
    """Hidden states and gradients of one batch, and how many targets each call of the ops had."""
    rows, sizes, apply = models.examples(3, (5, 7)), [], linear._apply
    batch = lay_out([rows[:1], rows[1:]], packs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_apply", lambda layers, *rest: sizes.append(len(layers)) or apply(layers, *rest))
        factors = cohort.parameters()
        with cohort.batch(batch.tokens, sequences=batch.sequences, dropout_step=1):
            hidden = cohort.model.model(**batch.inputs, use_cache=False).last_hidden_state
            grads = torch.autograd.grad(hidden.pow(2).sum(), factors)
    assert not cohort.route.waiting
    return [hidden.detach(), *grads], sizes


def test_sharing_changes_no_result():
    cohort = attached()
    for module in cohort.bank.modules.values():
        torch.nn.init.normal_(module.B_PN, generator=torch.Generator().manual_seed(1))
    shared, sizes = results(cohort)
    assert sizes == [3, 1, 2, 1] * 2
    cohort.route.groups.clear()
    apart, sizes = results(cohort)
    assert sizes == [1] * 14
    for one, other in zip(shared, apart, strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max()


@torch.no_grad()
def test_what_waits_is_only_for_the_input_that_it_was_made_of():
    cohort = attached(dropout=0.0)
    for module in cohort.bank.modules.values():
        module.B_PN.normal_(generator=torch.Generator().manual_seed(1))
    q, k, v = (cohort.layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    x = torch.randn(6, q.in_features, dtype=torch.float64)
    with cohort.batch([2, 4]):
        other = torch.randn_like(x)
        expected = k(other), k(2 * x)
        q(x)
        assert torch.equal(k(other), expected[0]), "another tensor"
        q(x)
        x.mul_(2)
        assert torch.equal(k(x), expected[1]), "the same tensor, written to in between"
        q(x)
        assert cohort.route.waiting
        v(x)
    assert not cohort.route.waiting
