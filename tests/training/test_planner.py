"""The planner: cohorts and passes under a token or memory budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_core as flora
from flora_core.data.pack import passes
from flora_core.training import planner
from flora_core.training.planner import Demand, measure_bytes_per_token, plan
from tests.support import models

EACH = settings(max_examples=150, deadline=None)
SIZES = st.lists(st.integers(1, 40), max_size=25)


def padded_size(group: list[int], sizes: list[int]) -> int:
    return len(group) * max(sizes[i] for i in group)


@EACH
@given(SIZES, st.integers(1, 60), st.booleans())
def test_passes_keep_order_and_budget(sizes: list[int], budget: int, padded: bool):
    """Every item once and in order; a pass above the budget holds one item, which is too large by itself."""
    cut = passes(list(enumerate(sizes)), budget, padded=padded)
    assert [item for group in cut for item in group] == list(range(len(sizes)))
    assert all(cut) or not sizes
    for group in cut:
        size = padded_size(group, sizes) if padded else sum(sizes[i] for i in group)
        assert size <= budget or len(group) == 1


@EACH
@given(SIZES, st.integers(1, 60))
def test_passes_are_about_equal(sizes: list[int], budget: int):
    """A pass exceeds the even share by less than its largest item, and is never cut shorter than it must be."""
    cut = passes(list(enumerate(sizes)), budget)
    counts = [sum(sizes[i] for i in group) for group in cut]
    if cut and max(sizes) <= budget:
        even = sum(sizes) / -(-sum(sizes) // budget)
        assert max(counts) < even + max(sizes) + 1
        assert min([budget, *counts[:-1]]) > even - max(sizes) - 1


def test_passes_by_example():
    assert passes([("a", 4), ("b", 4), ("c", 4)], 12) == [["a", "b", "c"]]
    assert passes([("a", 4), ("b", 4), ("c", 4)], 8) == [["a", "b"], ["c"]]
    assert passes([("a", 4), ("b", 50), ("c", 4)], 8) == [["a"], ["b"], ["c"]]
    assert passes([("a", 2), ("b", 8), ("c", 2)], 12) == [["a", "b", "c"]]
    assert passes([("a", 2), ("b", 8), ("c", 2)], 12, padded=True) == [["a"], ["b"], ["c"]]
    assert passes([], 8) == []


def demand(name: str, tokens: int = 100, longest: int = 60, parameters: int = 1000, **config: Any) -> Demand:
    return Demand(name, flora.TrainConfig(**config), tokens, longest, parameters)


def test_all_together_without_a_budget():
    for device, tokens in (("cpu", 2048), ("cuda", 16384)):
        chosen = plan([demand(n) for n in "abc"], bytes_per_token=0.0, device=device)
        assert (chosen.cohorts, chosen.token_budget) == ((("a", "b", "c"),), tokens)
        assert chosen.reason == f"default for {device}"


def test_a_token_budget_splits_the_cohort():
    """As many consecutive clients as fit with a micro-batch each; the tightest client's budget counts."""
    sizes = {"a": 100, "b": 60, "c": 200, "d": 40, "e": 350, "f": 10}
    demands = [demand(n, tokens, token_budget=300 if n == "c" else 400) for n, tokens in sizes.items()]
    chosen = plan(demands, bytes_per_token=0.0)
    assert chosen.cohorts == (("a", "b"), ("c", "d"), ("e",), ("f",))
    assert (chosen.token_budget, chosen.reason) == (300, "token_budget=300")


@EACH
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 120))
def test_a_token_budget_keeps_every_client_once(tokens: list[int], budget: int):
    demands = [demand(str(i), n, token_budget=budget) for i, n in enumerate(tokens)]
    chosen = plan(demands, bytes_per_token=0.0)
    assert [name for cohort in chosen.cohorts for name in cohort] == [d.name for d in demands]
    for cohort in chosen.cohorts:
        assert len(cohort) == 1 or sum(tokens[int(name)] for name in cohort) <= budget


def test_clients_that_cannot_share_a_pass_are_kept_apart():
    """Autocast and checkpointing are of the whole pass."""
    demands = [
        demand("a"),
        demand("b", dtype="bfloat16"),
        demand("c", gradient_checkpointing=True),
        demand("d"),
        demand("e", dtype="bfloat16"),
        demand("f", recompute=("norms",)),
    ]
    assert plan(demands, bytes_per_token=0.0).cohorts == (("a", "d"), ("b", "e"), ("c",), ("f",))


def test_a_memory_budget_takes_as_few_cohorts_as_it_allows():
    """The estimate: gradient and moments, tokens in flight, the loss' chunks; the plan stays below the budget."""
    loss, per_token, params = planner._LOSS_BYTES, 1e6, 4_000_000
    demands = [demand(name, 100, 60, params) for name in "abcd"]
    everything = 3 * 4 * 4 * params + loss
    one, two = (4 * 4 * n * params + loss for n in (1, 2))

    def planned(limit: float) -> planner.Plan:
        tight = [demand(d.name, d.tokens, d.longest, params, memory_budget_gb=limit / 1e9) for d in demands]
        chosen = plan(tight, bytes_per_token=per_token)
        assert chosen.memory_bytes <= limit
        assert [name for cohort in chosen.cohorts for name in cohort] == list("abcd")
        return chosen

    roomy = planned(everything + 5000 * per_token)
    assert (len(roomy.cohorts), roomy.token_budget) == (1, 2048)
    assert roomy.memory_bytes == everything + 400 * per_token
    cut = planned(everything + 100 * per_token)
    assert (len(cut.cohorts), cut.token_budget) == (1, 100)
    halves = planned(two + 100 * per_token)
    assert (halves.cohorts, halves.token_budget) == ((("a", "b"), ("c", "d")), 100)
    single = planned(one + 70 * per_token)
    assert ([len(cohort) for cohort in single.cohorts], single.token_budget) == ([1, 1, 1, 1], 70)
    assert "memory_budget_gb=" in single.reason
    with pytest.raises(ValueError, match=r"cannot hold one client's longest sequence; the least is 0.33 .*max_length"):
        planned(one + 50 * per_token)


