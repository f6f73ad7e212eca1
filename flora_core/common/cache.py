"""Folders that are not the user's: the engine's cache, and files that travel with the package."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of all that is kept between runs: the demo's model, measured choices of kernels.

    It is $FLORA_CACHE; else flora/ in $XDG_CACHE_HOME; else ~/.cache/flora. An empty variable counts as unset.
    """
    if os.environ.get("FLORA_CACHE"):
        return Path(os.environ["FLORA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flora"


def packaged(name: str, in_checkout: str) -> Path:
    """Return a folder of files that travel with the package: inside it where it is installed, else the checkout's."""
    package = Path(__file__).parents[1]
    installed = package / f"packaged_{name}"
    return installed if installed.is_dir() else package.parent / in_checkout
