"""The C interface itself: a fuzzer under the address and undefined-behaviour sanitizers, and its promises to C."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SANITIZED = ["-g", "-O1", "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w"]
ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
CXX = os.environ.get("CXX", "g++")


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
    sources = [*sorted((CSRC / "common").glob("*.cpp")), CSRC / "cpu/dispatch.cpp", ROOT / "tests/native/fuzz.cpp"]
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
    assert {name for name in names if not name.startswith("flora_")} <= {"_init", "_fini"}
    header = (CSRC / "include/flora_kernels.h").read_text()
    assert all(name in header for name in names if name.startswith("flora_"))
