"""The Triton backend without a GPU: its kernels under the interpreter, and when it is to be had.

The interpreter has to be chosen before a kernel is defined, so each group of tests runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flora_core.ops import api, backends
from flora_core.testing import LINEAR_SHAPES, make_linear, run_linear

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")
# The interpreter takes milliseconds a program: make test runs all of it in bfloat16 and one shape in the others,
# make test-all everything. A sum in float64 takes one interpreted step per rank.
FEW_LORA = "(not fp32 and not fp16 or M37) and not inf"
FEW_MERGES = "triton and (integers_are_exact and contiguous or many_is_one or repeats_by_seed or draws_anew)"
FEW = f"{FEW_MERGES} or triton and (powers_of_two or without_an_owner or step_0 or on_the_others)"


def interpreted(*words: str, first: str = "") -> str:
    """Run something under the interpreter, with a folder of packages that goes first; what it says."""
    path = os.pathsep.join([first, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def interpreted_tests(scale, few: str, everything: str, *files: str) -> None:
    """Run tests under the interpreter: some of them, or at full size everything."""
    full = scale(0, 1, "runs of every interpreted test")
    size, chosen = ("full", everything) if full else ("1", few)
    words = ("-p", "no:cacheprovider", "-p", "tests.support.triton.interpreter", f"--scale={size}", "-k", chosen)
    told = interpreted("-m", "pytest", "-q", *words, *files)
    assert " passed" in told


def test_lora_ops_under_the_interpreter(scale):
    interpreted_tests(scale, FEW_LORA, "test", "tests/support/triton/ops.py")


def test_merge_and_adamw_under_the_interpreter(scale):
    interpreted_tests(scale, FEW, "triton", "tests/ops/test_stacked_merge.py", "tests/ops/test_cohort_adamw.py")


def test_another_version_of_triton_gives_the_same_bits(scale):
    other = os.environ.get("FLORA_OTHER_TRITON")
    if not other:
        pytest.skip(
            "FLORA_OTHER_TRITON names no folder with another Triton: "
            "pip install --target FOLDER triton==3.6.0 'numpy<2.4' (3.6.0's interpreter fails with a newer NumPy)"
        )
    few = [] if scale(0, 1, "digests of every op") else ["--few"]
    mine, theirs = (
        json.loads(interpreted("-m", "tests.support.triton.digest", *few, first=path)) for path in ("", other)
    )
    assert mine["versions"]["triton"] != theirs["versions"]["triton"], f"{other} holds this very version"
    assert mine["digests"], "nothing was compared"
    assert mine["digests"] == theirs["digests"]


def test_the_interpreter_s_bf16_is_right():
    """Casts round to nearest even, products are those of float32, and arithmetic is refused."""
    code = """
import torch, triton, triton.language as tl
import tests.support.triton.interpreter

@triton.jit
def round_trip(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))

@triton.jit
def product(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(x + at)))

