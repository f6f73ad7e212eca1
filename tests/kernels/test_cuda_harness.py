"""The harness that executes CUDA code on the host: the instructions it emulates, and the faults that it catches.

The instructions are held against formulas written anew from the PTX manual, the faults are planted: every barrier and
every wait of every kernel left out in turn, fragments swapped, and lines of the kernels' source changed.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flora_core import Segments, testing
from flora_core.testing import LinearCase, MergeCase, make_linear, make_merge
from flora_kernels import reference
from tests.support.cuda.emulated import ROOT, EmulationError, Library, build_emulated, fresh_emulated, host_compiler
from tests.support.cuda.probes import PROBES, expected, words_for

BF16 = torch.bfloat16
# More steps than every pipeline has stages, the last in the first slot; ragged edges; clients for two rounds of search.
CASE = LinearCase("", (70, 5, 40) + (0, 1) * 17, 264, 140, (20, 3, 37) + (1, 2) * 17, BF16)
DROPOUT = reference.Dropout([6000, 0, 20000] + [9000] * 34, list(range(37)), [4 * c for c in range(37)])


@pytest.fixture
def library() -> Library:
    if host_compiler() is None:
        pytest.skip("needs g++ or clang++ to build the kernels for the host")
    return fresh_emulated()


@pytest.mark.parametrize("probe", PROBES)
def test_an_instruction_does_what_its_manual_says(probe, library):
    words = words_for(probe)
    right = expected(probe, words)
    assert torch.equal(library.probe(PROBES[probe], words, right.numel()), right)


def merge(library: Library) -> float:
    one = make_merge(MergeCase("", 131, 264, (100, 33), BF16))
    out = one.weight.clone()
    library.merge_(out, one.A, one.B, one.coef)
    return testing.budget_ratio(out, testing.oracle_merge(one), testing.oracle_merge(one, BF16))


def merge_masters(library: Library) -> float:
    one = make_merge(MergeCase("", 131, 264, (40, 33)))
    out = one.weight.clone()
    library.merge_(out, one.A.to(BF16), one.B.to(BF16), one.coef)
    one = replace(one, A=one.A.to(BF16), B=one.B.to(BF16))
    return testing.budget_ratio(out, testing.oracle_merge(one), testing.oracle_merge(one, torch.float32))


def merge_nine_bits(library: Library) -> float:
    """301 has a bit more than one bf16 piece holds; a 16-bit weight's budget would hide the loss."""
    weight = torch.zeros(16, 16, dtype=torch.float16)
    library.merge_(weight, torch.full((1, 16), 5.0), torch.full((1, 16), 301.0), torch.ones(1))
    return 0.0 if weight.eq(1505).all() else float("inf")


def shrink(library: Library) -> float:
    inputs = make_linear(CASE, masters=True)
    arguments = inputs.tokens, inputs.ranks, inputs.scaling_C, DROPOUT
    out = library.shrink(inputs.x, inputs.A, *arguments)
    with testing.plain_rounding():
        low = reference.shrink(inputs.x, inputs.A, *arguments)
    ref64 = reference.shrink(inputs.x.double(), inputs.A.to(BF16).double(), *arguments)
    return testing.budget_ratio(out, ref64, low)


def expand(library: Library) -> float:
    inputs = make_linear(CASE, masters=True)
    arguments = inputs.tokens, inputs.ranks, inputs.scaling_C
    s = reference.shrink(inputs.x, inputs.A, inputs.tokens, inputs.ranks)
    out, low, ref64 = inputs.dy.clone(), inputs.dy.clone(), inputs.dy.double()
    library.expand_(out, s, inputs.B, *arguments)
    with testing.plain_rounding():
        reference.expand_(low, s, inputs.B, *arguments)
    reference.expand_(ref64, s.double(), inputs.B.to(BF16).double(), *arguments)
    return testing.budget_ratio(out, ref64, low)


def wgrad(library: Library) -> float:
    inputs = make_linear(CASE)
    arguments = inputs.tokens, inputs.ranks, inputs.scaling_C
    s = reference.shrink(inputs.x, inputs.A, inputs.tokens, inputs.ranks)
    out = library.wgrad(s, inputs.x, s, inputs.dy, *arguments, BF16, DROPOUT)
    with testing.plain_rounding():
        low = reference.wgrad(s, inputs.x, s, inputs.dy, *arguments, BF16, DROPOUT)
    s, x, dy = s.double(), inputs.x.double(), inputs.dy.double()
    ref64 = reference.wgrad(s, x, s, dy, *arguments, torch.float64, DROPOUT)
    return max(testing.budget_ratio(*three) for three in zip(out, ref64, low, strict=True))


