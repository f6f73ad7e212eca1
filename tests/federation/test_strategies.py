"""Strategies inside a federation: what is trained, what each client starts from, who catches up, what is reported."""

from __future__ import annotations

import json
import math

import pytest
import torch

import flora_core as flora
from flora_core.adapters.penalty import TailPenalty
from flora_core.aggregation import STRATEGIES, get_strategy
from flora_core.federation.global_model import GlobalModel
from flora_core.federation.server import Server
from flora_core.training.optimizer import CohortAdamW
from tests.support.federations import TRAIN, make_clients, make_federation, make_model, make_tokenizer, target_weights

EACH = pytest.mark.parametrize("name", list(STRATEGIES))
CONFIG = flora.TrainConfig(**{**TRAIN, "weight_decay": 0.1, "clip_norm": 1.0})


def clients_of(name: str) -> list[flora.ClientSpec]:
    """Equal ranks where the strategy asks for them."""
    return make_clients((4, 2, 3) if get_strategy(name).mixed_ranks else (3, 3, 3))


def run(name: str, rounds: int = 3, **changes):
    return make_federation(strategy=name, clients=clients_of(name), rounds=rounds, **changes)


@EACH
def test_every_strategy_runs_and_learns(name):
    result = run(name, rounds=3, lr=3e-2).run()
    assert [one["applied"] for one in result.history] == [True] * 3
    assert result.before is not None
    assert result.after is not None
    assert result.after["loss"] < result.before["loss"]
    if get_strategy(name).exact:
        assert max(one["aggregation_error"] for one in result.history) < 1e-6


@EACH
def test_a_killed_run_goes_on_as_one_that_was_not(name, tmp_path):
    whole, cut = make_model(), make_model()
    run(name, out=tmp_path / "whole", model=whole).run()

    class Stop(Exception):  # noqa: N818
        pass

    def stop(event):
        if event["event"] == "round_end" and event["round"] == 1:
            raise Stop

    with pytest.raises(Stop):
        run(name, out=tmp_path / "cut", model=cut, callbacks=[stop]).run()
    cut = make_model()
    again = run(name, out=tmp_path / "cut", model=cut).run()
    assert again.history[-1]["round"] == 3
    for module, weight in target_weights(whole).items():
        assert torch.equal(weight, target_weights(cut)[module])
    adapters = [(tmp_path / kind / "adapter" / "adapter_model.safetensors") for kind in ("whole", "cut")]
    assert adapters[0].exists() == adapters[1].exists()
    if adapters[0].exists():
        assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.parametrize("trainable", [("A",), ("B",)])
def test_a_frozen_factor_stays_bit_for_bit_under_decay_and_momentum(trainable):
    cohort, trainer = trained(trainable)
    before = {name: copies(cohort, name) for name in cohort.names}
    trainer.run()
    still = 1 - "AB".index(trainable[0])
    for name in cohort.names:
        for module, pair in copies(cohort, name).items():
            assert torch.equal(pair[still], before[name][module][still])
            assert not torch.equal(pair[1 - still], before[name][module][1 - still])


def trained(trainable, **config):
    """A cohort whose B is not zero, and a trainer of it."""
    cohort = flora.attach(make_model(), make_clients(), ["q_proj", "v_proj"])
    for name in cohort.names:
        for _, B in cohort.bank.adapters(name).values():
            B.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    settings = flora.TrainConfig(**{**TRAIN, "weight_decay": 0.1, **config})
    return cohort, flora.CohortTrainer(cohort, settings, make_tokenizer(), trainable=trainable)


def copies(cohort, name):
    return {m: (A.clone(), B.clone()) for m, (A, B) in cohort.bank.adapters(name).items()}


@pytest.mark.parametrize("factor", ["A", "B"])
def test_the_trained_factor_takes_the_step_that_it_takes_alone(factor):
    """One step, clipped by nothing: the gradient of A at fixed B does not depend on whether B is trained too."""
    results = []
    for trainable in ((factor,), ("A", "B")):
        cohort, trainer = trained(trainable, max_steps=1)
        trainer.run()
        results.append({name: copies(cohort, name) for name in cohort.names})
    which = "AB".index(factor)
    for name, modules in results[0].items():
        for module, pair in modules.items():
            assert torch.equal(pair[which], results[1][name][module][which])


