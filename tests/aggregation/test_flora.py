"""Strategies that start from the sum of the products, against oracles that are written apart: plain loops, and PEFT.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import pytest
import torch

from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation import aggregate
from tests.support.rounds import (
    SHAPES,
    Q,
    assert_close,
    dense_svd,
    effective,
    equal_ranks,
    make_update,
    mixed_ranks,
    oracle,
    start_of,
)


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
            # The norm of what was cut, not the root of 1 - share: rounding lifts a share above 1.
            assert lost == pytest.approx(float(S[rank:].norm() / S.norm()), rel=0, abs=1e-9)
    assert all(result.next_adapter(update.client) is None for update in updates)


def test_flora_svd_sends_fewer_bytes_and_never_more_rows_than_the_matrix_has():
    updates = [make_update(f"c{i}", 8, seed=i, dtype=torch.float32) for i in range(6)]
    whole = aggregate(updates, "flora_svd")
    for module, (N, K) in SHAPES.items():
        assert whole.base_delta[module][0].shape[0] == min(N, K)
    assert aggregate(updates, "flora_svd", tau=0.5).bytes_down < whole.bytes_down
    assert aggregate(updates[:1], "flora_svd").base_delta[Q][0].dtype == torch.float32


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

    from tests.support.federations import make_model

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
