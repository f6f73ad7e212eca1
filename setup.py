"""Build flora_core and flora_kernels with their native library. Needs no torch: build isolation would fetch it anew.

FLORA_NATIVE=auto|0|1   auto builds csrc/ where there is a C++ compiler, else installs pure Python and keeps the reason;
                        1 fails without a compiler, 0 builds nothing. A compiler that fails is an error either way.
FLORA_CUDA=auto|0|1     auto adds CUDA where nvcc and an NVIDIA GPU are found, for that GPU alone: all GPUs take minutes
                        in which pip prints nothing; 1 adds it for all and fails without nvcc; 0 leaves it out.
FLORA_CUDA_ARCHS=LIST   the GPUs to compile CUDA for, such as 80,90,100+PTX (these are all); auto adds CUDA then.
CXX, NVCC               the compilers; g++ or clang++ and nvcc unless given.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "flora_core/version.py").read_text(), re.M)[1]
X86 = platform.machine().lower() in ("x86_64", "amd64")
# -fno-math-errno lets sqrt be an instruction; nothing that changes a sum is allowed.
BASE_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS = [*BASE_FLAGS, "-O3", "-ffp-contract=fast", "-fno-math-errno"]
# GCC takes its own intrinsics for uninitialised (bug 105593) and reports vectors of two registers.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-psabi"]
ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static", "-t", "2"]
# Machine code of these, which GPUs of a later minor version run too, and PTX of the last for what comes after it.
CUDA_ARCHS = "80,90,100+PTX"
CMAKE_CONFIG = """\
# find_package(flora_kernels) gives the target flora_kernels::flora_kernels.
get_filename_component(_flora_root "${{CMAKE_CURRENT_LIST_DIR}}/../../.." ABSOLUTE)
set(flora_kernels_VERSION {version})
if(NOT TARGET flora_kernels::flora_kernels)
  add_library(flora_kernels::flora_kernels SHARED IMPORTED)
  set_target_properties(flora_kernels::flora_kernels PROPERTIES
    IMPORTED_LOCATION "${{_flora_root}}/lib/libflora_kernels.so"
    INTERFACE_INCLUDE_DIRECTORIES "${{_flora_root}}/include")
endif()
"""
CMAKE_VERSION = """\
# Fits whoever asks for this minor version or an earlier one of the same major version.
set(PACKAGE_VERSION {version})
if(PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION OR NOT PACKAGE_FIND_VERSION_MAJOR EQUAL {major})
  set(PACKAGE_VERSION_COMPATIBLE FALSE)
else()
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
  if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)
    set(PACKAGE_VERSION_EXACT TRUE)
  endif()
endif()
"""
PKG_CONFIG = """\
prefix=${{pcfiledir}}/../..
Name: flora_kernels
Description: Stacked LoRA merge, mixed-rank shrink, expand and wgrad, cohort AdamW
Version: {version}
Cflags: -I${{prefix}}/include
Libs: -L${{prefix}}/lib -lflora_kernels -Wl,-rpath,${{prefix}}/lib
"""


def choice(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise PlatformError(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def wanted_archs() -> str:
    """The GPUs to compile CUDA for: FLORA_CUDA_ARCHS, else all with FLORA_CUDA=1, else those that are found."""
    named = os.environ.get("FLORA_CUDA_ARCHS")
    return named or (CUDA_ARCHS if choice("FLORA_CUDA") == "1" else found_archs())


def found_archs() -> str:
    """The entries of CUDA_ARCHS that the GPUs of this machine run, by what the driver says."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    majors = {int(major) for major in re.findall(r"^(\d+)\.\d+$", found.stdout, re.M)}
    # Machine code runs on later minor versions of its own major one, PTX on everything later.
    return ",".join(sorted({{8: "80", 9: "90"}.get(major, "100+PTX") for major in majors if major >= 8}))


def cuda_codes() -> list[str]:
    """GPUs that nvcc compiles for."""
    codes = []
    for arch in wanted_archs().split(","):
        number, ptx = arch.strip().removesuffix("+PTX"), arch.strip().endswith("+PTX")
        if not re.fullmatch(r"[89]\d[af]?|1[0-9]\d[af]?", number):
            raise PlatformError(f"FLORA_CUDA_ARCHS must be a list such as 80,90,100+PTX, got {arch!r} in it")
        codes += [f"-gencode=arch=compute_{number},code={code}_{number}" for code in ["sm"] + ["compute"] * ptx]
    return codes


