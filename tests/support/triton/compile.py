"""Compile a Triton launch ahead of time for a GPU that is not there: its code, registers, stack and shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# The compiler asks that this be said; it is the default of every version that we run on.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTER = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
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


def specialised(
    value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any], aligned: bool
) -> Any:
    """The type of an argument as a launch would specialise it; tuples element by element."""
    if isinstance(value, tuple):
        return tuple(specialised(item, (*path, i), constants, attributes, aligned) for i, item in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if aligned if isinstance(value, torch.Tensor) else value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return f"*{POINTER[value.dtype]}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def source(kernel: JITFunction, launch: dict[str, Any], aligned: bool = True) -> ASTSource:
    """Compile what a launch would, specialised as it would be where tensors begin at multiples of 16 bytes."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = launch[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = specialised(value, (index,), constants, attributes, aligned)
    return ASTSource(kernel, signature, constants, attributes)


def build(kernel: JITFunction, launch: dict[str, Any], target: Target, aligned: bool = True) -> Built:
    """Compile what a launch would run on a target."""
    options = {name: launch[name] for name in ("num_warps", "num_stages") if name in launch}
    compiled = triton.compile(source(kernel, launch, aligned), target=target.gpu, options=options)
    shared = compiled.metadata.shared
    if target.gpu.backend == "hip":
        code = compiled.asm["amdgcn"]
        registers, stack = (int(re.findall(rf"{n}:?\s+(\d+)", code)[-1]) for n in (r"\.vgpr_count", "ScratchSize"))
        return Built(kernel.__name__, code, registers, stack, shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", told)[-1]) for name in ("REG", "STACK"))
    return Built(kernel.__name__, told, registers, stack, shared)
