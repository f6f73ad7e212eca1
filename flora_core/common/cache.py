"""The cache folder of the engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def cache_folder() -> Path:
    """Return the folder of all that is kept between runs: the demo's model, measured choices of kernels.

    It is $FLORA_CACHE; else flora/ in $XDG_CACHE_HOME; else ~/.cache/flora. An empty variable counts as unset.
    """
    if os.environ.get("FLORA_CACHE"):
        return Path(os.environ["FLORA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flora"
