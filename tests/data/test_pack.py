"""Packed and padded batches: the same tokens and targets, and no sequence predicts its neighbour."""

import pytest
import torch

from flora_core.common.segments import Segments
from flora_core.data.pack import epoch_order, micro_batches, pack, pad, passes
from flora_core.data.template import Example


def example(*ids, loss_from=0):
    return Example(list(ids), [-100] * loss_from + list(ids[loss_from:]), record=0)


# Two sequences, none (a client that ran out of data), one of a single token and one of three.
CLIENTS = [[example(1, 2, 3, loss_from=1), example(4, 5)], [], [example(6), example(7, 8, 9, loss_from=2)]]


def test_pack():
    batch = pack(CLIENTS)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2]]
    assert batch.label_index.tolist() == [0, 1, 3, 7]
    assert batch.target_M.tolist() == [2, 3, 5, 9]
    assert batch.tokens == Segments([5, 0, 4])
    assert batch.sequences == (3, 2, 1, 3)
    assert (batch.real_index, batch.num_rows) == (None, 9)
    assert {tensor.dtype for tensor in (*batch.inputs.values(), batch.label_index, batch.target_M)} == {torch.int64}


def test_pad():
    batch = pad(CLIENTS, pad_id=99)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 99], [6, 99, 99], [7, 8, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert batch.label_index.tolist() == [0, 1, 3, 10]
    assert batch.target_M.tolist() == [2, 3, 5, 9]
    assert batch.real_index is not None
    assert batch.real_index.tolist() == [0, 1, 2, 3, 4, 6, 9, 10, 11]
    assert (batch.tokens, batch.sequences, batch.num_rows) == (Segments([5, 0, 4]), None, 12)


def test_padded_real_tokens_are_the_packed_ones():
    packed, padded = pack(CLIENTS), pad(CLIENTS, pad_id=0)
    assert padded.real_index is not None
    real = padded.inputs["input_ids"].flatten()[padded.real_index]
    assert torch.equal(real, packed.inputs["input_ids"][0])
    assert torch.equal(padded.real_index[packed.label_index], padded.label_index)
    assert torch.equal(padded.target_M, packed.target_M)


def test_nothing_to_pack():
    for batch in (pack([[], []]), pad([[], []], 0)):
        assert batch.inputs["input_ids"].numel() == batch.num_rows == batch.target_M.numel() == 0
        assert batch.tokens == Segments([0, 0])


def test_pad_id_is_checked():
    with pytest.raises(TypeError, match="pad_id must be a whole number, got None"):
        pad(CLIENTS, pad_id=None)  # pyright: ignore[reportArgumentType]


def test_micro_batches():
    examples = [example(number) for number in range(5)]
    assert [[e.input_ids[0] for e in batch] for batch in micro_batches(examples, 2)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        micro_batches(examples, 0)


def test_epoch_order_is_a_permutation_of_its_own():
    order = epoch_order(50, 3, "a", 1, 0)
    assert sorted(order) == list(range(50))
    assert order == epoch_order(50, 3, "a", 1, 0)
    others = [(4, "a", 1, 0), (3, "b", 1, 0), (3, "a", 0, 0), (3, "a", 1, 1), (3, "a", 0, 1)]
    orders = [order, *(epoch_order(50, *other) for other in others)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert epoch_order(0, 3, "a", 1, 0) == []


@pytest.mark.parametrize(
    ("sizes", "budget", "padded", "wanted"),
    [
        ([], 10, False, []),
        ([3, 3, 3], 9, False, [3]),
        ([3, 3, 3], 9, True, [3]),
        # As many passes as the budget needs, of about equal size: 12 tokens in two passes, not 10 and 2.
        ([2] * 6, 10, False, [3, 3]),
        ([2] * 6, 10, True, [5, 1]),
        # Padded to the longest in the pass, 1 and 4 take 8.
        ([1, 1, 1, 4, 4], 8, True, [3, 2]),
        ([1, 4, 4], 8, True, [2, 1]),
        ([1, 4, 4], 8, False, [2, 1]),
        # What is longer than the budget goes alone.
        ([2, 30, 2, 2], 10, False, [1, 1, 2]),
        ([2, 30, 2, 2], 10, True, [1, 1, 2]),
        ([30, 30], 10, False, [1, 1]),
        ([1, 1], 1, True, [1, 1]),
    ],
)
def test_passes_are_within_the_budget_and_of_about_equal_size(sizes, budget, padded, wanted):
    cut = passes(list(enumerate(sizes)), budget, padded=padded)
    assert [len(one) for one in cut] == wanted
    assert [item for one in cut for item in one] == list(range(len(sizes)))
