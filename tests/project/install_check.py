"""Install flora-core as the README says, from its sdist and from its wheel, each into a fresh environment, and use it.

    python -m tests.project.install_check --torch torch==2.13.0     a few minutes on two cores (make test-install)

The commands are the README's own block; only "." becomes the sdist or the wheel, and torch a pinned release. The wheel
is built from the sdist, with its compiled library; the sdist is installed without it, which takes no compiler, and into
an environment without pip, as uv makes them. Needs the network, or pip's cache.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

from flora_core import __version__
from flora_core.common.cache import cache_folder
from flora_core.runs.demo_model import WHEEL

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")
# Beside the README's: what a user tries first, and a round of training with its report.
MORE = (
    "flora --version",
    "flora --help",
    "flora run quickstart --out run clients.count=2 federation.rounds=1 data.per_client=2 data.test_items=2",
)
# Run by the environment's own Python: that the installation is complete, and the compiled library with it.
LOOK = """
import importlib.metadata
files = {str(file) for file in importlib.metadata.files("flora-core") if "__pycache__" not in str(file)}
for name in ("flora_core/py.typed", "flora_kernels/py.typed", "flora_core/packaged_recipes/quickstart.yaml"):
    assert name in files, name
assert not [name for name in files if name.startswith(("tests", "bench", "csrc"))]
print(*sorted(name for name in files if name.endswith((".py", ".yaml", ".typed"))), sep="\\n")
"""


def readme_commands() -> list[str]:
    """The lines of the README's block that installs, and the first commands after it."""
    (block,) = re.findall(r"```\n(pip install torch\n.*?)```", README.read_text("utf-8"), re.S)
    return block.splitlines()


class Environment:
    """A fresh virtual environment in which lines of a shell are run, in an empty folder of its own."""

    def __init__(self, folder: Path, installer: Path | None = None, **variables: str):
        """Make it; with the Python of an `installer`, without a pip of its own: that Python's pip installs."""
        venv.create(folder / "environment", with_pip=installer is None, symlinks=True)
        self.bin, self.home = folder / "environment/bin", folder / "home"
        self.home.mkdir()
        self.python = self.bin / "python"
        self.pip = [str(installer or self.python), *PIP, *(("--python", str(self.python)) if installer else ())]
        inherited = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "FLORA_"))}
        # Compiling all of torch's modules takes longer than the few that are imported here.
        self.variables = {
            **inherited,
            "PIP_NO_COMPILE": "1",
            "OMP_NUM_THREADS": "1",
            "VIRTUAL_ENV": str(self.bin.parent),
            **variables,
        }
        self.variables["PATH"] = f"{self.bin}:{os.environ['PATH']}"

    def run(self, *command: str | Path) -> str:
        """Run a command; end this program with its output if it fails."""
        words, began = [str(word) for word in command], time.monotonic()
        done = subprocess.run(words, cwd=self.home, env=self.variables, capture_output=True, text=True)
        print(f"  {time.monotonic() - began:5.1f} s  {shlex.join(words)[-100:]}".replace("\n", " "), flush=True)
        if done.returncode:
            sys.exit(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def line(self, line: str, torch: str, source: Path) -> str:
        """Run one of the README's lines."""
        words = shlex.split(line)
        if words[:2] == ["pip", "install"]:
            wanted = [_requirement(word, torch, source) for word in words[2:]]
            return self.run(*self.pip, "install", *wanted)
        return self.run(self.bin / words[0], *words[1:])


def _requirement(word: str, torch: str, source: Path) -> str:
    """Replace torch by the pinned release, and the checkout's folder by what was built from it."""
    if word == "torch":
        return torch
    return re.sub(r"^\.", str(source), word)


def check(environment: Environment, torch: str, source: Path, native: str) -> list[str]:
    """Install and use flora-core in an environment; return the Python files and recipes of the installation."""
    print(source.name, flush=True)
    said = {line: environment.line(line, torch, source) for line in (*readme_commands(), *MORE)}
    for line, words in expected(native).items():
        for word in words:
            if word not in said[line]:
                sys.exit(f"{line} does not print {word!r}:\n{said[line]}")
    if re.search(r"^extra (train|cli) .*MISSING", said["flora doctor"], re.M):
        sys.exit(f"the extras of the README lack a package:\n{said['flora doctor']}")
    if not (environment.home / "run/report.html").is_file():
        sys.exit("the run left no report.html")
    return environment.run(environment.python, "-c", LOOK).splitlines()


def expected(native: str) -> dict[str, Sequence[str]]:
    """Expected output of the commands."""
    return {
        "flora --version": [f"flora-core {__version__}"],
        "flora --help": ["flora run quickstart --dry-run"],
        "flora doctor": [f"flora-core         {__version__} (", f"backend native     {native}"],
        "flora run quickstart --dry-run": ["memory: together"],
        MORE[-1]: ["report: ", "aggregation error"],
    }


def build(tools: Environment, folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and from it the wheel, with nothing but the build requirements that they declare."""
    print("building", flush=True)
    tools.run(*tools.pip, "install", "build")
    tools.run(tools.python, "-m", "build", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch", metavar="REQUIREMENT", help="the torch to install")
    torch, began = parser.parse_args().torch, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flora-install-") as name:
        folder = Path(name)
        parts = [folder / part for part in ("tools", "first", "second", "cache", "dist")]
        for part in parts:
            part.mkdir()
        tools, first, second, cache, dist = parts
        if (cache_folder() / WHEEL).is_file():  # spares a download of 93 MB
            shutil.copy(cache_folder() / WHEEL, cache)
        builder = Environment(tools)
        sdist, wheel = build(builder, dist)
        has_compiler = any(map(shutil.which, ("g++", "clang++", "c++")))
        of_wheel = Environment(first, FLORA_CACHE=str(cache))
        files = check(of_wheel, torch, wheel, "runs" if has_compiler else "no C++ compiler")
        of_sdist = Environment(second, builder.python, FLORA_CACHE=str(cache), FLORA_NATIVE="0")
        others = check(of_sdist, torch, sdist, "installed with FLORA_NATIVE=0")
    if files != others:
        sys.exit(f"an sdist and a wheel install other files: {sorted(set(files) ^ set(others))}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"both install the same {len(files)} files, and the README's commands work with both: "
        f"{time.monotonic() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processor time"
    )


if __name__ == "__main__":
    main()
