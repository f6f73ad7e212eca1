"""Errors where a package of an extra is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flora_core.common import extras

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def without(monkeypatch):
    """Make imports of these modules fail."""
    return lambda *names: [monkeypatch.setitem(sys.modules, name, None) for name in names]


def test_the_table_is_that_of_the_package():
    declared = PROJECT["optional-dependencies"]
    assert set(extras.EXTRAS) == set(declared) - {"dev"}
    for name, requirements in extras.EXTRAS.items():
        assert list(requirements) == [one for one in declared[name] if not one.startswith("flora-core[")]


def test_no_advice_asks_an_index_for_flora_core():
    """It is on none: advice names the packages, or the checkout's folder."""
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "flora_core").rglob("*.py"),
        *(ROOT / "tests").glob("*.py"),
    ]
    found = [page for page in pages if re.search(r"install [\"']?flora-core", page.read_text("utf-8"))]
    assert not found


def test_names_every_missing_package_and_the_command(without):
    extras.require_extras("a run", "cli")
    without("yaml", "accelerate", "rich")
    assert extras.missing("demo", "cli") == ["accelerate>=1.1", "rich>=13", "pyyaml>=6"]
    with pytest.raises(ImportError, match=r"a run needs rich, pyyaml: .*install 'rich>=13' 'pyyaml>=6'$"):
        extras.require_extras("a run", "cli")


def test_a_failed_import_gets_its_installation(without):
    without("yaml", "gguf")
    error = ImportError("No module named 'yaml.x'", name="yaml.x")
    assert extras.remedy(error, "flora run").startswith("flora run needs pyyaml: ")
    assert extras.remedy(error, "flora run", "cli", "demo").startswith("flora run needs pyyaml, gguf: ")


def test_other_failures_of_an_import_keep_their_text():
    for error in (
        ImportError("libfoo.so:\n not found", name="rich"),
        ImportError("why", name="mine"),
        ImportError("why"),
    ):
        assert extras.remedy(error, "flora run", "cli") == " ".join(str(error).split())


def test_without_pip_the_command_is_uvs(monkeypatch):
    monkeypatch.setattr(extras, "has_pip", lambda: False)
    monkeypatch.setattr(extras.shutil, "which", lambda name: f"/bin/{name}")
    assert extras.install_command(["rich>=13"]) == f"uv pip install --python {sys.executable} 'rich>=13'"
    monkeypatch.setattr(extras.shutil, "which", lambda name: None)
    assert extras.install_command(["rich>=13"]) == "pip install 'rich>=13'"


def test_the_command_line_says_what_a_core_installation_lacks():
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
        "sys.modules.update(yaml=None, transformers=None)\n"
        "from flora_core.cli import main\nsys.exit(main(['run', 'quickstart']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flora: flora run needs pyyaml, transformers: ")
    assert done.stderr.endswith("install 'pyyaml>=6' 'transformers>=5.0'\n")