def test_a_frozen_factor_has_no_gradient_and_counts_nothing_in_the_norm():
    cohort, _ = trained(("A", "B"))
    optimizer = CohortAdamW(cohort.bank, CONFIG, trainable=("B",))
    module, entry = next(iter(cohort.bank.modules.items()))
    assert not entry.A_PK.requires_grad
    assert entry.A_PK.grad is None
    assert entry.B_PN.grad is not None
    entry.B_PN.grad.fill_(1.0)
    own_B = cohort.bank.adapters(cohort.names[0])[module][1]
    assert optimizer.grad_norms()[0] == pytest.approx(math.sqrt(own_B.numel()))
    optimizer.step()
    moments_A, moments_B = cohort.bank.views_of(optimizer.exp_avg)[module]
    assert not moments_A.any()
    assert moments_B.all()
    with pytest.raises(ValueError, match=r"trainable must name 'A', 'B' or both, got \('C',\)"):
        CohortAdamW(cohort.bank, CONFIG, trainable=("C",))


def test_hetlora_s_penalty_adds_its_gradient_to_its_client_alone(monkeypatch):
    grads = []
    monkeypatch.setattr(CohortAdamW, "step", lambda self, *_: grads.append(self.grad.clone()))
    penalty = TailPenalty(0.3, {"model.layers.0.self_attn.q_proj": 2})
    for penalties in ({}, {"a": penalty}):
        cohort, trainer = trained(("A", "B"), max_steps=1)
        trainer.penalties = penalties
        trainer.run()
    plain, more = ({name: cohort.bank.adapters(name, grad) for name in cohort.names} for grad in grads)
    for name, module in [(name, module) for name, own in plain.items() for module in own]:
        factors = [factor.clone().requires_grad_() for factor in cohort.bank.adapters(name)[module]]
        A, B = factors
        added = [torch.zeros_like(factor) for factor in factors]
        if name == "a" and module in penalty.first:
            added = torch.autograd.grad(0.3 * A[2:].norm() * B[2:].norm(), factors)
            assert added[0].any()
        for before, after, want in zip(plain[name][module], more[name][module], added, strict=True):
            torch.testing.assert_close(after - before, want, rtol=1e-5, atol=1e-7)


def test_a_penalty_of_nothing_adds_nothing():
    """B is zero in the first round, and rows that a client gave up are zero in both factors."""
    A, B = torch.ones(4, 3), torch.zeros(4, 5)
    grads = torch.zeros(4, 3), torch.zeros(4, 5)
    TailPenalty(1e6, {"m": 2}).add_gradients_({"m": (A, B)}, {"m": grads})
    TailPenalty(1e6, {"m": 2}).add_gradients_({"m": (0 * A, B)}, {"m": grads})
    assert not any(grad.any() for grad in grads)


def test_a_penalty_is_refused_for_clients_that_train_elsewhere():
    federation = run("hetlora", strategy_options={"prune": 0.5, "penalty": 0.1})
    federation._prepare()
    with pytest.raises(ValueError, match=r"clients b train elsewhere, .* leave the penalty of strategy 'hetlora' out"):
        federation.server.refuse_penalties(["b"])
    federation = run("hetlora", strategy_options={"prune": 0.5})
    federation._prepare()
    federation.server.refuse_penalties(["b"])


def test_hetlora_s_penalty_makes_clients_give_rows_up():
    """Without it all tails grow in training; with it those of the small clients shrink, and half of their rows go."""
    kept = [
        run("hetlora", rounds=2, lr=3e-3, strategy_options={"prune": 0.5, "penalty": weight}).run().state["kept"]
        for weight in (0.0, 100.0)
    ]
    assert kept[0] == {}
    assert {name: set(rows.values()) for name, rows in kept[1].items()} == {"b": {1}, "c": {1}}


@pytest.mark.parametrize("name", ["ffa", "rolora"])
def test_the_federation_freezes_what_the_strategy_says(name, tmp_path):
    result = run(name, rounds=3, out=tmp_path).run()
    from flora_core.adapters.peft import load_peft_adapter

    rounds = [
        [load_peft_adapter(tmp_path / "rounds" / f"{number:04d}" / client).adapters for client in "abc"]
        for number in (1, 2, 3)
    ]
    for number, (a, b, c) in enumerate(rounds):
        for module in a:
            same = [torch.equal(a[module][i], b[module][i]) and torch.equal(a[module][i], c[module][i]) for i in (0, 1)]
            assert same == ([True, False] if name == "ffa" or number != 1 else [False, True])
    sizes = [one["bytes_up"] for one in result.history]
    assert sizes[0] == sum(4 * B.numel() for own in rounds[0] for _, B in own.values())


def test_flora_warm_takes_the_smallest_rank_of_everybody_not_of_the_round():
    result = run("flora_warm", rounds=3, fraction=0.4, min_clients=1).run()
    assert result.adapter is not None
    assert set(result.adapter.ranks.values()) == {2}


