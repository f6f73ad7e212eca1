"""The Triton kernels compiled ahead of time: matrix instructions, registers, spills, shared memory, no float atomics.

Every launcher is called on tensors without data, its launch is kept instead of run, and what it would have compiled is
compiled for each target: so nothing is checked that cannot be chosen, and nothing that can be chosen is left out.
``python -m tests.kernels.test_triton_aot`` writes the tables of docs/kernels.md.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from flora_kernels.triton import counts
from flora_kernels.triton.common import Tile
from tests.support.triton.compile import TARGETS, Built, Target, build, recorded
from tests.support.triton.launches import CONFIGURATIONS, FEW, RANKS, ROWS, K, N, adamw, merge


def built(configuration: str, target: Target) -> list[Built]:
    """Every kernel that a configuration launches."""
    # Launchers choose by the GPUs that torch was built for.
    hip = "6" if target.gpu.backend == "hip" else None
    with recorded() as launches, mock.patch.object(torch.version, "hip", hip):
        CONFIGURATIONS[configuration]()
    assert launches, f"{configuration} launches nothing"
    aligned = "unaligned" not in configuration
    return [build(kernel, launch, target, aligned) for kernel, launch in launches]


FLOAT_ATOMIC = r"\b(RED|ATOM\w*)\.\S*(F16|BF16|F32|F64)|(global|flat|buffer|ds)_(atomic_)?(pk_)?add_(rtn_)?(f|bf)\d+"
PRODUCTS = ("_shrink_kernel", "_expand_kernel", "_wgrad_kernel", "_linear_kernel", "_merge_kernel")


def problems(configuration: str, kernel: Built, target: Target) -> list[str]:
    """Properties that a kernel of a configuration must not have."""
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


def chosen_by(module: ModuleType, launches: list[tuple[Any, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Arguments of a module's own launches."""
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
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text().partition("<!-- tables -->")[2]
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
    page = Path(__file__).parents[2] / "docs" / "kernels.md"
    written, faults = tables()
    page.write_text(page.read_text().partition("<!-- tables -->")[0] + f"<!-- tables -->\n\n{written}\n")
    sys.exit("\n".join(faults) or None)
