"""Costs of the strategies by count: the counts behind the table of docs/strategies.md are those of the code that runs.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cases.strategies import PUBLISHED, counted_gflop, work
from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation import STRATEGIES, aggregate, get_strategy
from flora_core.aggregation import strategy as strategy_module
from flora_core.aggregation.downlink import Form

# (ranks, N, K): a small stack, a stack wider than the matrix, and one large enough for iterating.
CASES = {"few": ((6, 3, 2), 120, 90), "wide": ((50, 40), 120, 90), "many": ((8,) * 12, 1200, 900)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"svd": "fast"}], ids=["", "fast"])
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_products_are_counted_as_torch_counts_them(name, options, case, monkeypatch):
    strategy, (ranks, n, k) = get_strategy(name), CASES[case]
    if not set(options) <= set(strategy.options):
        pytest.skip("has no such option")
    monkeypatch.setattr(strategy_module, "certify", lambda updates, result: None)
    monkeypatch.setattr(strategy_module, "smallest_form", lambda stack: (stack, Form("stack", 0)))
    ranks = ranks if strategy.mixed_ranks else ranks[-1:] * len(ranks)
    A = torch.randn(max(ranks), k)
    updates = [ClientUpdate(f"c{i}", {"w": (A[:r], torch.randn(r, n))}, {"w": 1.0}) for i, r in enumerate(ranks)]
    with FlopCounterMode(display=False) as counter:
        aggregate(updates, name, **options)
    assert counter.get_total_flops() == work(name, ranks, n, k, options).products


def test_the_docs_show_the_counts():
    text = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
    rows = re.findall(r"^\| `(\w+)`(?: `svd=\"(fast)\"`)? \| ([\d.]+|-) \| ([\d.]+) \|", text, re.MULTILINE)
    assert {name for name, *_ in rows} == set(STRATEGIES)
    for name, svd, published, counted in rows:
        assert published == (f"{PUBLISHED[name]:g}" if name in PUBLISHED and not svd else "-")
        assert counted == f"{counted_gflop(name, **({'svd': svd} if svd else {})):.2f}"
