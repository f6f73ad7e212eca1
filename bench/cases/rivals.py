"""The rivals behind one interface: a name, how it is set up and why that is fair, and a maker.

A rival that is not installed, fails or runs out of memory is noted with the reason; the others go on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.harness.protocol import Missing, Result

FROZEN = "frozen base"


@dataclass(frozen=True)
class Rival:
    """A contender that is not ours.

    Args:
        name: In tables and files.
        fair: How it is set up, by whose documentation, and what it is spared.
        make: From a question's setting to a contender; raises ``Missing`` with the reason where it cannot take part.
    """

    name: str
    fair: str
    make: Callable[[Any], Any]


def ready(rivals: Iterable[Rival], setting: Any, result: Result) -> dict[str, Any]:
    """Make every rival that can take part; the result tells why the others cannot."""
    made = {}
    for rival in rivals:
        try:
            made[rival.name] = rival.make(setting)
        except Exception as error:  # whatever a foreign package raises is the reason to go on without it
            result.leave_out(rival.name, error)
    return made


def need_package(name: str, remedy: str) -> None:
    """Raise ``Missing`` unless a package is there."""
    if importlib.util.find_spec(name) is None:
        raise Missing(f"the package {name} is not installed ({remedy})")


def need_gpu(setting: Any, why: str) -> None:
    """Raise ``Missing`` on a CPU."""
    if setting.device.type != "cuda":
        raise Missing(f"needs a GPU: {why}")


def need_bfloat16(setting: Any) -> None:
    """Raise ``Missing`` where the base is float32: adapters of 16 bits would then only add casts."""
    if setting.dtype.itemsize != 2:
        raise Missing("the base is float32 on a CPU; adapters of 16 bits would only add casts")


__all__ = ["FROZEN", "Rival", "need_bfloat16", "need_gpu", "need_package", "ready"]
