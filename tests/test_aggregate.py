"""The contract of every strategy in the table, and what each of them is by its paper.

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

from flora_core.aggregate import STRATEGIES, aggregate, get_strategy
from flora_core.update import ClientUpdate

SHAPES = {"layers.0.q_proj": (24, 16), "layers.0.v_proj": (8, 16), "layers.1.q_proj": (24, 16)}  # (N, K)
EACH = pytest.mark.parametrize("name", list(STRATEGIES))


def make_update(
    client: str,
    ranks: Any = 4,
    *,
    seed: int = 0,
    weight: float = 1.0,
    scaling: Any = 2.0,
    dtype: torch.dtype = torch.float32,
    modules: tuple[str, ...] = tuple(SHAPES),
) -> ClientUpdate:
    """A client's update of random factors; ``ranks`` and ``scaling`` for all modules or by module."""
    generator = torch.Generator().manual_seed(seed)
    ranks = ranks if isinstance(ranks, dict) else dict.fromkeys(modules, ranks)
    scaling = scaling if isinstance(scaling, dict) else dict.fromkeys(modules, scaling)
    adapters = {}
    for module in modules:
        n, k = SHAPES[module]
        A_RK = torch.randn(ranks[module], k, generator=generator, dtype=torch.float64)
        B_RN = torch.randn(ranks[module], n, generator=generator, dtype=torch.float64)
        adapters[module] = (A_RK.to(dtype), B_RN.to(dtype))
    return ClientUpdate(client, adapters, scaling, weight)


def equal_ranks() -> list[ClientUpdate]:
    return [make_update(f"c{i}", 4, seed=i, weight=w, scaling=0.5 + i) for i, w in enumerate([30, 10, 60])]


def mixed_ranks() -> list[ClientUpdate]:
    """Ten clients with ranks 64..4 cut to these shapes: rsLoRA scalings, partial modules, a rank 0, ranks above N."""
    updates = []
    for i, rank in enumerate([12, 8, 8, 7, 5, 4, 3, 2, 1, 1]):
        modules = tuple(SHAPES)[: 1 + i % 3]
        updates.append(make_update(f"c{i}", rank, seed=i, weight=1 + i, scaling=16 / math.sqrt(rank), modules=modules))
    updates.append(make_update("none", dict.fromkeys(SHAPES, 0), weight=5, scaling=0.0))
    return updates


def oracle(updates) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The exact sum in float64, one rank-one term after another, and the sum of the clients' norms."""
    dense, norms = {}, {}
    total = sum(update.weight for update in updates)
    for update in updates:
        for module, (A, B) in update.adapters.items():
            n, k = SHAPES[module]
            part = torch.zeros(n, k, dtype=torch.float64)
            for row in range(A.shape[0]):
                part += torch.outer(B[row].double(), A[row].double())
            part *= update.weight * update.scaling[module] / total
            dense[module] = dense.get(module, 0) + part
            norms[module] = norms.get(module, 0.0) + float(part.norm())
    return dense, norms


def assert_close(got, want, norms, case=""):
    """1e-9 of the sum of the clients' norms: clients that nearly cancel would spoil a measure by the sum's own norm."""
    for module, norm in norms.items():
        error = float((got.get(module, torch.zeros_like(want[module])) - want[module]).norm())
        assert error <= 1e-9 * norm, f"{case} {module}: {error / norm:.1e} of the clients' norms"


def effective(adapter, update) -> dict[str, torch.Tensor]:
    """What a client's adapter adds to the base, module by module."""
    return {m: update.scaling[m] * B.double().T @ A.double() for m, (A, B) in adapter.items()}


@EACH
def test_one_client_gives_back_its_own_product(name):
    update = make_update("only", dict.fromkeys(SHAPES, 3), weight=0.25, scaling=dict.fromkeys(SHAPES, 1.5))
    want, norms = oracle([update])
    result = aggregate([update], name)
    assert_close(result.dense(), want, norms)
    assert result.certificate.aggregation_error < 1e-12


@EACH
def test_order_of_clients_does_not_matter(name):
    updates = equal_ranks()
    want = aggregate(updates, name).dense()
    _, norms = oracle(updates)
    for order in itertools.permutations(updates):
        assert_close(aggregate(list(order), name).dense(), want, norms)


@EACH
def test_weights_are_normalised_over_the_round(name):
    updates = equal_ranks()
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
    updates = equal_ranks()
    want = aggregate(updates, name).dense()
    got = aggregate([*updates, make_update("idle", 4, seed=9, weight=0)], name).dense()
    for module in SHAPES:
        assert torch.equal(got[module], want[module])


