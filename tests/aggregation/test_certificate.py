"""The two errors of a round, measured against dense float64: they see whatever a strategy or a write loses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation import Certificate, Deviation, aggregate, certify, norm, sample_rows, total, write_deviation


def stack(p, k, n, dtype=torch.float64):
    generator = torch.Generator().manual_seed(p)
    A, B, coef = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((p, k), (p, n), (p,)))
    return A, B, coef


def dense(A, B, coef):
    return (B.double().T * coef.double()) @ A.double()


# P well below NK / (N + K) goes through the core, above it through the dense sum; 1 and 0 are the edges.
@pytest.mark.parametrize(("p", "k", "n"), [(3, 40, 30), (16, 40, 30), (18, 40, 30), (90, 40, 30), (1, 5, 7), (0, 5, 7)])
def test_norm_equals_the_dense_norm(p, k, n):
    parts = stack(p, k, n)
    assert norm(parts) == pytest.approx(float(dense(*parts).norm()), rel=1e-12)


@pytest.mark.parametrize("p", [4, 60])
def test_norm_of_terms_that_cancel_is_zero_to_rounding(p):
    """A Gram matrix would leave 1e-8 here: it squares the error."""
    A, B, coef = stack(p, 40, 30)
    twice = torch.cat([A, A]), torch.cat([B, 2 * B]), torch.cat([coef, -coef / 2])
    assert norm(twice) <= 1e-13 * norm((A, B, coef))


def test_deviation_of_nothing_from_nothing_is_zero_and_of_something_infinite():
    assert Deviation(0.0, None).relative == 0.0
    assert Deviation(0.0, 0.0).relative == 0.0
    assert Deviation(1.0, 0.0).relative == math.inf
    both = total([Deviation(3.0, 6.0), Deviation(4.0, 8.0)])
    assert (both.difference, both.exact) == (5.0, 10.0)
    assert total([]).relative == 0.0


def test_certificate_of_fedit_equals_the_dense_measure():
    generator = torch.Generator().manual_seed(0)
    updates = [
        ClientUpdate(
            f"c{i}",
            {m: (torch.randn(3, 20, generator=generator), torch.randn(3, 25, generator=generator)) for m in "xy"},
            {"x": 2.0, "y": 0.5},
            1.0 + i,
        )
        for i in range(3)
    ]
    result, exact = aggregate(updates, "fedit"), aggregate(updates, "flora").dense()
    applied = result.dense()
    for module in "xy":
        want = float((applied[module] - exact[module]).norm() / exact[module].norm())
        assert result.certificate.aggregation[module].relative == pytest.approx(want, rel=1e-12)
    flat = [torch.cat([part[m].flatten() for m in "xy"]) for part in (applied, exact)]
    want = float((flat[0] - flat[1]).norm() / flat[1].norm())
    assert result.certificate.aggregation_error == pytest.approx(want, rel=1e-12)


def test_certificate_sees_a_coefficient_off_by_one_bit():
    update = ClientUpdate("c", {"x": (torch.ones(1, 4), torch.ones(1, 4))}, {"x": 1.0})
    result = aggregate([update])
    A, B, coef = result.base_delta["x"]
    result.base_delta["x"] = (A, B, coef * (1 + 2**-52))
    assert certify([update], result).aggregation_error == pytest.approx(2**-52, rel=1e-3, abs=0)
    result.base_delta["x"] = (A.clone(), B.clone(), coef)
    assert certify([update], result).aggregation_error == 0.0
    result.base_delta = {}
    assert certify([update], result).aggregation_error == 1.0


def test_rows_beyond_the_exact_ones_are_seen():
    """Applied = exact + more: what both begin with cancels, the rest must count, a pair that cancels must not."""
    update = ClientUpdate("c", {"x": (torch.eye(2, 6), torch.eye(2, 7))}, {"x": 1.0})
    result = aggregate([update])
    A, B, coef = result.base_delta["x"]
    result.base_delta["x"] = torch.cat([A, A[:1]]), torch.cat([B, B[1:]]), torch.cat([coef, coef[:1]])
    assert certify([update], result).aggregation_error == pytest.approx(2**-0.5)
    result.adapter = {"x": (A[:1], B[1:], -coef[:1])}
    assert certify([update], result).aggregation_error == 0
    result.adapter = {"x": (A[:1], B[1:], coef[:1])}
    assert certify([update], result).aggregation_error == pytest.approx(2 * 2**-0.5)


@pytest.mark.parametrize("n", [30, 1500])  # 1500 rows need a second chunk
def test_write_deviation_measures_what_a_write_lost(n):
    parts = stack(4, 10, n)
    before = torch.randn(n, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    after = before + dense(*parts)
    assert write_deviation(before, after, parts).relative < 1e-14
    lost = after.clone()
    lost[n - 1] = before[n - 1]
    want = float(dense(*parts)[n - 1].norm() / dense(*parts).norm())
    assert write_deviation(before, lost, parts).relative == pytest.approx(want, rel=1e-9)
    rows = torch.tensor([0, n - 1])
    sampled = write_deviation(before[rows], lost[rows], parts, rows)
    assert sampled.difference == pytest.approx(float(dense(*parts)[n - 1].norm()), rel=1e-9)
    assert write_deviation(before, before, parts).relative == 1.0


def test_sampled_rows_are_spread_and_all_where_there_are_few():
    assert sample_rows(10, 4).tolist() == [0, 2, 5, 7]
    assert sample_rows(3, 4).tolist() == sample_rows(3, None).tolist() == [0, 1, 2]
    assert sample_rows(3, 0).tolist() == []


def test_certificate_is_json_also_where_an_error_is_infinite():
    certificate = Certificate({"x": Deviation(1.0, 0.0)}, {"x": Deviation(1.0, 4.0)}, rows=64)
    assert json.loads(json.dumps(certificate.to_json(), allow_nan=False)) == {
        "aggregation_error": None,
        "aggregation_error_by_module": {"x": None},
        "application_error": 0.25,
        "application_error_by_module": {"x": 0.25},
        "application_rows": 64,
    }
    assert Certificate({}).to_json()["application_error"] is None
