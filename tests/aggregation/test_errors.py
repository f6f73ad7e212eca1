"""Rounds that cannot be aggregated and strategies that cannot be registered are refused with words that help."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flora_core.adapters.update import ClientUpdate, RoundResult
from flora_core.aggregation import STRATEGIES, Strategy, aggregate, register, table
from flora_core.aggregation import strategy as strategy_module


def update(client="a", rank=2, k=8, n=6, weight: Any = 1.0, module="q_proj", scaling=2.0) -> ClientUpdate:
    return ClientUpdate(client, {module: (torch.ones(rank, k), torch.ones(rank, n))}, {module: scaling}, weight)


def with_tensors(A: Any, B: Any) -> ClientUpdate:
    return ClientUpdate("a", {"q_proj": (A, B)}, {"q_proj": 2.0})


@pytest.fixture
def own_table(monkeypatch):
    """A copy of the table, so that a test's strategies do not outlive it."""
    monkeypatch.setattr(strategy_module, "STRATEGIES", dict(STRATEGIES))


CASES = {
    "empty": ([], "at least one ClientUpdate, got none; skip the round"),
    "twice": ([update("a"), update("b"), update("a")], "more than one update of 'a'"),
    "negative": ([update(weight=-1)], r"client 'a': weight must be a finite number of at least 0, got -1"),
    "nan-weight": ([update(weight=math.nan)], r"client 'a': weight must be a finite number of at least 0, got nan"),
    "inf-weight": ([update(weight=math.inf)], "weight must be a finite number of at least 0, got inf"),
    "text-weight": ([update(weight="3")], "weight must be a finite number of at least 0, got '3'"),
    "all-zero": ([update("a", weight=0), update("b", weight=0.0)], "weights of the round are all zero"),
    "sum-of-weights": ([update("a", weight=1e308), update("b", weight=1e308)], "must have a finite sum; divide"),
    "no-pair": (
        [ClientUpdate("a", {"q_proj": (torch.ones(2, 8),)}, {"q_proj": 1.0})],  # pyright: ignore[reportArgumentType]
        r"client 'a', module 'q_proj': adapters must hold a pair \(A, B\), got 1 of them",
    ),
    "k-differs": (
        [update("a", k=8), update("b", k=8), update("c", k=9)],
        r"module 'q_proj' must have one shape .* got K=8, N=6 on cpu from 'a', 'b'; K=9, N=6 on cpu from 'c'",
    ),
    "n-differs": ([update("a", n=6), update("b", n=7)], r"K=8, N=6 on cpu from 'a'; K=8, N=7 on cpu from 'b'"),
    "shapes-of-rank-0": ([update("a"), update("b", rank=0, k=9)], "must have one shape"),
    "rank-differs": (
        [with_tensors(torch.ones(2, 8), torch.ones(3, 6))],
        r"client 'a', module 'q_proj': A \(R, K\) and B \(R, N\) must have one rank, got \(2, 8\) and \(3, 6\)",
    ),
    "peft-layout": ([with_tensors(torch.ones(2, 8), torch.ones(6, 2))], "B is stored R x N, the transpose of PEFT's"),
    "nan": ([with_tensors(torch.full((2, 8), math.nan), torch.ones(2, 6))], "client 'a', module 'q_proj'.*NaN"),
    "inf": ([with_tensors(torch.ones(2, 8), torch.full((2, 6), -math.inf))], "must be finite.*leave this client out"),
    "nan-scaling": ([update(scaling=math.nan)], "A, B and scaling must be finite"),
    "no-scaling": (
        [ClientUpdate("a", {"q_proj": (torch.ones(2, 8), torch.ones(2, 6))}, {})],
        r"client 'a': scaling must have the modules of adapters, got one without the other for \['q_proj'\]",
    ),
    "one-dim": ([with_tensors(torch.ones(8), torch.ones(2, 6))], r"module 'q_proj': A must have shape \(any, any\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["flora", "fedit"])
def test_bad_rounds_are_refused(case, name):
    updates, words = CASES[case]
    with pytest.raises(ValueError, match=words):
        aggregate(updates, name)


def test_updates_of_several_bases_are_refused_where_bases_are_known():
    updates = [update(name) for name in "abc"]
    updates[0].base, updates[2].base = "llama", "vicuna"
    words = r"updates must be of one base model, got 'llama' from 'a'; 'vicuna' from 'c'; .*set update.base alike"
    with pytest.raises(ValueError, match=words):
        aggregate(updates)
    updates[2].base = "llama"
    assert aggregate(updates).certificate.aggregation_error == 0


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="a sequence of ClientUpdate, got one alone; put it into a list"):
        aggregate(update())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"state must be what RoundResult\.state was, or None, got int"):
        aggregate([update()], state=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="updates must hold ClientUpdate objects, got dict"):
        aggregate([{}])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"module 'q_proj': A must be a torch.Tensor, got list"):
        aggregate([with_tensors([[1.0]], torch.ones(1, 6))])
    with pytest.raises(TypeError, match="updates must be a sequence of ClientUpdate, got NoneType"):
        aggregate(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="updates must be a sequence of ClientUpdate, got dict"):
        aggregate({"a": update()})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"client 'a', module 'q_proj': scaling must be a number, got '2'"):
        aggregate([update(scaling="2")])  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        TypeError, match="client 'a': adapters and scaling must be mappings by module, got list and dict"
    ):
        aggregate([ClientUpdate("a", [], {})])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"B must be one of float32, .* got int64"):
        aggregate([with_tensors(torch.ones(2, 8), torch.ones(2, 6, dtype=torch.int64))])


