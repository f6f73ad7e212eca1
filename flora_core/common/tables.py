"""Tables on a terminal, by rich."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def print_tables(tables: list[Table], stream: TextIO | None = None) -> None:
    """Print tables on `stream` (standard output)."""
    from rich.console import Console
    from rich.table import Table as RichTable

    out: TextIO = sys.stdout if stream is None else stream
    for title, columns, full in tables:
        rows = [
            [_shortened(cell) if name == "client" else cell for name, cell in zip(columns, row, strict=True)]
            for row in full
        ]
        table = RichTable(title=title, title_justify="left")
        for column, cells in zip(columns, zip(*rows, strict=True) if rows else [()] * len(columns), strict=True):
            table.add_column(column, justify="right" if _numbers(cells) else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        # A file or pipe has no width of its own; wrapped cells would be unreadable there, and cut ones worse.
        console = Console(file=out, width=None if out.isatty() else 1000, markup=False, highlight=False)
        console.print(table)


def _shortened(name: str, length: int = 40) -> str:
    """Return a name that fits a column: clients may have names of any length, which files hold in full."""
    return name if len(name) <= length else f"{name[: length - 3]}..."


def _numbers(cells: Sequence[str]) -> bool:
    """Return whether a column holds numbers with units, which are read by their last digits."""
    return bool(cells) and all(cell[:1] in "+-.0123456789" for cell in cells if cell)
