"""Whoever fails stays alone with it, and what can be known is told before training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import flora_core as flora
from tests.support.federations import (
    make_clients,
    make_federation,
    make_model,
    make_records,
    no_training,
    target_weights,
    updates_of,
)

# Refused clients.


def poisoned(name: str, spec: flora.ClientSpec) -> flora.ClientSpec:
    """The same client, whose records use a word that the poisoned model has NaN for."""
    return flora.ClientSpec(spec.name, [{**one, "instruction": name} for one in spec.data], spec.adapter)


def poisoned_model(word: int) -> Any:
    model = make_model(torch.float64)
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = math.nan
    return model


def run_with(clients: list[flora.ClientSpec], out: Path, model: Any) -> tuple[flora.Federation, Any]:
    fed = make_federation(out, model=model, clients=clients, eval_data=None, keep_optimizer=True)
    return fed, fed.run()


def same_rounds(out: Path, other: Path, names: str) -> None:
    for number in (1, 2):
        one, two = ({u.client: u for u in updates_of(path, number, dict.fromkeys("abc", 1))} for path in (out, other))
        assert set(one) == set(two) == set(names)
        for name in names:
            for module, pair in one[name].adapters.items():
                for got, want in zip(pair, two[name].adapters[module], strict=True):
                    assert float((got - want).abs().max()) <= 1e-9 * float(want.abs().max())


def test_a_client_whose_data_give_nan_stays_alone_with_it(tmp_path):
    clients = [flora.ClientSpec(s.name, [r for r in s.data if "w19" not in str(r)], s.adapter) for s in make_clients()]
    broken = [clients[0], poisoned("w1 w19", clients[1]), clients[2]]
    with pytest.warns(RuntimeWarning, match="client 'b' was stopped"):
        fed, result = run_with(broken, tmp_path / "broken", poisoned_model(23))
    other, _ = run_with([clients[0], clients[2]], tmp_path / "without", poisoned_model(23))
    same_rounds(tmp_path / "broken", tmp_path / "without", "ac")
    for module, weight in target_weights(fed.model).items():
        want = target_weights(other.model)[module]
        assert float((weight - want).abs().max()) <= 1e-9 * float(want.abs().max())
    assert set(fed.clients.optimizer) == {"a", "c"}, "moments that led astray are not carried on"
    for one in result.history:
        assert list(one["refused"]) == ["b"]
        assert "loss is not finite at step 1" in one["refused"]["b"]
        assert one["applied"]
        assert one["clients"]["b"]["refused"] == one["refused"]["b"]
        assert "refused" not in one["clients"]["a"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_client_whose_adapter_is_broken_stays_alone_with_it(value, tmp_path, monkeypatch):
    """An answer over a wire may be anything, whatever the training was like."""
    from flora_core.federation import local_clients

    class Tampered(local_clients.CohortTrainer):
        def run(self):
            updates = super().run()
            for update in updates:
                if update.client == "b":
                    next(iter(update.adapters.values()))[1][0, 3] = value
            return updates

    others = [make_clients()[0], make_clients()[2]]
    without, _ = run_with(others, tmp_path / "without", make_model(torch.float64))
    monkeypatch.setattr(local_clients, "CohortTrainer", Tampered)
    with pytest.warns(RuntimeWarning, match="client 'b' was refused"):
        fed, result = run_with(make_clients(), tmp_path / "broken", make_model(torch.float64))
    same_rounds(tmp_path / "broken", tmp_path / "without", "ac")
    for module, weight in target_weights(fed.model).items():
        want = target_weights(without.model)[module]
        assert float((weight - want).abs().max()) <= 1e-9 * float(want.abs().max())
    assert [list(one["refused"]) for one in result.history] == [["b"], ["b"]]


def test_an_update_beyond_max_norm_is_refused_and_the_round_goes_on():
    clients = make_clients()
    clients[1] = flora.ClientSpec("b", clients[1].data, clients[1].adapter, {"lr": 1.0})
    fed = make_federation(clients=clients, max_norm=5.0, keep_optimizer=True, rounds=1)
    with pytest.warns(
        RuntimeWarning, match=r"client 'b' was refused: the norm of its product is .* bound of 5 \(max_n"
    ):
        (one,) = fed.run().history
    assert set(fed.clients.optimizer) == {"a", "c"}, "moments that led astray are not carried on"
    assert list(one["refused"]) == ["b"]
    assert one["applied"]


def test_a_round_with_too_few_good_updates_changes_nothing_and_the_next_goes_on(tmp_path):
    model, events = make_model(), []
    clients = make_clients()
    clients[1] = flora.ClientSpec("b", clients[1].data, clients[1].adapter, {"lr": 1.0})
    fed = make_federation(
        tmp_path, model=model, clients=clients, max_norm=5.0, min_clients=3, callbacks=[events.append], rounds=2
    )
    before = target_weights(model)
    with pytest.warns(RuntimeWarning, match="client 'b' was refused"):
        result = fed.run()
    assert [one["applied"] for one in result.history] == [False, False]
    assert all(torch.equal(before[module], weight) for module, weight in target_weights(model).items())
    told = [event["message"] for event in events if event["event"] == "warning"]
    assert told == [f"round {n} changes nothing: 2 good updates, min_clients=3" for n in (1, 2)]
    assert "aggregated" not in {event["event"] for event in events}
    assert result.before is not None
    assert result.after is not None
    assert result.after["loss"] == result.before["loss"]


# Mistakes are told before training.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(clients=[make_clients()[0]] * 2), "client names must be unique, got twice: a"),
        (dict(clients=[]), "clients must hold at least one ClientSpec"),
        (dict(strategy="fedavg"), r"unknown strategy 'fedavg'; did you mean 'fedit'\?"),
        (dict(strategy_options={"tau": 0.9}), "strategy 'flora' has no option 'tau'"),
        (dict(min_clients=4), r"min_clients must be at most the number of clients \(3\), got 4"),
        (dict(weights={"a": 1.0, "b": 1.0, "d": 2.0}), "missing or unknown: c, d"),
    ],
)
def test_settings_that_do_not_fit_the_clients(changes, words):
    with pytest.raises(ValueError, match=words):
        make_federation(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(strategy="fedit"),
            r"'fedit' needs equal ranks, got 2 from 'b'; 3 from 'c'; 4 from 'a' .*zero_pad",
        ),
        (dict(clients=[*make_clients(), flora.ClientSpec("z", [])]), "client 'z'.* no "),
        (dict(clients=[flora.ClientSpec("z")]), "client 'z' has no data"),
        (
            dict(clients=[*make_clients(), flora.ClientSpec("z", make_records("z", 3), flora.AdapterConfig(0))]),
            "client 'z' has rank 0 everywhere",
        ),
        (dict(clients=make_clients((17,))), "client 'a'.* rank .* between 0 and .* 16, got 17"),
        (dict(target_modules=["q_prj"]), "q_prj"),
        (dict(max_length=2), "client 'a' has no examples left after tokenizing"),
    ],
)
def test_what_can_be_known_is_told_before_training(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        make_federation(tmp_path / "out", callbacks=[no_training], **changes).run()
    assert not (tmp_path / "out" / "run.json").exists()


def test_mixed_ranks_are_seen_although_the_clients_are_never_drawn_together():
    with pytest.raises(ValueError, match="needs equal ranks"):
        make_federation(strategy="fedit", fraction=0.01, callbacks=[no_training]).run()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rounds", 0, "rounds must be at least 1, got 0"),
        ("fraction", 0.0, "fraction must be above 0"),
        ("fraction", 1.5, "fraction must be between 0 and 1"),
        ("min_clients", 0, "min_clients must be at least 1"),
        ("weights", "exampels", "did you mean 'examples'"),
        ("weights", {"a": 0.0}, r"weights\['a'\] must be above 0"),
        ("weights", {"a": -1.0}, r"weights\['a'\] must be at least 0"),
        ("seed", -1, "seed must be at least 0"),
        ("eval_every", 0, "eval_every must be at least 1"),
        ("eval_template", "chatty", "did you mean 'chat'"),
        ("eval_max_length", 1, "eval_max_length must be at least 2"),
        ("rounding", "up", "rounding must be one of low_bits, nearest, stochastic"),
        ("max_norm", 0.0, "max_norm must be above 0"),
        ("keep_snapshots", 0, "keep_snapshots must be at least 1"),
    ],
)
def test_settings_out_of_range(field, value, words):
    with pytest.raises(ValueError, match=words):
        flora.FederationConfig(**{"rounds": 2, field: value})


def test_a_config_must_be_given():
    with pytest.raises(
        TypeError, match=r"config must be a FederationConfig, such as FederationConfig\(rounds=3\), got None"
    ):
        flora.Federation(None, None, make_clients())


def test_held_out_data_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        make_federation(eval_data=tmp_path / "nowhere.jsonl")
