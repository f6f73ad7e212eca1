"""bench/gpu/merge.py runs to its end: on the CPU, through the same functions of the C interface."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("flora_kernels.native", exc_type=ImportError)
pytest.importorskip("peft")
pytest.importorskip("triton")

from bench.gpu import merge

CASES = {"q,v": [(24, 40)] * 3, "all linears": [(24, 40), (40, 24), (24, 24)]}


def test_it_checks_and_times_every_contender(monkeypatch):
    monkeypatch.setattr(merge, "ROUNDS", 2)
    found = merge.run("cpu", CASES)
    assert found["green"]
    assert 0 < found["share of the error budget"] <= 1
    for name in CASES:
        row = found[name]
        assert set(row["times"]) == {"flora", "flora, fp32 factors", *merge.LEAST}
        assert len(row["met"]) == 4
    assert found["q,v"]["bytes"] == 3 * (2 * 24 * 40 * 2 + 160 * (24 + 40) * 2)
    json.dumps(found)


def test_what_is_wrong_is_not_timed(monkeypatch):
    def half(self, layers):
        return lambda: layers.weights[0].mul_(2)

    monkeypatch.setattr(merge.Library, "merge", half)
    found = merge.run("cpu", CASES)
    assert not found["green"]
    assert not set(CASES) & set(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_library_says_why_there_is_no_gpu():
    with pytest.raises(RuntimeError, match=r"built without CUDA|no GPU"):
        merge.Library("cuda")