def test_a_long_sequence_counts_though_the_mean_is_short():
    """A pass is never cut within a sequence: the longest one must fit, in a cohort of several clients too."""
    limit = (3 * 4 * 4 * 1000 + planner._LOSS_BYTES + 100e6) / 1e9
    demands = [demand(name, 20, 90, memory_budget_gb=limit) for name in "abcd"]
    chosen = plan(demands, bytes_per_token=1e6)
    assert (len(chosen.cohorts), chosen.token_budget) == (1, 100)
    assert plan([demand("a", 20, 5000)], bytes_per_token=1e6).memory_bytes > 5000e6
    with pytest.raises(ValueError, match="longest sequence"):
        plan([demand(name, 20, 200, memory_budget_gb=limit) for name in "abcd"], bytes_per_token=1e6)


def test_the_estimate_counts_accumulated_batches():
    """They share passes: what is in flight is the whole step, cut at the budget."""
    once, ten, many = (
        plan([demand("a", 50, 10, gradient_accumulation=n)], bytes_per_token=1e6).memory_bytes for n in (1, 10, 99)
    )
    assert (ten - once, many - once) == (450e6, 1998e6)


def test_bytes_per_token_is_measured():
    """The estimate of what a pass keeps for backward has the right magnitude; the bank is left as it was."""
    cohort = flora.attach(models.tiny("llama", torch.float32), models.clients(), ["q_proj", "v_proj"])
    measured = measure_bytes_per_token(cohort, 32)
    # Two layers of widths 16 and 24 keep some dozens of 4-byte numbers per unit of width.
    assert 2 * 16 * 10 * 4 < measured < 2 * 16 * 200 * 4
    assert not any(entry.A_PK.requires_grad or entry.B_PN.requires_grad for entry in cohort.bank.modules.values())
    assert measure_bytes_per_token(cohort, 1000) == measure_bytes_per_token(cohort, 64), "as long as the model allows"


def in_flight(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    """Record every pass of a run: tokens of each client of the cohort, and all positions, padding included."""
    seen: list[tuple[tuple[int, ...], int]] = []
    enter = flora.Cohort.batch

    def recorded(self: flora.Cohort, tokens: Any, **how: Any) -> Any:
        seen.append((tuple(tokens), how.get("positions", 0)))
        return enter(self, tokens, **how)

    monkeypatch.setattr(flora.Cohort, "batch", recorded)
    return seen


def check_passes(seen: list[tuple[tuple[int, ...], int]], budget: int, clients: Any) -> None:
    """Within the budget, padding included; a sequence longer than the budget goes alone."""
    lengths = {len(example.input_ids) for spec in clients for example in spec.data}
    for tokens, positions in seen:
        assert positions <= budget or (positions in lengths and sum(map(bool, tokens)) == 1)


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("budget", "cohorts"), [(1, 5), (15, 5), (40, 3), (90, 1)])
def test_a_budget_bounds_the_tokens_in_flight(packs: bool, budget: int, cohorts: int, monkeypatch: pytest.MonkeyPatch):
    cohort = flora.attach(models.tiny("llama", torch.float32), models.clients(), ["q_proj", "v_proj"])
    cohort.packs = packs
    trainer = flora.CohortTrainer(cohort, flora.TrainConfig(token_budget=budget, max_steps=2))
    assert len(trainer.plan().cohorts) == cohorts
    seen = in_flight(monkeypatch)
    trainer.run()
    check_passes(seen, budget, cohort.clients)


def test_a_memory_budget_reaches_the_trainer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planner, "_LOSS_BYTES", 0)
    cohort = flora.attach(models.tiny("llama", torch.float32), models.clients(), ["q_proj", "v_proj"])

    def trainer(gigabytes: float) -> flora.CohortTrainer:
        return flora.CohortTrainer(cohort, flora.TrainConfig(memory_budget_gb=gigabytes, max_steps=1))

    roomy = trainer(1.0).plan()
    assert (len(roomy.cohorts), roomy.token_budget) == (1, 2048)
    tight = trainer(roomy.memory_bytes / 3e9)
    assert tight.plan().memory_bytes <= roomy.memory_bytes / 3
    seen = in_flight(monkeypatch)
    tight.run()
    assert max(positions for _, positions in seen) <= tight.plan().token_budget
    with pytest.raises(ValueError, match="cannot hold one client's longest sequence"):
        trainer(1e-6).run()


def test_a_memory_budget_knows_what_is_computed_again():
    """More tokens are in flight in the same memory, more still with more computed again; the model is as it was."""
    cohort = flora.attach(models.tiny("llama", torch.float32).train(), models.clients(), ["q_proj", "v_proj"])
    modes = [module.training for module in cohort.model.modules()]

    def tokens(**settings: object) -> int:
        config = flora.TrainConfig(memory_budget_gb=0.5, token_budget=10**6, **settings)  # pyright: ignore
        return flora.CohortTrainer(cohort, config).plan().token_budget

    found = [tokens(), tokens(recompute=["activations"]), tokens(gradient_checkpointing=True)]
    assert found == sorted(set(found)), found
    assert [module.training for module in cohort.model.modules()] == modes