def test_large_finite_factors_are_taken():
    """Their sum overflows float32, which must not pass for an infinity among them."""
    huge = with_tensors(torch.full((2, 8), 3e38), torch.full((2, 6), 1e-38))
    assert float(aggregate([huge]).dense()["q_proj"].max()) > 1


def test_many_clients_of_one_shape_are_named_briefly():
    with pytest.raises(ValueError, match="from 'c0', 'c1', 'c2' and 7 more; K=9"):
        aggregate([*(update(f"c{i}") for i in range(10)), update("odd", k=9)])


def test_unknown_strategy_shows_the_nearest_name_and_all_of_them():
    with pytest.raises(ValueError, match=r"unknown strategy 'fedti'; did you mean 'fedit'\? known: .*zero_pad"):
        aggregate([update()], "fedti")
    with pytest.raises(ValueError, match=r"unknown strategy \['flora'\]; .*known: fedex"):
        aggregate([update()], ["flora"])  # pyright: ignore[reportArgumentType]


def test_unknown_option_names_the_strategy(own_table):
    with pytest.raises(ValueError, match="strategy 'flora' has no option 'taau'; known: none"):
        aggregate([update()], "flora", taau=1)

    @register
    class Energy(Strategy):
        """Keep some energy."""

        name = "energy"

        def aggregate(self, updates, state, *, tau=1.0):
            assert tau == 0.5
            return RoundResult(base_delta={})

    with pytest.raises(ValueError, match=r"no option 'tua'; did you mean 'tau'\?"):
        aggregate([update()], "energy", tua=0.5)
    assert aggregate([update()], "energy", tau=0.5).bytes_up == 2 * 14 * 4


def test_state_of_another_strategy_is_refused():
    state = aggregate([update()], "fedit").state
    with pytest.raises(ValueError, match="state must be that of strategy 'flora', got 'fedit'; start with state=None"):
        aggregate([update()], "flora", state)


def test_table_shows_every_strategy_with_its_properties():
    lines = table().splitlines()
    assert lines[0].split() == ["name", "exact", "mixed", "ranks", "mixed", "modules", "idle-safe", "rule"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert set(rows) == set(STRATEGIES)
    want = {"flora": "yes yes yes yes", "fedit": "no no yes yes", "zero_pad": "no yes yes no", "ffa": "yes no no yes"}
    for name, flags in want.items():
        assert rows[name].split()[1:5] == flags.split()
    assert "2409.05976" in rows["flora"]


def test_third_party_strategy_is_used_and_certified(own_table):
    """A strategy that drops the last client: registered outside the package, and its error is measured."""

    @register
    class Lossy(Strategy):
        """Drop the last client."""

        name = "lossy"

        def aggregate(self, updates, state):
            A, B = updates[0].adapters["q_proj"]
            coef = torch.full((A.shape[0],), 0.5 * updates[0].scaling["q_proj"], dtype=torch.float64)
            return RoundResult(base_delta={"q_proj": (A, B, coef)}, state={"rounds": state.get("rounds", 0) + 1})

    assert "Drop the last client." in strategy_module.table()
    result = aggregate([update("a"), update("b")], "lossy")
    assert result.certificate.aggregation_error == pytest.approx(0.5, abs=1e-12)
    assert aggregate([update("a"), update("b")], "lossy", result.state).state == {"rounds": 2, "strategy": "lossy"}


def test_register_refuses_what_cannot_be_a_strategy(own_table):
    with pytest.raises(TypeError, match="register takes a subclass of Strategy, got 3"):
        register(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Nameless must set name"):
        register(type("Nameless", (Strategy,), {}))
    with pytest.raises(
        ValueError, match=r"'flora' is already registered by flora_core.aggregation.flora; choose another"
    ):
        register(type("Mine", (Strategy,), {"name": "flora"}))
