"""One wording for every error about names, choices and ranges: name, expected, got, remedy.

It imports nothing heavy, so that the command line can answer a wrong argument at once; `tensor_checks` has what needs
torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word is meant, or list them all."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"


def check_choice(name: str, value: str, known: Iterable[str]) -> str:
    """Check that a word is one of the known ones."""
    known = list(known)
    if value not in known:
        # Looking for what is meant takes longer than a small merge.
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}; {nearest(str(value), known)}")
    return value


def check_name(name: Any) -> str:
    """Check a client's name: text of one line that UTF-8 can hold, with something to see in it."""
    good = isinstance(name, str) and bool(name.strip()) and name.isprintable()
    if not good:
        raise ValueError(f"a client's name must be text of one line, got {name!r:.80}; such as 'St. Mary Hospital'")
    return name


def check_flag(name: str, value: Any) -> None:
    """Check for True or False: a word such as 'no' would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value: Any, low: float, high: float = float("inf"), *, whole: bool = False) -> None:
    """Check that a finite number lies in [low, high]; ``whole`` asks for an int."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {'a whole number' if whole else 'a number'}, got {value!r}")
    bounds = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
    require(
        low <= value <= high and value == value and abs(value) != float("inf"), f"{name} must be {bounds}, got {value}"
    )