@EACH
def test_mixed_ranks_work_or_are_refused(name):
    updates = mixed_ranks()
    if get_strategy(name).mixed_ranks:
        assert set(aggregate(updates, name).dense()) == set(SHAPES)
    else:
        with pytest.raises(ValueError, match=r"needs equal ranks, got 1 from 'c8', 'c9'; .*use one of flora, zero_pad"):
            aggregate(updates, name)


@EACH
def test_exact_means_the_exact_sum(name):
    updates = mixed_ranks() if get_strategy(name).mixed_ranks else equal_ranks()
    want, norms = oracle(updates)
    result = aggregate(updates, name)
    if get_strategy(name).exact:
        assert_close(result.dense(), want, norms)
        assert result.certificate.aggregation_error < 1e-12
    else:
        assert result.certificate.aggregation_error > 1e-3


def test_exact_strategies_equal_the_float64_sum_for_any_round(scale):
    @settings(max_examples=scale(25, 300, "rounds"), deadline=None)
    @given(data=st.data())
    def check(data):
        updates = [draw_update(data, i) for i in range(data.draw(st.integers(1, 5)))]
        # A twin that takes the first client back almost exactly: the sum is small beside its terms.
        A, B = updates[0].adapters["layers.0.q_proj"]
        twin = {"layers.0.q_proj": (A, -B * (1 + 2**-7))}
        updates.append(ClientUpdate("twin", twin, {"layers.0.q_proj": updates[0].scaling["layers.0.q_proj"]}))
        want, norms = oracle(updates)
        for name in (name for name, strategy in STRATEGIES.items() if strategy.exact):
            assert_close(aggregate(updates, name).dense(), want, norms, name)

    check()


def draw_update(data, i: int) -> ClientUpdate:
    ranks = {module: data.draw(st.integers(0, 9)) for module in SHAPES}
    scaling = {module: data.draw(st.sampled_from([0.0, 0.5, 2.0, 16 / math.sqrt(7)])) for module in SHAPES}
    weight = data.draw(st.integers(0, 100)) + (i == 0)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return make_update(f"c{i}", ranks, seed=i, weight=weight, scaling=scaling, dtype=dtype)


@EACH
def test_a_round_in_which_nobody_trains_changes_nobody(name):
    _idle_rounds(name, equal_ranks())


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items() if strategy.mixed_ranks])
def test_idle_round_at_mixed_ranks_is_as_the_table_says(name):
    clients = [make_update(f"c{i}", rank, seed=i) for i, rank in enumerate([8, 4, 2])]
    if get_strategy(name).idle_safe:
        _idle_rounds(name, clients)
    else:
        with pytest.raises(AssertionError, match="effective model moved"):
            _idle_rounds(name, clients)


def _idle_rounds(name, clients):
    """One round of training, then two in which every client sends back what it got, the second without one client."""
    result = aggregate(clients, name)
    base = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
    for round_clients in (clients, clients[:2]):
        _apply(base, result)
        before = {c.client: _model(base, result, c) for c in clients}
        result = aggregate([_idle(result, c) for c in round_clients], name, result.state)
        after_base = {m: w.clone() for m, w in base.items()}
        _apply(after_base, result)
        for client in clients:
            after = _model(after_base, result, client)
            for module, want in before[client.client].items():
                moved = float((after[module] - want).norm() / want.norm())
                assert moved < 1e-6, f"{client.client} {module}: effective model moved by {moved:.1e}"
        base = after_base
        result.base_delta = {}


def _apply(base, result):
    for module, (A, B, coef) in result.base_delta.items():
        base[module] += (B.double().T * coef) @ A.double()


def _model(base, result, client):
    adapter = result.next_adapter(client.client, ranks=client.ranks, scaling=client.scaling) or {}
    return {m: w + effective(adapter, client).get(m, 0) for m, w in base.items()}


def _idle(result, client) -> ClientUpdate:
    adapter = result.next_adapter(client.client, ranks=client.ranks, scaling=client.scaling)
    fresh = {m: (A, torch.zeros_like(B)) for m, (A, B) in client.adapters.items()}
    return ClientUpdate(client.client, adapter or fresh, client.scaling, client.weight)


