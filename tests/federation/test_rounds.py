"""Whole runs: what rounds write is exact, who takes part is drawn by the seed, and whoever fails stays alone with it.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.adapters.peft import save_stacked_adapter
from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation import aggregate
from flora_core.data.template import Example
from flora_core.testing import budget_ratio, plain_rounding
from flora_kernels.reference import join_master
from tests.support.federations import (
    RANKS,
    assert_within_one_ulp,
    make_clients,
    make_federation,
    make_model,
    no_training,
    starts,
    target_weights,
    updates_of,
)
from tests.support.models import exact64, tiny

# peft's own call of what transformers renames.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def exact_sum(updates: list[ClientUpdate], module: str) -> torch.Tensor:
    """sum of p_k s_k B_k A_k in float64, straight from its formula."""
    total = sum(update.weight for update in updates)
    terms = [
        update.weight / total * update.scaling[module] * (B.double().T @ A.double())
        for update in updates
        for A, B in [update.adapters[module]]
    ]
    return torch.stack(terms).sum(0)


def examples_of(clients: list[flora.ClientSpec]) -> dict[str, float]:
    return {spec.name: len(spec.data) for spec in clients}


def ten_clients() -> list[flora.ClientSpec]:
    """The demo's ranks; one client scales as rsLoRA does."""
    clients = make_clients(RANKS)
    rslora = flora.AdapterConfig(16, 16, use_rslora=True)
    return [flora.ClientSpec(spec.name, spec.data, rslora if spec.name == "d" else spec.adapter) for spec in clients]


# A round writes the exact sum, rounded once.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_round_adds_the_exact_sum_rounded_once(dtype, tmp_path):
    model, masters = make_model(dtype, hidden=64), {}
    wide = torch.promote_types(dtype, torch.float32)

    def look(event) -> None:
        if event["event"] in ("run_start", "round_end"):
            low = fed.server.model.low_bits
            now = {m: (join_master(w, low[m]) if low else w).clone() for m, w in fed.server.model.weights.items()}
            masters[event.get("round", 0)] = now

    clients = ten_clients()
    fed = make_federation(tmp_path, model=model, clients=clients, fraction=0.6, callbacks=[look], eval_data=None)
    result = fed.run()
    assert len(masters) == 3
    drawn = set()
    for number in (1, 2):
        updates = updates_of(tmp_path, number, examples_of(clients))
        assert [update.client for update in updates] == fed.sampled(number)
        assert len(updates) == 6
        drawn |= {update.client for update in updates}
        for module, before in masters[number - 1].items():
            ideal = before.double() + exact_sum(updates, module)
            after = masters[number][module]
            assert not torch.equal(after, before)
            assert_within_one_ulp(after.to(wide), ideal, before.to(wide), wide)
        assert result.history[number - 1]["aggregation_error"] == 0
    assert "d" in drawn
    for module, weight in target_weights(model).items():
        assert torch.equal(weight, masters[2][module].to(dtype)), "the model's own weights are the masters, rounded"


@PEFT_WARNS
def test_a_round_as_one_peft_adapter_gives_the_logits_of_the_changed_model(tmp_path):
    from peft import PeftModel

    base, clients = make_model(hidden=64), ten_clients()
    model = copy.deepcopy(base)
    make_federation(tmp_path / "out", model=model, clients=clients, rounds=1, eval_data=None).run()
    updates = updates_of(tmp_path / "out", 1, examples_of(clients))
    save_stacked_adapter(aggregate(updates), tmp_path / "stacked")
    true = copy.deepcopy(base).double().eval()
    peft = PeftModel.from_pretrained(base, tmp_path / "stacked").eval()
    ids = torch.arange(20)[None] % 28
    with torch.no_grad(), exact64():
        for module in updates[0].adapters:
            true.get_submodule(module).weight.add_(exact_sum(updates, module))  # pyright: ignore
        want = true(ids).logits
    with torch.no_grad():
        merged, stacked = model.eval()(ids).logits, peft(ids).logits
        with plain_rounding():
            low = peft(ids).logits
        with peft.disable_adapter():
            before = peft(ids).logits
    assert budget_ratio(merged, want, low) <= 1
    assert budget_ratio(stacked, want, low) <= 1
    assert budget_ratio(before, want, low) > 100


