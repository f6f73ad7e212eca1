"""The C interface itself: a fuzzer under the address and undefined-behaviour sanitizers, and its promises to C."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.cuda import abi

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SANITIZED = ["-g", "-O1", "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w"]
ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
CXX = os.environ.get("CXX", "g++")
HEADER = (CSRC / "include/flora_kernels.h").read_text()
DECLARED = set(re.findall(r"^FLORA_API [^(]*?(flora_\w+)\(", HEADER, re.M))


def can_sanitize(folder: Path) -> bool:
    (folder / "probe.cpp").write_text("int main() { return 0; }")
    command = [CXX, "-fsanitize=address,undefined", "probe.cpp", "-o", "probe"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_the_fuzzer_finds_nothing(tmp_path, scale):
    """Portable code in make test; every instruction set of this processor in make test-all."""
    if not can_sanitize(tmp_path):
        pytest.skip("needs a C++ compiler with the address and undefined-behaviour sanitizers")
    native = pytest.importorskip("flora_kernels.native", exc_type=ImportError)
    every = scale(0, 1, "instruction sets beside the portable one") and native._native.cpu_isa() > 1
    sources = [*sorted((CSRC / "common").glob("*.cpp")), CSRC / "cpu/dispatch.cpp", ROOT / "tests/support/fuzz.cpp"]
    isas = {"portable": [], **(ISA_FLAGS if every else {})}
    jobs = [(source, ["-DFLORA_X86"] if every else []) for source in sources]
    jobs += [(CSRC / f"cpu/isa_{isa}.cpp", flags) for isa, flags in isas.items()]
    includes = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'common'}"]
    for source, flags in jobs:
        subprocess.run([CXX, *SANITIZED, *flags, *includes, "-c", str(source)], cwd=tmp_path, check=True)
    objects = [f"{source.stem}.o" for source, _ in jobs]
    subprocess.run([CXX, *SANITIZED, *objects, "-o", "fuzz"], cwd=tmp_path, check=True)
    calls = scale(3000, 100_000, "calls")
    done = subprocess.run(["./fuzz", "1", str(calls)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accepted = int(done.stdout.split()[2])
    assert calls / 4 < accepted < calls * 3 / 4, "the arguments are too wrong or too right to test anything"


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    native = pytest.importorskip("flora_kernels.native", exc_type=ImportError)
    loaded = ctypes.CDLL(str(native.prefix() / "lib/libflora_kernels.so"))
    for name in ("flora_version", "flora_last_error", "flora_status_name"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def test_versions_and_names(library):
    import flora_core

    assert library.flora_version().decode() == flora_core.__version__
    assert library.flora_abi_version() == 1000
    assert library.flora_status_name(0) == b"FLORA_OK"
    assert library.flora_status_name(2) == b"FLORA_OVERLAP"
    assert library.flora_status_name(-5) == b"an unknown status"


def test_null_is_refused_everywhere(library):
    bytes_ = ctypes.c_size_t()
    for op in ("shrink", "expand", "wgrad", "adamw"):
        assert getattr(library, f"flora_{op}")(None, None) == 1
        assert library.flora_last_error() == b"exec must not be NULL"
        assert getattr(library, f"flora_{op}_workspace")(None, None, ctypes.byref(bytes_)) == 1
    assert library.flora_merge_many(None, None, 3, None) == 1
    assert library.flora_merge(None, None, None) == 1


def test_messages_belong_to_their_thread(library):
    from concurrent.futures import ThreadPoolExecutor

    library.flora_device_available(7, 0)
    assert library.flora_last_error() == b"device must be FLORA_CPU or FLORA_CUDA, got 7"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(library.flora_last_error).result() == b"no call of this thread has failed"


def test_only_the_interface_is_exported(library):
    done = subprocess.run(["nm", "-D", "--defined-only", library._name], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    assert names - {"_init", "_fini"} == DECLARED


def test_python_calls_what_the_header_declares():
    called = set(re.findall(r"\bflora_\w+", (CSRC / "python" / "bindings.cpp").read_text())) & DECLARED
    # One item is many, and Python has names for its exceptions.
    assert DECLARED - called == {"flora_merge", "flora_status_name"}


STRUCTS = {
    "exec": abi.Exec,
    "matrix": abi.Matrix,
    "vector": abi.Vector,
    "clients": abi.Clients,
    "merge_item": abi.Item,
    "merge_options": abi.Options,
    "shrink_args": abi.ShrinkArgs,
    "expand_args": abi.ExpandArgs,
    "wgrad_args": abi.WgradArgs,
    "adamw_args": abi.AdamwArgs,
}


@pytest.mark.parametrize(("compiler", "standard"), [("gcc", "c99"), ("g++", "c++11"), ("clang", "c99")])
def test_the_header_is_plain_c_without_a_warning(compiler, standard, tmp_path):
    """Every macro and every field, under all warnings; the layout is that of tests/support/cuda/abi.py."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    lines, layout = [], []
    for name, struct in STRUCTS.items():
        lines.append(f"    flora_{name} {name} = FLORA_{name.upper()}_INIT;")
        layout.append(ctypes.sizeof(struct))
        lines.append(f'    printf("%d\\n", (int)sizeof({name}));')
        for field, *_ in struct._fields_:
            layout.append(getattr(struct, field).offset)
            lines.append(f'    printf("%d\\n", (int)((char *)&{name}.{field} - (char *)&{name}));')
    source = tmp_path / ("all.cpp" if "++" in compiler else "all.c")
    body = "\n".join(lines)
    source.write_text(
        f"#include <flora_kernels.h>\n#include <stdio.h>\n\nint main(void) {{\n{body}\n    return 0;\n}}\n"
    )
    flags = [f"-std={standard}", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{CSRC / 'include'}"]
    subprocess.run([compiler, *flags, source.name, "-o", "all"], cwd=tmp_path, check=True)
    done = subprocess.run(["./all"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert list(map(int, done.stdout.split())) == layout


# Every bad argument of a merge: what it does to the item, the options or exec, and what the library says.


class Merge:
    """A sound merge in one buffer, to be spoilt: W (6, 10) and its factors, P = 3."""

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        self.buffer = torch.randn(256, generator=random)
        self.weight, self.before = self.buffer[:60].view(6, 10), self.buffer[:60].clone()
        A, B = self.buffer[64:94].view(3, 10), self.buffer[96:114].view(3, 6)
        self.item = abi.merge_item(self.weight, A, B, self.buffer[116:119])
        self.options = abi.Options(ctypes.sizeof(abi.Options), 0, 1)
        self.exec = abi.Exec(ctypes.sizeof(abi.Exec))

    def run(self, library: ctypes.CDLL, spoil: Callable[[Merge], None]) -> tuple[int, str]:
        """Ask for the workspace, spoil, run."""
        need = ctypes.c_size_t()
        arguments = ctypes.byref(self.item), ctypes.c_int64(1), ctypes.byref(self.options)
        assert library.flora_merge_many_workspace(ctypes.byref(self.exec), *arguments, ctypes.byref(need)) == 0
        self.room = torch.zeros(need.value + 512, dtype=torch.uint8)
        self.exec.workspace = -(-self.room.data_ptr() // 256) * 256
        self.exec.workspace_bytes = need.value
        spoil(self)
        return library.flora_merge_many(ctypes.byref(self.exec), *arguments), library.flora_last_error().decode()


def put(path: str, value: int | Callable[[int], int]) -> Callable[[Merge], None]:
    """Set a field such as item.weight.rows, or change what it holds."""

    def spoil(merge: Merge) -> None:
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, merge)
        setattr(owner, name, value(getattr(owner, name)) if callable(value) else value)

    return spoil


def onto_weight(merge: Merge) -> None:
    merge.item.B.data = merge.item.weight.data + 4


def workspace_onto_weight(merge: Merge) -> None:
    merge.exec.workspace = merge.buffer.data_ptr() // 256 * 256


BAD_ARGUMENT, OVERLAP, BAD_WORKSPACE, NO_DEVICE = 1, 2, 3, 5
SPOILT = [
    (put("item.weight.data", 0), BAD_ARGUMENT, "weight.data must not be NULL"),
    (put("item.A.data", 0), BAD_ARGUMENT, "A.data must not be NULL"),
    (put("item.coef.data", 0), BAD_ARGUMENT, "coef.data must not be NULL"),
    (put("item.B.data", lambda at: at + 1), BAD_ARGUMENT, "B.data must be aligned to its element of 4 bytes"),
    (put("item.weight.data", lambda at: at + 2), BAD_ARGUMENT, "weight.data must be aligned to its element"),
    (put("item.weight.rows", -1), BAD_ARGUMENT, "weight must have no negative size, got (-1, 10)"),
    (put("item.A.rows", 4), BAD_ARGUMENT, "B must have the shape (4, 6) to fit the others, got (3, 6)"),
    (put("item.coef.size", -3), BAD_ARGUMENT, "coef must have no negative size, got -3"),
    (put("item.weight.row_stride", 2**61), BAD_ARGUMENT, "weight reaches beyond memory"),
    (put("item.A.column_stride", -(2**62)), BAD_ARGUMENT, "A reaches beyond memory"),
    (
        put("item.weight.dtype", 77),
        BAD_ARGUMENT,
        "weight.dtype must be fp32, bf16, fp16, fp64, got an unknown code (77); convert it",
    ),
    (put("item.A.dtype", 5), BAD_ARGUMENT, "A.dtype must be fp32, bf16, fp16, fp64, got int16 (5)"),
    (put("item.weight.reserved", 1), BAD_ARGUMENT, "weight.reserved must be 0, got 1"),
    (put("item.struct_size", 8), BAD_ARGUMENT, "items[i].struct_size must be"),
    (put("options.rounding", 7), BAD_ARGUMENT, "options.rounding must be FLORA_NEAREST or FLORA_STOCHASTIC, got 7"),
    (put("options.rounding", 1), BAD_ARGUMENT, "weight.dtype must be bf16 for stochastic rounding, got fp32"),
    (put("options.accumulate", 2), BAD_ARGUMENT, "options.accumulate must be FLORA_FP32 or FLORA_FP64, got 2"),
    (put("exec.device", 9), BAD_ARGUMENT, "exec.device must be FLORA_CPU or FLORA_CUDA, got 9"),
    (put("exec.device_index", 1), BAD_ARGUMENT, "exec.device_index must be 0 on the CPU"),
    (put("exec.num_threads", -1), BAD_ARGUMENT, "exec.num_threads must be between 0 and 4096, got -1"),
    (put("exec.isa", 9), BAD_ARGUMENT, "exec.isa must be one of FLORA_ISA_*, got 9"),
    (put("exec.struct_size", 7), BAD_ARGUMENT, "exec.struct_size must be"),
    (put("exec.workspace", 0), BAD_WORKSPACE, "exec.workspace must have"),
    (put("exec.workspace", lambda at: at + 8), BAD_WORKSPACE, "exec.workspace must be aligned to 256 bytes"),
    (put("exec.workspace_bytes", lambda size: size - 1), BAD_WORKSPACE, "exec.workspace_bytes must be at least"),
    (put("item.weight.row_stride", 0), OVERLAP, "weight is written and must have a place for each element"),
    (onto_weight, OVERLAP, "weight is written and must share no memory with B"),
    (workspace_onto_weight, OVERLAP, "exec.workspace is written and must share no memory with weight"),
]


@pytest.mark.parametrize(("spoil", "status", "words"), SPOILT, ids=[words for _, _, words in SPOILT])
def test_a_bad_argument_is_named_and_changes_nothing(spoil, status, words, library):
    merge = Merge()
    assert merge.run(library, lambda _: None)[0] == 0
    assert not torch.equal(merge.weight.flatten(), merge.before)
    merge = Merge()
    found, message = merge.run(library, spoil)
    assert found == status
    assert words in message
    assert torch.equal(merge.weight.flatten(), merge.before)


def test_one_bad_item_of_many_keeps_all_from_being_written(library):
    good, bad = Merge(), Merge()
    bad.item.coef.dtype = 77
    table, need = (abi.Item * 2)(good.item, bad.item), ctypes.c_size_t()
    rest = table, ctypes.c_int64(2), ctypes.byref(good.options)
    assert library.flora_merge_many_workspace(ctypes.byref(good.exec), *rest, ctypes.byref(need)) == BAD_ARGUMENT
    assert library.flora_merge_many(ctypes.byref(good.exec), *rest) == BAD_ARGUMENT
    assert b"items[1].coef.dtype" in library.flora_last_error()
    assert torch.equal(good.weight.flatten(), good.before)


def test_a_gpu_that_is_not_here_is_said(library):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    merge = Merge()
    found, message = merge.run(library, put("exec.device", 1))
    assert found == NO_DEVICE
    assert "built without CUDA" in message or "no GPU can be used here" in message
    assert torch.equal(merge.weight.flatten(), merge.before)