def test_options_reach_the_strategy():
    result = run("flora_svd", rounds=1, strategy_options={"tau": 0.5}).run()
    assert 0.1 < result.history[0]["aggregation_error"] < 0.75
    with pytest.raises(ValueError, match="tau must be between 0 and 1, got 2"):
        run("flora_svd", strategy_options={"tau": 2})
    with pytest.raises(ValueError, match="unknown strategy 'florasvd'; did you mean 'flora_svd'"):
        make_federation(strategy="florasvd")


@pytest.mark.parametrize("name", ["ffa", "rolora", "fedex", "fedit"])
def test_mixed_ranks_are_refused_before_anything_is_trained(name):
    with pytest.raises(ValueError, match=f"strategy '{name}' needs equal ranks"):
        make_federation(strategy=name, clients=make_clients((4, 2, 3))).run()


def test_the_certificate_and_the_bytes_are_written_down(tmp_path):
    run("flora", out=tmp_path).run()
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for event in (one for one in events if one["event"] == "aggregated"):
        assert event["aggregation_error"] == 0
        assert 0 < event["application_error"] < 1e-3
        assert event["application_rows"] == 64
        assert set(event["application_error_by_module"]) == set(event["aggregation_error_by_module"])
        assert sum(event["up"].values()) == event["bytes_up"]
        assert sum(event["down"].values()) == event["bytes_down"]
        assert sum(event["forms"].values()) == 4
        assert set(event["seconds_of"]) == {"aggregate", "certify", "write"}
        assert sum(event["seconds_of"].values()) <= event["seconds"]
        assert event["peak_memory_bytes"] > 0


@pytest.mark.parametrize("rows", [None, 5])
def test_the_application_error_is_that_of_the_rows_that_are_stated(rows, monkeypatch):
    """A write that loses one row that the sample misses: 5 of 16 rows do not see row 15, all rows do."""
    from flora_core.merge import in_place

    def lossy(items, **options):
        keep = [item.weight[15].clone() for item in items]
        real(items, **options)
        for item, row in zip(items, keep, strict=True):
            item.weight[15] = row

    real = in_place.stacked_merge_many_
    monkeypatch.setattr(in_place, "stacked_merge_many_", lossy)
    result = run("flora", rounds=1, check_rows=rows).run()
    assert result.history[0]["application_rows"] == rows
    assert (result.history[0]["application_error"] > 1e-2) == (rows is None)


def test_clients_that_were_away_catch_up_by_what_is_smaller():
    events = []
    run("flora", rounds=6, fraction=0.34, callbacks=[events.append]).run()
    sizes, have = {}, dict.fromkeys("abc", 0)
    snapshot = 4 * 16 * 16 * 4
    for event in (one for one in events if one["event"] == "aggregated"):
        (client,) = event["up"]
        missed = [size for number, size in sizes.items() if number > have[client]]
        want = {}
        if missed:
            size = min(sum(missed), snapshot)
            want = {client: {"kind": "log" if sum(missed) <= snapshot else "snapshot", "bytes": size}}
        assert event["catch_up"] == want
        sizes[event["round"]], have[client] = event["bytes_down"], event["round"]
    assert len(sizes) == 6


def test_who_is_away_is_known_after_a_resume(tmp_path):
    class Stop(Exception):  # noqa: N818
        pass

    def stop(event):
        if event["event"] == "round_end" and event["round"] == 3:
            raise Stop

    told = []
    run("flora", rounds=6, fraction=0.34, callbacks=[told.append]).run()
    with pytest.raises(Stop):
        run("flora", rounds=6, fraction=0.34, out=tmp_path, callbacks=[stop]).run()
    events = run("flora", rounds=6, fraction=0.34, out=tmp_path).run().events
    late = [[one["catch_up"] for one in some if one["event"] == "aggregated"] for some in (told, events)]
    assert late[0] == late[1]
    assert any(late[0][3:])


def test_population_options_reach_aggregate_and_own_options_win():
    federation = run("flora_warm", strategy_options={"floor": 1})
    federation._prepare()
    assert federation.server.options == {"floor": 1}
    model = make_model()
    server = Server(GlobalModel(model, list(target_weights(model))), federation.clients.expected, "flora_warm")
    assert set(server.options["floor"].values()) == {2}


def test_a_round_that_leaves_nothing_beside_the_base_is_evaluated_as_the_base(tmp_path):
    """``start="directions"`` keeps adapters of rank 0: there is no global adapter to attach or to save."""
    options = {"start": "directions"}
    result = make_federation(tmp_path, strategy="flora_warm", strategy_options=options, rounds=3).run()
    assert result.adapter is None
    assert not (tmp_path / "adapter").exists()
    assert result.before is not None
    assert result.after is not None
    assert result.after["loss"] < result.before["loss"]