@EACH
def test_next_adapter_from_the_state_alone_is_the_result_s(name):
    updates = equal_ranks()
    result = aggregate(updates, name)
    for update in updates:
        own = result.next_adapter(update.client)
        resumed = get_strategy(name).next_adapter(result.state, update.client, update.ranks, update.scaling)
        assert (own is None) == (resumed is None)
        for module, pair in (own or {}).items():
            assert all(torch.equal(x, y) for x, y in zip(pair, (resumed or {})[module], strict=True))


@EACH
def test_state_holds_tensors_and_json_values_only(name):
    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            for item in value.values():
                check(item)
        else:
            assert isinstance(value, (torch.Tensor, str, int, float))

    state = aggregate(equal_ranks(), name).state
    assert state["strategy"] == name
    check(state)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_updates_and_result_are_left_as_they_were(name, dtype):
    updates = [make_update(f"c{i}", 4, seed=i, dtype=dtype) for i in range(3)]
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


@pytest.mark.parametrize("name", ["flora", "fedit", "zero_pad"])
def test_bytes_count_what_travels(name):
    updates = equal_ranks()
    result = aggregate(updates, name)
    sizes = sum((n + k) * 4 * 4 for n, k in SHAPES.values())  # rank 4, four bytes
    assert result.bytes_up == 3 * sizes
    if name == "flora":
        # P = 12 against NK / (N + K) = 9.6 and 5.3: dense is smaller everywhere.
        assert result.bytes_down == 3 * sum(n * k * 4 for n, k in SHAPES.values())
        small = aggregate(updates[:2], name)
        stack = sum(8 * (n + k) * 4 for n, k in SHAPES.values() if n == 24)
        assert small.bytes_down == 2 * (stack + 8 * 16 * 4)
    else:
        assert result.bytes_down == 3 * sizes


def test_flora_stacks_without_a_copy_where_the_bank_already_is_the_stack():
    flat = torch.randn(7, 16)
    other = torch.randn(7, 24)
    cuts = [(0, 4), (4, 4), (4, 7)]
    updates = [
        ClientUpdate(f"c{i}", {"layers.0.q_proj": (flat[a:b], other[a:b])}, {"layers.0.q_proj": 1.0})
        for i, (a, b) in enumerate(cuts)
    ]
    A, B, coef = aggregate(updates).base_delta["layers.0.q_proj"]
    assert A.data_ptr() == flat.data_ptr()
    assert torch.equal(A, flat)
    assert B.data_ptr() == other.data_ptr()
    assert torch.equal(B, other)
    assert coef.dtype == torch.float64
    assert coef.tolist() == [1 / 3] * 7
    A, B, _ = aggregate(updates[::-1]).base_delta["layers.0.q_proj"]
    assert torch.equal(A, torch.cat([flat[4:], flat[:4]]))
    assert torch.equal(B, torch.cat([other[4:], other[:4]]))
    with_gap = [updates[0], ClientUpdate("gap", {"layers.0.q_proj": (flat[5:], other[5:])}, {"layers.0.q_proj": 1.0})]
    A, _, _ = aggregate(with_gap).base_delta["layers.0.q_proj"]
    assert torch.equal(A, torch.cat([flat[:4], flat[5:]]))


def test_fedit_averages_factors_apart_with_scalings_folded_into_b():
    updates = equal_ranks()
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


def test_average_of_products_is_not_the_product_of_averages():
    """FedIT's cross terms, by hand: two opposite clients cancel exactly, and so must the exact sum alone."""
    module = "layers.0.q_proj"
    A, B = torch.ones(1, 16), torch.ones(1, 24)
    updates = [
        ClientUpdate("plus", {module: (A, B)}, {module: 1.0}),
        ClientUpdate("minus", {module: (-A, B)}, {module: 1.0}),
    ]
    assert float(aggregate(updates, "flora").dense()[module].abs().max()) == 0
    assert float(aggregate(updates, "fedit").dense()[module].abs().max()) == 0
    updates[1].adapters[module] = (-A, -B)
    assert torch.equal(aggregate(updates, "flora").dense()[module], torch.ones(24, 16, dtype=torch.float64))
    lost = aggregate(updates, "fedit")
    assert float(lost.dense()[module].abs().max()) == 0
    assert lost.certificate.aggregation_error == pytest.approx(1.0)


@EACH
def test_all_clients_of_rank_zero_make_an_empty_round(name):
    result = aggregate([make_update("c", dict.fromkeys(SHAPES, 0), scaling=0.0)], name)
    assert result.dense() == {}
    assert result.next_adapter("c") is None
    assert (result.bytes_up, result.bytes_down, result.certificate.aggregation_error) == (0, 0, 0.0)
