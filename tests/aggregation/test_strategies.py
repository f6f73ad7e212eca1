"""Strategies that average factors, by their papers, against oracles that are written apart: plain float64 loops.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import math

import pytest
import torch

from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation import aggregate, get_strategy
from tests.support.rounds import (
    SHAPES,
    Q,
    a_round,
    applied,
    dense_svd,
    effective,
    equal_ranks,
    freeze,
    fresh_start,
    make_update,
    new_base,
    oracle,
    start_of,
)


def test_fedit_averages_factors_apart_with_scalings_folded_into_b():
    updates = equal_ranks(torch.float32)
    result = aggregate(updates, "fedit")
    assert result.base_delta == {}
    module = "layers.0.v_proj"
    p = [0.3, 0.1, 0.6]
    A = torch.stack([w * u.adapters[module][0].double() for w, u in zip(p, updates, strict=True)]).sum(0)
    B = [w * u.scaling[module] * u.adapters[module][1].double() for w, u in zip(p, updates, strict=True)]
    B = torch.stack(B).sum(0)
    torch.testing.assert_close(result.dense()[module], B.T @ A, rtol=0, atol=1e-12)
    for update in updates:
        adapter = result.next_adapter(update.client)
        assert adapter is not None
        assert adapter[module][0].dtype == torch.float32
        got = effective(adapter, update)[module]
        # One rounding of each factor to float32.
        assert float((got - B.T @ A).norm() / (B.T @ A).norm()) < 4 * torch.finfo(torch.float32).eps


def test_fedit_serves_a_client_that_did_not_take_part():
    updates = equal_ranks()
    result = aggregate(updates, "fedit")
    with pytest.raises(ValueError, match=r"client 'late' sent no update this round: pass its ranks= and scaling="):
        result.next_adapter("late")
    ranks, scaling = {"layers.0.q_proj": 4, "layers.1.q_proj": 0}, {"layers.0.q_proj": 8.0, "layers.1.q_proj": 0.0}
    late = result.next_adapter("late", ranks=ranks, scaling=scaling)
    assert late is not None
    assert list(late) == ["layers.0.q_proj"]
    own = result.next_adapter("c0")
    assert own is not None
    torch.testing.assert_close(8 * late["layers.0.q_proj"][1], 0.5 * own["layers.0.q_proj"][1])
    with pytest.raises(ValueError, match="needs rank 4, that of the global adapter, got 3"):
        result.next_adapter("late", ranks={"layers.0.q_proj": 3}, scaling=scaling)
    with pytest.raises(ValueError, match="scaling must not be 0"):
        result.next_adapter("late", ranks={"layers.0.q_proj": 4}, scaling={})


def test_fedit_keeps_the_global_adapter_of_a_module_that_nobody_adapts_this_round():
    first = aggregate(equal_ranks(), "fedit")
    some = make_update("c0", 4, seed=7, modules=("layers.0.q_proj",))
    second = aggregate([some], "fedit", first.state)
    assert torch.equal(second.dense()["layers.1.q_proj"], first.dense()["layers.1.q_proj"])
    assert not torch.equal(second.dense()["layers.0.q_proj"], first.dense()["layers.0.q_proj"])


def test_zero_pad_cuts_and_extends_to_each_client_s_rank():
    small, large = make_update("small", 2, seed=1), make_update("large", 6, seed=2, weight=3.0)
    result = aggregate([small, large], "zero_pad")
    module = "layers.0.q_proj"
    (a, b), (A, B) = small.adapters[module], large.adapters[module]
    mean_A = 0.75 * A.double() + 0.25 * torch.cat([a, torch.zeros(4, 16)]).double()
    mean_B = 2.0 * (0.75 * B.double() + 0.25 * torch.cat([b, torch.zeros(4, 24)]).double())
    torch.testing.assert_close(result.dense()[module], mean_B.T @ mean_A, rtol=0, atol=1e-12)
    cut, full = result.next_adapter("small"), result.next_adapter("large")
    assert cut is not None
    assert full is not None
    assert torch.equal(cut[module][0], full[module][0][:2])
    assert torch.equal(cut[module][1], full[module][1][:2])
    hints = {"ranks": dict.fromkeys(SHAPES, 9), "scaling": dict.fromkeys(SHAPES, 2.0)}
    wide, again = result.next_adapter("wide", **hints), result.next_adapter("wide", **hints)
    assert wide is not None
    assert again is not None
    assert wide[module][0].shape == (9, 16)
    assert torch.equal(wide[module][0][:6], full[module][0])
    assert torch.equal(wide[module][1][6:], torch.zeros(3, 24)), "the new rows must not change the effective model"
    assert wide[module][0][6:].abs().min() > 0
    assert wide[module][0][6:].abs().max() <= 1 / math.sqrt(16)
    assert torch.equal(wide[module][0], again[module][0])


def test_zero_pad_equals_fedit_at_equal_ranks():
    updates = equal_ranks()
    fedit, padded = aggregate(updates, "fedit").dense(), aggregate(updates, "zero_pad").dense()
    assert all(torch.equal(fedit[module], padded[module]) for module in SHAPES)


def test_hetlora_weighs_by_the_norms_of_the_products_and_cuts():
    small, large = make_update("small", 2, seed=1, weight=9), make_update("large", 6, seed=2, weight=1, scaling=0.5)
    result = aggregate([small, large], "hetlora")
    (a, b), (A, B) = small.adapters[Q], large.adapters[Q]
    sizes = [float((2 * b.T @ a).norm()), float((0.5 * B.T @ A).norm())]
    w, v = sizes[0] / sum(sizes), sizes[1] / sum(sizes)
    mean_A = w * torch.cat([a, torch.zeros(4, 16)]) + v * A
    mean_B = w * 2 * torch.cat([b, torch.zeros(4, 24)]) + v * 0.5 * B
    torch.testing.assert_close(result.dense()[Q], mean_B.T @ mean_A, rtol=0, atol=1e-10)
    cut = result.next_adapter("small")
    assert cut is not None
    torch.testing.assert_close(cut[Q][0], mean_A[:2])
    shares = aggregate([small, large], "hetlora", weigh="share").dense()
    assert torch.equal(shares[Q], aggregate([small, large], "zero_pad").dense()[Q])


def test_hetlora_of_a_round_without_products_goes_by_shares():
    clients = [ClientUpdate(u.client, fresh_start(u), u.scaling, u.weight) for u in equal_ranks()]
    assert float(aggregate(clients, "hetlora").dense()[Q].norm()) == 0


def test_hetlora_prunes_the_tail_of_a_client_that_let_it_shrink():
    clients = [make_update(f"c{i}", 8, seed=i, scaling=1.0) for i in range(2)]
    result = aggregate(clients, "hetlora", prune=0.5)
    assert result.state["kept"] == {}, "nobody can have shrunk what nobody was sent"
    trained = []
    for number, client in enumerate(clients):
        start = start_of(result, client)
        factor = [0.5, 2.0][number]
        for A, _ in start.values():
            A[4:] *= factor
        trained.append(ClientUpdate(client.client, start, client.scaling))
    result = aggregate(trained, "hetlora", result.state, prune=0.5)
    assert result.state["kept"] == {"c0": dict.fromkeys(SHAPES, 4)}
    A, B = start_of(result, clients[0])[Q]
    assert not A[4:].any()
    assert not B[4:].any()
    assert A[:4].any()
    assert start_of(result, clients[1])[Q][0][4:].any()
    trained[0].adapters = start_of(result, clients[0])
    again = aggregate(trained, "hetlora", result.state, prune=0.5)
    assert again.state["kept"]["c0"][Q] == 4, "equal tails are not smaller"


def test_fedex_averages_as_fedit_and_leaves_the_rest_to_the_base():
    updates = equal_ranks()
    result, fedit = aggregate(updates, "fedex"), aggregate(updates, "fedit")
    want = oracle(updates)[0]
    for module in SHAPES:
        A, B, _ = result.adapter[module]
        torch.testing.assert_close(B.T @ A, fedit.dense()[module], rtol=0, atol=1e-10)
        got = applied(new_base(), result)[module]
        torch.testing.assert_close(got, want[module] - fedit.dense()[module], rtol=0, atol=1e-10)


def test_fedex_can_leave_only_the_leading_triplets_of_the_rest_to_the_base():
    updates = equal_ranks()
    want, fedit = oracle(updates)[0], aggregate(updates, "fedit").dense()
    for rank in (0, 1, 5, 12):
        result = aggregate(updates, "fedex", residual_rank=rank)
        for module, matrix in want.items():
            best = dense_svd(matrix - fedit[module], min(rank, *matrix.shape))
            torch.testing.assert_close(applied(new_base(), result)[module], best, rtol=0, atol=1e-9)
            lost = float((matrix - fedit[module] - best).norm() / matrix.norm())
            assert result.certificate.aggregation[module].relative == pytest.approx(lost, abs=1e-9)
    # Three clients of rank 4: what fedit misses has rank 12 at most, and this loses nothing.
    assert result.certificate.aggregation_error < 1e-12
    assert aggregate(updates, "fedex", residual_rank=1).bytes_down < aggregate(updates, "fedex").bytes_down


def test_ffa_keeps_a_and_averages_b():
    updates = a_round("ffa")
    result = aggregate(updates, "ffa")
    A = updates[0].adapters[Q][0]
    mean = sum(u.weight * u.scaling[Q] * u.adapters[Q][1] for u in updates) / 100
    assert torch.equal(result.adapter[Q][0], A)
    torch.testing.assert_close(result.adapter[Q][1], mean)
    assert result.base_delta == {}


def test_rolora_takes_turns():
    updates, strategy = a_round("rolora"), get_strategy("rolora")
    state, turns = {}, []
    for number in range(4):
        turns.append(strategy.trainable(state))
        result = aggregate(updates, "rolora", state)
        assert result.certificate.aggregation_error < 1e-12
        state = result.state
        updates = [ClientUpdate(u.client, start_of(result, u), u.scaling, u.weight) for u in updates]
        for i, update in enumerate(updates):
            noise = make_update("noise", 4, seed=50 * number + i).adapters
            for module, (A, B) in update.adapters.items():
                frozen = strategy.trainable(state) == ("B",)
                update.adapters[module] = (A if frozen else A + noise[module][0], B + noise[module][1] if frozen else B)
    assert turns == [("B",), ("A",), ("B",), ("A",)]


@pytest.mark.parametrize("name", ["ffa", "rolora"])
def test_only_the_trained_factor_travels(name):
    updates = freeze(equal_ranks(torch.float32), ("B",))
    result = aggregate(updates, name)
    assert result.bytes_up == result.bytes_down == 3 * sum(4 * 4 * n for n, _ in SHAPES.values())
    assert result.up == dict.fromkeys(["c0", "c1", "c2"], result.bytes_up // 3)


@pytest.mark.parametrize("name", ["zero_pad", "flexlora"])
@pytest.mark.parametrize("rank", [2, 4, 9])
def test_a_client_is_sent_the_rows_of_its_rank_that_there_are(name: str, rank: int):
    state = aggregate([make_update("a", 2, seed=0), make_update("b", 4, seed=1)], name).state
    update = make_update("c", rank)
    there = max(pair["A"].shape[0] for pair in state["adapter"].values())
    sizes = {"A": sum(k for _, k in SHAPES.values()), "B": sum(n for n, _ in SHAPES.values())}
    for trained in (("A", "B"), ("A",), ("B",)):
        expected = min(rank, there) * 8 * sum(sizes[factor] for factor in trained)
        assert get_strategy(name).adapter_bytes(state, update, trained) == expected
    one = make_update("d", rank, modules=[Q])
    assert get_strategy(name).adapter_bytes(state, one, ("A",)) == min(rank, there) * 8 * SHAPES[Q][1]


@pytest.mark.parametrize("name", ["ffa", "rolora"])
def test_a_frozen_factor_that_was_trained_is_refused(name):
    updates = a_round(name)
    A, B = updates[1].adapters[Q]
    updates[1].adapters[Q] = (A + 1e-3, B)
    words = rf"client 'c1', module '{Q}': strategy '{name}' trains B alone in this round, and A differs .*client 'c0'"
    with pytest.raises(ValueError, match=words):
        aggregate(updates, name)
