"""Every error of the ops, segments, bank and backends says what to do, and leaves what it was given as it was.

Letters: M packed tokens, K in_features, N out_features, P sum of ranks, C clients, H hyper-parameters.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flora_core
from flora_core import AdapterBank, AdapterConfig, LoraWeights, MergeItem, Segments
from flora_core.common import checks
from flora_core.ops import backends
from flora_core.ops.api import dropout_threshold

META = torch.device("meta")


def zeros(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **options)


def linear_arguments() -> dict[str, Any]:
    """A right call: M=5, K=4, N=3, ranks 2 and 1."""
    return dict(
        x_MK=zeros(5, 4),
        weight_NK=zeros(3, 4),
        bias_N=zeros(3),
        A_PK=zeros(3, 4),
        B_PN=zeros(3, 3),
        tokens=Segments([2, 3]),
        ranks=Segments([2, 1]),
        scaling_C=[1.0, 2.0],
        dropout_C=[0.5, 0.0],
        dropout_seed_C=[1, 2],
        row_C=[0, 0],
    )


# Argument, wrong value, error, words that help.
WRONG_LINEAR = [
    ("x_MK", None, TypeError, "x_MK must be a torch.Tensor, got NoneType"),
    ("x_MK", zeros(5), ValueError, r"x_MK must have shape \(any, any\), got \(5,\)"),
    ("x_MK", zeros(5, 4, dtype=torch.int64), TypeError, "x_MK must be one of float32, bfloat16.*got int64"),
    ("x_MK", zeros(4, 4), ValueError, "tokens must cover the M=4 rows of x_MK, got 5 in 2 segments"),
    ("x_MK", zeros(5, 3), ValueError, r"weight_NK must have shape \(any, 3\) to match x_MK with K=3.*got \(3, 4\)"),
    ("weight_NK", [[1.0]], TypeError, "weight_NK must be a torch.Tensor, got list"),
    ("weight_NK", zeros(4), ValueError, r"weight_NK must have shape \(any, 4\).*got \(4,\)"),
    ("weight_NK", zeros(3, 4).half(), TypeError, "weight_NK must be one of float32, got float16"),
    ("weight_NK", zeros(3, 4, device=META), ValueError, r"weight_NK must be on cpu with x_MK, got meta.*\.to\(\)"),
    (
        "weight_NK",
        zeros(3, 4, requires_grad=True),
        ValueError,
        r"weight_NK must be frozen; call requires_grad_\(False\)",
    ),
    ("bias_N", zeros(4), ValueError, r"bias_N must have shape \(3\), got \(4,\)"),
    ("bias_N", zeros(3).double(), TypeError, "bias_N must be one of float32, got float64"),
    ("bias_N", zeros(3, device=META), ValueError, "bias_N must be on cpu with x_MK, got meta"),
    ("bias_N", zeros(3, requires_grad=True), ValueError, r"bias_N must be frozen; call requires_grad_\(False\)"),
    ("A_PK", zeros(3, 5), ValueError, r"A_PK must have shape \(3, 4\) for ranks that sum to P=3, got \(3, 5\)"),
    ("A_PK", zeros(2, 4), ValueError, r"A_PK must have shape \(3, 4\) for ranks that sum to P=3, got \(2, 4\)"),
    ("A_PK", zeros(3, 4).bfloat16(), TypeError, "A_PK must be one of float32, got bfloat16"),
    ("A_PK", zeros(3, 4, device=META), ValueError, "A_PK must be on cpu with x_MK, got meta"),
    ("B_PN", zeros(4, 3), ValueError, r"B_PN must have shape \(3, 3\) for ranks that sum to P=3, got \(4, 3\)"),
    ("B_PN", zeros(3, 3).double(), TypeError, "B_PN must be one of float32, got float64"),
    ("B_PN", zeros(3, 3, device=META), ValueError, "B_PN must be on cpu with x_MK, got meta"),
    ("ranks", Segments([3]), ValueError, "ranks and scaling_C must have one entry for each of the 2.*got 1 and 2"),
    ("ranks", Segments([2, 2]), ValueError, r"A_PK must have shape \(4, 4\) for ranks that sum to P=4"),
    ("scaling_C", [1.0], ValueError, "ranks and scaling_C must have one entry for each of the 2 segments.*got 2 and 1"),
    ("tokens", Segments([5]), ValueError, "one entry for each of the 1 segments of tokens, got 2 and 2"),
    ("dropout_C", [0.5], ValueError, "dropout_C must have 2 entries, one per client, got 1"),
    ("dropout_C", [0.5, 1.0], ValueError, "dropout must be at least 0 and below 1 .*got 1.0"),
    ("dropout_C", [-0.1, 0.0], ValueError, "dropout must be at least 0 .*got -0.1"),
    ("dropout_C", [float("nan"), 0.0], ValueError, "dropout must be at least 0 .*got nan"),
    ("dropout_seed_C", None, ValueError, "dropout_seed_C must be given where dropout_C is above 0"),
    ("dropout_seed_C", [1], ValueError, "dropout_seed_C must have 2 entries, one per client, got 1"),
    ("row_C", [0], ValueError, "row_C must have 2 entries, one per client, got 1"),
    ("row_C", [-1, 0], ValueError, "row_C must lie from 0 to 2147483647, got -1 to 0"),
    ("row_C", [0, 2**31], ValueError, "row_C must lie from 0 to 2147483647, got 0 to 2147483648"),
    ("dropout_seed_C", [1.5, 2], TypeError, r"dropout_seed_C must hold whole numbers, got \[1.5, 2\]"),
    ("dropout_seed_C", ["1", "2"], TypeError, "dropout_seed_C must hold whole numbers"),
    ("dropout_seed_C", torch.tensor([1.0, 2.0]), TypeError, "dropout_seed_C must hold whole numbers, got tensor"),
    ("dropout_seed_C", [1, 2**63], ValueError, "dropout_seed_C must lie from -9223372036854775808 to"),
    ("dropout_seed_C", 7, TypeError, "dropout_seed_C must hold one number per client, got int"),
    ("dropout_C", 0.5, TypeError, "dropout_C must hold one number per client, got float"),
    ("scaling_C", None, TypeError, "scaling_C must hold one number per client, got NoneType"),
    ("tokens", [2, 3], TypeError, r"tokens must be Segments, got list; make them by Segments.from_lengths"),
    ("ranks", (2, 1), TypeError, r"ranks must be Segments, got tuple; make them by Segments.from_lengths"),
    ("backend", "cuda", ValueError, "backend must be one of auto, reference, triton, native, got 'cuda'"),
]


def call_id(value: Any) -> str | None:
    return value if isinstance(value, str) and len(value) < 20 else None


@pytest.mark.parametrize(("name", "value", "error", "words"), WRONG_LINEAR, ids=call_id)
def test_lora_linear_says_what_is_wrong(name, value, error, words):
    arguments = linear_arguments()
    flora_core.lora_linear(**arguments)
    with pytest.raises(error, match=words):
        flora_core.lora_linear(**{**arguments, name: value})


def test_a_threshold_that_keeps_nothing_is_refused():
    assert dropout_threshold(1 - 2**-16) == 65535
    with pytest.raises(ValueError, match=r"below 1 - 2\*\*-17, got 0.99999999"):
        dropout_threshold(0.99999999)


def test_lora_linears_names_the_target():
    good = LoraWeights(zeros(3, 4), None, zeros(3, 4), zeros(3, 3), Segments([2, 1]), [1.0, 2.0])
    wrong = LoraWeights(zeros(3, 4), None, zeros(3, 4), zeros(3, 2), Segments([2, 1]), [1.0, 2.0])
    tokens = Segments([2, 3])
    with pytest.raises(ValueError, match=r"targets\[1\]\.B_PN must have shape \(3, 3\)"):
        flora_core.lora_linears(zeros(5, 4), [good, wrong], tokens)
    with pytest.raises(ValueError, match="targets must hold at least one LoraWeights, got none"):
        flora_core.lora_linears(zeros(5, 4), [], tokens)
    with pytest.raises(TypeError, match=r"targets\[1\] must be a flora_core.LoraWeights, got tuple"):
        flora_core.lora_linears(zeros(5, 4), [good, (1, 2)], tokens)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="dropout_seed_C must have one row for each of 2 targets, got 1"):
        flora_core.lora_linears(zeros(5, 4), [good, good], tokens, dropout_C=[0.5, 0.5], dropout_seed_C=[[1, 2]])


def merge_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A right call: N=3, K=4, P=2."""
    return dict(
        weight_NK=torch.ones(3, 4, dtype=dtype), A_PK=torch.ones(2, 4), B_PN=torch.ones(2, 3), coef_P=torch.ones(2)
    )


