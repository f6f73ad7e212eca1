"""What each strategy is by its paper, against oracles that are written apart: plain float64 NumPy-like loops, and PEFT.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest
import torch

from flora_core.aggregate import STRATEGIES, aggregate, get_strategy
from flora_core.aggregate.compress import energy_rank, leading_svd, stack_svd
from flora_core.update import ClientUpdate
from tests.aggregate_cases import (
    SHAPES,
    Q,
    a_round,
    applied,
    assert_close,
    effective,
    equal_ranks,
    freeze,
    global_model,
    make_update,
    mixed_ranks,
    model_of,
    new_base,
    oracle,
    start_of,
)

EPS = torch.finfo(torch.float32).eps


def dense_svd(matrix, rank):
    """The best approximation of a rank, by the textbook."""
    U, S, V = torch.linalg.svd(matrix)
    return U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank]


@pytest.mark.parametrize("name", ["flora", "fedit", "zero_pad"])
def test_bytes_count_what_travels(name):
    updates = equal_ranks(torch.float32)
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


def test_flora_svd_keeps_the_energy_that_is_asked():
    updates = mixed_ranks()
    want, norms = oracle(updates)
    lossless = aggregate(updates, "flora_svd", tau=1)
    assert_close(lossless.dense(), want, norms)
    for tau in (0.5, 0.9, 0.999):
        result = aggregate(updates, "flora_svd", tau=tau)
        for module, matrix in want.items():
            S = torch.linalg.svdvals(matrix)
            share = S.square().cumsum(0) / S.square().sum()
            rank = next(r + 1 for r in range(len(S)) if share[r] >= tau)
            assert_close({module: result.dense()[module]}, {module: dense_svd(matrix, rank)}, {module: norms[module]})
            assert result.base_delta[module][0].shape[0] == rank
            lost = result.certificate.aggregation[module].relative
            assert lost == pytest.approx(math.sqrt(1 - float(share[rank - 1])), abs=1e-7)
    assert all(result.next_adapter(update.client) is None for update in updates)


def test_flora_svd_sends_fewer_bytes_and_never_more_rows_than_the_matrix_has():
    updates = [make_update(f"c{i}", 8, seed=i, dtype=torch.float32) for i in range(6)]
    whole = aggregate(updates, "flora_svd")
    for module, (N, K) in SHAPES.items():
        assert whole.base_delta[module][0].shape[0] == min(N, K)
    assert aggregate(updates, "flora_svd", tau=0.5).bytes_down < whole.bytes_down
    assert aggregate(updates[:1], "flora_svd").base_delta[Q][0].dtype == torch.float32


def test_energy_rank_at_the_edges():
    S = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert [energy_rank(S, tau) for tau in (1, 1e-9, 4 / 6, 4.1 / 6, 5.1 / 6)] == [4, 1, 1, 2, 3]
    assert energy_rank(S[:0], 0.5) == 0


@pytest.mark.parametrize(("p", "n", "k"), [(3, 24, 16), (9, 24, 16), (10, 24, 16), (40, 24, 16), (5, 3, 30), (0, 4, 5)])
def test_stack_svd_equals_the_dense_one(p, n, k):
    """P below and above NK / (N + K), above min(N, K), and no rows at all."""
    A, B, coef = (torch.randn(*shape, dtype=torch.float64) for shape in ((p, k), (p, n), (p,)))
    matrix = (B.T * coef) @ A
    svd = stack_svd((A, B, coef))
    torch.testing.assert_close(
        (svd.U_RN.T * svd.S_R) @ svd.V_RK, matrix, rtol=0, atol=1e-12 * (1 + float(matrix.norm()))
    )
    assert len(svd.S_R) == min(p, n, k)
    for rows in (svd.U_RN, svd.V_RK):
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)
    if p:
        torch.testing.assert_close(svd.S_R, torch.linalg.svdvals(matrix)[: len(svd.S_R)], rtol=0, atol=1e-11)
        assert bool((svd.V_RK.gather(1, svd.V_RK.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize("start", ["shared", "directions"])
def test_flora_warm_is_exact_over_many_rounds_and_everybody_starts_at_the_global_model(start):
    """Against a plain run: the exact global model of each round is the weighted mean of the clients' own models."""
    ranks, scaling = {"a": 8, "b": 4, "c": 2}, {"a": 2.0, "b": 3.0, "c": 8 / math.sqrt(2)}
    clients = [make_update(n, ranks[n], seed=i, weight=1 + i, scaling=scaling[n]) for i, n in enumerate(ranks)]
    base, state, rounds = new_base(), None, 5
    current, starts = dict(base), {client.client: idle_start(client) for client in clients}
    for number in range(rounds):
        present = clients if number % 2 == 0 else clients[1:]
        trained = [train(starts[c.client], c, 10 * number + i) for i, c in enumerate(present)]
        want = mean_of_models(base, trained)
        result = aggregate(trained, "flora_warm", state, start=start, floor=2)
        assert result.certificate.aggregation_error < 1e-12
        base, state = applied(base, result), result.state
        current = global_model(base, result)
        starts = {c.client: start_of(result, c) for c in clients}
        for module in SHAPES:
            torch.testing.assert_close(current[module], want[module], rtol=0, atol=1e-10)
            for client in clients:
                torch.testing.assert_close(model_of(base, result, client)[module], current[module], rtol=0, atol=1e-12)
        carried = result.adapter[Q][0].shape[0]
        assert carried == (2 if start == "shared" else 0)
        assert float(torch.linalg.matrix_norm(current[Q])) > 1, "the shared part must not be lost"


