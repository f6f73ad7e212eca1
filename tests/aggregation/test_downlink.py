"""The downlink: the smallest exact form of every change, and a client that missed rounds gets the same weights.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import pytest
import torch

from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation import aggregate
from flora_core.aggregation.downlink import DeltaLog, smallest_form
from flora_core.aggregation.svd import full_rank
from flora_core.merge.in_place import apply_base_delta_, new_low_bits


def stack(p, n=40, k=30, dtype=torch.float32):
    generator = torch.Generator().manual_seed(p)
    A, B = (torch.randn(p, width, generator=generator).to(dtype) for width in (k, n))
    return A, B, torch.rand(p, generator=generator, dtype=torch.float64) + 0.1


def dense(A, B, coef):
    return (B.double().T * coef) @ A.double()


# NK / (N + K) = 17.1: 17 rows are smaller than dense, 18 are not.
@pytest.mark.parametrize(
    ("p", "kind", "numbers"), [(0, "none", 0), (1, "stack", 70), (17, "stack", 1190), (18, "dense", 1200)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_smaller_of_stack_and_dense(p, kind, numbers, dtype):
    parts = stack(p, dtype=dtype)
    same, form = smallest_form(parts)
    assert form == (kind, numbers * dtype.itemsize)
    assert all(mine is theirs for mine, theirs in zip(same, parts, strict=True)), "what came is applied as it came"


def test_rows_that_do_nothing_are_not_sent():
    A, B, coef = stack(6)
    A[1], B[2], coef[3] = 0, 0, 0
    kept, form = smallest_form((A, B, coef))
    assert form == ("stack", 3 * 70 * 4)
    # The rows themselves: a library rounds the sum over six rows otherwise than that over three.
    for part, every in zip(kept, (A, B, coef), strict=True):
        assert torch.equal(part, every[[0, 4, 5]])


def test_rows_that_depend_on_each_other_are_recompressed_without_loss():
    A, B, coef = stack(3)
    many = torch.cat([A, A, 2 * A, -A]), torch.cat([B, B.flip(0), B, 3 * B]), coef.repeat(4)
    kept, form = smallest_form(many)
    # 12 rows of 4 bytes a number against 3 of 8.
    assert form == ("recompressed", 3 * 70 * 8)
    torch.testing.assert_close(dense(*kept), dense(*many), rtol=0, atol=1e-12)
    A, B, coef = (part[:4] for part in many)
    assert smallest_form((A, B, coef))[1] == ("stack", 4 * 70 * 4), "8 bytes a number do not pay for one row less"


def test_terms_that_cancel_send_nothing_in_the_end():
    A, B, coef = stack(3)
    _, form = smallest_form((torch.cat([A, A]), torch.cat([B, -B]), coef.repeat(2)))
    assert form == ("none", 0)


def test_rows_that_cancel_behind_independent_ones_are_found():
    """The second client takes back all but one row of the first: the first rows alone look independent."""
    A, B, coef = stack(4)
    _, form = smallest_form((torch.cat([A, A[:3]]), torch.cat([B, -B[:3]]), torch.cat([coef, coef[:3]])))
    assert form == ("recompressed", 70 * 8)


def test_full_rank_is_never_claimed_for_dependent_rows():
    A = stack(5)[0]
    assert full_rank(A)
    assert full_rank(1e-20 * A)
    assert full_rank(A[:0])
    alike = A[:1] + 1e-3 * A
    assert full_rank(alike.double()), "float32 cannot tell, float64 can"
    assert not full_rank(A[:1].double() + 1e-6 * A)
    for dependent in (
        torch.cat([A, A[:1]]),
        torch.cat([A, A.sum(0, keepdim=True)]),
        torch.cat([A, 0 * A[:1]]),
        A[:, :3],
    ):
        assert not full_rank(dependent)


def rounds(count, p=2, n=16, k=12):
    """Rounds of one module, and the weights after each."""
    weights = {"w": torch.randn(n, k).to(torch.bfloat16)}
    low, states, deltas = new_low_bits(weights), [], []
    for number in range(count + 1):
        if number:
            update = ClientUpdate("c", {"w": (torch.randn(p, k), torch.randn(p, n))}, {"w": 0.5})
            deltas.append(aggregate([update]))
            apply_base_delta_(weights, deltas[-1].base_delta, low_bits=low)
        states.append(({"w": weights["w"].clone()}, {"w": low["w"].clone()}))
    return states, deltas


def test_a_client_that_missed_rounds_gets_the_server_s_bits_by_either_way():
    states, deltas = rounds(5)
    log = DeltaLog(snapshot_bytes=16 * 12 * 4)
    for number, result in enumerate(deltas, 1):
        log.record(number, sum(form.size_bytes for form in result.forms.values()), ["always"], result.base_delta)
    assert log.missed("always") == ("none", 0, [])
    # Two rounds of 2 (16 + 12) numbers weigh less than the 192 of the weight; four weigh more.
    log.have["away"] = 3
    kind, size, missed = log.missed("away")
    assert (kind, size, missed) == ("log", 2 * 2 * 28 * 4, [4, 5])
    weights, low = ({m: t.clone() for m, t in part.items()} for part in states[3])
    for number in missed:
        apply_base_delta_(weights, log.deltas[number], low_bits=low)
    assert torch.equal(weights["w"], states[5][0]["w"])
    assert torch.equal(low["w"], states[5][1]["w"])
    assert log.missed("new") == ("snapshot", 16 * 12 * 4, [])


def test_the_log_never_outgrows_a_snapshot_by_more_than_a_round():
    log = DeltaLog(snapshot_bytes=100)
    for number in range(1, 50):
        log.record(number, 30, [], {})
        assert sum(log.sizes.values()) < 100 + 30
        assert set(log.deltas) == set(log.sizes)
    assert log.sizes == {46: 30, 47: 30, 48: 30, 49: 30}
    log.have |= {"late": 45, "later": 46, "gone": 44}
    assert [log.missed(name)[0] for name in ("late", "later", "gone", "new")] == [
        "snapshot",
        "log",
        "snapshot",
        "snapshot",
    ]


def test_a_log_that_begins_too_late_is_never_offered():
    """Three rounds weigh exactly a snapshot, and are all that is kept: not enough for who misses a fourth."""
    log = DeltaLog(snapshot_bytes=90)
    for number in range(1, 10):
        log.record(number, 30, [])
    log.have |= {"late": 6, "later": 5}
    assert log.missed("late") == ("log", 90, [7, 8, 9])
    assert log.missed("later") == ("snapshot", 90, [])


def test_the_log_survives_being_saved():
    log = DeltaLog(snapshot_bytes=50)
    for number in (1, 2, 5):
        log.record(number, 20, [f"c{number}"])
    again = DeltaLog(snapshot_bytes=50)
    again.restore(log.saved())
    assert again == log
    assert again.missed("c2") == ("log", 20, [5])
