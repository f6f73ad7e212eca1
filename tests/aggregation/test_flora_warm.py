"""Promises of flora_warm: exact, every client starts at the global model, over many rounds and any participation.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import math

import pytest
import torch

from flora_core.adapters.update import ClientUpdate, RoundResult
from flora_core.aggregation import aggregate, get_strategy
from flora_core.aggregation.downlink import DeltaLog
from flora_core.merge.in_place import apply_base_delta_
from tests.support.rounds import (
    SHAPES,
    Q,
    applied,
    dense_svd,
    effective,
    fresh_start,
    global_model,
    make_update,
    model_of,
    new_base,
    oracle,
    start_of,
)


@pytest.mark.parametrize("start", ["shared", "directions"])
def test_flora_warm_is_exact_over_many_rounds_and_everybody_starts_at_the_global_model(start):
    """Against a plain run: the exact global model of each round is the weighted mean of the clients' own models."""
    ranks, scaling = {"a": 8, "b": 4, "c": 2}, {"a": 2.0, "b": 3.0, "c": 8 / math.sqrt(2)}
    clients = [make_update(n, ranks[n], seed=i, weight=1 + i, scaling=scaling[n]) for i, n in enumerate(ranks)]
    base, state, rounds = new_base(), None, 5
    current, starts = dict(base), {client.client: fresh_start(client) for client in clients}
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


def train(start, client, seed):
    noise = make_update(client.client, client.ranks, seed=seed, modules=tuple(start)).adapters
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


V = "layers.0.v_proj"
RANKS = {"a": {Q: 8, V: 5}, "b": {Q: 4, V: 2}, "c": {Q: 3}, "d": {Q: 6, V: 3, "layers.1.q_proj": 4}}
COMINGS = ["abcd", "ab", "ab", "bd", "c", "abcd", "ad", "abc"]


@pytest.mark.parametrize("name", ["flora", "flora_svd", "flora_warm"])
@pytest.mark.parametrize(("way", "snapshot_bytes"), [("snapshot", 1), ("log", 10**9)])
def test_clients_that_come_and_go_train_on_the_global_model(name, way, snapshot_bytes):
    """Each keeps a base of its own, brought up to date from the log or a snapshot; ranks differ by module."""
    clients = {n: make_update(n, ranks, scaling=2.0, modules=tuple(ranks)) for n, ranks in RANKS.items()}
    options = get_strategy(name).population_options(RANKS)
    weights, bases = new_base(), {n: new_base() for n in clients}
    log, result, ways = DeltaLog(snapshot_bytes), RoundResult({}), set()
    for number, present in enumerate(COMINGS, 1):
        current, trained = global_model(weights, result), []
        for i, client in enumerate(clients[n] for n in present):
            own, (kind, size, missed) = bases[client.client], log.missed(client.client)
            # Client c alone teaches what all carry: its round's change of the base is rounding error, or nothing.
            ways.add(kind if size else "none")
            for m in own if kind == "snapshot" else ():
                own[m].copy_(weights[m])
            for late in missed:
                apply_base_delta_(own, log.deltas[late])
            start = {**fresh_start(client), **(start_of(result, client) or {})}
            carried = effective(start, client)
            for m, weight in current.items():
                assert torch.equal(own[m], weights[m])
                torch.testing.assert_close(own[m] + carried.get(m, 0), weight, rtol=0, atol=1e-9)
            trained.append(train(start, client, 10 * number + i))
        sums, _ = oracle(trained)
        want = {m: weight + sums.get(m, 0) for m, weight in weights.items()}
        result = aggregate(trained, name, result.state or None, **options)
        for base in (weights, *(bases[n] for n in present)):
            apply_base_delta_(base, result.base_delta)
        log.record(number, sum(size for _, size in result.forms.values()), present, result.base_delta)
        for m, weight in global_model(weights, result).items():
            torch.testing.assert_close(weight, want[m], rtol=0, atol=1e-9)
    assert ways == {"none", way}


def test_flora_warm_knows_the_whole_population():
    ranks = {"a": {Q: 8, "layers.0.v_proj": 4}, "b": {Q: 2}}
    assert get_strategy("flora_warm").population_options(ranks) == {"floor": {Q: 2, "layers.0.v_proj": 0}}
    assert get_strategy("flora").population_options(ranks) == {}
