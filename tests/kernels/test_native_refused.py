"""Arguments that ``flora_kernels.native`` refuses before the library sees them; each message names the argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flora_kernels.types import Dropout
from tests.kernels.test_native_arrays import arrays, close, product

native = pytest.importorskip("flora_kernels.native", exc_type=ImportError)


def test_clients_of_wrong_kinds_are_refused():
    x, A, parts = torch.zeros(5, 7), torch.zeros(6, 7), ([slice(0, 5)], [slice(0, 6)])
    for wrong, words in (
        ((x, A, [3, 2], parts[1]), r"tokens\[0\] must be a slice such as slice\(0, 3\), got 3"),
        ((x, A, None, parts[1]), "tokens must be a sequence, got None"),
        ((x, A, [slice(0, 5, 2)], parts[1]), r"tokens\[0\] must be a slice"),
        ((x, A, [slice(0, 2.5)], parts[1]), r"tokens\[0\].stop must be an integer, got 2.5"),
        ((x, A, *parts, ["a"]), r"scaling_C must hold one number for each client of tokens, got \['a'\]"),
        ((x, A, *parts, ("a",)), "scaling_C must hold numbers"),
        ((x, A, *parts, 2.0), "scaling_C must hold one number for each client of tokens, got 2.0"),
        # A probability instead of a threshold would be no dropout at all.
        ((x, A, *parts, None, Dropout([0.1], [1], [0])), r"dropout.q_C must hold one integer for .*, got \[0.1\]"),  # pyright: ignore[reportArgumentType]
        ((x, A, *parts, None, 0.1), r"dropout must be Dropout\(q_C, seed_C, row_C\), got 0.1"),
        ((x, A, *parts, None, Dropout([2**40], [1], [0])), r"integers below 2\*\*31"),
    ):
        with pytest.raises(TypeError, match=words):
            native.shrink(*wrong)


def test_outputs_that_do_not_fit_are_refused():
    """Named as the caller names them, and nothing is written."""
    x, A, tokens, ranks = np.ones((5, 7), np.float32), np.ones((6, 7), np.float32), [slice(0, 5)], [slice(0, 6)]
    s = native.shrink(x, A, tokens, ranks)
    for out, words in (
        (np.zeros(31, np.float32), "out must have 30 elements to fit the others, got 31"),
        (np.zeros(30), "out.dtype must be fp32, got fp64"),
        (np.zeros(60, np.float32)[::2], "out.stride must be 1, got 2; copy it"),
        (x.reshape(-1)[:30], "out is written and must share no memory with x_MK; copy one of them"),
        (np.broadcast_to(np.float32(0), 30), "out is read-only and would be written"),
    ):
        before = out.copy()
        with pytest.raises(ValueError, match=words):
            native.shrink(x, A, tokens, ranks, out=out)
        assert np.array_equal(out, before)
    with pytest.raises(ValueError, match="s_flat must have 30 elements to fit the others, got 29"):
        native.expand_(x, s[:-1], A, tokens, ranks)
    gradients = s, x, s, x, tokens, ranks, None
    with pytest.raises(TypeError, match=r"out must be a tuple \(dA_PK, dB_PN\), got ndarray"):
        native.wgrad(*gradients, np.float32, out=A)
    with pytest.raises(ValueError, match="dB_PN is written and must share no memory with dA_PK"):
        native.wgrad(*gradients, np.float32, out=(A, A))
    with pytest.raises(TypeError, match=r"dtype must be a dtype of numpy, as the arrays are, got torch\.float32"):
        native.wgrad(*gradients, torch.float32)
    with pytest.raises(ValueError, match="x_MK must have 2 axes, got 1"):
        native.wgrad(s, x[0], *gradients[2:], np.float32)


ADAMW = [
    (dict(grad=np.ones(19, np.float32)), "grad must have 20 elements, as param has, got 19"),
    (dict(exp_avg=np.ones(20)), "exp_avg must have the elements of param; convert it"),
    (dict(param=np.ones(40, np.float32)[::2]), "param must be contiguous; copy it"),
    (dict(hyper_CH=np.ones((1, 6), np.float32)), r"hyper_CH must have the shape \(any, 7\) .* got \(1, 6\)"),
    (dict(segments=[slice(0, 19)]), "segments must end at 20, the length of its axis, got 19"),
    (dict(segments=[slice(0, 5), slice(9, 24)], owner=[0, 0]), r"segments\[1\] must go on from 5"),
    (dict(owner=[1]), r"owner\[0\] must name one of 1 rows of hyper_CH, got 1"),
    (dict(owner=[0, 0]), "owner must have one entry for each segment, 1, got 2"),
    (dict(owner=[0.0]), r"owner must hold one integer for each segment, got \[0.0\]"),
]


@pytest.mark.parametrize(("change", "words"), ADAMW, ids=[words[:24] for _, words in ADAMW])
def test_optimizer_buffers_that_do_not_fit_are_refused(change, words):
    buffers = {name: np.ones(20, np.float32) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    rest = dict(segments=[slice(0, 20)], hyper_CH=np.ones((1, 7), np.float32), owner=[0])
    with pytest.raises((TypeError, ValueError), match=words):
        native.cohort_adamw_(**{**buffers, **rest, **change})
    assert all((buffer == 1).all() for buffer in buffers.values())


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (None, "items must be a sequence of MergeItem or tuples, got None"),
        ([(1, 2, 3)], r"items\[0\] must be a MergeItem or a tuple \(W, A, B, coef\[, low_bits\]\), got a tuple of 3"),
        (np.zeros((6, 10), np.float32), r"items\[0\] must be a MergeItem"),
    ],
    ids=["none", "short", "array"],
)
def test_items_that_are_none_are_refused(items, words):
    with pytest.raises(TypeError, match=words):
        native.merge_many_(items)


def test_items_may_come_one_by_one():
    a = arrays()
    wanted = a["weight_NK"] + product(a)
    native.merge_many_(item for item in [tuple(a.values())])
    assert close(a["weight_NK"], wanted, torch.float32)


def test_seeds_and_threads_are_integers():
    a = arrays()
    for option in ("seed", "threads"):
        for wrong in ("1", 1.5):
            with pytest.raises(TypeError, match=f"{option} must be an integer, got {wrong!r}"):
                native.merge_(**a, **{option: wrong})


def test_a_tensor_without_memory_is_refused():
    """torch.func's wrappers and fake tensors have none."""
    t = {name: torch.from_numpy(array) for name, array in arrays().items()}
    with pytest.raises(TypeError, match=r"A is a Tensor without memory .*; pass the plain tensor"):
        torch.func.vmap(lambda A: native.merge_(**{**t, "A_PK": A}))(torch.stack([t["A_PK"]] * 2))
    with pytest.raises(ValueError, match="weight must be a plain strided tensor, got layout nested"):
        native.merge_(**{**t, "weight_NK": torch.nested.nested_tensor([t["coef_P"]], layout=torch.jagged)})