def mean_of_models(base, updates):
    total = sum(update.weight for update in updates)
    models = [{m: base[m] + effective(update.adapters, update)[m] for m in SHAPES} for update in updates]
    parts = {m: [u.weight / total * own[m] for u, own in zip(updates, models, strict=True)] for m in SHAPES}
    return {m: torch.stack(part).sum(0) for m, part in parts.items()}


def idle_start(client):
    return {m: (A, torch.zeros_like(B)) for m, (A, B) in client.adapters.items()}


def train(start, client, seed):
    noise = make_update(client.client, client.ranks, seed=seed).adapters
    adapters = {m: (start[m][0] + 0.1 * noise[m][0], start[m][1] + 0.1 * noise[m][1]) for m in start}
    return ClientUpdate(client.client, adapters, client.scaling, client.weight)


def test_flora_warm_starts_bit_for_bit_where_it_says_so():
    clients = [make_update(f"c{i}", r, seed=i, scaling=2.0, dtype=torch.float32) for i, r in enumerate([6, 3])]
    shared, apart = aggregate(clients, "flora_warm"), aggregate(clients, "flora_warm", start="directions")
    for client in clients:
        for module, (A, B) in start_of(shared, client).items():
            want_A, want_B, _ = shared.adapter[module]
            assert torch.equal(A[:3].double(), want_A)
            assert torch.equal(2 * B[:3].double(), want_B)
            assert not B[3:].any()
        assert not any(B.any() for _, B in start_of(apart, client).values())


def test_flora_warm_shares_the_leading_part_and_aims_the_other_rows_at_the_next_directions():
    clients = [make_update(f"c{i}", r, seed=i, scaling=2.0) for i, r in enumerate([6, 3])]
    result = aggregate(clients, "flora_warm")
    matrix = oracle(clients)[0][Q]
    V = torch.linalg.svd(matrix).Vh
    A, B = start_of(result, clients[0])[Q]
    torch.testing.assert_close(2.0 * B.T @ A, dense_svd(matrix, 3), rtol=0, atol=1e-10)
    cosines = (torch.nn.functional.normalize(A, dim=1) * V[:6]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-9)
    # As long as fresh rows: uniform within 1 / sqrt(K).
    torch.testing.assert_close(A.norm(dim=1), torch.full((6,), 3**-0.5, dtype=torch.float64), rtol=0, atol=1e-9)
    wide, _ = start_of(result, make_update("wide", 12))[Q]
    assert wide.shape[0] == 12
    assert float(wide[9:].abs().max()) <= 1 / math.sqrt(16)


def test_flora_warm_refuses_who_cannot_carry_the_shared_part():
    clients = [make_update(f"c{i}", 4, seed=i) for i in range(2)]
    result = aggregate(clients, "flora_warm")
    small = make_update("small", 3)
    with pytest.raises(
        ValueError, match="shared part of rank 4, more than this client's rank 3; aggregate with floor=3"
    ):
        start_of(result, small)
    with pytest.raises(
        ValueError, match=r"client 'small', .*rank 3 cannot carry the shared part of rank 4; give floor="
    ):
        aggregate([*clients, small], "flora_warm", result.state)
    assert aggregate(clients, "flora_warm", floor={Q: 3}).adapter[Q][0].shape[0] == 3
    assert aggregate(clients, "flora_warm", floor={Q: 3}).adapter["layers.0.v_proj"][0].shape[0] == 0


def test_flora_warm_knows_the_whole_population():
    ranks = {"a": {Q: 8, "layers.0.v_proj": 4}, "b": {Q: 2}}
    assert get_strategy("flora_warm").population_options(ranks) == {"floor": {Q: 2, "layers.0.v_proj": 0}}
    assert get_strategy("flora").population_options(ranks) == {}


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
    clients = [ClientUpdate(u.client, idle_start(u), u.scaling, u.weight) for u in equal_ranks()]
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


