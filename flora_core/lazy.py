"""Packages whose names are imported on first use, so that what needs no torch does not wait for it.

The names are those that the package's ``__init__.py`` imports under ``TYPE_CHECKING``: type checkers and readers see an
ordinary import (the idea of Scientific Python's SPEC 1).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def face(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the ``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    ``package`` is its ``__name__`` and ``file`` its ``__file__``. A name that it does not have raises AttributeError
    with those that it has.
    """
    homes = _homes(Path(file).read_text(encoding="utf-8"))
    names = sorted(homes)

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has: {', '.join(names)}")
        home = homes[name]
        value = (
            import_module(f".{name}", package) if home is None else getattr(import_module(f".{home}", package), name)
        )
        setattr(sys.modules[package], name, value)
        return value

    return find, lambda: sorted({*vars(sys.modules[package]), *names}), names


def _homes(source: str) -> dict[str, str | None]:
    """Map each name to the module that it is imported from, a submodule to None."""
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports for alias in node.names}
