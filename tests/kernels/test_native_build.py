"""Building, installing and embedding: each example in examples/embed runs against what an installation puts there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMBED = ROOT / "examples/embed"
native = pytest.importorskip("flora_kernels.native", exc_type=ImportError)
PYTHON = {**os.environ, "PYTHONPATH": str(native.prefix().parent), "OMP_NUM_THREADS": "1"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**PYTHON, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def need(*programs: str) -> None:
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def merged_by_hand() -> list[list[float]]:
    """W of merge.c."""
    return [[0.5 * (n + 1) * k + 2.0 * (n + 5) * (k + 6) for k in range(6)] for n in range(4)]


def as_numbers(text: str) -> list[list[float]]:
    return [[float(word) for word in line.split()] for line in text.splitlines()]


def test_c_and_cpp_with_cmake(tmp_path):
    need("cmake", "gcc", "g++")
    run("cmake", "-S", EMBED, "-B", ".", f"-DCMAKE_PREFIX_PATH={native.prefix()}", cwd=tmp_path)
    run("cmake", "--build", ".", cwd=tmp_path)
    assert as_numbers(run("./merge_c", cwd=tmp_path)) == merged_by_hand()
    # The master went from 1 to 1 + 8 * 0.25 * 1e-4, which bfloat16 alone cannot say.
    assert run("./merge_cpp", cwd=tmp_path) == "1.0002000\n"


def test_c_with_pkg_config(tmp_path):
    need("pkg-config", "gcc")
    folder = str(native.prefix() / "lib/pkgconfig")
    flags = run("pkg-config", "--cflags", "--libs", "flora_kernels", cwd=tmp_path, PKG_CONFIG_PATH=folder).split()
    run("gcc", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", *flags[:1],
        EMBED / "merge.c", *flags[1:], "-o", "merge", cwd=tmp_path)  # fmt: skip
    assert as_numbers(run("./merge", cwd=tmp_path)) == merged_by_hand()


def test_numpy_without_torch(tmp_path):
    out = run(sys.executable, EMBED / "merge_numpy.py", cwd=tmp_path)
    assert out == "bfloat16: True  float32: True\ntorch imported: False\n"


def test_torch_without_the_engine(tmp_path):
    assert run(sys.executable, EMBED / "merge_torch.py", cwd=tmp_path).count("merged: True") == 2


@pytest.mark.parametrize("wanted", ["", "{major}", "{version} EXACT", "{major}.99", "99"])
def test_a_cmake_project_of_one_s_own(wanted, tmp_path):
    """Found by the folder of its configuration; a version that is too new, or of another major number, is refused."""
    need("cmake", "gcc")
    version = native.describe().split(",")[0]
    asked = wanted.format(version=version, major=version.split(".")[0])
    shutil.copy(EMBED / "merge.c", tmp_path)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(mine C)\n"
        f"find_package(flora_kernels {asked} REQUIRED)\n"
        "add_executable(mine merge.c)\ntarget_link_libraries(mine PRIVATE flora_kernels::flora_kernels)\n"
    )
    command = ["cmake", "-S", ".", "-B", "made", f"-Dflora_kernels_DIR={native.prefix()}/lib/cmake/flora_kernels"]
    if "99" in wanted:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0
        assert f"version: {version}" in done.stderr
        return
    run(*command, cwd=tmp_path)
    run("cmake", "--build", "made", cwd=tmp_path)
    assert as_numbers(run("made/mine", cwd=tmp_path)) == merged_by_hand()


@pytest.mark.slow
def test_jax_under_jit_and_grad(tmp_path):
    pytest.importorskip("jax")
    need("g++")
    out = run(sys.executable, EMBED / "lora_jax.py", tmp_path, cwd=tmp_path, JAX_PLATFORMS="cpu")
    assert out == "gradients: True\nmerged: True\n"


def test_cupy(tmp_path):
    pytest.importorskip("cupy")
    assert "merged: True" in run(sys.executable, EMBED / "merge_cupy.py", cwd=tmp_path)


@pytest.mark.parametrize("path", sorted(EMBED.glob("merge*")) + sorted(EMBED.glob("lora*")), ids=lambda path: path.name)
def test_examples_are_short(path):
    code = [line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith(("//", "#"))]
    assert len(code) <= 36


def test_the_page_shows_what_the_examples_do():
    page = (ROOT / "docs/embedding.md").read_text()
    sources = {path.name: path.read_text() for path in EMBED.iterdir()}
    for block in re.findall(r"```(?:c|python)\n(.*?)```", page, re.S):
        assert any(block in source for source in sources.values()), block
    assert {name for name in sources if name not in page} == set()
    assert all((ROOT / path).exists() for path in re.findall(r"\$FLORA/(\S+)", page))
    assert all((ROOT / path).exists() for path in re.findall(r"`((?:tests|docs)/[\w./]+)`", page))


def checkout(folder: Path) -> Path:
    """Copy of what a build needs of this checkout."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "lib", "include", "not_built.txt")
    for name in ("flora_core", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=left_out)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


