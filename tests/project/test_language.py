"""Language of the code: how docstrings begin."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("folder", ["flora_core", "kernels", "bench", "tests", "examples"])
def test_docstrings_begin_with_a_noun_phrase_or_an_imperative(folder: str):
    questions = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)) and re.match(r"What\b|Whether\b", text)
    ]
    assert not questions