def find_compiler() -> str | None:
    """The C++ compiler's command, from CXX or the PATH."""
    named = os.environ.get("CXX")
    if named:
        return named if shutil.which(shlex.split(named)[0]) else None
    return next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(
            f"{shlex.join(command)}\n{done.stdout}{done.stderr}\n"
            "the native library does not compile here; FLORA_NATIVE=0 installs without it"
        )


class BuildNative(build_ext):
    """libflora_kernels, the module over it, and what C and C++ need to find it."""

    def run(self) -> None:
        self.package = Path("kernels/flora_kernels") if self.inplace else Path(self.build_lib, "flora_kernels")
        self.package = (ROOT / self.package).resolve()
        self.objects = Path(self.build_temp).resolve() / "flora_kernels"
        reason = self.reason_not_to()
        self.package.mkdir(parents=True, exist_ok=True)
        note = self.package / "not_built.txt"
        note.unlink(missing_ok=True)
        if reason:
            note.write_text(reason + "\n")
            self.announce(f"flora_kernels.native: {reason}", level=2)
            return
        self.objects.mkdir(parents=True, exist_ok=True)
        self.compiler_command = shlex.split(find_compiler())
        self.openmp = self.takes(["-fopenmp"])
        self.build_library()
        self.build_module()
        self.install_files()

    def reason_not_to(self) -> str | None:
        wanted = choice("FLORA_NATIVE")
        if wanted == "0":
            return "installed with FLORA_NATIVE=0; reinstall without it"
        if platform.system() not in ("Linux", "Darwin"):
            return f"not built on {platform.system()}"
        if find_compiler() is None:
            reason = "no C++ compiler was found at installation; install g++ (or set CXX) and reinstall flora-core"
            if wanted == "1":
                raise PlatformError(f"FLORA_NATIVE=1, but {reason}")
            return reason
        return None

    def takes(self, flags: list[str]) -> list[str]:
        """These flags if the compiler can link a program with them."""
        source = self.objects / "probe.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [*self.compiler_command, *flags, str(source), "-o", str(source.with_suffix(""))]
        return flags if subprocess.run(command, capture_output=True).returncode == 0 else []

    def compile(self, source: Path, flags: list[str]) -> str:
        """The object of a source with these flags, made anew if any file of csrc, or this one, is younger."""
        made = self.objects / f"{source.stem}-{sha256(shlex.join(flags).encode()).hexdigest()[:8]}.o"
        youngest = max(path.stat().st_mtime for path in [*CSRC.rglob("*"), ROOT / "setup.py"])
        if self.force or not made.exists() or made.stat().st_mtime < youngest:
            run([*flags, f"-I{CSRC / 'include'}", f"-I{CSRC / 'common'}", "-c", str(source), "-o", str(made)])
        return str(made)

    def build_library(self) -> None:
        isas = {isa: flags for isa, flags in ISA_FLAGS.items() if X86 or isa == "portable"}
        defines = [f'-DFLORA_VERSION="{VERSION}"', *(["-DFLORA_X86"] if X86 else [])]
        nvcc, no_cuda = self.find_nvcc()
        self.nvcc = nvcc
        if nvcc:
            defines.append("-DFLORA_WITH_CUDA")
        self.announce(f"flora_kernels: compiling for the CPU; CUDA: {no_cuda or 'yes, which takes minutes'}", level=2)
        base = [*self.compiler_command, *FLAGS, *self.openmp, *defines]
        jobs = [(CSRC / f"cpu/isa_{isa}.cpp", [*base, *QUIET, *flags]) for isa, flags in isas.items()]
        jobs += [(source, base) for source in [*sorted((CSRC / "common").glob("*.cpp")), CSRC / "cpu/dispatch.cpp"]]
        api = jobs.index((CSRC / "common/api.cpp", base))
        jobs[api] = (CSRC / "common/api.cpp", [*base, f'-DFLORA_NO_CUDA="{no_cuda}"'])
        if nvcc:
            jobs.append((CSRC / "cuda/backend.cu", [nvcc, *CUDA_FLAGS, *cuda_codes(), *defines]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(lambda job: self.compile(*job), jobs))
        (self.package / "lib").mkdir(exist_ok=True)
        self.library = self.package / "lib" / "libflora_kernels.so"
        shared = ["-shared", *self.openmp, "-o", str(self.library), *self.soname("libflora_kernels.so")]
        run([*self.compiler_command, *made, *shared, *(self.cuda_libraries(nvcc) if nvcc else [])])

    def find_nvcc(self) -> tuple[str | None, str]:
        """Return nvcc if CUDA is to be built, and else the reason."""
        wanted, nvcc = choice("FLORA_CUDA"), shutil.which(os.environ.get("NVCC", "nvcc"))
        if wanted == "0":
            return None, "FLORA_CUDA was 0"
        if nvcc is None:
            if wanted == "1":
                raise PlatformError("FLORA_CUDA=1, but nvcc was not found; put it on the PATH or set NVCC")
            return None, "nvcc was not found"
        if not wanted_archs():
            return None, "no NVIDIA GPU was found; FLORA_CUDA=1 builds it for one elsewhere"
        return nvcc, ""

    def cuda_libraries(self, nvcc: str) -> list[str]:
        """The static runtime, from where nvcc says its home is: nvcc itself may be a wrapper elsewhere."""
        told = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        home = re.search(r"^#\$ TOP=(.*)$", told, re.M)
        folder = Path(home[1].strip() if home else Path(nvcc).resolve().parents[1])
        found = next(iter(sorted(folder.glob("**/libcudart_static.a"))), None)
        if found is None:
            raise CompileError(f"libcudart_static.a was not found under {folder}; FLORA_CUDA=0 builds without CUDA")
        return [str(found), "-ldl", "-lrt", "-lpthread"]

    def soname(self, name: str) -> list[str]:
        return [f"-Wl,-soname,{name}"] if platform.system() == "Linux" else [f"-Wl,-install_name,@rpath/{name}"]

    def build_module(self) -> None:
        import pybind11

        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        defines = ["-DFLORA_WITH_CUDA"] if self.nvcc else []
        made = self.compile(
            CSRC / "python/bindings.cpp", [*self.compiler_command, "-O2", *BASE_FLAGS, *defines, *includes]
        )
        origin = "$ORIGIN" if platform.system() == "Linux" else "@loader_path"
        loose = [] if platform.system() == "Linux" else ["-undefined", "dynamic_lookup"]
        module = self.package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        run(
            [
                *self.compiler_command,
                made,
                "-shared",
                *loose,
                str(self.library),
                f"-Wl,-rpath,{origin}/lib",
                "-o",
                str(module),
            ]
        )

    def install_files(self) -> None:
        (self.package / "include").mkdir(exist_ok=True)
        for source in ("include/flora_kernels.h", "jax/flora_ffi.cpp"):
            shutil.copy(CSRC / source, self.package / "include")
        for folder, name, text in (
            ("lib/cmake/flora_kernels", "flora_kernels-config.cmake", CMAKE_CONFIG),
            ("lib/cmake/flora_kernels", "flora_kernels-config-version.cmake", CMAKE_VERSION),
            ("lib/pkgconfig", "flora_kernels.pc", PKG_CONFIG),
        ):
            (self.package / folder).mkdir(parents=True, exist_ok=True)
            (self.package / folder / name).write_text(text.format(version=VERSION, major=VERSION.partition(".")[0]))

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# `kernels` is the import name of another library, so flora_kernels lies in it without being part of it;
# recipes and the Flower app lie where a newcomer looks, and travel as data-only packages inside flora_core.
setup(
    packages=[
        "flora_core",
        *(f"flora_core.{name}" for name in find_packages("flora_core")),
        "flora_core.packaged_recipes",
        "flora_core.packaged_flower_app",
        "flora_kernels",
        *(f"flora_kernels.{name}" for name in find_packages("kernels/flora_kernels")),
    ],
    package_dir={
        "flora_kernels": "kernels/flora_kernels",
        "flora_core.packaged_recipes": "recipes",
        "flora_core.packaged_flower_app": "examples/flower",
    },
    package_data={
        "flora_core": ["py.typed"],
        "flora_core.runs": ["*.jinja"],
        "flora_kernels": ["py.typed"],
        "flora_core.packaged_recipes": ["*.yaml"],
        "flora_core.packaged_flower_app": ["pyproject.toml", "flora_app/*.py"],
    },
    # Else whatever MANIFEST.in puts into the sdist, such as a library that was built in place, would be in the wheel.
    include_package_data=False,
    # The sources are BuildNative's affair; that there is an extension makes the wheel one of this platform.
    ext_modules=[Extension("flora_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