@triton.jit
def double(x, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(x + i, tl.load(x + i) + tl.load(x + i))

bits = torch.randint(-2**31, 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
ties = (bits & ~0xFFFF) | 0x8000
for x in (bits.view(torch.float32), ties.view(torch.float32)):
    y = torch.empty(4096, dtype=torch.bfloat16)
    round_trip[(1,)](x, y, 4096)
    assert torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
x, y = torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
product[(1,)](x, y, 16)
assert (y - x.float() @ x.float()).abs().max() < 1e-5
try:
    double[(1,)](x, 16)
except Exception as error:
    assert "widen to float32" in str(error)
else:
    raise AssertionError("bf16 arithmetic was not refused")
"""
    # The interpreter reads a kernel's source, so it must be in a file.
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "bf16.py"
        script.write_text(code)
        interpreted(str(script))


def test_auto_never_takes_the_interpreter_and_names_what_does_not_fit():
    told = interpreted(
        "-c",
        "import torch; from flora_core import backends\n"
        "print(backends.resolve('auto', 'shrink')[0].__name__)\n"
        "print(backends.resolve('triton', 'shrink', torch.zeros(1))[0].__name__)\n"
        "try: backends.resolve('triton', 'shrink', torch.zeros(1).double())\n"
        "except ValueError as error: print(error)",
    ).splitlines()
    assert told[0] != "flora_kernels.triton"
    assert told[1] == "flora_kernels.triton"
    assert told[2].endswith("takes float32, bfloat16, float16 in shrink, got float64; use backend='reference'")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backends.availability.cache_clear()
    yield
    backends.availability.cache_clear()


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_reason_is_told():
    assert backends.availability()["triton"] == "no GPU here and TRITON_INTERPRET is not set"
    inputs = make_linear(LINEAR_SHAPES[1])
    with pytest.raises(ValueError, match=r"'triton' is not to be had here \(no GPU here.*available: reference"):
        run_linear(inputs, "triton")


@pytest.mark.parametrize(("capability", "hip"), [((7, 5), None), ((8, 0), None), ((9, 4), "6"), ((7, 0), "6")])
def test_a_gpu_that_is_too_old_is_refused_by_name(capability, hip, no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    if capability >= (8, 0) or hip:
        assert backends.availability()["triton"] is None
        return
    assert "Tesla T4 has 7.5" in backends.resolve("auto", "shrink")[1]
    words = "'triton' is not to be had here .*capability 8.0 or later, Tesla T4 has 7.5; use backend='reference'"
    with pytest.raises(ValueError, match=words):
        run_linear(make_linear(LINEAR_SHAPES[1]), "triton")


def test_with_a_gpu_tensors_on_the_cpu_are_refused_or_go_to_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "availability", lambda: {"reference": None, "triton": None})
    assert backends.resolve("auto", "shrink", torch.zeros(1))[1] == "reference (auto)"
    with pytest.raises(ValueError, match=r"runs on a GPU, the tensors are on cpu; move them with .to\('cuda'\)"):
        backends.resolve("triton", "shrink", torch.zeros(1))


def test_every_op_has_the_reference_s_name_and_arguments():
    import inspect

    from flora_kernels import reference, triton

    lora = ("shrink", "shrink_many", "expand_", "expand_many_", "wgrad", "linear", "linear_lora", "place_")
    for name in (*lora, "merge_", "merge_many_", "cohort_adamw_"):
        assert inspect.signature(getattr(triton, name)) == inspect.signature(getattr(reference, name)), name
    assert triton.Dropout is reference.Dropout
    assert set(triton.DTYPES) <= set(triton.__all__)
    assert api.HYPER_COLUMNS.index("clip_scale") + 1 == triton.adamw._COLUMNS


def test_a_tile_measured_here_goes_first_and_the_reason_is_told(monkeypatch):
    from flora_kernels.triton import common, tiles

    both = (torch.bfloat16, torch.float16)
    table = [
        common.Tile(both, {"BLOCK_M": 16}, measured_on="another GPU"),
        common.Tile(both, {"BLOCK_M": 64}),
        common.Tile((torch.bfloat16,), {"BLOCK_M": 32}, measured_on="this GPU"),
    ]
    monkeypatch.setattr(common, "device_name", lambda: "this GPU")
    assert str(common.pick(table, torch.bfloat16)) == "32, 4 warps (measured on this GPU)"
    assert str(common.pick(table, torch.float16)) == "64, 4 warps (chosen by counts)"
    monkeypatch.setattr(common, "device_name", lambda: None)
    assert common.pick(table, torch.bfloat16).sizes == {"BLOCK_M": 64}
    assert common.pick(table[:1], torch.bfloat16).sizes == {"BLOCK_M": 16}
    assert all("chosen by counts" in told for told in tiles(torch.bfloat16, targets=3).values())


def test_addresses_are_of_64_bits():
    """A tile may step over more than 32 bits hold; a wrong address crashes the process."""
    code = """
import torch
import tests.support.triton.interpreter
from flora_core import Segments
from flora_kernels import reference, triton

def spread(rows, columns, *strides):
    reach = 1 + (rows - 1) * strides[0] + (columns - 1) * strides[1]
    numbers = torch.randint(-1, 2, (rows, columns))
    return torch.empty(reach, dtype=torch.half).as_strided((rows, columns), strides).copy_(numbers)

# 64 steps of the one and 16 of the other pass 2**31; memory that nobody touches costs nothing.
x, A, W = (spread(rows, 130, 1, 2**25 + 8) for rows in (2, 3, 4))
B, two, s = spread(34, 4, 2**27 + 16, 1), Segments([2]), torch.ones(68, dtype=torch.half)
for name, call in {
    "shrink": lambda k: k.shrink(x, A, two, Segments([3])),
    "expand_": lambda k: k.expand_(torch.zeros(2, 4).half(), s, B, two, Segments([34])),
    "linear_lora": lambda k: k.linear_lora(x, W, None, s, B, two, Segments([34]), [1.0]),
    "wgrad": lambda k: k.wgrad(s[:6], x, s[:6], x, two, Segments([3]), [1.0], torch.float32)[0],
}.items():
    assert torch.equal(call(triton), call(reference)), name
"""
    interpreted("-c", code)


def test_rows_that_32_bits_cannot_step_over_are_refused():
    common = pytest.importorskip("flora_kernels.triton.common")
    wide = torch.empty(1, 2**25, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"shape \(1, 33554432\) has rows too wide .* 33,554,432 columns; use"):
        common.near(wide)
    far = wide[0, : 2**25].as_strided((2, 3), (1, 2**24 - 1))
    assert common.near(far) is far
    tall = torch.empty(2**25, 1, dtype=torch.int8).T.expand(2, 2**25)[:, :1]
    assert common.near(tall) is tall