def test_flexlora_cuts_the_exact_sum_to_each_rank():
    clients = [make_update(f"c{i}", r, seed=i, scaling=16 / r) for i, r in enumerate([6, 3, 1])]
    result = aggregate(clients, "flexlora")
    want = oracle(clients)[0]
    for client in clients:
        for module, matrix in want.items():
            rank = client.ranks[module]
            torch.testing.assert_close(
                effective(start_of(result, client), client)[module], dense_svd(matrix, rank), rtol=0, atol=1e-9
            )
    torch.testing.assert_close(result.dense()[Q], dense_svd(want[Q], 6), rtol=0, atol=1e-9)
    assert aggregate(clients, "flexlora", rank=2).adapter[Q][0].shape[0] == 2


def test_flexlora_keeps_its_largest_rank_while_that_client_is_away():
    clients = [make_update(f"c{i}", r, seed=i) for i, r in enumerate([6, 3])]
    first = aggregate(clients, "flexlora")
    others = [make_update(f"d{i}", 3, seed=10 + i) for i in range(2)]
    result = aggregate(others, "flexlora", first.state)
    assert result.adapter[Q][0].shape[0] == 6
    assert result.certificate.aggregation_error < 1e-9, "six triplets hold two clients of rank three"


def test_raflora_weighs_every_slice_over_the_clients_that_have_it():
    ranks, weights = [6, 3, 3, 1], [1.0, 2.0, 3.0, 4.0]
    clients = [make_update(f"c{i}", r, seed=i, weight=weights[i], scaling=1 + i) for i, r in enumerate(ranks)]
    result = aggregate(clients, "raflora")
    for module, (N, K) in SHAPES.items():
        total = torch.zeros(N, K, dtype=torch.float64)
        for low, high in ((0, 1), (1, 3), (3, 6)):
            having = [c for c in clients if c.ranks[module] >= high]
            share = sum(c.weight for c in having)
            for client in having:
                A, B = client.adapters[module]
                total += client.weight / share * client.scaling[module] * B[low:high].T @ A[low:high]
        torch.testing.assert_close(result.dense()[module], dense_svd(total, 6), rtol=0, atol=1e-9)
        start = effective(start_of(result, clients[1]), clients[1])[module]
        torch.testing.assert_close(start, dense_svd(total, 3), rtol=0, atol=1e-9)


def test_raflora_is_flexlora_at_equal_ranks():
    one, other = (aggregate(equal_ranks(), name).dense() for name in ("raflora", "flexlora"))
    for module in SHAPES:
        torch.testing.assert_close(one[module], other[module], rtol=0, atol=1e-10)


def test_fedex_averages_as_fedit_and_leaves_the_rest_to_the_base():
    updates = equal_ranks()
    result, fedit = aggregate(updates, "fedex"), aggregate(updates, "fedit")
    want = oracle(updates)[0]
    for module in SHAPES:
        A, B, _ = result.adapter[module]
        torch.testing.assert_close(B.T @ A, fedit.dense()[module], rtol=0, atol=1e-10)
        got = applied(new_base(), result)[module]
        torch.testing.assert_close(got, want[module] - fedit.dense()[module], rtol=0, atol=1e-10)


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


@pytest.mark.parametrize("name", ["ffa", "rolora"])
def test_a_frozen_factor_that_was_trained_is_refused(name):
    updates = a_round(name)
    A, B = updates[1].adapters[Q]
    updates[1].adapters[Q] = (A + 1e-3, B)
    words = rf"client 'c1', module '{Q}': strategy '{name}' trains B alone in this round, and A differs .*client 'c0'"
    with pytest.raises(ValueError, match=words):
        aggregate(updates, name)


