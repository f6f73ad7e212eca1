"""Arguments that the native library takes and refuses: arrays of NumPy, JAX and torch, bad sizes, overlaps; errors name
it."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
import pytest
import torch

from flora_core import MergeItem, Segments
from flora_core.ops import api, backends
from flora_kernels.types import Dropout

native = pytest.importorskip("flora_kernels.native", exc_type=ImportError)


# A library that was built with CUDA takes merges of a GPU's arrays too.
WHERE = " or ".join(native.DEVICES["merge_"])


def arrays(n: int = 6, k: int = 10, p: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {"weight_NK": (n, k), "A_PK": (p, k), "B_PN": (p, n), "coef_P": (p,)}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in sizes.items()}


def product(a: dict[str, np.ndarray]) -> np.ndarray:
    return a["B_PN"].astype(float).T @ (a["coef_P"].astype(float)[:, None] * a["A_PK"].astype(float))


def close(out: np.ndarray, wanted: np.ndarray, dtype: torch.dtype) -> bool:
    return bool(np.abs(out - wanted).max() <= 2 * torch.finfo(dtype).eps * np.abs(wanted).max())


def test_numpy_arrays_are_changed_where_they_lie():
    a = arrays()
    address, wanted = a["weight_NK"].ctypes.data, a["weight_NK"] + product(a)
    native.merge_(**a)
    assert a["weight_NK"].ctypes.data == address
    assert close(a["weight_NK"], wanted, torch.float32)


def test_views_of_numpy_arrays():
    """Every second column, rows from the last to the first, and a transposed stack."""
    a = arrays()
    wide = np.zeros((6, 20), np.float32)
    W = wide[::-1, ::2]
    native.merge_(W, np.asfortranarray(a["A_PK"]), a["B_PN"][:, ::1], a["coef_P"])
    assert close(wide[::-1, ::2], product(a), torch.float32)
    assert not wide[:, 1::2].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_uint16_holds_what_dtype_says(dtype):
    a = arrays()
    W = torch.from_numpy(a["weight_NK"]).to(getattr(torch, dtype))
    bits = W.view(torch.int16).numpy().view(np.uint16).copy()
    native.merge_(W, *(torch.from_numpy(a[name]) for name in ("A_PK", "B_PN", "coef_P")))
    native.merge_(bits, a["A_PK"], a["B_PN"], a["coef_P"], dtype=dtype)
    assert np.array_equal(bits, W.view(torch.int16).numpy().view(np.uint16))
    with pytest.raises(TypeError, match=r"weight is uint16: say with dtype= .* 'bfloat16' or 'float16'"):
        native.merge_(bits, a["A_PK"], a["B_PN"], a["coef_P"])
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, got 'int8'"):
        native.merge_(bits, a["A_PK"], a["B_PN"], a["coef_P"], dtype="int8")


def test_numpy_runs_every_op():
    tokens, ranks = Segments.from_lengths([3, 2]), Segments.from_lengths([2, 4])
    dropout, scaling = Dropout([9000, 0], [1, 2], [0, 0]), [2.0, 3.0]
    random = np.random.default_rng(1)
    mine = [random.standard_normal(shape).astype(np.float32) for shape in ((5, 7), (5, 8), (6, 7), (6, 8))]

    def run(x, dy, A, B, dtype):
        s = native.shrink(x, A, tokens, ranks, None, dropout)
        y = native.expand_(dy * 1, s, B, tokens, ranks, scaling)
        return s, y, *native.wgrad(s, x, s, dy, tokens, ranks, scaling, dtype, dropout)

    theirs = [torch.from_numpy(array) for array in mine]
    for out, wanted in zip(run(*mine, dtype=np.float32), run(*theirs, dtype=torch.float32), strict=True):
        assert isinstance(out, np.ndarray)
        assert np.array_equal(out, wanted.numpy())


def test_jax_arrays_are_read_and_never_written():
    jnp = pytest.importorskip("jax.numpy")
    a = arrays()
    wanted = a["weight_NK"] + product(a)
    A, B, coef = (jnp.asarray(a[name]) for name in ("A_PK", "B_PN", "coef_P"))
    native.merge_(a["weight_NK"], A, B, coef)
    assert close(a["weight_NK"], wanted, torch.float32)
    with pytest.raises(TypeError, match=r"weight is written in place, and JAX arrays are immutable; .*FFI"):
        native.merge_(jnp.asarray(a["weight_NK"]), A, B, coef)


def test_what_is_not_writable_is_refused():
    a = arrays()
    a["weight_NK"].flags.writeable = False
    before = a["weight_NK"].copy()
    with pytest.raises(ValueError, match="weight is read-only and would be written"):
        native.merge_(**a)
    assert np.array_equal(a["weight_NK"], before)


def test_what_needs_grad_is_refused_outside_no_grad():
    t = {name: torch.from_numpy(array) for name, array in arrays().items()}
    for name in ("weight_NK", "A_PK"):
        needy = {**t, name: t[name].clone().requires_grad_()}
        before = needy["weight_NK"].detach().clone()
        with pytest.raises(ValueError, match=rf"{name[:-3].strip('_')} requires grad, .*torch.no_grad"):
            native.merge_(**needy)
        assert torch.equal(needy["weight_NK"], before)
    with torch.no_grad():
        native.merge_(**needy)


MERGES = [
    (dict(A_PK=(3, 9)), r"A must have the shape \(any, 10\) to fit the others, got \(3, 9\)"),
    (dict(B_PN=(2, 6)), r"B must have the shape \(3, 6\) to fit the others, got \(2, 6\)"),
    (dict(coef_P=(4,)), r"coef must have 3 elements to fit the others, got 4"),
    (dict(B_PN=(6, 3)), r"B must have the shape \(3, 6\) .* got \(6, 3\); pass its transpose"),
    (dict(coef_P=(3, 1)), r"coef must have 1 axes, got 2"),
    (dict(weight_NK=(60,)), r"weight must have 2 axes, got 1"),
    (dict(rounding="up"), r"rounding must be one of nearest, stochastic, got 'up'"),
    (dict(accumulate="bfloat16"), r"accumulate must be one of float32, float64, got 'bfloat16'"),
    (dict(rounding="stochastic"), r"weight.dtype must be bf16 for stochastic rounding, got fp32"),
    (dict(isa="sse9"), r"isa must be one of auto, portable, avx2, avx512, got 'sse9'"),
    (dict(rounding=["nearest"]), r"rounding must be one of nearest, stochastic, got \['nearest'\]"),
    (dict(threads=-1), r"threads must be at least 0"),
    (dict(threads=5000), r"threads must be .* at most 4096, got 5000"),
    (dict(low_bits_NK=(6, 10)), r"low_bits.dtype must be int16, got fp32"),
]


@pytest.mark.parametrize(("change", "words"), MERGES, ids=[words[:24] for _, words in MERGES])
def test_merges_that_do_not_fit_name_the_argument(change, words):
    a = arrays()
    before = a["weight_NK"].copy()
    options = {k: np.zeros(v, np.float32) if isinstance(v, tuple) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        native.merge_(**{**a, **options})
    assert np.array_equal(a["weight_NK"], before)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        ([[1.0]], "weight must be an array with __dlpack__ .*got list"),
        (np.zeros((6, 10), np.int64), "weight must be float32, .*got int64; convert it"),
        (torch.zeros(6, 10, dtype=torch.int64), "weight must be one of float32, .*got int64"),
        (torch.zeros(6, 10).to_sparse(), "weight must be a plain strided tensor"),
        (torch.zeros(6, 10, dtype=torch.complex64).conj().imag, r"weight is conjugated or negated .*resolve_neg\(\)"),
        # What a tensor is handed over as: nobody may name an address of his own.
        ((16, 1, 0, 0, [6, 10], [10, 1]), "weight must be an array with __dlpack__ .*got tuple"),
        (None, "weight must be an array with __dlpack__ .*got NoneType"),
        (np.zeros((6, 10), ">f4"), "weight cannot be shared: .*native byte order"),
    ],
    ids=["list", "int64", "torch-int64", "sparse", "negated", "tuple", "none", "byte-order"],
)
def test_what_is_no_float_array_is_refused(array, words):
    a = arrays()
    with pytest.raises((TypeError, ValueError), match=words):
        native.merge_(**{**a, "weight_NK": array})


def test_tensors_on_other_devices_are_refused():
    t = {name: torch.from_numpy(array).to("meta") for name, array in arrays().items()}
    with pytest.raises(ValueError, match=f"weight must be on {WHERE}, got meta; use another backend"):
        native.merge_(**t)
    with pytest.raises(ValueError, match=r"backend='native' runs on cpu.*, the tensors are on meta"):
        backends.resolve("native", "merge_", t["weight_NK"])
    assert backends.resolve("auto", "merge_", t["weight_NK"])[0].__name__ != "flora_kernels.native"


def test_an_output_may_not_overlap_anything():
    buffer = torch.randn(400)
    view = dict(weight_NK=buffer[:60].view(6, 10), A_PK=buffer[100:130].view(3, 10), B_PN=buffer[200:218].view(3, 6))
    view["coef_P"] = buffer[300:303]
    native.merge_(**view)
    before = buffer.clone()
    for name, start in (("A_PK", 59), ("B_PN", 45), ("coef_P", 0)):
        size = view[name].numel()
        with pytest.raises(ValueError, match=f"weight is written and must share no memory with {name[:-3].strip('_')}"):
            native.merge_(**{**view, name: buffer[start : start + size].view(view[name].shape)})
    assert torch.equal(buffer, before)
    with pytest.raises(
        ValueError, match="weight is written and must have a place for each element, got strides 0 and 1"
    ):
        native.merge_(**{**view, "weight_NK": torch.zeros(1, 10).expand(6, 10)})


def test_items_may_share_a_matrix_but_no_element():
    """q, k and v are rows of one weight, or columns; a stack may serve many items."""
    whole, t = torch.zeros(18, 20), {name: torch.from_numpy(array) for name, array in arrays().items()}
    factors = t["A_PK"], t["B_PN"], t["coef_P"]
    places = [whole[row : row + 6, column : column + 10] for row in (0, 6, 12) for column in (0, 10)]
    native.merge_many_([(place, *factors) for place in places])
    one = torch.zeros(6, 10)
    native.merge_(one, *factors)
    assert torch.equal(whole, one.repeat(3, 2))
    with pytest.raises(
        ValueError, match=r"items\[\d\].weight is written and must share no memory with items\[\d\].weight"
    ):
        native.merge_many_([(whole[:6, :10], *factors), (whole[5:11, :10], *factors)])
    many = [(torch.zeros(6, 10), *factors) for _ in range(300)]
    native.merge_many_(many)
    with pytest.raises(ValueError, match=r"items\[3\].weight is written .* no memory with items\[300\].weight"):
        native.merge_many_([*many, (many[3][0][1:], factors[0], factors[1][:, 1:], factors[2])])
    assert torch.equal(many[3][0], one)


def test_clients_that_do_not_fit_are_refused():
    x, A = torch.zeros(5, 7), torch.zeros(6, 7)
    tokens, ranks = Segments.from_lengths([3, 2]), Segments.from_lengths([2, 4])
    for wrong, words in (
        ((x[:4], A, tokens, ranks), "tokens must end at 4, the length of its axis, got 5"),
        ((x, A[:5], tokens, ranks), "ranks must end at 5, the length of its axis, got 6"),
        ((x, A[:, :6], tokens, ranks), r"A_PK must have the shape \(any, 7\) to fit the others, got \(6, 6\)"),
        ((x[0], A, tokens, ranks), "x_MK must have 2 axes, got 1"),
        ((x, A, tokens, Segments([6])), "ranks must have one entry for each client of tokens, 2, got 1"),
        ((x, A, tokens, ranks, [1.0]), "scaling_C must have one entry for each client of tokens, 2, got 1"),
        ((x, A, tokens, ranks, (1.0,)), "scaling_C must have one entry for each client of tokens, 2, got 1"),
        ((x, A, tokens, ranks, None, Dropout([1], [1, 2], [0, 0])), r"dropout.q_C must have one entry .* 2, got 1"),
        ((x, A, [slice(0, 2), slice(3, 5)], ranks), r"tokens\[1\] must go on from 2, .* got slice\(3, 5, None\)"),
        ((x, A, tokens, [slice(1, 2), slice(2, 6)]), r"ranks\[0\] must go on from 0"),
        (
            (x, A, tokens, ranks, None, Dropout([1, 65537], [1, 2], [0, 0])),
            r"dropout.q_C\[1\] must be between 0 and 65536",
        ),
        ((x, A, tokens, ranks, None, Dropout([1, 1], [1, 2], [0, 2**32])), r"dropout.row_C\[1\] .*below 2\^32"),
        ((x.half(), A.bfloat16(), tokens, ranks), "A_PK.dtype must be fp32, fp16, got bf16"),
    ):
        with pytest.raises(ValueError, match=words):
            native.shrink(*wrong)


def test_a_workspace_is_not_needed_from_python_and_grows_with_the_call():
    for size in (10, 3000, 20):
        W, A = torch.zeros(8, size), torch.ones(4, size)
        native.merge_(W, A, torch.ones(4, 8), torch.ones(4))
        assert torch.equal(W, torch.full((8, size), 4.0))


def test_auto_takes_native_on_a_cpu_and_says_so():
    W = torch.zeros(6, 10)
    module, why = backends.resolve("auto", "merge_many_", W)
    assert module is native
    assert re.match(r"native \(auto", why)
    t = {name: torch.from_numpy(array) for name, array in arrays().items()}
    api.stacked_merge_many_([MergeItem(W, t["A_PK"], t["B_PN"], t["coef_P"])], backend="native")
    assert close(W.numpy(), product(arrays()), torch.float32)


class OnCuda:
    """An array that says it lies on the first GPU, with DLPack's structs written by hand; its memory is NumPy's."""

    def __init__(self, array: np.ndarray):
        self.array, self.asked = array, {}
        self.shape, self.strides = ((ctypes.c_int64 * array.ndim)(*axes) for axes in (array.shape, self._steps()))

    def _steps(self) -> list[int]:
        return [step // self.array.itemsize for step in self.array.strides]

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **options: Any) -> Any:
        self.asked = options
        bits = 8 * self.array.itemsize
        # DLManagedTensor: data, device (2), axes, dtype (code, bits, lanes), shape, strides, offset, context, deleter.
        words = (self.array.ctypes.data, 2, self.array.ndim | (2 | bits << 8 | 1 << 16) << 32)
        self.managed = (ctypes.c_uint64 * 8)(*words, *map(ctypes.addressof, (self.shape, self.strides)), 0, 0, 0)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.managed), b"dltensor", None)


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the array is not really there")


@needs_no_gpu
def test_cuda_arrays_reach_the_cuda_kernels_on_the_stream_of_their_framework(monkeypatch):
    """As far as they can get where there is no GPU: the library says that it has none, and nothing is written."""
    a = arrays()
    on_cuda = {name: OnCuda(array) for name, array in a.items()}
    before = a["weight_NK"].copy()
    monkeypatch.setattr(native, "_stream_of", lambda array: 7 if array is on_cuda["weight_NK"] else 99)
    with pytest.raises(RuntimeError, match=r"built without CUDA|no GPU can be used here"):
        native.merge_(**on_cuda)
    assert np.array_equal(a["weight_NK"], before)
    assert all(array.asked["stream"] == 7 for array in on_cuda.values())


@needs_no_gpu
def test_arrays_on_two_devices_are_refused():
    a = arrays()
    for name in ("A_PK", "B_PN", "coef_P"):
        before = a["weight_NK"].copy()
        with pytest.raises(
            ValueError, match=f"^{name.rpartition('_')[0]} must be on the device of weight; move it there"
        ):
            native.merge_(**{**a, name: OnCuda(a[name])})
        assert np.array_equal(a["weight_NK"], before)


@needs_no_gpu
def test_ops_whose_tables_lie_on_the_host_refuse_cuda_arrays_by_name():
    tokens, ranks = Segments.from_lengths([5]), Segments.from_lengths([3])
    x, A, out, B, y = (OnCuda(np.zeros(size, np.float32)) for size in ((5, 10), (3, 10), 15, (3, 6), (5, 6)))
    words = "must be on the CPU: from Python, {} runs there only; .* backend='triton'"
    with pytest.raises(ValueError, match="x_MK " + words.format("shrink")):
        native.shrink(x, A, tokens, ranks, out=out)
    with pytest.raises(ValueError, match="y_MN " + words.format("expand")):
        native.expand_(y, out, B, tokens, ranks)
    flat = [OnCuda(np.zeros(4, np.float32)) for _ in range(4)]
    with pytest.raises(ValueError, match="param " + words.format("adamw")):
        native.cohort_adamw_(*flat, [slice(0, 4)], OnCuda(np.zeros((1, 7))), [0])


@pytest.mark.parametrize("other", ["A_PK", "B_PN", "coef_P"])
def test_tensors_on_two_devices_are_refused(other):
    t = {name: torch.from_numpy(array) for name, array in arrays().items()}
    before = t["weight_NK"].clone()
    with pytest.raises(ValueError, match=f"^{other.rpartition('_')[0]} must be on {WHERE}, got meta"):
        native.merge_(**{**t, other: t[other].to("meta")})
    assert torch.equal(t["weight_NK"], before)
