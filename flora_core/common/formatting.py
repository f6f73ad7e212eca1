"""Numbers as text: bytes, seconds, errors; and the tables that they stand in."""

from __future__ import annotations

Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def show_bytes(size: float | None) -> str:
    """Write a size for people: 3.4 MB."""
    if size is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def show_seconds(seconds: float | None) -> str:
    """Write a duration for people: 2 min 05 s."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def show_error(value: float | None) -> str:
    """Write a relative error: 1.2e-07, and 0 for none at all."""
    return "0" if value == 0 else show_number(value, ".1e")


def show_number(value: float | None, spec: str = ".3f") -> str:
    """Write a number, or a dash where there is none."""
    return "-" if value is None else format(value, spec)
