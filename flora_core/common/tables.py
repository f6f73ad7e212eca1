"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table as RichTable

from .formatting import Table


def print_tables(tables: list[Table], stream: TextIO | None = None) -> None:
    """Print tables on `stream` (standard output)."""
    console = Console(file=stream, markup=False, highlight=False)
    if not console.file.isatty():
        # A file or pipe has no width of its own; wrapped cells would be unreadable there, and cut ones worse.
        console.width = 1000
    for title, columns, rows in tables:
        table = RichTable(title=title, title_justify="left")
        for column, cells in zip(columns, zip(*rows, strict=True) if rows else [()] * len(columns), strict=True):
            table.add_column(column, justify="right" if _numbers(cells) else "left", overflow="fold")
        for row in rows:
            table.add_row(
                *(_shortened(cell) if name == "client" else cell for name, cell in zip(columns, row, strict=True))
            )
        console.print(table)


def _shortened(name: str, length: int = 40) -> str:
    """Return a name that fits a column: clients may have names of any length, which files hold in full."""
    return name if len(name) <= length else f"{name[: length - 3]}..."


def _numbers(cells: Sequence[str]) -> bool:
    """Return whether a column holds numbers with units, which are read by their last digits."""
    return bool(cells) and all(cell[:1] in "+-.0123456789" for cell in cells if cell)
