"""The contract of every strategy in the table.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation import STRATEGIES, aggregate, get_strategy
from tests.support.rounds import (
    SHAPES,
    a_round,
    applied,
    assert_close,
    effective,
    equal_ranks,
    freeze,
    global_model,
    idle,
    make_update,
    mixed_ranks,
    model_of,
    new_base,
    oracle,
    start_of,
)

EACH = pytest.mark.parametrize("name", list(STRATEGIES))
EXACT = [name for name, strategy in STRATEGIES.items() if strategy.exact]
# What an fp32 round may lose, in parts of the clients' norms.
FLOAT32_BOUND = 1e-6


@EACH
def test_one_client_gives_back_its_own_product(name):
    update = make_update("only", dict.fromkeys(SHAPES, 3), weight=0.25, scaling=dict.fromkeys(SHAPES, 1.5))
    want, norms = oracle([update])
    result = aggregate([update], name)
    assert_close(result.dense(), want, norms)
    assert result.certificate.aggregation_error < 1e-12


@EACH
def test_order_of_clients_does_not_matter(name):
    updates = a_round(name)[:4]
    want = aggregate(updates, name).dense()
    _, norms = oracle(updates)
    for order in itertools.permutations(updates):
        result = aggregate(list(order), name)
        assert_close(result.dense(), want, norms)
        for client in updates:
            ours, theirs = (effective(start_of(aggregate(o, name), client), client) for o in (updates, list(order)))
            assert ours.keys() == theirs.keys()
            for module in ours:
                torch.testing.assert_close(ours[module], theirs[module], rtol=1e-9, atol=1e-9)


@EACH
def test_a_client_counts_as_two_of_half_its_weight(name):
    updates = a_round(name)
    if name == "hetlora":
        # It weighs by norms, whoever they are of; with shares it obeys.
        options = {"weigh": "norm_and_share"}
        assert_differ(aggregate(updates, name), aggregate(twice(updates), name))
    else:
        options: dict[str, Any] = {}
    want, norms = aggregate(updates, name, **options).dense(), oracle(updates)[1]
    assert_close(aggregate(twice(updates), name, **options).dense(), want, norms)


def twice(updates):
    first = updates[0]
    half = [ClientUpdate(f"half{i}", first.adapters, first.scaling, first.weight / 2) for i in range(2)]
    return [*half, *updates[1:]]


def assert_differ(one, other):
    assert any(float((one.dense()[m] - other.dense()[m]).norm()) > 1e-3 for m in SHAPES)


@EACH
def test_weights_are_normalised_over_the_round(name):
    updates = a_round(name)
    want = aggregate(updates, name).dense()
    _, norms = oracle(updates)
    for update in updates:
        update.weight *= 7
    assert_close(aggregate(updates, name).dense(), want, norms)


def test_shares_do_not_depend_on_the_order_by_a_single_bit():
    updates = [make_update(f"c{i}", 1, weight=weight, scaling=1.0) for i, weight in enumerate([0.1, 0.2, 0.3])]
    assert sum([0.1, 0.2, 0.3]) != sum([0.3, 0.2, 0.1])
    forward, backward = aggregate(updates).base_delta, aggregate(updates[::-1]).base_delta
    for module in SHAPES:
        assert torch.equal(forward[module][2], backward[module][2].flip(0))


@EACH
def test_client_of_weight_zero_changes_nothing(name):
    updates = a_round(name, mixed=False)
    want = aggregate(updates, name).dense()
    late = make_update("idle", 4, seed=9, weight=0)
    got = aggregate([*updates, late], name).dense()
    for module in SHAPES:
        assert torch.equal(got[module], want[module])


@EACH
def test_mixed_ranks_work_or_are_refused(name):
    updates = mixed_ranks()
    if get_strategy(name).mixed_ranks:
        assert set(aggregate(updates, name).dense()) == set(SHAPES)
    else:
        words = r"needs equal ranks, got 1 from 'c8', 'c9'; .*use one of flora, flora_svd, flora_warm, flexlora"
        with pytest.raises(ValueError, match=words):
            aggregate(updates, name)


@EACH
def test_clients_of_different_modules_work_or_are_refused(name):
    updates = freeze([make_update("all", seed=1), make_update("few", seed=2)], get_strategy(name).trainable({}))
    del updates[1].adapters["layers.0.v_proj"], updates[1].scaling["layers.0.v_proj"]
    if get_strategy(name).mixed_modules:
        result = aggregate(updates, name)
        assert set(result.dense()) == set(SHAPES)
        assert "layers.0.v_proj" not in (result.next_adapter("few") or {})
    else:
        words = "needs clients that adapt the same modules, got 'layers.0.v_proj' in only one of 'all' and 'few'"
        with pytest.raises(ValueError, match=words):
            aggregate(updates, name)


@EACH
def test_exact_means_the_exact_sum(name):
    updates = a_round(name)
    want, norms = oracle(updates)
    result = aggregate(updates, name)
    if get_strategy(name).exact:
        assert_close(result.dense(), want, norms)
        assert result.certificate.aggregation_error < 1e-12
    else:
        assert result.certificate.aggregation_error > 1e-3


@EACH
def test_a_second_round_is_as_exact_as_the_first(name):
    first = aggregate(a_round(name), name)
    updates = a_round(name)
    for i, update in enumerate(updates):
        noise = make_update(update.client, update.ranks, seed=100 + i, modules=tuple(update.adapters)).adapters
        start = idle(first, update).adapters
        trained = {m: [x + y for x, y in zip(start[m], noise[m], strict=True)] for m in start}
        update.adapters = {m: (A, B) for m, (A, B) in trained.items()}
    freeze(updates, get_strategy(name).trainable(first.state))
    want, norms = oracle(updates)
    result = aggregate(updates, name, first.state)
    if get_strategy(name).exact:
        assert_close(result.dense(), want, norms)
        assert result.certificate.aggregation_error < 1e-12
    else:
        assert result.certificate.aggregation_error > 1e-3


def test_exact_strategies_equal_the_float64_sum_for_any_round(scale):
    @settings(max_examples=scale(20, 1000, "rounds"), deadline=None)
    @given(data=st.data())
    def check(data):
        updates = [draw_update(data, i) for i in range(data.draw(st.integers(1, 5)))]
        # A twin that takes the first client back almost exactly: the sum is small beside its terms.
        twin = {m: (A, -B * (1 + 2**-7)) for m, (A, B) in updates[0].adapters.items()}
        updates.append(ClientUpdate("twin", twin, updates[0].scaling))
        narrow = torch.float64 if all(is_float64(update) for update in updates) else torch.float32
        for name in EXACT:
            taken = updates if get_strategy(name).mixed_ranks else equal(updates, name, data)
            want, norms = oracle(taken)
            result = aggregate(taken, name)
            assert_close(result.dense(), want, norms, 1e-9 if narrow is torch.float64 else FLOAT32_BOUND, name)

    check()


def draw_update(data, i: int) -> ClientUpdate:
    ranks = {module: data.draw(st.integers(0, 9)) for module in SHAPES}
    scaling = {module: data.draw(st.sampled_from([0.25, 0.5, 2.0, 16 / math.sqrt(7)])) for module in SHAPES}
    weight = data.draw(st.integers(0, 100)) + (i == 0)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return make_update(f"c{i}", ranks, seed=i, weight=weight, scaling=scaling, dtype=dtype)


def is_float64(update) -> bool:
    return all(factor.dtype == torch.float64 for pair in update.adapters.values() for factor in pair)


def equal(updates, name, data):
    """The same clients at one rank, with what the strategy freezes in common."""
    rank = data.draw(st.integers(1, 9))
    same = [
        make_update(u.client, rank, seed=i, weight=u.weight, scaling=u.scaling, dtype=torch.float32)
        for i, u in enumerate(updates)
    ]
    return freeze(same, get_strategy(name).trainable({}))


@EACH
def test_a_round_in_which_nobody_trains_changes_nobody(name):
    idle_rounds(name, a_round(name, mixed=False, dtype=torch.float32))


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items() if strategy.mixed_ranks])
def test_idle_round_at_mixed_ranks_is_as_the_table_says(name):
    clients = [make_update(f"c{i}", rank, seed=i, dtype=torch.float32) for i, rank in enumerate([8, 4, 2])]
    if get_strategy(name).idle_safe:
        idle_rounds(name, clients)
    else:
        with pytest.raises(AssertionError, match="effective model moved"):
            idle_rounds(name, clients)


@pytest.mark.parametrize("name", [name for name, s in STRATEGIES.items() if s.mixed_modules and s.idle_safe])
def test_idle_round_with_different_modules_changes_nobody(name):
    few = make_update("few", 4, seed=5, modules=("layers.0.q_proj",), dtype=torch.float32)
    idle_rounds(name, [few, *equal_ranks(torch.float32)])


def idle_rounds(name, clients):
    """One round of training, then three in which all who are present send back what they got."""
    result = aggregate(clients, name)
    base = applied(new_base(), result)
    for present in (clients, clients[:2], clients[1:]):
        before = {c.client: model_of(base, result, c) for c in clients}
        result = aggregate([idle(result, c) for c in present], name, result.state)
        base = applied(base, result)
        for client in clients:
            after = model_of(base, result, client)
            for module, want in before[client.client].items():
                moved = float((after[module] - want).norm()) / (float(want.norm()) or 1.0)
                assert moved < FLOAT32_BOUND, f"{client.client} {module}: effective model moved by {moved:.1e}"


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("scaling", [2.0, 16 / math.sqrt(5)])
def test_every_client_of_an_exact_strategy_starts_at_the_global_model(name, scaling):
    """Bit for bit at a scaling that is a power of two, else up to the rounding of B / s; newcomers too."""
    clients = a_round(name, dtype=torch.float32)
    result = aggregate(clients, name)
    base = applied(new_base(), result)
    late = make_update("late", 4 if not get_strategy(name).mixed_ranks else 7, scaling=scaling, dtype=torch.float32)
    got, want = model_of(base, result, late), global_model(base, result)
    for module in SHAPES:
        moved = float((got[module] - want[module]).norm() / want[module].norm())
        assert moved < FLOAT32_BOUND


@EACH
def test_next_adapter_from_the_state_alone_is_the_result_s(name):
    updates = a_round(name, mixed=False)
    result = aggregate(updates, name)
    for update in updates:
        own = result.next_adapter(update.client)
        resumed = get_strategy(name).next_adapter(result.state, update.client, update.ranks, update.scaling)
        assert (own is None) == (resumed is None)
        for module, pair in (own or {}).items():
            assert all(torch.equal(x, y) for x, y in zip(pair, (resumed or {})[module], strict=True))


@EACH
def test_a_client_that_returns_or_is_new_gets_the_newest_adapter(name):
    """Whoever was away for two rounds starts as one who was there; a newcomer of the same shape too."""
    clients = a_round(name, mixed=False)
    first = aggregate(clients, name)
    result = aggregate([idle(first, c) for c in clients[:2]], name, first.state)
    present, away = (effective(start_of(result, c), c) for c in (clients[0], clients[2]))
    new = ClientUpdate("new", clients[0].adapters, clients[0].scaling)
    for other in (away, effective(start_of(result, new), new)):
        assert other.keys() == present.keys()
        for module in present:
            torch.testing.assert_close(other[module], present[module], rtol=1e-9, atol=1e-9)


@EACH
def test_state_holds_tensors_and_json_values_only(name):
    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            for item in value.values():
                check(item)
        else:
            assert isinstance(value, (torch.Tensor, str, int, float))

    state = aggregate(a_round(name), name).state
    assert state["strategy"] == name
    check(state)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_updates_and_result_are_left_as_they_were(name, dtype):
    updates = a_round(name, mixed=False, dtype=dtype)
    before = [(A.clone(), B.clone()) for update in updates for A, B in update.adapters.values()]
    result = aggregate(updates, name)
    dense = result.dense()
    for adapter in (result.next_adapter("c0") or {}).values():
        for tensor in adapter:
            tensor.zero_()
    after = [pair for update in updates for pair in update.adapters.values()]
    assert all(torch.equal(x, y) for old, new in zip(before, after, strict=True) for x, y in zip(old, new, strict=True))
    for again in (result.dense(), aggregate(updates, name).dense()):
        assert all(torch.equal(value, again[module]) for module, value in dense.items())


@EACH
def test_all_clients_of_rank_zero_make_an_empty_round(name):
    result = aggregate([make_update("c", dict.fromkeys(SHAPES, 0), scaling=0.0)], name)
    assert result.dense() == {}
    assert result.next_adapter("c") is None
    assert (result.bytes_up, result.bytes_down, result.certificate.aggregation_error) == (0, 0, 0.0)