LOW = dict(low_bits_NK=zeros(3, 4, dtype=torch.int16))
WRONG_MERGE = [
    (dict(weight_NK=3.0), TypeError, "weight_NK must be a torch.Tensor, got float"),
    (dict(weight_NK=zeros(3)), ValueError, r"weight_NK must have shape \(any, any\), got \(3,\)"),
    (dict(weight_NK=zeros(3, 4, dtype=torch.int8)), TypeError, "weight_NK must be one of float32.*got int8"),
    (dict(A_PK=zeros(2, 5)), ValueError, r"A_PK must have shape \(any, 4\) to match weight_NK with K=4, got \(2, 5\)"),
    (dict(A_PK=zeros(2, 4, dtype=torch.int32)), TypeError, "A_PK must be one of float32.*got int32"),
    (dict(A_PK=zeros(2, 4, device=META)), ValueError, "A_PK must be on cpu with weight_NK, got meta"),
    (dict(B_PN=zeros(1, 3)), ValueError, r"B_PN must have shape \(2, 3\) to match A_PK with P=2 .*got \(1, 3\)"),
    (dict(B_PN=zeros(3, 2)), ValueError, r"B_PN must have shape \(2, 3\).*weight_NK with N=3, got \(3, 2\)"),
    (dict(B_PN=zeros(2, 3, device=META)), ValueError, "B_PN must be on cpu with weight_NK, got meta"),
    (dict(coef_P=zeros(3)), ValueError, r"coef_P must have shape \(2\) to match A_PK with P=2, got \(3,\)"),
    (dict(coef_P=[1.0, 1.0]), TypeError, "coef_P must be a torch.Tensor, got list"),
    (dict(coef_P=zeros(2, device=META)), ValueError, "coef_P must be on cpu with weight_NK, got meta"),
    (dict(rounding="up"), ValueError, "rounding must be one of nearest, stochastic, got 'up'"),
    (dict(rounding="stocastic"), ValueError, "did you mean 'stochastic'"),
    (dict(accumulate="bfloat16"), ValueError, "accumulate must be one of float32, float64, got 'bfloat16'"),
    (dict(rounding="stochastic"), ValueError, "seed must be given for rounding='stochastic'"),
    (
        dict(rounding="stochastic", seed=0),
        ValueError,
        "is for bfloat16 weights, weight_NK is torch.float32; use 'nearest'",
    ),
    (dict(rounding="stochastic", seed="0"), TypeError, "seed must hold whole numbers"),
    (
        dict(weight_NK=torch.ones(1, 4).expand(3, 4)),
        ValueError,
        "weight_NK must have a place for each element, got strides 0 and 1",
    ),
    (dict(backend="fast"), ValueError, "backend must be one of auto, .*got 'fast'"),
    (dict(LOW), ValueError, "low_bits_NK belongs to a bfloat16 weight, got torch.float32; leave it out"),
]
BF16 = torch.ones(3, 4, dtype=torch.bfloat16)
WRONG_LOW_BITS = [
    (zeros(3, 4), "nearest", TypeError, "low_bits_NK must be one of int16, got float32"),
    (zeros(4, 3, dtype=torch.int16), "nearest", ValueError, r"low_bits_NK must have shape \(3, 4\), got \(4, 3\)"),
    (zeros(3, 4, dtype=torch.int16, device=META), "nearest", ValueError, "low_bits_NK must be on cpu with weight_NK"),
    (zeros(3, 4, dtype=torch.int16), "stochastic", ValueError, "rounding must be 'nearest' with low_bits_NK"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG_MERGE, ids=call_id)
def test_stacked_merge_says_what_is_wrong_and_changes_nothing(change, error, words):
    arguments = {**merge_arguments(), **change}
    before = copy.deepcopy(arguments)
    with pytest.raises(error, match=words):
        flora_core.stacked_merge_(**arguments)
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and value.device != META:
            assert torch.equal(arguments[name], value), name


@pytest.mark.parametrize(("low_bits", "rounding", "error", "words"), WRONG_LOW_BITS, ids=call_id)
def test_wrong_low_bits_change_nothing(low_bits, rounding, error, words):
    arguments = {**merge_arguments(torch.bfloat16), "low_bits_NK": low_bits}
    with pytest.raises(error, match=words):
        flora_core.stacked_merge_(**arguments, rounding=rounding, seed=0)
    assert torch.equal(arguments["weight_NK"], BF16)
    assert low_bits.is_meta or not low_bits.any()


def test_many_are_checked_before_the_first_is_changed():
    good, wrong = (
        MergeItem(**dict(zip(("weight", "A", "B", "coef"), merge_arguments().values(), strict=True))) for _ in "12"
    )
    wrong = MergeItem(wrong.weight, wrong.A, wrong.B[:, 1:], wrong.coef)
    with pytest.raises(ValueError, match=r"items\[1\]\.B_PN must have shape \(2, 3\)"):
        flora_core.stacked_merge_many_([good, wrong])
    with pytest.raises(TypeError, match=r"items\[1\] must be a flora_core.MergeItem, got tuple"):
        flora_core.stacked_merge_many_([good, (wrong.weight,)])  # pyright: ignore[reportArgumentType]
    assert (good.weight == 1).all()


def adamw_arguments() -> dict[str, Any]:
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    hyper_CH = torch.tensor([[0.1, 0.9, 0.999, 1e-8, 0.0, 1, 1]] * 2)
    return {**{name: torch.ones(6) for name in names}, "segments": Segments([2, 4]), "hyper_CH": hyper_CH}


WRONG_ADAMW = [
    (dict(param=zeros(2, 3)), ValueError, r"param must have shape \(any\), got \(2, 3\)"),
    (dict(param=zeros(6).bfloat16()), TypeError, "param must be one of float32, float64, got bfloat16"),
    (dict(grad=None), TypeError, "grad must be a torch.Tensor, got NoneType"),
    (dict(grad=zeros(5)), ValueError, r"grad must have shape \(6\), got \(5,\)"),
    (dict(grad=zeros(6).double()), TypeError, "grad must be one of float32, got float64"),
    (dict(grad=zeros(6, device=META)), ValueError, "grad must be on cpu with param, got meta"),
    (dict(exp_avg=zeros(7)), ValueError, r"exp_avg must have shape \(6\), got \(7,\)"),
    (dict(exp_avg_sq=zeros(6).half()), TypeError, "exp_avg_sq must be one of float32, got float16"),
    (dict(grad=zeros(12)[::2]), ValueError, r"grad must be contiguous, got stride 2; pass grad.contiguous\(\)"),
    (dict(exp_avg=zeros(12)[::2]), ValueError, "exp_avg must be contiguous, got stride 2; pass a contiguous copy"),
    (dict(segments=[2, 4]), TypeError, "segments must be Segments, got list"),
    (dict(segments=Segments([2, 3])), ValueError, "segments must cover the 6 elements of param, got 5"),
    (dict(owner=[0]), ValueError, "owner must name a row for each of 2 ranges, got 1"),
    (dict(owner=[0, 2]), ValueError, r"hyper_CH must have a row for each client, got 2 rows and clients \[0, 2\]"),
    (dict(owner=[0, -1]), ValueError, r"hyper_CH must have a row for each client, got 2 rows and clients \[-1, 0\]"),
    (dict(hyper_CH=zeros(2, 6)), ValueError, r"hyper_CH must have shape \(any, 7\), got \(2, 6\)"),
    (
        dict(hyper_CH=zeros(1, 7)),
        ValueError,
        r"hyper_CH must have a row for each client, got 1 rows and clients \[0, 1\]",
    ),
    (dict(hyper_CH=[[0.1] * 7]), TypeError, "hyper_CH must be a torch.Tensor, got list"),
    (dict(backend="nativ"), ValueError, "backend must be one of auto, .*got 'nativ'"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG_ADAMW, ids=call_id)
def test_cohort_adamw_says_what_is_wrong_and_changes_nothing(change, error, words):
    arguments = {**adamw_arguments(), **change}
    before = copy.deepcopy(arguments)
    with pytest.raises(error, match=words):
        flora_core.cohort_adamw_(**arguments)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(arguments[name], before[name])


WRONG_CONFIG = [
    (dict(rank=-1), ValueError, "rank must be at least 0, got -1"),
    (dict(rank=2.0), TypeError, "rank must be a whole number, got 2.0"),
    (dict(rank=True), TypeError, "rank must be a whole number, got True"),
    (dict(alpha="16"), TypeError, "alpha must be a number, got '16'"),
    (dict(alpha=-1), ValueError, "alpha must be at least 0, got -1"),
    (dict(alpha=float("nan")), ValueError, "alpha must be at least 0, got nan"),
    (dict(alpha=float("inf")), ValueError, "alpha must be at least 0, got inf"),
    (dict(dropout=1.0), ValueError, "dropout must be below 1, got 1.0"),
    (dict(dropout=-0.5), ValueError, "dropout must be at least 0, got -0.5"),
    (dict(rank_pattern={"q": -2}), ValueError, r"rank_pattern\['q'\] must be at least 0, got -2"),
    (dict(rank_pattern={"q": 1.5}), TypeError, r"rank_pattern\['q'\] must be a whole number, got 1.5"),
    (dict(alpha_pattern={"q": None}), TypeError, r"alpha_pattern\['q'\] must be a number, got None"),
    (dict(rank_pattern=["q"]), TypeError, r"rank_pattern must map patterns of module paths to numbers, got \['q'\]"),
    (dict(rank_pattern={"(q": 2}), ValueError, r"rank_pattern: '\(q' is not a regular expression"),
    (
        dict(target_modules="*.q"),
        ValueError,
        r"target_modules: '\*.q' is not a regular expression .* write \.\* for any",
    ),
    (dict(target_modules=3), TypeError, "target_modules must be a list of names, a regex or 'all-linear', got 3"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG_CONFIG, ids=call_id)
def test_adapter_config_says_what_is_wrong(change, error, words):
    with pytest.raises(error, match=words):
        AdapterConfig(**{"rank": 4, **change})


WRONG_BANK = [
    (dict(ranks={"q": [5, 1]}), r"client 'a': the rank in q must be between 0 and min\(N, K\) = 4, got 5"),
    (dict(ranks={"q": [1, -1]}), "client 'b': the rank in q must be between 0 and .*got -1"),
    (dict(ranks={"q": [1]}), "q must have a rank and a scale for each of the 2 clients, got 1 and 2"),
    (dict(scaling={"q": [1.0] * 3}), "q must have a rank and a scale for each of the 2 clients, got 2 and 3"),
    (dict(names=["a", "a"]), "clients must have different names, got a, a"),
    (dict(scaling={}), "scaling must have an entry for each module of shapes, got none for q"),
]


@pytest.mark.parametrize(("change", "words"), WRONG_BANK, ids=call_id)
def test_bank_says_what_is_wrong(change, words):
    good = dict(names=["a", "b"], ranks={"q": [1, 2]}, scaling={"q": [1.0, 1.0]}, shapes={"q": (6, 4)})
    bank = AdapterBank(**good)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=words):
        AdapterBank(**{**good, **change})  # pyright: ignore[reportArgumentType]
    for call in (
        bank.index,
        bank.adapters,
        bank.scaling,
        lambda name: bank.reset(name, 0),
        lambda name: bank.subset([name]),
    ):
        with pytest.raises(ValueError, match="client must be one of a, b, got 'c'"):
            call("c")


@pytest.fixture
def other_backends(monkeypatch, tmp_path):
    """Three backends: one that runs, one whose library is missing, one that says why it does not run."""
    (tmp_path / "fake_here.py").write_text("def shrink(): ...\n")
    (tmp_path / "fake_needy.py").write_text("import no_such_library\n")
    (tmp_path / "fake_broken.py").write_text("raise ImportError('built without CUDA; set FLORA_CUDA=1')\n")
    monkeypatch.syspath_prepend(tmp_path)
    modules = {"reference": "fake_here", "triton": "fake_needy", "native": "fake_broken", "later": "fake_later"}
    monkeypatch.setattr(backends, "_MODULES", modules)
    backends.availability.cache_clear()
    yield
    backends.availability.cache_clear()


@pytest.mark.usefixtures("other_backends")
def test_backends_say_why_they_do_not_run():
    assert backends.availability() == {
        "reference": None,
        "triton": "needs no_such_library: pip install it",
        "native": "built without CUDA; set FLORA_CUDA=1",
        "later": "not part of this version (fake_later)",
    }
    module, why = backends.resolve("auto", "shrink")
    assert module.__name__ == "fake_here"
    assert why.startswith("reference (auto; triton: needs no_such_library")
    assert backends.resolve("reference", "shrink")[1] == "reference (named)"


@pytest.mark.usefixtures("other_backends")
@pytest.mark.parametrize(
    ("backend", "op", "words"),
    [
        ("triton", "shrink", "backend='triton' .*needs no_such_library: pip install it.*available: reference"),
        ("native", "shrink", "backend='native' .*built without CUDA; set FLORA_CUDA=1.*available: reference"),
        ("later", "shrink", "not part of this version"),
        ("Triton", "shrink", "backend must be one of auto, reference, triton, native, later, got 'Triton'"),
        ("reference", "expand_", "backend='reference' has no expand_; use backend='auto' or 'reference'"),
        ("auto", "expand_", "no backend has expand_ here; available: reference"),
    ],
)
def test_a_named_backend_runs_or_raises(backend, op, words):
    with pytest.raises(ValueError, match=words):
        backends.resolve(backend, op)


def test_backends_skip_what_lacks_the_op(monkeypatch):
    """auto goes on to the next backend; a named one does not fall back."""
    half = SimpleNamespace(merge_=None)
    monkeypatch.setattr(backends, "availability", lambda: {"reference": None, "native": None})
    real = backends.importlib.import_module
    monkeypatch.setattr(
        backends.importlib, "import_module", lambda name: half if name == "flora_kernels.native" else real(name)
    )
    assert backends.resolve("auto", "merge_")[0] is half
    assert backends.resolve("auto", "shrink")[1] == "reference (auto)"
    with pytest.raises(ValueError, match="backend='native' has no shrink"):
        backends.resolve("native", "shrink")


def test_a_misspelt_word_is_told_the_nearest_or_all():
    assert checks.nearest("q_prj", ["q_proj", "v_proj"]) == "did you mean 'q_proj'?"
    assert checks.nearest("x", ["b", "a"]) == "known: a, b"
    assert checks.nearest("x", []) == "known: none"


@pytest.mark.parametrize(
    ("value", "limits", "error", "words"),
    [
        (1.5, (0, 1), ValueError, "p must be between 0 and 1, got 1.5"),
        (float("nan"), (0, 1), ValueError, "p must be between 0 and 1, got nan"),
        (float("inf"), (0,), ValueError, "p must be at least 0, got inf"),
        ("1", (0,), TypeError, "p must be a number, got '1'"),
    ],
)
def test_numbers_are_finite_and_within_their_bounds(value, limits, error, words):
    with pytest.raises(error, match=words):
        checks.check_number("p", value, *limits)


def test_an_unknown_public_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"has no attribute 'atach'; it has: .*attach"):
        flora_core.atach  # noqa: B018  # pyright: ignore