def test_the_saved_model_is_the_changed_one(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model()
    make_federation(tmp_path, model=model).run()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for (name, mine), other in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("w1 w2")["input_ids"] == [5, 6]
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is as it was handed in"


@PEFT_WARNS
def test_conv1d_targets_are_written_and_saved_the_right_way_round(tmp_path):
    from peft import PeftModel

    base = tiny("gpt2", torch.float32)
    model = copy.deepcopy(base)
    data = [Example(list(range(3, 12)), list(range(3, 12)), 0)] * 3
    clients = [flora.ClientSpec(n, data, flora.AdapterConfig(r, 2 * r)) for n, r in (("a", 3), ("b", 2))]
    changes: dict[str, Any] = dict(model=model, clients=clients, target_modules=["c_attn"], eval_data=None, rounds=1)
    make_federation(tmp_path, **changes).run()
    updates = updates_of(tmp_path, 1, {"a": 3, "b": 3})
    for path in updates[0].adapters:
        before, after = (m.get_submodule(path).weight.detach().T for m in (base, model))
        assert_within_one_ulp(after, before.double() + exact_sum(updates, path), before, torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "rounds" / "0001" / "a")  # warns about a wrong fan_in_fan_out
    assert peft.peft_config["default"].fan_in_fan_out  # pyright: ignore


# Rounding of 16-bit weights.


def test_plain_rounding_of_bf16_weights_warns_with_what_it_lost():
    events = []
    model = make_model(torch.bfloat16)
    make_federation(model=model, rounding="nearest", rounds=1, lr=1e-3, callbacks=[events.append]).run()
    (warning,) = [event for event in events if event["event"] == "warning"]
    (aggregated,) = [event for event in events if event["event"] == "aggregated"]
    assert warning["message"].startswith(f"rounding='nearest' lost {aggregated['application_error']:.1%} of round 1")
    (exact,) = make_federation(model=make_model(torch.bfloat16), rounds=1, lr=1e-3).run().history
    # 8 bits of mantissa against 24.
    assert aggregated["application_error"] > 2**10 * exact["application_error"]


def test_without_callbacks_a_warning_is_python_s_own():
    fed = make_federation(model=make_model(torch.bfloat16), rounding="nearest", rounds=1, callbacks=())
    with pytest.warns(RuntimeWarning, match="rounding='nearest' lost"):
        fed.run()


@pytest.mark.parametrize(
    ("dtype", "rounding", "words"),
    [
        (torch.float16, "low_bits", "rounding='low_bits' needs bfloat16 or float32 targets, got float16"),
        (torch.float32, "stochastic", r"rounding='stochastic' is for bfloat16 targets, got torch\.float32"),
    ],
)
def test_a_rounding_that_the_weights_cannot_have_is_told_before_training(dtype, rounding, words):
    with pytest.raises(ValueError, match=words):
        make_federation(model=make_model(dtype), rounding=rounding, callbacks=[no_training]).run()


def test_stochastic_rounding_repeats():
    weights = []
    for _ in range(2):
        model = make_model(torch.bfloat16)
        make_federation(model=model, rounding="stochastic", rounds=2, eval_data=None).run()
        weights.append(target_weights(model))
    assert all(torch.equal(weights[0][module], weights[1][module]) for module in weights[0])


# Who takes part, and from where.


def test_the_draw_depends_on_seed_and_round_alone():
    def fed(**changes):
        return make_federation(clients=make_clients([2] * 10), **changes)

    first = [fed(fraction=0.3).sampled(number) for number in range(1, 30)]
    assert all(len(names) == 3 for names in first)
    assert all(names == sorted(names) for names in first), "in the order of the clients"
    assert first == [fed(fraction=0.3, rounds=50, lr=1.0).sampled(number) for number in range(1, 30)]
    assert first != [fed(fraction=0.3, seed=1).sampled(number) for number in range(1, 30)]
    assert {name for names in first for name in names} == set("abcdefghij")
    assert len({tuple(names) for names in first}) > 20


@pytest.mark.parametrize(("fraction", "least", "count"), [(1.0, 1, 10), (0.01, 1, 1), (0.2, 4, 4), (0.75, 1, 8)])
def test_how_many_are_drawn(fraction, least, count):
    fed = make_federation(clients=make_clients([2] * 10), fraction=fraction, min_clients=least)
    assert len(fed.sampled(1)) == count


def test_adapters_start_afresh_each_round_whoever_else_takes_part(tmp_path):
    # At a rate of 0 what is saved is the start.
    make_federation(tmp_path / "all", lr=0.0).run()
    make_federation(tmp_path / "two", lr=0.0, clients=make_clients()[:2]).run()
    first, second = starts(tmp_path / "all", 1), starts(tmp_path / "all", 2)
    assert not any(torch.equal(first[name], second[name]) for name in "abc")
    assert not torch.equal(first["a"][:2], first["b"])
    for number in (1, 2):
        alone = starts(tmp_path / "two", number)
        assert all(torch.equal(alone[name], starts(tmp_path / "all", number)[name]) for name in "ab")


def test_clients_are_checked_a_few_at_a_time(monkeypatch):
    from flora_core.federation import local_clients

    model, other = make_model(), make_model()
    make_federation(model=model).run()
    monkeypatch.setattr(local_clients, "TOGETHER", 2)
    make_federation(model=other).run()
    assert all(torch.equal(weight, target_weights(other)[m]) for m, weight in target_weights(model).items())
    with pytest.raises(ValueError, match="needs equal ranks"):
        make_federation(strategy="fedit", clients=make_clients((2, 2, 3)), callbacks=[no_training]).run()


def test_a_run_repeats_bit_for_bit_and_another_seed_does_not():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = make_model()
        make_federation(model=model, seed=seed, eval_data=None, clients=make_clients(dropout=0.2)).run()
        return target_weights(model)

    one, same, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(one[module], same[module]) for module in one)
    assert not any(torch.equal(one[module], other[module]) for module in one)


