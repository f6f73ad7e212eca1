"""An update is used only if it is what the client's configuration promised; the reason for a refusal helps.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation.norms import norm_of, product_norm
from flora_core.config import FederationConfig
from flora_core.federation.judge import Judge, examine, judge_updates

K, N = 12, 20
RANKS = {"x": 4, "y": 3}


def why_refused(*args: Any, **options: Any) -> str | None:
    found = examine(*args, **options)
    return found if isinstance(found, str) else None


def make_update(name: str = "ann", size: float = 1.0) -> ClientUpdate:
    random = torch.Generator().manual_seed(len(name))
    adapters = {
        module: (torch.randn(rank, K, generator=random), size * torch.randn(rank, N, generator=random))
        for module, rank in RANKS.items()
    }
    return ClientUpdate(name, adapters, dict.fromkeys(RANKS, 2.0), weight=5.0)


def promised(name: str = "ann") -> ClientUpdate:
    update = make_update(name)
    return replace(update, adapters={m: (A.to("meta"), B.to("meta")) for m, (A, B) in update.adapters.items()})


def with_factor(factor: str, value: torch.Tensor) -> ClientUpdate:
    update = make_update()
    A, B = update.adapters["y"]
    update.adapters["y"] = (value, B) if factor == "A" else (A, value)
    return update


def with_value(factor: str, value: float) -> ClientUpdate:
    update = make_update()
    update.adapters["y"]["AB".index(factor)][1, 2] = value
    return update


def test_an_update_as_promised_is_good():
    assert why_refused(make_update(), promised()) is None
    assert why_refused(make_update(size=0.0), promised(), max_norm=1e-30) is None


WRONG = {
    "nan in A": (with_value("A", math.nan), r"A of y is not finite: 1 of 36 values"),
    "inf in B": (with_value("B", -math.inf), r"B of y is not finite: 1 of 60 values"),
    "rank too large": (with_factor("A", torch.zeros(4, K)), r"A of y must be \(3, 12\) .* got \(4, 12\)"),
    "rank too small": (with_factor("B", torch.zeros(2, N)), r"B of y must be \(3, 20\) .* got \(2, 20\)"),
    "B as peft has it": (with_factor("B", torch.zeros(N, 3)), r"B of y must be \(3, 20\) .* got \(20, 3\)"),
    "one dimension": (with_factor("A", torch.zeros(3 * K)), r"A of y must be \(3, 12\) .* got \(36,\)"),
    "integers": (with_factor("A", torch.zeros(3, K, dtype=torch.int32)), r"A of y must be a floating-point tensor"),
    "wider than promised": (
        with_factor("A", torch.zeros(3, K).double()),
        "A of y must be a plain tensor .* got torch.flo",
    ),
    "sparse": (with_factor("A", torch.zeros(3, K).to_sparse()), "A of y must be a plain tensor .* got .*sparse"),
    "without storage": (with_factor("A", torch.zeros(3, K, device="meta")), "A of y must be a plain tensor"),
    "no tensor": (with_factor("A", [[0.0] * K] * 3), r"A of y must be a floating-point tensor, got list"),  # type: ignore[arg-type]
    "three factors": (
        replace(make_update(), adapters={**make_update().adapters, "y": make_update().adapters["x"] * 2}),  # type: ignore[arg-type]
        "y must have two factors, A and B, got 4",
    ),
    "unknown module": (
        replace(make_update(), adapters={**make_update().adapters, "z": make_update().adapters["x"]}),
        "modules that its configuration does not name: z",
    ),
    "missing module": (replace(make_update(), adapters={"x": make_update().adapters["x"]}), "lacks modules .*: y"),
    "scaling": (replace(make_update(), scaling={"x": 2.0, "y": 3.0}), "scaling of y must be 2 .* got 3.0"),
    "no scaling": (replace(make_update(), scaling={"x": 2.0}), "scaling of y must be 2 .* got None"),
    "scaling nan": (replace(make_update(), scaling={"x": 2.0, "y": math.nan}), "scaling of y must be 2"),
    "weight nan": (replace(make_update(), weight=math.nan), "weight must be a finite number"),
    "weight negative": (replace(make_update(), weight=-1.0), "weight must be .* at least 0, got -1.0"),
    "weight text": (replace(make_update(), weight="many"), "weight must be a finite number"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", WRONG)
def test_whatever_is_not_as_promised_is_refused(what):
    update, reason = WRONG[what]
    got = why_refused(update, promised())
    assert got is not None
    assert re.search(reason, got), got
    verdict = judge_updates([make_update("bob"), update], {"ann": promised(), "bob": promised("bob")})
    good, refused = verdict.good, verdict.refused
    assert [one.client for one in good] == ["bob"]
    assert refused == {"ann": got}


def test_an_update_beyond_the_bound_is_refused_and_one_at_it_is_not():
    norm = product_norm(make_update())
    assert why_refused(make_update(), promised(), max_norm=norm) is None
    reason = why_refused(make_update(), promised(), max_norm=0.999 * norm)
    assert reason is not None
    assert "the norm of its product is" in reason
    assert "max_norm" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_factors_whose_product_no_weight_can_hold_are_refused_without_a_bound(dtype):
    huge = 0.9 * float(torch.finfo(dtype).max)
    update, mine = with_factor("A", torch.full((3, K), huge, dtype=dtype)), promised()
    mine.adapters = {module: (A.to(dtype), B.to(dtype)) for module, (A, B) in mine.adapters.items()}
    reason = why_refused(update, mine)
    assert reason is not None
    assert "norm of its product" in reason


def test_only_clients_of_the_round_are_heard_and_each_once():
    updates = [make_update("ann"), make_update("bob"), make_update("bob"), make_update("eve")]
    verdict = judge_updates(updates, {"ann": promised(), "bob": promised("bob"), "cid": promised("cid")})
    good, refused = verdict.good, verdict.refused
    assert [one.client for one in good] == ["ann"]
    assert refused["bob"] == "it sent 2 updates in one round"
    assert "not asked" in refused["eve"]
    assert set(refused) == {"bob", "eve"}


def test_half_precision_may_be_sent_where_float32_was_promised():
    update = make_update()
    update.adapters = {module: (A.bfloat16(), B.half()) for module, (A, B) in update.adapters.items()}
    assert why_refused(update, promised()) is None


def test_a_norm_far_above_the_median_of_the_good_is_refused():
    sizes = {"ann": 1.0, "bob": 1.1, "cid": 0.9, "dan": 30.0, "eve": math.nan}
    updates = [make_update(name, size) for name, size in sizes.items()]
    mine = {name: promised(name) for name in sizes}
    verdict = judge_updates(updates, mine, outlier_factor=5.0)
    good, refused = verdict.good, verdict.refused
    assert [one.client for one in good] == ["ann", "bob", "cid"]
    assert re.fullmatch(
        r"the norm of its product is .*, more than 5 times the round's median of .* \(outlier_factor\)", refused["dan"]
    )
    assert "not finite" in refused["eve"], "what is broken has no part in the median"
    assert [one.client for one in judge_updates(updates, mine).good] == ["ann", "bob", "cid", "dan"]


def test_an_update_that_was_judged_where_it_was_trained_is_not_read_again():
    """Its factors may not even be here; its norm takes part in the round's median."""
    names = ("ann", "bob", "cid")
    mine = {name: promised(name) for name in names}
    norms = judge_updates([make_update(name) for name in names], mine).norms
    norms["cid"] = norms["cid"]._replace(value=1e3)
    verdict = judge_updates([promised(name) for name in names], mine, outlier_factor=5.0, norms=norms)
    assert [one.client for one in verdict.good] == ["ann", "bob"]
    assert "(outlier_factor)" in verdict.refused["cid"]


def test_what_is_too_large_is_clipped_by_the_norm_that_it_was_judged_by(monkeypatch):
    from flora_core.federation import judge

    measured = []
    monkeypatch.setattr(judge, "norm_of", lambda update: measured.append(update.client) or norm_of(update))
    small, large = make_update("ann"), make_update("bob", 10.0)
    bound = 1.001 * product_norm(small)
    config = FederationConfig(rounds=1, clip_update=bound, outlier_factor=1e3, weights="uniform")
    verdict = Judge(config, math.inf).round([small, large], {"ann": promised(), "bob": promised("bob")})
    assert measured == ["ann", "bob"], "once each"
    assert verdict.good[0] is small
    assert verdict.clipped == {"bob": product_norm(large)}
    assert product_norm(verdict.good[1]) <= bound
    assert [one.weight for one in verdict.good] == [1.0, 1.0]