BAD_OPTIONS = {
    "tau-0": ("flora_svd", {"tau": 0}, "tau must be above 0 and at most 1, got 0"),
    "tau-2": ("flora_svd", {"tau": 1.5}, "tau must be between 0 and 1, got 1.5"),
    "tau-nan": ("flora_svd", {"tau": math.nan}, "tau must be between 0 and 1, got nan"),
    "start": ("flora_warm", {"start": "cold"}, "start must be one of shared, directions, got 'cold'"),
    "floor": ("flora_warm", {"floor": -1}, "floor of floor must be at least 0, got -1"),
    "weigh": ("hetlora", {"weigh": "norms"}, "weigh must be one of norm, .*did you mean 'norm'"),
    "prune": ("hetlora", {"prune": 1}, "prune must lie between 0 and 1, got 1; None prunes nothing"),
    "svd": ("raflora", {"svd": "quick"}, "svd must be one of exact, fast, got 'quick'"),
    "rank": ("flexlora", {"rank": 0}, "rank must be at least 1, got 0"),
    "name": ("flora_svd", {"taau": 0.9}, "strategy 'flora_svd' has no option 'taau'; did you mean 'tau'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_out_of_range_are_refused(case):
    name, options, words = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=words):
        aggregate([make_update("a")], name, **options)
    with pytest.raises(TypeError, match="tau must be a number"):
        aggregate([make_update("a")], "flora_svd", tau="high")


def test_every_strategy_of_the_design_is_there():
    names = "flora flora_svd flora_warm fedit zero_pad hetlora flexlora ffa rolora fedex raflora"
    assert set(names.split()) <= set(STRATEGIES)


def test_leading_svd_finds_what_the_whole_one_does_where_the_spectrum_falls():
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(80, width, generator=generator, dtype=torch.float64) for width in (120, 100))
    fall = 2.0 ** -torch.arange(80, dtype=torch.float64)
    stack = torch.linalg.qr(A.T).Q.T.contiguous(), torch.linalg.qr(B.T).Q.T.contiguous(), fall
    fast, whole = leading_svd(stack, 12), stack_svd(stack).cut(12)
    torch.testing.assert_close(fast.S_R, whole.S_R, rtol=1e-10, atol=0)
    torch.testing.assert_close((fast.U_RN.T * fast.S_R) @ fast.V_RK, (whole.U_RN.T * whole.S_R) @ whole.V_RK)
    again = leading_svd(stack, 12)
    assert all(torch.equal(one, other) for one, other in zip(fast, again, strict=True))
    assert len(leading_svd((A, B, 0 * fall), 12).S_R) == 0


@pytest.mark.parametrize("name", ["flexlora", "raflora"])
def test_fast_decomposition_loses_little_more_than_the_best_cut(name):
    """Thirty clients of random factors: hardly any gaps in the spectrum, the worst case for subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    updates = []
    for i in range(30):
        pair = torch.randn(4, 90, generator=generator).double(), torch.randn(4, 100, generator=generator).double()
        updates.append(ClientUpdate(f"c{i}", {"w": pair}, {"w": 1.0}))
    whole, fast = (aggregate(updates, name, svd=kind).certificate.aggregation_error for kind in ("exact", "fast"))
    assert whole <= fast < 1.02 * whole


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_flexlora_equals_peft_s_own_svd():
    """``add_weighted_adapter(combination_type="svd")`` at one rank is an independent oracle."""
    import peft

    from tests.federation_cases import make_model

    model = make_model(torch.float64)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"])
    theirs = peft.get_peft_model(model, config, adapter_name="c0")
    theirs.add_adapter("c1", config)
    generator, updates = torch.Generator().manual_seed(0), []
    layers = {
        path.removeprefix("base_model.model."): m for path, m in theirs.named_modules() if path.endswith("q_proj")
    }
    for name in ("c0", "c1"):
        adapters = {}
        for path, layer in layers.items():
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            for factor in (A, B):
                factor.data = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
            adapters[path] = (A.detach(), B.detach().T)
        updates.append(ClientUpdate(name, adapters, dict.fromkeys(adapters, 2.0), {"c0": 0.3, "c1": 0.7}[name]))
    theirs.add_weighted_adapter(["c0", "c1"], [0.3, 0.7], "all", combination_type="svd", svd_rank=3)
    for path, change in aggregate(updates, "flexlora").dense().items():
        # PEFT decomposes in float32.
        want = layers[path].get_delta_weight("all").detach()
        assert float((change - want).norm() / want.norm()) < 1e-6


def test_the_strategy_in_the_docs_works_as_it_says(monkeypatch, tmp_path):
    from flora_core.aggregate import strategy

    monkeypatch.setattr(strategy, "STRATEGIES", dict(STRATEGIES))
    text = (Path(__file__).parents[1] / "docs" / "strategies.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@register" in block]
    (tmp_path / "mine.py").write_text(code)
    runpy.run_path(str(tmp_path / "mine.py"))
    result = aggregate(mixed_ranks(), "damped")
    assert result.certificate.aggregation_error == pytest.approx(0.5, abs=1e-12)
    with pytest.raises(ValueError, match="rate must be between 0 and 1, got 2"):
        aggregate(mixed_ranks(), "damped", rate=2)


def test_the_docs_table_says_what_the_table_says():
    text = (Path(__file__).parents[1] / "docs" / "strategies.md").read_text()
    lines = [[cell.strip(" `") for cell in line.split("|")] for line in text.splitlines()]
    rows = {cells[1]: cells for cells in lines if len(cells) == 10}
    for name, strategy in STRATEGIES.items():
        flags = [strategy.exact, strategy.mixed_ranks, strategy.mixed_modules, strategy.idle_safe]
        told = [cell in ("yes", "at `tau=1") for cell in rows[name][4:8]]
        assert told == flags, name
