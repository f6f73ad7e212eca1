"""Whole runs: what rounds write is exact, who takes part is drawn by the seed, and whoever fails stays alone with it.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.aggregate import aggregate
from flora_core.data.template import Example
from flora_core.peft_io import load_peft_adapter, save_stacked_adapter
from flora_core.testing import budget_ratio, ulp
from flora_core.update import ClientUpdate
from flora_kernels.reference import join_master
from tests.federation_cases import (
    RANKS,
    make_clients,
    make_federation,
    make_model,
    make_records,
    make_tokenizer,
    no_training,
    target_weights,
    updates_of,
)
from tests.models import exact64, tiny

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


def assert_within_one_ulp(after: torch.Tensor, ideal: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> None:
    off = (after.double() - ideal.to(dtype).double()).abs()
    assert (off <= ulp(torch.maximum(before.abs(), after.abs()), dtype)).all(), float(off.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_round_adds_the_exact_sum_rounded_once(dtype, tmp_path):
    model, masters = make_model(dtype, hidden=64), {}
    wide = torch.promote_types(dtype, torch.float32)

    def look(event) -> None:
        if event["event"] in ("run_start", "round_end"):
            low = fed.server.low_bits
            now = {m: (join_master(w, low[m]) if low else w).clone() for m, w in fed.server.weights.items()}
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
        with peft.disable_adapter():
            before = peft(ids).logits
    assert budget_ratio(merged, want, stacked) <= 1
    assert budget_ratio(stacked, want, merged) <= 1
    assert budget_ratio(before, want, merged) > 100


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


def starts(out: Path, number: int) -> dict[str, torch.Tensor]:
    return {
        update.client: next(iter(update.adapters.values()))[0]
        for update in updates_of(out, number, dict.fromkeys("abc", 1))
    }


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
    from flora_core import federation

    model, other = make_model(), make_model()
    make_federation(model=model).run()
    monkeypatch.setattr(federation, "_CHECKED_TOGETHER", 2)
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
        return {name: state["step"] for name, state in fed.optimizer.items()}

    assert steps(True) == {"b": 9}
    assert steps(False) == {}


# Strategies that average factors apart.


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
        plain = flora.evaluate(model, tokenizer, fed.eval_data, max_length=32)
        flora.merge_adapter_(model, result.adapter)
        merged = flora.evaluate(model, tokenizer, fed.eval_data, max_length=32)
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


def test_clients_go_on_from_the_global_adapter(tmp_path):
    fed = make_federation(tmp_path, strategy="fedit", clients=make_clients((3, 3, 3)), fraction=0.7, rounds=3, lr=1e-2)
    state = fed.run().state
    (tmp_path / "more").mkdir()
    seen = {}
    fed.server.state = state
    cohort = flora.attach(fed.model, list(fed.specs.values()), fed.target_modules)
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


# What is told.


def test_the_events_of_a_run(tmp_path):
    events = []
    clients = make_clients()
    result = make_federation(tmp_path, rounds=3, eval_every=2, callbacks=[events.append], clients=clients).run()
    told = [(event["event"], event.get("round")) for event in events if event["event"] != "train_progress"]
    round_of = lambda n: [("round_start", n), *[("client_done", n)] * 3, ("aggregated", n)]  # noqa: E731
    assert told == [
        ("run_start", None),
        ("evaluated", 0),
        *round_of(1),
        ("round_end", 1),
        *round_of(2),
        ("evaluated", 2),
        ("round_end", 2),
        *round_of(3),
        ("evaluated", 3),
        ("round_end", 3),
        ("run_end", None),
    ]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [event for event in events if event["event"] != "train_progress"] == result.events
    steps = [event["step"] for event in events if event["event"] == "train_progress"]
    assert steps == [1, 2, 3, 4] * 3
    start, end = events[0], [event for event in events if event["event"] == "round_end"][-1]
    assert start["clients"][0] == {"name": "a", "rank": 4, "examples": 5, "parameters": 4 * 4 * (16 + 16)}
    assert (start["rounds"], start["strategy"], start["device"], start["seed"]) == (3, "flora", "cpu", 0)
    assert Path(end["checkpoint"]) == tmp_path / "rounds" / "0003"
    assert end["peak_memory_bytes"] > 0
    (aggregated, *_) = [event for event in events if event["event"] == "aggregated"]
    assert aggregated["bytes_up"] == 4 * sum(client["parameters"] for client in start["clients"])
    assert aggregated["clients"] == 3


def test_the_report_and_the_progress_take_the_events_of_a_run(tmp_path):
    import io

    from flora_core.history import History, summary_tables
    from flora_core.progress import PlainProgress

    stream = io.StringIO()
    result = make_federation(tmp_path, callbacks=[PlainProgress(stream, 0.0)]).run()
    assert "round 2/2: done" in stream.getvalue()
    assert [title for title, *_ in summary_tables(History.of(result.events))] == [
        "Clients",
        "Traffic",
        "Held-out data",
        "Certificate",
        "The whole run",
    ]


def test_the_result_of_a_run():
    model, tokenizer, data = make_model(), make_tokenizer(), make_records("held out", 6)
    before = flora.evaluate(model, tokenizer, data, max_length=32)
    result = make_federation(model=model, tokenizer=tokenizer, eval_data=data).run()
    after = flora.evaluate(model, tokenizer, data, max_length=32)
    assert result.before is not None
    assert result.after is not None
    assert before.items() <= result.before.items()
    assert after.items() <= result.after.items()
    assert [one["round"] for one in result.history] == [1, 2]
    assert [one["evaluation"]["round"] for one in result.history] == [1, 2]
    assert set(result.history[0]["clients"]) == {"a", "b", "c"}
    assert (result.adapter, result.out) == (None, None)
    without = make_federation(eval_data=None).run()
    assert (without.before, without.after) == (None, None)


def test_a_run_without_out_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_federation().run()
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_given_back_when_a_round_fails():
    model = make_model()

    def fail(event) -> None:
        if event["event"] == "train_progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_federation(model=model, callbacks=[fail]).run()
    make_federation(model=model, rounds=1).run()
