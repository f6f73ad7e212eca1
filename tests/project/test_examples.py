"""Every example runs as it stands."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(p for p in EXAMPLES.glob("*.py") if p.name != "tiny.py"), ids=lambda p: p.stem)
# transformers 5.23 warns about its own deprecated names here.
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning")
def test_example(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_every_example_is_listed():
    readme = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name == "tiny.py" or f"`{path.name}`" in readme