WEIGHTS = {
    "examples": {"a": 5, "b": 6, "c": 7},
    "tokens": {"a": 45, "b": 54, "c": 63},
    "uniform": {"a": 1, "b": 1, "c": 1},
    "mapping": {"a": 0.5, "b": 20.0, "c": 3.0},
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind, tmp_path):
    model, base = make_model(torch.float64), make_model(torch.float64)
    weights = WEIGHTS[kind] if kind == "mapping" else kind
    result = make_federation(tmp_path, model=model, rounds=1, weights=weights, eval_data=None).run()
    if kind == "tokens":
        assert {name: event["tokens"] for name, event in result.history[0]["clients"].items()} == WEIGHTS[kind]
    updates, before = updates_of(tmp_path, 1, WEIGHTS[kind]), target_weights(base)
    for module, after in target_weights(model).items():
        ideal = before[module] + exact_sum(updates, module)
        assert float((after - ideal).abs().max()) <= 1e-9 * float(exact_sum(updates, module).abs().max())


def test_moments_are_carried_to_the_next_round_only_if_asked():
    def steps(keep: bool) -> dict[str, int]:
        clients = make_clients()
        clients[1] = flora.ClientSpec("b", clients[1].data, clients[1].adapter, {"keep_optimizer": keep})
        fed = make_federation(clients=clients, rounds=3, eval_data=None)
        fed.run()
        return {name: state["step"] for name, state in fed.clients.optimizer.items()}

    assert steps(True) == {"b": 9}
    assert steps(False) == {}
