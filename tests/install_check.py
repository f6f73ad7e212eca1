"""Install flora-core as the README says, from its sdist and from its wheel, each into a fresh environment, and use it.

    python -m tests.install_check --torch torch==2.13.0     about three minutes on two cores (make test-install)

The commands are the README's own block; only "." becomes the sdist or the wheel, and torch a pinned release. The second
environment has no pip, as uv makes them. Needs the network, or pip's cache.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

from flora_core import __version__
from flora_core.demo_model import WHEEL
from flora_core.files import cache_folder

ROOT = Path(__file__).resolve().parents[1]
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
import importlib.metadata, importlib.resources
from flora_kernels import native
print(native.describe())
files = {str(file) for file in importlib.metadata.files("flora-core") if "__pycache__" not in str(file)}
for name in ("flora_core/py.typed", "flora_kernels/py.typed", "flora_core/packaged_recipes/quickstart.yaml"):
    assert name in files, name
assert not [name for name in files if name.startswith(("tests", "bench", "csrc"))]
print(*sorted(name for name in files if ".dist-info" not in name), sep="\\n")
"""


def readme_commands() -> list[str]:
    """The lines of the README's block that installs, and the first commands after it."""
    (block,) = re.findall(r"```\n(pip install torch\n.*?)```", README.read_text("utf-8"), re.S)
    return block.splitlines()


class Environment:
    """A fresh virtual environment in which lines of a shell are run, in an empty folder of its own."""

    def __init__(self, folder: Path, installer: Path | None = None):
        """Make it, without a pip of its own if the Python of an `installer` is given, whose pip then installs."""
        venv.create(folder / "environment", with_pip=installer is None, symlinks=True)
        self.bin, self.home = folder / "environment/bin", folder / "home"
        self.home.mkdir()
        self.python = self.bin / "python"
        target = ("--python", str(self.python)) if installer else ()
        self.pip = [str(installer or self.python), *PIP, *target]

    def run(self, *command: str | Path, cache: Path | None = None) -> str:
        """Run a command; end this program with its output if it fails."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FLORA_"))}
        environment |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "VIRTUAL_ENV": str(self.bin.parent)}
        if cache is not None:
            environment["FLORA_CACHE"] = str(cache)
        began = time.monotonic()
        done = subprocess.run(
            [str(word) for word in command], cwd=self.home, env=environment, capture_output=True, text=True
        )
        shown = shlex.join(map(str, command)).replace("\n", " ")[:110]
        print(f"  {time.monotonic() - began:5.1f} s  {shown}", flush=True)
        if done.returncode:
            sys.exit(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def line(self, line: str, torch: str, source: Path, cache: Path) -> str:
        """Run one of the README's lines."""
        words = shlex.split(line)
        if words[:2] == ["pip", "install"]:
            wanted = [_requirement(word, torch, source) for word in words[2:]]
            return self.run(*self.pip, "install", *wanted)
        return self.run(self.bin / words[0], *words[1:], cache=cache)


def _requirement(word: str, torch: str, source: Path) -> str:
    """Replace torch by the pinned release, and the checkout's folder by what was built from it."""
    if word == "torch":
        return torch
    return re.sub(r"^\.", str(source), word)


def check(name: str, environment: Environment, torch: str, source: Path, cache: Path) -> list[str]:
    """Install and use flora-core in an environment; return the files of the installation."""
    print(f"{name}: {source.name}", flush=True)
    said = {line: environment.line(line, torch, source, cache) for line in (*readme_commands(), *MORE)}
    for line, words in expected().items():
        for word in words:
            if word not in said[line]:
                sys.exit(f"{line} does not print {word!r}:\n{said[line]}")
    if re.search(r"^extra (train|cli) .*MISSING", said["flora doctor"], re.M):
        sys.exit(f"the extras of the README lack a package:\n{said['flora doctor']}")
    if not (environment.home / "run/report.html").is_file():
        sys.exit("the run left no report.html")
    native, *files = environment.run(environment.python, "-c", LOOK).splitlines()
    print(f"  native library: {native}")
    return files


def expected() -> dict[str, Sequence[str]]:
    """What the commands print."""
    return {
        "flora --version": [f"flora-core {__version__}"],
        "flora --help": ["flora run quickstart --dry-run"],
        "flora doctor": [f"flora-core         {__version__} (", "backend native     runs"],
        "flora run quickstart --dry-run": ["memory: together"],
        MORE[-1]: ["report: ", "aggregation error"],
    }


def built(tools: Environment, folder: Path) -> Iterator[Path]:
    """Build the sdist, and the wheel from the checkout itself, with the build requirements that they declare."""
    print("building", flush=True)
    tools.run(*tools.pip, "install", "build")
    for kind, pattern in (("sdist", "*.tar.gz"), ("wheel", "*.whl")):
        tools.run(tools.python, "-m", "build", f"--{kind}", "--outdir", folder / kind, ROOT)
        (file,) = (folder / kind).glob(pattern)
        yield file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch", metavar="REQUIREMENT", help="the torch to install")
    torch = parser.parse_args().torch
    with tempfile.TemporaryDirectory(prefix="flora-install-") as name:
        folder = Path(name)
        for part in ("tools", "sdist-environment", "wheel-environment", "cache"):
            (folder / part).mkdir()
        if (cache_folder() / WHEEL).is_file():  # spares a download of 93 MB
            shutil.copy(cache_folder() / WHEEL, folder / "cache")
        tools = Environment(folder / "tools")
        sdist, wheel = built(tools, folder)
        first = check("sdist", Environment(folder / "sdist-environment"), torch, sdist, folder / "cache")
        second = check("wheel", Environment(folder / "wheel-environment", tools.python), torch, wheel, folder / "cache")
    if first != second:
        sys.exit(f"an sdist and a wheel install other files: {sorted(set(first) ^ set(second))}")
    print("sdist and wheel install the same files, and the README's commands work with both")


if __name__ == "__main__":
    main()
