"""Every example runs as it stands: the scripts in ``examples/`` and those in docstrings."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.aggregation import STRATEGIES
from tests.support.federations import make_clients, make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FACES = ("flora_core", "flora_core.ops", "flora_core.aggregation", "flora_core.testing")
PARSER = doctest.DocTestParser()

# transformers 5.23 warns about its own deprecated names here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning")


@pytest.mark.parametrize("path", sorted(p for p in EXAMPLES.glob("*.py") if p.name != "tiny.py"), ids=lambda p: p.stem)
def test_example(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_every_example_is_listed():
    readme = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name == "tiny.py" or f"`{path.name}`" in readme


def _docstrings() -> Iterator[Any]:
    """Parameters of every docstring with examples, by file and name."""
    for path in sorted(path for folder in ("flora_core", "kernels") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if ">>>" in text else ():
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ">>>" in (
                ast.get_docstring(node) or ""
            ):
                name = f"{path.relative_to(ROOT)}:{getattr(node, 'name', 'module')}"
                yield pytest.param(ast.get_docstring(node), id=name)


def _make_updates() -> list[flora.ClientUpdate]:
    """Updates of two clients, of ranks 2 and 3 and weights 1 and 3, for one module of the model."""
    random, module = torch.Generator().manual_seed(0), "model.layers.0.self_attn.q_proj"

    def update(client: str, rank: int, scaling: float, weight: float) -> flora.ClientUpdate:
        A_RK, B_RN = (torch.randn(rank, 16, generator=random) for _ in "AB")
        return flora.ClientUpdate(client, {module: (A_RK, B_RN)}, {module: scaling}, weight)

    return [update("a", 2, 2.0, 1.0), update("b", 3, 1.0, 3.0)]


# Names that an example in a docstring may use besides flora and torch; each is made where it is used.
MAKERS: dict[str, Callable[[], Any]] = {
    "model": make_model,
    "tokenizer": make_tokenizer,
    "clients": make_clients,
    "updates": _make_updates,
}


@pytest.fixture
def registered() -> Iterator[None]:
    """Keep the strategies that an example registers out of the other tests."""
    before = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


@pytest.mark.parametrize("docstring", list(_docstrings()))
def test_docstring_example(docstring: str, tmp_path, monkeypatch, registered):
    monkeypatch.chdir(tmp_path)
    used = set(re.findall(r"\w+", "".join(example.source for example in PARSER.get_examples(docstring))))
    names = {"flora": flora, "torch": torch, **{name: make() for name, make in MAKERS.items() if name in used}}
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(PARSER.get_doctest(docstring, names, "docstring", None, 0), out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize(
    ("face", "name"), [(face, name) for face in FACES for name in import_module(face).__all__], ids=str
)
def test_public_name_has_an_example(face: str, name: str):
    value = inspect.unwrap(getattr(import_module(face), name))
    # A constant or an alias has no docstring of its own: its package's has the example.
    documented = inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value)
    docstring = inspect.getdoc(value if documented else import_module(face)) or ""
    sources = (example.source for example in PARSER.get_examples(docstring))
    code = "".join(source for source in sources if not source.startswith(("import ", "from ")))
    assert re.search(rf"\b{name}\b", code), f"the docstring of {face}.{name} needs an example that uses it"


def test_no_example_is_skipped():
    files = [path for folder in ("flora_core", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert not [str(path) for path in files if "doctest: +SKIP" in path.read_text()]
