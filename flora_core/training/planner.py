"""Which clients train together, and how many tokens are in flight, under a token or memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..common import require
from ..config import TrainConfig
from ..model import Cohort, decoder_of, sequence_limit

# Tokens in flight where nothing limits them. On two CPU cores a step is fastest at one to two thousand tokens (measured
# on 8 layers of SmolLM2's shape: 128 to 512 tokens are up to 1.5 times slower); a GPU wants to fill its matrix units.
_DEFAULT_TOKENS = {"cpu": 2048, "cuda": 16384}
# The loss holds up to three chunks of 2**24 float32 logits.
_LOSS_BYTES = 3 << 26


@dataclass(frozen=True)
class Demand:
    """One client's demand: its micro-batch and longest sequence in tokens, its adapter in numbers."""

    name: str
    config: TrainConfig
    tokens: int
    longest: int
    parameters: int


@dataclass(frozen=True)
class Plan:
    """Cohorts that train one after another, the tokens in flight of each pass, and why."""

    cohorts: tuple[tuple[str, ...], ...]
    token_budget: int
    memory_bytes: int
    reason: str


def plan(
    demands: Sequence[Demand],
    *,
    bytes_per_token: float,
    device: str = "cpu",
    bytes_per_number: int = 4,
) -> Plan:
    """Group clients into cohorts.

    Without a budget all clients train together and passes are cut at a size that suits the device. A token budget
    bounds the tokens in flight, and cohorts are as large as fits it with one micro-batch of each client, so that a
    budget of one client's tokens trains one client at a time. A memory budget takes as few cohorts as it allows.

    Args:
        demands: One per client, in order.
        bytes_per_token: Bytes saved for backward per token in flight.
        device: cpu or cuda.
        bytes_per_number: Of an adapter, its gradient and its two moments each.
    Returns:
        The plan; ``memory_bytes`` is its estimate beyond the base and the finished adapters.
    Raises:
        ValueError: If the memory budget cannot hold even one client's longest sequence.
    """
    wanted = [d.config.token_budget for d in demands if d.config.token_budget is not None]
    memory = [d.config.memory_budget_gb for d in demands if d.config.memory_budget_gb is not None]
    groups = _alike(demands)

    def cost(cohort: Sequence[Demand], tokens: int) -> int:
        # Gradient and two moments, and a working copy where the cohort is not everybody.
        copies = 3 if len(cohort) == len(demands) else 4
        state = copies * bytes_per_number * sum(d.parameters for d in cohort)
        return int(state + tokens * bytes_per_token + _LOSS_BYTES)

    if wanted:
        budget, cohorts = min(wanted), [c for group in groups for c in _fill(group, min(wanted))]
        reason = f"token_budget={budget}"
    else:
        budget, cohorts = _DEFAULT_TOKENS.get(device, 2048), groups
        reason = f"default for {device}"
    if memory:
        limit = int(min(memory) * 1e9)
        budget, cohorts = _within(groups, cohorts, budget, limit, cost, bytes_per_token)
        reason += f", memory_budget_gb={min(memory)}"
    peak = max(cost(cohort, _in_flight(cohort, budget)) for cohort in cohorts)
    return Plan(tuple(tuple(d.name for d in cohort) for cohort in cohorts), budget, peak, reason)


def _in_flight(cohort: Sequence[Demand], budget: int) -> int:
    """Tokens of a cohort's largest pass: a step's, cut at the budget, but never within a sequence."""
    step = sum(d.tokens * d.config.gradient_accumulation for d in cohort)
    return max(min(budget, step), *(d.longest for d in cohort))


def _alike(demands: Sequence[Demand]) -> list[list[Demand]]:
    """Clients that can share a forward pass: same autocast dtype, algorithms, graphs and what is recomputed."""
    groups: dict[tuple[Any, ...], list[Demand]] = {}
    for demand in demands:
        config = demand.config
        recomputed = (config.gradient_checkpointing, config.recompute)
        alike = (config.dtype, *recomputed, config.deterministic, config.cuda_graphs)
        groups.setdefault(alike, []).append(demand)
    return list(groups.values())


def _fill(group: Sequence[Demand], budget: int) -> list[list[Demand]]:
    """Consecutive clients whose micro-batches fit the budget together; a larger one stands alone."""
    cohorts: list[list[Demand]] = [[]]
    for demand in group:
        if cohorts[-1] and sum(d.tokens for d in cohorts[-1]) + demand.tokens > budget:
            cohorts.append([])
        cohorts[-1].append(demand)
    return cohorts


def _within(groups, cohorts, budget: int, limit: int, cost, bytes_per_token: float):
    """The fewest cohorts of about equal size that leave room for each client's micro-batch and longest sequence."""
    largest = max(len(cohort) for cohort in cohorts)
    for size in range(largest, 0, -1):
        split = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
        room = min((limit - cost(cohort, 0)) // max(bytes_per_token, 1) for cohort in split)
        needs = max(max(d.longest, d.tokens if size > 1 else 0) for cohort in split for d in cohort)
        if room >= needs:
            return int(min(budget, room)), split
    single = [demand for group in groups for demand in group]
    least = max(cost([d], d.longest) for d in single)
    raise ValueError(
        f"memory_budget_gb={limit / 1e9:g} cannot hold one client's longest sequence; the least is {least / 1e9:.2f} "
        "(lower max_length, or turn gradient_checkpointing on)"
    )


def spread(work: Mapping[str, float], processes: int) -> list[list[str]]:
    """Assign clients to processes so that these have about equal work: the largest first, each to the least loaded.

    At most 4/3 - 1/(3 processes) of the best possible time (Graham 1969). The same on every process.

    Args:
        work: Client -> predicted work, in the round's order.
        processes: How many there are; some may get no client.
    Returns:
        Each process's clients, in the round's order.
    """
    order = {name: place for place, name in enumerate(work)}
    shares: list[list[str]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for name in sorted(work, key=lambda name: -work[name]):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += work[name]
    return [sorted(share, key=order.__getitem__) for share in shares]


def measure_bytes_per_token(cohort: Cohort, tokens: int = 64) -> float:
    """Bytes that one token's forward pass keeps for backward, measured on a short sequence."""
    model: Any = cohort.model
    kept: dict[int, int] = {}
    fixed = {p.untyped_storage().data_ptr() for p in model.parameters()}
    fixed.add(cohort.bank.param.untyped_storage().data_ptr())

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    limit = sequence_limit(model) or tokens
    tokens = min(tokens, limit)
    device = cohort.bank.param.device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    counts = [tokens] + [0] * (len(cohort.active.names) - 1)
    factors = cohort.parameters()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), cohort.batch(counts):
            hidden = decoder_of(model)[1](input_ids=ids, use_cache=False).last_hidden_state
        require(hidden.shape[1] == tokens, f"the decoder must keep {tokens} positions, got {hidden.shape[1]}")
        return sum(kept.values()) / tokens
    finally:
        for factor in factors:
            factor.requires_grad_(False)
