"""Strategies by name: the table, the options, the docs, and strategies of their own."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from flora_core.aggregation import STRATEGIES, aggregate, load_strategy
from tests.support.rounds import make_update, mixed_ranks

BAD_OPTIONS = {
    "tau-0": ("flora_svd", {"tau": 0}, "tau must be above 0 and at most 1, got 0"),
    "tau-2": ("flora_svd", {"tau": 1.5}, "tau must be between 0 and 1, got 1.5"),
    "tau-nan": ("flora_svd", {"tau": math.nan}, "tau must be between 0 and 1, got nan"),
    "start": ("flora_warm", {"start": "cold"}, "start must be one of shared, directions, got 'cold'"),
    "floor": ("flora_warm", {"floor": -1}, "^floor must be at least 0, got -1"),
    "floor-by-module": ("flora_warm", {"floor": {"q_proj": -1}}, "floor of q_proj must be at least 0, got -1"),
    "weigh": ("hetlora", {"weigh": "norms"}, "weigh must be one of norm, .*did you mean 'norm'"),
    "prune": ("hetlora", {"prune": 1}, "prune must lie between 0 and 1, got 1; None prunes nothing"),
    "penalty": ("hetlora", {"prune": 0.5, "penalty": -1}, "penalty must be at least 0, got -1"),
    "penalty-alone": ("hetlora", {"penalty": 0.1}, "penalty=0.1 is on the tail that prune cuts off: give prune="),
    "svd": ("raflora", {"svd": "quick"}, "svd must be one of exact, fast, got 'quick'"),
    "rank": ("flexlora", {"rank": 0}, "rank must be at least 1, got 0"),
    "residual": ("fedex", {"residual_rank": -1}, "residual_rank must be at least 0, got -1"),
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


def test_the_strategy_in_the_docs_works_as_it_says(monkeypatch, tmp_path):
    from flora_core.aggregation import strategy

    monkeypatch.setattr(strategy, "STRATEGIES", dict(STRATEGIES))
    text = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@register" in block]
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=r"unknown strategy 'damped'; known: .*flora"):
        load_strategy("damped")
    assert load_strategy(f"{tmp_path / 'mine.py'}:damped") == load_strategy("damped") == "damped"
    with pytest.raises(
        ValueError, match=r"strategy 'other.py:damped' is FILE.py:NAME, and 'other.py' is no Python file"
    ):
        load_strategy("other.py:damped")
    result = aggregate(mixed_ranks(), "damped")
    assert result.certificate.aggregation_error == pytest.approx(0.5, abs=1e-12)
    with pytest.raises(ValueError, match="rate must be between 0 and 1, got 2"):
        aggregate(mixed_ranks(), "damped", rate=2)


def test_the_docs_table_says_what_the_table_says():
    text = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
    lines = [[cell.strip(" `") for cell in line.split("|")] for line in text.splitlines()]
    rows = {cells[1]: cells for cells in lines if len(cells) == 10}
    for name, strategy in STRATEGIES.items():
        flags = [strategy.exact, strategy.mixed_ranks, strategy.mixed_modules, strategy.idle_safe]
        told = [cell in ("yes", "at `tau=1") for cell in rows[name][4:8]]
        assert told == flags, name
