"""The reference kernels alone: Philox and the dropout mask, the split fp32 master, S as it lies, ragged products.

Letters: M packed tokens, K in_features, N out_features, R one client's rank, C clients.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from flora_core import testing
from flora_core.ops.api import dropout_threshold
from flora_core.testing import LINEAR_SHAPES, make_linear, ulp
from flora_kernels import reference
from flora_kernels.reference import Dropout, dropout_keep, join_master, philox4x32, split_master

VECTORS = json.loads((Path(__file__).parents[1] / "support" / "dropout_vectors.json").read_text())["masks"]
CPU = torch.device("cpu")
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
ONES, ZEROS = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2), ((0,) * 4, (0,) * 2)
# Random123's known answers (kat_vectors).
KNOWN = [
    pytest.param(*ZEROS, 7, "5f6fb709 0d893f64 4f121f81 4f730a48", id="7-zeros"),
    pytest.param(*ONES, 7, "5207ddc2 45165e59 4d8ee751 8c52f662", id="7-ones"),
    pytest.param(*PI, 7, "4dfccaba 190a87f0 c47362ba b6b5242a", id="7-pi"),
    pytest.param(*ZEROS, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="10-zeros"),
    pytest.param(*ONES, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd", id="10-ones"),
    pytest.param(*PI, 10, "d16cfe09 94fdcceb 5001e420 24126ea1", id="10-pi"),
]


@pytest.mark.parametrize(("counter", "key", "rounds", "words"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, rounds, words):
    wanted = [int(word, 16) for word in words.split()]
    assert [int(word) for word in philox4x32([torch.tensor(c) for c in counter], key, rounds)] == wanted
    assert list(testing.philox4x32(counter, key, rounds)) == wanted


def bits(packed_hex: str, rows: int, columns: int) -> torch.Tensor:
    text = "".join(f"{byte:08b}" for byte in bytes.fromhex(packed_hex))[: rows * columns]
    return torch.tensor([bit == "1" for bit in text]).view(rows, columns)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["why"])
def test_dropout_mask_is_the_committed_one(vector):
    wanted = bits(vector["kept_hex"], vector["rows"], vector["columns"])
    shape, q, seed, first_row = (vector["rows"], vector["columns"]), vector["q"], vector["seed"], vector["first_row"]
    assert torch.equal(dropout_keep(*shape, q, seed, first_row, CPU), wanted)
    assert torch.equal(testing.keep_mask(*shape, q, seed, first_row), wanted)


def test_dropout_mask_does_not_depend_on_how_it_is_cut():
    whole = dropout_keep(40, 50, 20000, 2**62 + 5, 100, CPU)
    for start, stop, columns in ((0, 1, 50), (7, 40, 50), (0, 40, 49), (13, 14, 8), (39, 40, 1)):
        part = dropout_keep(stop - start, columns, 20000, 2**62 + 5, 100 + start, CPU)
        assert torch.equal(part, whole[start:stop, :columns])


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (3, 0)])
def test_an_empty_mask_is_empty(rows, columns):
    assert dropout_keep(rows, columns, 5, 0, 0, CPU).shape == (rows, columns)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.95])
def test_dropout_keeps_its_share(p):
    rows, columns, q = 300, 512, dropout_threshold(p)
    keep = dropout_keep(rows, columns, q, 2**60 + 17, 0, CPU).double()
    share = 1 - q / 65536
    sigma = math.sqrt(share * (1 - share))
    assert abs(keep.mean().item() - share) <= 5 * sigma / math.sqrt(rows * columns)
    # Nor does any of the eight draws of a counter, or a row, go its own way.
    assert ((keep.view(rows, -1, 8).mean((0, 1)) - share).abs() <= 5 * sigma / math.sqrt(rows * columns / 8)).all()
    assert ((keep.mean(1) - share).abs() <= 5 * sigma / math.sqrt(columns)).all()
    # Neighbouring rows, columns and keys are not alike.
    other = dropout_keep(rows, columns, q, 2**60 + 18, 0, CPU).double()
    for one, two in ((keep[:-1], keep[1:]), (keep[:, :-1], keep[:, 1:]), (keep, other)):
        agreement = ((one - share) * (two - share)).sum() / (share * (1 - share))
        assert abs(agreement.item()) <= 5 * math.sqrt(one.numel())


def test_a_dropped_nan_is_zero():
    keep = dropout_keep(6, 16, 32768, 3, 0, CPU)
    x = torch.where(keep, 1.0, float("nan"))
    dropout = Dropout([32768], [3], [0])
    rows, ranks, A = [slice(0, 6)], [slice(0, 2)], torch.ones(2, 16)
    s = reference.shrink(x, A, rows, ranks, None, dropout)
    assert torch.equal(s.view(6, 2), (2.0 * keep.sum(1, keepdim=True)).expand(6, 2))
    dA, _ = reference.wgrad(torch.ones(12), x, s, torch.zeros(6, 1), rows, ranks, [1.0], torch.float32, dropout)
    assert torch.equal(dA, (2.0 * keep.sum(0)).expand(2, 16))


def test_a_nan_in_the_branch_does_not_reach_dropped_inputs():
    keep = dropout_keep(6, 16, 32768, 3, 0, CPU)
    dx = torch.zeros(6, 16)
    A = torch.full((2, 16), float("nan"))
    reference.expand_(dx, torch.ones(12), A, [slice(0, 6)], [slice(0, 2)], None, Dropout([32768], [3], [0]))
    assert torch.equal(dx.isnan(), keep)
    assert (dx[~keep] == 0).all()


def test_s_is_ragged_flat_and_unscaled():
    inputs = make_linear(LINEAR_SHAPES[0], exact=True)
    tokens, ranks = tuple(inputs.tokens), tuple(inputs.ranks)
    with testing.nan_filled():
        s = reference.shrink(inputs.x, inputs.A, tokens, ranks)
    blocks = [(inputs.x[m] @ inputs.A[p].T).flatten() for m, p in zip(tokens, ranks, strict=True)]
    assert torch.equal(s, torch.cat(blocks))
    scaled = reference.shrink(inputs.x, inputs.A, tokens, ranks, inputs.scaling_C)
    assert torch.equal(scaled, torch.cat([block * c for block, c in zip(blocks, inputs.scaling_C, strict=True)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_sums_are_taken_in_fp32(dtype):
    """4097 ones: a 16-bit sum would stop at 2**8 or 2**11, and cannot hold the result."""
    one, tokens = [slice(0, 1)], [slice(0, 4097)]
    ones, column = torch.ones(4097, dtype=dtype), torch.ones(4097, 1, dtype=dtype)
    assert reference.shrink(column.T, column.T, one, one).item() == torch.tensor(4097.0).to(dtype)
    dA, dB = reference.wgrad(ones, column, ones, column, tokens, one, [1.0], torch.float32)
    assert dA.item() == dB.item() == 4097


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_expand_rounds_once(dtype):
    """Rounded by itself first, the branch would carry y up by one more step."""
    eps = torch.finfo(dtype).eps
    y, s = torch.full((1, 1), eps / 2, dtype=dtype), torch.ones(3, dtype=dtype)
    B = torch.tensor([[1.0], [eps / 2], [eps / 8]])
    assert reference.expand_(y, s, B, [slice(0, 1)], [slice(0, 3)]).item() == 1 + eps


def test_clients_without_tokens_or_rank_get_zero_gradients():
    inputs = make_linear(LINEAR_SHAPES[2])
    tokens, ranks = tuple(inputs.tokens), tuple(inputs.ranks)
    s, ds = (reference.shrink(t, f, tokens, ranks) for t, f in ((inputs.x, inputs.A), (inputs.dy, inputs.B)))
    with testing.nan_filled():
        dA, dB = reference.wgrad(ds, inputs.x, s, inputs.dy, tokens, ranks, inputs.scaling_C, torch.float32)
    assert not dA[ranks[1]].any()
    assert not dB[ranks[1]].any()
    assert dA[ranks[0]].all()


# Bit patterns of fp32: zeros, ties of either parity, one off a tie, denormals, the largest, infinities, NaN.
PATTERNS = [
    *(0x00000000, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x3F80FFFF, 0x3FFF8000, 0x00000001),
    *(0x00008000, 0x00007FFF, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F7F0000, 0x7F800000),
    *(0x7FC00000, 0x42F6E979),
]


def patterns() -> torch.Tensor:
    both = torch.tensor([sign | bits_ for bits_ in PATTERNS for sign in (0, 0x80000000)], dtype=torch.int64)
    random = torch.randint(0, 2**32, (4000,), generator=torch.Generator().manual_seed(0))
    random = random[(random & 0x7F800000) != 0x7F800000]
    return torch.cat([both, random]).to(torch.int32).view(torch.float32)


def test_split_and_join_give_back_every_bit():
    master = patterns()
    weight, low = split_master(master)
    assert (weight.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_master(weight, low).view(torch.int32), master.view(torch.int32))


def test_the_bf16_part_is_the_nearest():
    master = patterns()
    weight, low = split_master(master)
    tie = low == -(2**15)
    # Ties go away from zero where torch goes to even; everything else agrees with it.
    assert torch.equal(weight[~tie].float().nan_to_num(), master.bfloat16()[~tie].float().nan_to_num())
    assert tie.sum() >= 6
    gap = (weight[tie].double() - master[tie].double()).abs()
    finite = gap.isfinite()  # the largest tie goes to infinity, as torch's does
    assert (gap[finite] == (ulp(master[tie], torch.bfloat16) / 2)[finite]).all()
    assert (weight[tie].double().abs() > master[tie].double().abs()).all()


def test_split_does_not_need_contiguous_input():
    master = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weight, low = split_master(master.T)
    assert torch.equal(join_master(weight, low), master.T)
    assert torch.equal(join_master(weight.T.contiguous().T, low.T.contiguous().T), master.T)


def test_stochastic_rounding_does_not_depend_on_the_block():
    master = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    whole = reference.round_stochastic(master, torch.bfloat16, 9, 0)
    for start in (1, 7, 19):
        assert torch.equal(reference.round_stochastic(master[start:], torch.bfloat16, 9, start), whole[start:])


def test_stochastic_rounding_keeps_what_is_not_finite():
    master = torch.tensor([[float("inf"), -float("inf"), float("nan"), 0.0, 0.0, -0.0, 1.0]])
    master.view(torch.int32)[0, 3] = 0x7FFFFFFF  # a NaN that a carry would make -0
    for seed in range(20):
        out = reference.round_stochastic(master, torch.bfloat16, seed, 0).float()
        assert torch.equal(out.isnan(), master.isnan())
        assert torch.equal(out[~out.isnan()], master[~master.isnan()])


def test_stochastic_rounding_draws_its_own_numbers():
    """Half way between two neighbours it would otherwise go up exactly where dropout keeps."""
    half = torch.full((16, 64), 1 + 2.0**-8)
    up = reference.round_stochastic(half, torch.bfloat16, 5, 0) > 1
    assert not torch.equal(up, dropout_keep(16, 64, 32768, 5, 0, CPU))
    assert 0 < up.sum() < up.numel()