@pytest.mark.slow
def test_a_wheel_has_the_library_and_all_that_finds_it(tmp_path):
    pytest.importorskip("pybind11")
    need("g++")
    source = checkout(tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "made", "."]
    run(*command, cwd=source, FLORA_CUDA="0")
    (wheel,) = (source / "made").glob("*.whl")
    assert "-none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    there = tmp_path / "installed"
    show = "from flora_kernels import native; print(native.prefix(), native.describe(), sep='\\n')"
    prefix, told = run(sys.executable, "-c", show, cwd=tmp_path, PYTHONPATH=str(there)).splitlines()
    assert Path(prefix) == there / "flora_kernels"
    assert "CUDA: this library was built without CUDA (FLORA_CUDA was 0)" in told
    configuration = [f"lib/cmake/flora_kernels/flora_kernels-config{end}.cmake" for end in ("", "-version")]
    headers = "include/flora_kernels.h", "include/flora_ffi.cpp"
    for file in (*headers, "lib/libflora_kernels.so", "lib/pkgconfig/flora_kernels.pc", *configuration):
        assert (there / "flora_kernels" / file).is_file()
    run(sys.executable, EMBED / "merge_numpy.py", cwd=tmp_path, PYTHONPATH=str(there))
    linked = run("ldd", there / "flora_kernels/lib/libflora_kernels.so", cwd=tmp_path) if shutil.which("ldd") else ""
    assert "torch" not in linked
    assert "python" not in linked.replace(str(tmp_path), "")


def test_without_a_compiler_the_reason_is_kept(tmp_path):
    source = checkout(tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run(*command, cwd=source, CXX="no-such-compiler")
    # Without site, whose editable finder would lend this checkout's compiled module.
    show, environment = "import flora_kernels.native", {**PYTHON, "PYTHONPATH": str(source / "kernels")}
    done = subprocess.run([sys.executable, "-S", "-c", show], env=environment, capture_output=True, text=True)
    assert "no C++ compiler was found at installation; install g++ (or set CXX) and reinstall" in done.stderr
    environment = {**PYTHON, "CXX": "no-such-compiler", "FLORA_NATIVE": "1"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "FLORA_NATIVE=1, but no C++ compiler was found" in done.stderr


def test_a_compiler_that_fails_is_an_error_that_says_what_to_do(tmp_path):
    source = checkout(tmp_path)
    for path in (source / "csrc").rglob("*.cpp"):
        path.write_text("this is no C++")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=source, env={**PYTHON, "FLORA_CUDA": "0"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "FLORA_NATIVE=0 installs without it" in done.stderr


def test_cuda_that_is_asked_for_without_its_compiler_is_an_error(tmp_path):
    source = checkout(tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**PYTHON, "FLORA_CUDA": "1", "NVCC": "no-such-compiler"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "FLORA_CUDA=1, but nvcc was not found; put it on the PATH or set NVCC" in done.stderr
    assert not list((source / "kernels").rglob("*.so"))


NO_GPU = "no NVIDIA GPU was found; FLORA_CUDA=1 builds it for one elsewhere"


@pytest.mark.parametrize(
    ("gpus", "wanted", "reason", "archs"),
    [
        ("", {}, NO_GPU, None),
        ("7.5", {}, NO_GPU, None),
        ("9.0", {}, "", "90"),
        ("8.6\n8.9\n12.0", {}, "", "100+PTX,80"),
        ("", {"FLORA_CUDA": "1"}, "", "80,90,100+PTX"),
        ("8.6", {"FLORA_CUDA": "1"}, "", "80,90,100+PTX"),
        ("", {"FLORA_CUDA_ARCHS": "90"}, "", "90"),
        ("9.0", {"FLORA_CUDA": "0"}, "FLORA_CUDA was 0", None),
    ],
)
def test_cuda_is_built_for_the_gpus_that_are_found_or_on_request(gpus, wanted, reason, archs, tmp_path):
    """Its compilation takes minutes in which pip prints nothing, so that a compiler alone is no reason for it."""
    pytest.importorskip("setuptools")
    nvcc = tmp_path / "nvcc"
    for path, text in ((nvcc, "exit 0"), (tmp_path / "nvidia-smi", f"printf '{gpus}'" if gpus else "exit 9")):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    code = "import setuptools, runpy; setuptools.setup = lambda **_: None; made = runpy.run_path('setup.py'); "
    code += "found = made['BuildNative'].find_nvcc(None); print([*found, made['wanted_archs']() if found[0] else None])"
    environment = {"FLORA_CUDA": "auto", "FLORA_CUDA_ARCHS": "", **wanted}
    done = run(
        sys.executable, "-c", code, cwd=ROOT, PATH=f"{tmp_path}:{os.environ['PATH']}", NVCC=str(nvcc), **environment
    )
    assert done.strip() == repr([None if reason else str(nvcc), reason, archs])


def test_a_choice_that_is_none_is_refused(tmp_path):
    source = checkout(tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=source, env={**PYTHON, "FLORA_CUDA": "yes"}, capture_output=True, text=True)
    assert "FLORA_CUDA must be auto, 0 or 1, got 'yes'" in done.stderr


def test_cuda_is_compiled_for_the_gpus_that_are_named(tmp_path):
    """Which GPUs nvcc is asked for; one that writes its arguments down and fails stands in for it."""
    source = checkout(tmp_path)
    nvcc, asked = tmp_path / "nvcc", tmp_path / "asked"
    nvcc.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word" >> {asked}; done\nexit 1\n')
    nvcc.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]

    def build(**environment: str) -> tuple[set[str], str]:
        asked.write_text("")
        variables = {**PYTHON, "FLORA_CUDA": "1", "NVCC": str(nvcc), "CXX": "true", **environment}
        done = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True)
        assert done.returncode
        return {word.removeprefix("-gencode=") for word in asked.read_text().split() if "gencode" in word}, done.stderr

    known = {f"arch=compute_{number},code=sm_{number}" for number in (80, 90, 100)}
    assert build()[0] == known | {"arch=compute_100,code=compute_100"}
    assert build(FLORA_CUDA_ARCHS="90a")[0] == {"arch=compute_90a,code=sm_90a"}
    found, stderr = build(FLORA_CUDA_ARCHS="90,hopper")
    assert not found
    assert "FLORA_CUDA_ARCHS must be a list such as 80,90,100+PTX, got 'hopper' in it" in stderr
