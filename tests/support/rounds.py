"""Rounds of updates for the strategies' tests, and the exact sum by a second, plain way.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flora_core.adapters.update import ClientUpdate, RoundResult
from flora_core.aggregation import get_strategy

SHAPES = {"layers.0.q_proj": (24, 16), "layers.0.v_proj": (8, 16), "layers.1.q_proj": (24, 16)}  # (N, K)
Q = "layers.0.q_proj"
Dense = dict[str, torch.Tensor]


def make_update(
    client: str,
    ranks: Any = 4,
    *,
    seed: int = 0,
    weight: float = 1.0,
    scaling: Any = 2.0,
    dtype: torch.dtype = torch.float64,
    modules: Sequence[str] = tuple(SHAPES),
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


def bank_like_update() -> ClientUpdate:
    """Factors that are views of one buffer, one of rank 0, a scaling that only rsLoRA gives a whole alpha."""
    flat = torch.randn(400, generator=torch.Generator().manual_seed(0))
    adapters = {
        "a.q": (flat[:12].view(3, 4), flat[12:27].view(3, 5)),
        "b.a.q": (flat[27:35].view(2, 4), flat[35:45].view(2, 5)),
        "a.none": (torch.zeros(0, 4), torch.zeros(0, 5)),
    }
    return ClientUpdate("c", adapters, {"a.q": 16 / math.sqrt(3), "b.a.q": 16 / math.sqrt(2), "a.none": 0.0}, 7.0)


def equal_ranks(dtype: torch.dtype = torch.float64) -> list[ClientUpdate]:
    """Three clients of one rank, with weights and scalings of their own."""
    return [make_update(f"c{i}", 4, seed=i, weight=w, scaling=0.5 + i, dtype=dtype) for i, w in enumerate([30, 10, 60])]


def mixed_ranks(dtype: torch.dtype = torch.float64) -> list[ClientUpdate]:
    """Ten clients with ranks 64..4 cut to these shapes: rsLoRA scalings, partial modules, a rank 0, ranks above N."""
    updates = []
    for i, rank in enumerate([12, 8, 8, 7, 5, 4, 3, 2, 1, 1]):
        modules, scaling = tuple(SHAPES)[: 1 + i % 3], 16 / math.sqrt(rank)
        updates.append(make_update(f"c{i}", rank, seed=i, weight=1 + i, scaling=scaling, modules=modules, dtype=dtype))
    updates.append(make_update("none", dict.fromkeys(SHAPES, 0), weight=5, scaling=0.0, dtype=dtype))
    return updates


def freeze(updates: list[ClientUpdate], factors: Sequence[str]) -> list[ClientUpdate]:
    """As if only these factors had been trained: the other one is that of the first client, s B alike for all."""
    for update in updates[1:] if len(factors) == 1 else []:
        for module, (A, B) in update.adapters.items():
            common_A, common_B = updates[0].adapters[module]
            ratio = updates[0].scaling[module] / update.scaling[module]
            update.adapters[module] = (A if "A" in factors else common_A, B if "B" in factors else common_B * ratio)
    return updates


def a_round(name: str, mixed: bool = True, dtype: torch.dtype = torch.float64) -> list[ClientUpdate]:
    """A first round that a strategy can take, at mixed ranks and modules where it takes those."""
    strategy = get_strategy(name)
    updates = mixed_ranks(dtype) if mixed and strategy.mixed_ranks else equal_ranks(dtype)
    return freeze(updates, strategy.trainable({}))


def oracle(updates: Sequence[ClientUpdate]) -> tuple[Dense, dict[str, float]]:
    """The exact sum in float64, one rank-one term after another, and the sum of the clients' norms."""
    dense: Dense = {}
    norms: dict[str, float] = {}
    total = sum(update.weight for update in updates)
    for update in updates:
        for module, (A, B) in update.adapters.items():
            part = torch.zeros(B.shape[1], A.shape[1], dtype=torch.float64)
            for row in range(A.shape[0]):
                part += torch.outer(B[row].double(), A[row].double())
            part *= update.weight * update.scaling[module] / total
            dense[module] = dense.get(module, 0) + part
            norms[module] = norms.get(module, 0.0) + float(part.norm())
    return dense, norms


def assert_close(got: Dense, want: Dense, norms: Mapping[str, float], bound: float = 1e-9, case: str = "") -> None:
    """Relative to the sum of the clients' norms: clients that nearly cancel would spoil a measure by the sum's own."""
    for module, norm in norms.items():
        error = float((got.get(module, torch.zeros_like(want[module])) - want[module]).norm())
        assert error <= bound * norm, f"{case} {module}: {error / norm:.1e} of the clients' norms"


def effective(adapter: Any, update: ClientUpdate) -> Dense:
    """Sum that a client's adapter adds to the base, module by module."""
    return {m: update.scaling[m] * B.double().T @ A.double() for m, (A, B) in (adapter or {}).items()}


def dense_svd(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of a rank, by the textbook."""
    U, S, V = torch.linalg.svd(matrix)
    return U[:, :rank] @ torch.diag(S[:rank]) @ V[:rank]


def fresh_start(client: ClientUpdate) -> Any:
    """The client's own A with B = 0."""
    return {m: (A, torch.zeros_like(B)) for m, (A, B) in client.adapters.items()}


def start_of(result: RoundResult, client: ClientUpdate) -> Any:
    """Adapter that the round's result gives a client that it may not have seen."""
    return result.next_adapter(client.client, ranks=client.ranks, scaling=client.scaling)


def new_base() -> Dense:
    """A base of zeros."""
    return {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}


def applied(base: Dense, result: RoundResult) -> Dense:
    """The base after a round."""
    after = dict(base)
    for module, (A, B, coef) in result.base_delta.items():
        after[module] = base[module] + (B.double().T * coef) @ A.double()
    return after


def model_of(base: Dense, result: RoundResult, client: ClientUpdate) -> Dense:
    """The weights that a client starts the next round with."""
    own = effective(start_of(result, client), client)
    return {module: weight + own.get(module, 0) for module, weight in base.items()}


def global_model(base: Dense, result: RoundResult) -> Dense:
    """Base and global adapter."""
    adapter = {m: (B.double().T * coef) @ A.double() for m, (A, B, coef) in result.adapter.items()}
    return {module: weight + adapter.get(module, 0) for module, weight in base.items()}


def idle(result: RoundResult, client: ClientUpdate) -> ClientUpdate:
    """Update of a client that did not train: its start, or a fresh adapter with B = 0."""
    return ClientUpdate(
        client.client, {**fresh_start(client), **(start_of(result, client) or {})}, client.scaling, client.weight
    )
