"""Strategies that average factors apart: a global adapter beside a base that stays as it is.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import pytest
import torch

import flora_core as flora
from flora_core.adapters.peft import load_peft_adapter
from tests.support.federations import (
    assert_within_one_ulp,
    make_clients,
    make_federation,
    make_model,
    make_tokenizer,
    starts,
    target_weights,
    updates_of,
)
from tests.support.models import exact64


@pytest.mark.parametrize(("strategy", "ranks"), [("fedit", (3, 3, 3)), ("zero_pad", (4, 2, 3))])
def test_a_global_adapter_is_kept_beside_the_base(strategy, ranks, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model()
    result = make_federation(tmp_path, model=model, strategy=strategy, clients=make_clients(ranks)).run()
    base, updates = make_model(), updates_of(tmp_path, 2, {"a": 5, "b": 6, "c": 7})
    assert all(torch.equal(weight, target_weights(base)[m]) for m, weight in target_weights(model).items())
    adapter = load_peft_adapter(tmp_path / "adapter")
    assert result.adapter is not None
    for module, (A_RK, B_RN) in adapter.adapters.items():
        assert A_RK.shape[0] == max(ranks)
        mean_A, mean_B = torch.zeros(max(ranks), 16).double(), torch.zeros(max(ranks), 16).double()
        for update in updates:
            A, B = update.adapters[module]
            mean_A[: len(A)] += update.weight / 18 * A.double()
            mean_B[: len(B)] += update.weight / 18 * update.scaling[module] * B.double()
        assert adapter.scaling[module] == 1
        assert_within_one_ulp(A_RK, mean_A, A_RK, torch.float32)
        assert_within_one_ulp(B_RN, mean_B, B_RN, torch.float32)
        assert torch.equal(result.adapter.adapters[module][0], A_RK)
    flora.merge_adapter_(base, adapter)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(weight, target_weights(base)[m]) for m, weight in target_weights(saved).items())


def test_what_is_evaluated_is_the_base_with_the_global_adapter():
    model, tokenizer = make_model(torch.float64), make_tokenizer()
    with exact64():
        fed = make_federation(model=model, strategy="zero_pad", tokenizer=tokenizer)
        result = fed.run()
        assert result.adapter is not None
        assert result.after is not None
        assert result.before is not None
        plain = flora.evaluate(model, tokenizer, fed.held_out.records, max_length=32)
        flora.merge_adapter_(model, result.adapter)
        merged = flora.evaluate(model, tokenizer, fed.held_out.records, max_length=32)
    assert result.before["loss"] == plain["loss"]
    assert result.after["loss"] == pytest.approx(merged["loss"], rel=1e-9)
    assert result.after["loss"] != plain["loss"]


@pytest.mark.parametrize("strategy", ["fedit", "zero_pad"])
def test_factors_that_are_averaged_apart_start_from_one_adapter(strategy, tmp_path):
    ranks = (3, 3, 3) if strategy == "fedit" else (4, 2, 3)
    make_federation(tmp_path, lr=0.0, strategy=strategy, clients=make_clients(ranks), rounds=1).run()
    first = starts(tmp_path, 1)
    for name, rank in zip("abc", ranks, strict=True):
        assert torch.equal(first[name], first["a"][:rank])


@pytest.mark.parametrize("strategy", ["flora", "flexlora", "fedex", "flora_warm"])
def test_the_result_is_applied_to_the_model_whatever_the_strategy(strategy):
    model, tokenizer = make_model(), make_tokenizer()
    ranks = (3, 3, 3) if strategy == "fedex" else (4, 2, 3)
    fed = make_federation(model=model, strategy=strategy, tokenizer=tokenizer, clients=make_clients(ranks))
    result = fed.run()
    assert result.after is not None
    before = target_weights(model)
    with result.apply_to(model) as whole:
        own = flora.evaluate(whole, tokenizer, fed.held_out.records, max_length=32)
    assert own["loss"] == result.after["loss"]
    assert all(torch.equal(weight, before[name]) for name, weight in target_weights(model).items())
    if strategy in ("fedex", "flora_warm"):
        with pytest.raises(ValueError, match="the global adapter was trained on"), result.apply_to(make_model()):
            pass
    if strategy == "flexlora":
        with result.apply_to(make_model()) as whole:
            assert flora.evaluate(whole, tokenizer, fed.held_out.records, max_length=32) == own


def test_clients_go_on_from_the_global_adapter(tmp_path):
    fed = make_federation(tmp_path, strategy="fedit", clients=make_clients((3, 3, 3)), fraction=0.7, rounds=3, lr=1e-2)
    state = fed.run().state
    (tmp_path / "more").mkdir()
    seen = {}
    fed.server.state = state
    cohort = flora.attach(fed.model, list(fed.clients.specs.values()), fed.setup.target_modules)
    try:
        fed.server.load_starts(cohort, 4)
        seen = {name: cohort.update(name) for name in cohort.names}
    finally:
        flora.detach(fed.model)
    for update in seen.values():
        for module, (A_RK, B_RN) in update.adapters.items():
            pair = state["adapter"][module]
            assert torch.equal(A_RK, pair["A"].float())
            assert torch.equal(B_RN, (pair["B"] / update.scaling[module]).float())
