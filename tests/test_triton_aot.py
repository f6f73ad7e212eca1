"""The Triton kernels compiled ahead of time: matrix instructions, registers, spills, shared memory, no float atomics.

Every launcher is called on tensors without data, its launch is kept instead of run, and what it would have compiled is
compiled for each target: so nothing is checked that cannot be chosen, and nothing that can be chosen is left out.
``python tests/test_triton_aot.py`` writes the tables of docs/kernels.md.
Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

# The compiler asks that this be said; it is the default of every version that we run on.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from flora_core import Segments  # noqa: E402
from flora_kernels import triton as kernels  # noqa: E402
from flora_kernels.triton import counts  # noqa: E402
from flora_kernels.triton.common import Tile  # noqa: E402

ROWS, RANKS = (820,) * 2 + (819,) * 8, (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
LOW_RANKS = (16, 8, 4, 1)
M, K, N = sum(ROWS), 4096, 4096
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTER = {
    **{dtype: name for name, dtype in DTYPES.items()},
    torch.float64: "fp64",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Target:
    """A GPU, its matrix instruction, and the shared memory that one block may take."""

    name: str
    gpu: Any
    matrix: str
    shared_bytes: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), r"\bHMMA\.", 166912),
        Target("sm_90", GPUTarget("cuda", 90, 32), r"\bHGMMA\.", 232448),
        Target("sm_100", GPUTarget("cuda", 100, 32), r"\bUTC\w*MMA\b", 232448),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), r"\bv_mfma_", 65536),
    )
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def lora(
    op: str,
    dtype: torch.dtype,
    ranks: tuple[int, ...] = RANKS,
    dropout: bool = False,
    factor: torch.dtype = torch.float32,
    K: int = K,
    N: int = N,
    rows: tuple[int, ...] = ROWS,
    targets: int = 3,
) -> None:
    """Call one of the LoRA launchers."""
    rows = rows[: len(ranks)]
    tokens, bank, scaling = Segments(rows), Segments(ranks), [2.0] * len(ranks)
    draws = kernels.Dropout([6554] * len(ranks), [1] * len(ranks), [0] * len(ranks)) if dropout else None
    x, dy, s = empty(sum(rows), K, dtype=dtype), empty(sum(rows), N, dtype=dtype), empty(1, dtype=dtype)
    A, B = (empty(sum(ranks), size, dtype=factor) for size in (K, N))
    weight, bias = empty(N, K, dtype=dtype), empty(N, dtype=dtype)
    if op == "shrink":
        kernels.shrink(x, A, tokens, bank, None if dropout else scaling, draws)
    elif op == "shrink_many":
        kernels.shrink_many(x, [A] * targets, tokens, [bank] * targets, [None] * targets, [draws] * targets)
    elif op == "expand_":
        kernels.expand_(dy, s, B, tokens, bank, None if dropout else scaling, draws)
    elif op == "expand_many_":
        many: list[list[Any]] = [[value] * targets for value in (s, B, bank, None, draws)]
        kernels.expand_many_(dy, many[0], many[1], tokens, *many[2:])
    elif op == "wgrad":
        kernels.wgrad(s, x, s, dy, tokens, bank, scaling, factor, draws)
    elif op == "place_":
        kernels.place_(empty(sum(rows), K % 256 + 192, dtype=dtype), s, tokens, bank, scaling)
    elif op == "dx":
        kernels.linear_lora(dy, weight.T, None, s, A, tokens, bank, scaling)
    elif op == "linear":
        kernels.linear(x, weight, bias)
    else:
        kernels.linear_lora(x, weight, bias, s, B, tokens, bank, scaling)


def merge(dtype: torch.dtype, factor: torch.dtype = torch.float32, K: int = K, N: int = N, **options: Any) -> None:
    A, B = (empty(sum(RANKS), size, dtype=factor) for size in (K, N))
    low_bits = empty(N, K, dtype=torch.int16) if options.pop("low_bits", False) else None
    kernels.merge_(empty(N, K, dtype=dtype), A, B, empty(sum(RANKS)), low_bits_NK=low_bits, **options)


def adamw(dtype: torch.dtype) -> None:
    buffer = empty(4096, dtype=dtype)
    hyper_CH = empty(2, 7, dtype=torch.float64)
    kernels.cohort_adamw_(buffer, buffer, buffer, buffer, Segments([1000, 3096]), hyper_CH, [0, 1])


def split_wgrad() -> None:
    """One client long enough to be cut into chunks."""
    tokens, bank, s = Segments([M]), Segments([16]), empty(1, dtype=torch.bfloat16)
    x, dy = empty(M, K, dtype=torch.bfloat16), empty(M, N, dtype=torch.bfloat16)
    kernels.wgrad(s, x, s, dy, tokens, bank, [2.0], torch.float32)


# Sizes and addresses that no vector width divides; a crowd; more targets that share X than a model has.
ODD: dict[str, Any] = dict(K=4093, N=4091)
CROWD: dict[str, Any] = dict(ranks=(8,) * 256, rows=(32,) * 256)
DROPS = ("shrink", "shrink_many", "expand_", "expand_many_", "wgrad")
LORA = (*DROPS, "linear_lora")

# Name -> what calls the launcher. Products in 16 bits must use the matrix instructions of their target.
CONFIGURATIONS: dict[str, Callable[[], None]] = {}


def configure(name: str, op: str, dtype: str, **options: Any) -> None:
    run = merge if op == "merge" else lambda d, **rest: lora(op.partition("-")[2] or op, d, **rest)
    CONFIGURATIONS[name] = lambda: run(DTYPES[dtype], **options)


for _name in DTYPES:
    for _op in DROPS:
        for _dropout, _suffix in ((False, ""), (True, "-dropout")):
            configure(f"{_op}-{_name}{_suffix}", _op, _name, dropout=_dropout)
            # A narrower tile of ranks is another matrix instruction; in float32 it is less of the same.
            if _name == "bf16" and not _op.startswith("expand"):
                configure(f"{_op}-{_name}{_suffix}-low-ranks", _op, _name, dropout=_dropout, ranks=LOW_RANKS)
    for _op in ("linear", "linear_lora", "linear_lora-dx", "place_", "merge"):
        configure(f"{_op}-{_name}", _op, _name)
    configure(f"merge-{_name}-fp64-sum", "merge", _name, accumulate=torch.float64)
for _name in DTYPES:
    for _op in (*LORA, "linear", "merge"):
        configure(f"{_op}-{_name}-unaligned", _op, _name, **ODD, **(dict(dropout=True) if _op in DROPS else {}))
    for _op in ("shrink_many", "expand_many_"):
        configure(f"{_op}-{_name}-five", _op, _name, dropout=True, targets=5)
for _name in ("bf16", "fp16"):
    for _op in (*LORA, "merge"):
        configure(f"{_op}-{_name}-narrow-factors", _op, _name, factor=DTYPES[_name])
        if _op != "merge":
            configure(f"{_op}-{_name}-crowd", _op, _name, **CROWD, **(dict(dropout=True) if _op in DROPS else {}))
for _kind, _options in {
    "stochastic": dict(rounding="stochastic"),
    "low-bits": dict(low_bits=True),
    "fp64-sum": dict(accumulate=torch.float64),
}.items():
    if _kind != "fp64-sum":
        configure(f"merge-bf16-{_kind}", "merge", "bf16", **_options)
        configure(f"merge-bf16-{_kind}-fp64-sum", "merge", "bf16", **_options, accumulate=torch.float64)
    configure(f"merge-bf16-{_kind}-unaligned", "merge", "bf16", **_options, **ODD)
configure("place_-bf16-unaligned", "place_", "bf16", **ODD)
CONFIGURATIONS |= {
    "merge-fp64": lambda: merge(torch.float64),
    "wgrad-bf16-in-chunks": split_wgrad,
    "adamw-fp32": lambda: adamw(torch.float32),
    "adamw-fp32-unaligned": lambda: adamw(torch.float32),
    "adamw-fp64": lambda: adamw(torch.float64),
}
# What make test compiles: one of each kernel; make test-all compiles all of them for all targets.
FEW = ("shrink-bf16-dropout", "expand_-bf16", "wgrad-bf16-dropout", "linear_lora-bf16", "merge-bf16", "adamw-fp32")
FEW += ("shrink_many-bf16-dropout", "expand_many_-bf16-dropout", "wgrad-bf16-unaligned", "expand_-bf16-narrow-factors")


@contextmanager
def recorded() -> Iterator[list[tuple[JITFunction, dict[str, Any]]]]:
    """Keep every launch instead of running it."""
    launches: list[tuple[JITFunction, dict[str, Any]]] = []
    run = JITFunction.run

    def keep(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names = [parameter.name for parameter in self.params]
        launches.append((self, {**dict(zip(names, args, strict=False)), **options}))

    JITFunction.run = keep
    try:
        yield launches
    finally:
        JITFunction.run = run


@dataclass(frozen=True)
class Built:
    """A compiled kernel: its code, and what it takes on the GPU."""

    name: str
    code: str
    registers: int
    stack_bytes: int
    shared_bytes: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.code))


# Whether tensors begin at multiples of 16 bytes; what ``built`` compiles for.
ALIGNED = True


def specialised(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The type of an argument as a launch would specialise it; tuples element by element."""
    if isinstance(value, tuple):
        return tuple(specialised(item, (*path, i), constants, attributes) for i, item in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if ALIGNED if isinstance(value, torch.Tensor) else value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return f"*{POINTER[value.dtype]}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def source(kernel: JITFunction, launch: dict[str, Any]) -> ASTSource:
    """What the launch would compile, specialised as it would be."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = launch[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = specialised(value, (index,), constants, attributes)
    return ASTSource(kernel, signature, constants, attributes)


def build(kernel: JITFunction, launch: dict[str, Any], target: Target) -> Built:
    options = {name: launch[name] for name in ("num_warps", "num_stages") if name in launch}
    compiled = triton.compile(source(kernel, launch), target=target.gpu, options=options)
    shared = compiled.metadata.shared
    if target.gpu.backend == "hip":
        code = compiled.asm["amdgcn"]
        registers, stack = (int(re.findall(rf"{n}:?\s+(\d+)", code)[-1]) for n in (r"\.vgpr_count", "ScratchSize"))
        return Built(kernel.__name__, code, registers, stack, shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", told)[-1]) for name in ("REG", "STACK"))
    return Built(kernel.__name__, told, registers, stack, shared)


def built(configuration: str, target: Target) -> list[Built]:
    """Every kernel that a configuration launches."""
    # Launchers choose by the GPUs that torch was built for.
    hip = "6" if target.gpu.backend == "hip" else None
    with recorded() as launches, mock.patch.object(torch.version, "hip", hip):
        CONFIGURATIONS[configuration]()
    assert launches, f"{configuration} launches nothing"
    with mock.patch.dict(globals(), ALIGNED="unaligned" not in configuration):
        return [build(kernel, launch, target) for kernel, launch in launches]


FLOAT_ATOMIC = r"\b(RED|ATOM\w*)\.\S*(F16|BF16|F32|F64)|(global|flat|buffer|ds)_(atomic_)?(pk_)?add_(rtn_)?(f|bf)\d+"
PRODUCTS = ("_shrink_kernel", "_expand_kernel", "_wgrad_kernel", "_linear_kernel", "_merge_kernel")


def problems(configuration: str, kernel: Built, target: Target) -> list[str]:
    """What a kernel of a configuration must not be."""
    found = []
    spilled = kernel.count(r"\b(STL|LDL)\b") if target.gpu.backend == "cuda" else 0
    if kernel.stack_bytes or spilled:
        found.append(f"spills: {kernel.stack_bytes} bytes of stack, {spilled} local accesses")
    if kernel.shared_bytes > target.shared_bytes:
        found.append(f"{kernel.shared_bytes} bytes of shared memory, {target.shared_bytes} are there")
    if kernel.count(FLOAT_ATOMIC):
        found.append("float atomics")
    wide = "fp32" in configuration or "fp64" in configuration or "low-bits" in configuration
    matrix = kernel.count(target.matrix)
    amd_merge = kernel.name == "_merge_kernel" and target.gpu.backend == "hip"
    if kernel.name in PRODUCTS and not wide and not amd_merge and not matrix:
        found.append(f"no {target.matrix}")
    # TF32 is three products in 16-bit merges and nowhere else: fp32 means IEEE.
    tf32 = kernel.count(r"MMA\S*TF32|_xf32")
    if wide and (tf32 or (kernel.name in PRODUCTS and target.gpu.backend == "cuda" and matrix)):
        found.append("a matrix instruction where the product must be IEEE")
    return found


Row = tuple[str, str, list[tuple[int, int, int]], list[str]]


def checked(configuration: str, target_name: str) -> Row:
    """Registers, KB of shared memory and matrix instructions of each kernel, and what is wrong with any."""
    target = TARGETS[target_name]
    kernels = built(configuration, target)
    wrong = [
        f"{configuration} on {target_name}: {text}"
        for kernel in kernels
        for text in problems(configuration, kernel, target)
    ]
    found = [(kernel.registers, kernel.shared_bytes, kernel.count(target.matrix)) for kernel in kernels]
    return configuration, target_name, found, wrong


def check_all() -> list[Row]:
    """Every configuration for every target, side by side on all cores."""
    pairs = [(configuration, target) for configuration in CONFIGURATIONS for target in TARGETS]
    # A new process each: torch and the compiler have threads, which a fork would not take along.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(checked, *zip(*pairs, strict=True)))


def test_what_is_compiled_ahead_of_time(scale):
    full = len(CONFIGURATIONS) * len(TARGETS)
    compiled = scale(len(FEW), full, "configurations and targets")
    rows = check_all() if compiled == full else [checked(configuration, "sm_90") for configuration in FEW]
    wrong = [text for *_, texts in rows for text in texts]
    assert not wrong, "\n".join(wrong)


def chosen_by(module: ModuleType, launches: list[tuple[JITFunction, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What a module's own launches were given."""
    yield from (launch for kernel, launch in launches if kernel.fn.__module__ == module.__name__)


def test_every_tile_configuration_is_compiled():
    """Whatever stands in a table of tiles is taken by some configuration."""
    with recorded() as launches:
        for run in CONFIGURATIONS.values():
            run()
    for name in ("adamw", "expand", "linear", "merge", "place", "shrink", "wgrad"):
        module = importlib.import_module(f"flora_kernels.triton.{name}")
        tables = [value for value in vars(module).values() if isinstance(value, tuple)]
        tiles = {str(tile): tile for table in tables for tile in table if isinstance(tile, Tile)}
        assert tiles, f"{name} has no tiles"
        taken = list(chosen_by(module, launches))
        for told, tile in tiles.items():
            assert any(tile.options.items() <= launch.items() for launch in taken), f"{name}: {told} is never compiled"


def tf32_products(precision: str) -> int:
    """TF32 matrix instructions of the 16-bit merge, if its products had this precision."""
    with recorded() as launches:
        merge(torch.bfloat16)
    ((kernel, launch),) = launches
    assert launch["PRECISION"] == "tf32x3"
    return build(kernel, {**launch, "PRECISION": precision}, TARGETS["sm_90"]).count(r"MMA\S*TF32")


def test_tf32_is_three_products_and_never_one():
    # The compiler may issue an instruction more often; one product alone has a third of them at most.
    assert tf32_products("tf32x3") >= 3 * tf32_products("tf32") > 0


def test_the_published_table_has_every_configuration():
    page = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text().partition("<!-- tables -->")[2]
    assert re.findall(r"^\| (\S+) \| \d+ / ", page, re.MULTILINE) == list(CONFIGURATIONS)


def test_a_launch_is_recorded_and_not_run():
    with recorded() as launches:
        adamw(torch.float32)
    ((kernel, launch),) = launches
    assert kernel.__name__ == "_adamw_kernel"
    assert launch["numel"] == 4096


@pytest.mark.parametrize(
    ("sass", "wanted"),
    [
        ("STL [R1], R2 ; HGMMA.64x64x16.F32 ;", "spills"),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R3 ; HGMMA.64x64x16.F32 ;", "float atomics"),
        ("FFMA R1, R2, R3 ;", "no "),
        ("HGMMA.64x64x16.F32 ;", None),
    ],
)
def test_faults_in_the_code_are_seen(sass, wanted):
    found = problems("shrink-bf16", Built("_shrink_kernel", sass, 10, 0, 0), TARGETS["sm_90"])
    assert [text.startswith(wanted) for text in found] == [True] if wanted else not found


def test_plain_tf32_is_seen():
    code = "HGMMA.64x64x8.F32.TF32 ;"
    assert problems("shrink-fp32", Built("_shrink_kernel", code, 10, 0, 0), TARGETS["sm_90"])


def counted() -> dict[str, counts.Count]:
    """The shapes of DESIGN's table: M = 8192 over ten clients, 4096 -> 4096, bf16 with fp32 factors."""
    return {
        "shrink": counts.shrink(ROWS, RANKS, K),
        "expand_": counts.expand_(ROWS, RANKS, N),
        "wgrad": counts.wgrad(ROWS, RANKS, K, N),
        "linear": counts.linear(ROWS, K, N),
        "linear_lora": counts.linear_lora(ROWS, RANKS, K, N),
        "merge_": counts.merge_(RANKS, K, N),
        "merge_ with low bits": counts.merge_(RANKS, K, N, low_bits=True),
        "cohort_adamw_ (84e6 elements)": counts.cohort_adamw_(84_000_000),
    }


def test_counts_give_the_known_limits():
    limit = {name: count.limit_us for name, count in counted().items()}
    assert round(limit["linear"]) == 348
    assert 15.6 < limit["shrink"] < 17
    assert 16.2 < limit["merge_"] < 17.5


def tables() -> tuple[str, list[str]]:
    """The tables of docs/kernels.md, and what is wrong with any of the kernels."""
    lines = ["| op | MB moved | GFLOP | us at the limit |", "|---|---|---|---|"]
    for name, count in counted().items():
        lines.append(f"| `{name}` | {count.bytes / 1e6:.1f} | {count.flops / 1e9:.2f} | {count.limit_us:.1f} |")
    lines += ["", "| configuration | " + " | ".join(TARGETS) + " |", "|---|" + "---|" * len(TARGETS)]
    cells: dict[str, list[str]] = {}
    wrong: list[str] = []
    for configuration, _, found, texts in check_all():
        cells.setdefault(configuration, []).append(
            " / ".join(map(str, (found[0][0], found[0][1] // 1024, found[0][2])))
        )
        wrong += texts
    lines += [f"| {configuration} | {' | '.join(row)} |" for configuration, row in cells.items()]
    return "\n".join(lines), wrong


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "kernels.md"
    written, faults = tables()
    page.write_text(page.read_text().partition("<!-- tables -->")[0] + f"<!-- tables -->\n\n{written}\n")
    sys.exit("\n".join(faults) or None)
