"""The CUDA kernels as compiled: registers, no spills, tensor-core instructions, 16-byte accesses, no float atomics.

``python tests/kernels/test_cuda_code.py`` writes the table of docs/kernels.md.
"""

from __future__ import annotations

import functools
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cuda.emulated import ROOT, nvcc

TARGETS = ("sm_80", "sm_90", "sm_100")
# What a thread of a block may have, by the registers of a multiprocessor, is checked by the compiler; this is ours.
FLOAT_ATOMIC = r"\b(RED|ATOM\w*)\.\S*(F16|BF16|F32|F64)"
ENGINES = ("tensor cores", "fp32", "fp64")


def cuobjdump() -> str | None:
    """The disassembler, of CUDA or of Triton."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            found = importlib.import_module("triton").knobs.nvidia.cuobjdump.path
        except (ImportError, AttributeError, RuntimeError):
            return None
    return found


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and its code."""

    name: str
    code: str
    registers: int
    stack_bytes: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.code))

    @property
    def on_tensor_cores(self) -> bool:
        return bool(re.match(r"(shrink|expand|wgrad)_kernel<(bf16|fp16)|merge_kernel<.*tensor", self.name))


def demangled(text: str) -> str:
    """`merge_kernel<bf16, tensor cores>` for what the compiler calls it."""
    told = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    told = re.sub(r"flora::cuda::", "", told)
    told = re.sub(r"\(Engine\)(\d)", lambda engine: ENGINES[int(engine[1])], told)
    return re.sub(r"\bfloat\b", "fp32", re.sub(r"\bdouble\b", "fp64", told))


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def compiled(target: str) -> list[Kernel]:
    """Every kernel of csrc/cuda for a target."""
    compiler, tool = nvcc(), cuobjdump()
    if compiler is None or tool is None or shutil.which("c++filt") is None:
        pytest.skip("needs nvcc, cuobjdump (CUDA's or Triton's) and c++filt")
    arch = target.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        flags = ["-O3", "-std=c++17", "-cubin", f"-gencode=arch=compute_{arch},code={target}"]
        _output([compiler, *flags, "-I", str(ROOT / "csrc/include"), str(ROOT / "csrc/cuda/backend.cu"), "-o", cubin])
        usage, sass = _output([tool, "-res-usage", cubin]), _output([tool, "-sass", cubin])
    numbers = dict(re.findall(r"Function (\S+):\s+(REG.*)", usage))
    kernels = []
    for part in sass.split("Function : ")[1:]:
        mangled = part.split()[0]
        name = re.sub(r"\(\w+\)$", "", demangled(mangled).strip().removeprefix("void "))
        used = dict(re.findall(r"(REG|STACK):(\d+)", numbers[mangled]))
        kernels.append(Kernel(name, part, int(used["REG"]), int(used["STACK"])))
    return sorted(kernels, key=lambda kernel: kernel.name)


# What moves 16 bytes at once, and what multiplies on tensor cores, by the names that the disassembler gives.
WIDE_LOAD, WIDE_STORE, TENSOR = r"\b(LDG|LDGSTS)\.\S*128", r"\bSTG\.\S*128", r"\bHMMA\b"


def problems(kernel: Kernel) -> list[str]:
    """Properties that a kernel must not have."""
    found = []
    if kernel.stack_bytes or kernel.count(r"\b(STL|LDL)\b"):
        found.append(f"spills: {kernel.stack_bytes} bytes of stack")
    if kernel.on_tensor_cores != bool(kernel.count(TENSOR)):
        found.append("tensor-core instructions" + (" are missing" if kernel.on_tensor_cores else " in an IEEE product"))
    if kernel.count(r"MMA\S*TF32"):
        found.append("plain TF32")
    if kernel.count(FLOAT_ATOMIC):
        found.append("float atomics")
    if not kernel.count(WIDE_LOAD):
        found.append("no 16-byte loads")
    if not kernel.count(WIDE_STORE):
        found.append("no 16-byte stores")
    return found


def test_what_is_compiled(scale):
    few = scale(1, len(TARGETS), "targets")
    wrong = []
    for target in TARGETS if few == len(TARGETS) else ["sm_90"]:
        assert len(compiled(target)) >= 30
        wrong += [f"{kernel.name} on {target}: {text}" for kernel in compiled(target) for text in problems(kernel)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("HMMA.16816.F32.BF16 R1 ; LDGSTS.E.BYPASS.128 ; STG.E.128 ;", None),
        ("HMMA.16816.F32.BF16 R1 ; LDGSTS.E.BYPASS.128 ; STG.E.128 ; STL [R1], R2 ;", "spills"),
        ("FFMA R1 ; LDGSTS.E.BYPASS.128 ; STG.E.128 ;", "tensor-core instructions are missing"),
        ("HMMA.1688.F32.TF32 R1 ; LDG.E.128 ; STG.E.128 ;", "plain TF32"),
        ("HMMA.16816.F32.BF16 R1 ; LDG.E.64 ; STG.E.128 ;", "no 16-byte loads"),
        ("HMMA.16816.F32.BF16 R1 ; LDG.E.128 ; STG.E.64 ;", "no 16-byte stores"),
        ("HMMA.16816.F32.BF16 R1 ; LDG.E.128 ; STG.E.128 ; RED.E.ADD.F32.FTZ.RN ;", "float atomics"),
    ],
)
def test_faults_in_the_code_are_seen(code, wanted):
    found = problems(Kernel("merge_kernel<bf16, tensor cores>", code, 100, 0))
    assert [text.startswith(wanted) for text in found] == [True] if wanted else not found


def table() -> str:
    """Registers, tensor-core instructions and 16-byte accesses of every kernel on every target."""
    lines = ["| kernel | " + " | ".join(TARGETS) + " |", "|---|" + "---|" * len(TARGETS)]
    rows: dict[str, list[str]] = {}
    for target in TARGETS:
        for kernel in compiled(target):
            loads, stores = kernel.count(WIDE_LOAD), kernel.count(WIDE_STORE)
            counts = f"{kernel.registers} / {kernel.count('HMMA')} / {loads} + {stores}"
            rows.setdefault(kernel.name, []).append(counts)
    lines += [f"| `{name}` | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join([*lines, "", *map(instructions, TARGETS)])


def instructions(target: str) -> str:
    """The names of the instructions that were counted, of all kernels of a target."""
    code = "\n".join(kernel.code for kernel in compiled(target))
    names = (sorted(set(re.findall(rf"{pattern}[\w.]*", code))) for pattern in (r"\bHMMA", r"\bLDG", r"\bSTG"))
    tensor, loads, stores = ([f"`{name}`" for name in found if "HMMA" in name or "128" in name] for found in names)
    return f"- {target}: {', '.join(tensor)}; {', '.join(loads)}; {', '.join(stores)}."


if __name__ == "__main__":
    page = ROOT / "docs" / "kernels.md"
    before, rest = page.read_text().split("<!-- cuda table -->\n", 1)
    after = rest.split("<!-- end of cuda table -->", 1)[1]
    page.write_text(f"{before}<!-- cuda table -->\n\n{table()}\n\n<!-- end of cuda table -->{after}")
    sys.exit("\n".join(f"{k.name} on {t}: {p}" for t in TARGETS for k in compiled(t) for p in problems(k)) or None)