def adamw(library: Library) -> float:
    lengths = Segments([1500, 600])
    hyper = torch.tensor([[1e-2, 0.9, 0.99, 1e-8, 0.1, 3, 1.0], [3e-2, 0.8, 0.9, 1e-6, 0.0, 1, 0.5]])
    p, g, m, v = out = [torch.full((2100,), 0.5 + i) for i in range(4)]
    low, ref64 = [tensor.clone() for tensor in out], [tensor.double() for tensor in out]
    library.cohort_adamw_(p, g, m, v, lengths, hyper, (0, 1))
    for p, g, m, v in (low, ref64):
        reference.cohort_adamw_(p, g, m, v, lengths, hyper.double(), (0, 1))
    return max(testing.budget_ratio(*three) for three in zip(out, ref64, low, strict=True))


OPS: dict[str, Callable[[Library], float]] = {
    f.__name__: f for f in (merge, merge_masters, shrink, expand, wgrad, adamw)
}
# The faults that can be planted at each kind of place.
FAULTS = {
    "barrier": ("skip",),
    "wait": ("skip", "one group early"),
    "copy": ("no zero fill",),
    "mma": ("swap",),
    "ldmatrix": ("swap", "transpose"),
    "shuffle": ("skip",),
}


def caught(library: Library, op: Callable[[Library], float]) -> str | None:
    """Evidence of a fault: a message of the harness, or a wrong result; None without any."""
    for order in (0, 1):
        library.order = order
        try:
            ratio = op(library)
        except EmulationError as error:
            return str(error)
        if not ratio <= 1:
            return f"error / budget = {ratio:.3g}"
    return None


@pytest.mark.parametrize("op", OPS)
def test_tensors_that_are_moved_to_a_device_come_back(op, library):
    """As on a GPU, with the host as the device."""
    moving = copy.copy(library)
    moving._target = torch.device("cpu")
    assert OPS[op](moving) <= 1


@pytest.mark.parametrize("op", OPS)
def test_every_fault_at_every_place_is_caught(op, library):
    assert caught(library, OPS[op]) is None
    places = library.sites()
    assert any(place.startswith("barrier") for place in places)
    missed = []
    for place in places:
        for fault in FAULTS[place.split()[0]]:
            library.fault = (fault, place)
            if caught(library, OPS[op]) is None:
                missed.append(f"{fault}: {place}")
    assert not missed, missed


# Lines of the kernels, each made wrong in one way, and the op that must notice.
MUTATIONS = {
    "last column off by one": ("merge.cuh", "smaller(BJ, entry.K - k)", "smaller(BJ, entry.K - k - 1)", merge),
    "columns past the edge": ("merge.cuh", "smaller(BJ, entry.K - k)", "smaller(BJ, entry.K - k + 8)", merge),
    "one step of the sum too few": ("merge.cuh", "(P + DEPTH - 1) / DEPTH", "P / DEPTH", merge),
    "second piece dropped": ("merge.cuh", "finite ? value - widen(piece[0]) : 0.0f", "0.0f", merge_nine_bits),
    "rows of a neighbour": ("shrink.cuh", "smaller(BM, place.stop - place.row)", "smaller(BM, 115)", shrink),
    "mask one row off": ("clients.cuh", "first_row + uint32_t(row),", "first_row + uint32_t(row) + 1,", shrink),
    "rank past its end": ("expand.cuh", "s_unit, rows, rank - r)", "s_unit, rows, rank - r + 1)", expand),
    "too little shared memory": ("backend.cu", "sizeof(ExpandMemory<T, F>)", "sizeof(ExpandMemory<T, F>) - 64", expand),
    "scale on the wrong side": ("wgrad.cuh", "Sum(0) : side.scaled ?", "Sum(0) : !side.scaled ?", wgrad),
    "store past the edge": ("tile.cuh", "if (e < real) st_global(", "st_global(", expand),
    "unaligned 16-byte copy": ("tile.cuh", "if (unit == 16) {", "if (unit) {", wgrad),
    "barrier for half the block": (
        "merge.cuh",
        "sync_threads();",
        "if (thread_id() < 64) sync_threads();",
        merge,
    ),
    "settings of the wrong row": ("adamw.cuh", "args.owner + segment", "args.owner", adamw),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_line_is_caught(name, scale, tmp_path):
    few = scale(1, len(MUTATIONS), "changed lines, each of which is compiled")
    if list(MUTATIONS).index(name) >= few:
        pytest.skip("compiled at full scale")
    file, right, wrong, op = MUTATIONS[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / file
    assert path.read_text().count(right) == 1, f"{file} has changed: {right}"
    path.write_text(path.read_text().replace(right, wrong))
    changed = Library(build_emulated(tmp_path, tmp_path / "csrc"))
    assert caught(changed, op) is not None
