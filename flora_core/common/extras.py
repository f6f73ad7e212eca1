"""The optional packages: which extra brings which, what is missing here, and the command that installs it.

A remedy names the missing packages themselves, never `flora-core[extra]`: that would work only where flora-core itself
comes from an index.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Iterable

# As pyproject.toml has them, without flora-core's own name (tests/project/test_packaging.py compares).
EXTRAS = {
    "train": ("transformers>=5.0", "safetensors>=0.5", "filelock>=3.24"),
    "cli": ("rich>=13", "pyyaml>=6", "matplotlib>=3.8"),
    "demo": ("gguf>=0.13", "accelerate>=1.1", "rich>=13"),
    "data": ("datasets>=4", "pyarrow>=17"),
    "privacy": ("dp-accounting>=0.6",),
    "flower": ("flwr>=1.41,<1.42", "cryptography"),
}
# Packages that are imported under another name than they are installed under.
_IMPORTED_AS = {"pyyaml": "yaml", "dp-accounting": "dp_accounting"}


def name_of(requirement: str) -> str:
    """Return the package that a requirement asks for: `rich>=13` asks for rich."""
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower()


def versions(extra: str) -> dict[str, str | None]:
    """Return the packages of an extra with their installed versions; None for a missing one."""
    return {name_of(requirement): version_of(name_of(requirement)) for requirement in EXTRAS[extra]}


def missing(*extras: str) -> list[str]:
    """Return the requirements of some extras whose packages cannot be imported."""
    named = dict.fromkeys(requirement for extra in extras for requirement in EXTRAS[extra])
    return [requirement for requirement in named if not _is_importable(requirement)]


def require_extras(user: str, *extras: str) -> None:
    """Check that the packages of some extras are installed.

    Args:
        user: The name of what needs them, to begin the message with.
        extras: Names of `EXTRAS`.
    Raises:
        ImportError: With the missing packages and the command that installs them.
    """
    lacking = missing(*extras)
    if lacking:
        raise ImportError(f"{user} needs {', '.join(map(name_of, lacking))}: {install_command(lacking)}")


def remedy(error: ImportError, user: str, *extras: str) -> str:
    """Describe a failed import; if the package is one of `EXTRAS`, with the command that installs what is missing.

    Args:
        error: What the import raised.
        user: The name of what needs the package.
        extras: The extras that `user` needs: whatever else they lack is installed by the same command.
    """
    module = (error.name or "").partition(".")[0]
    named = [requirement for every in EXTRAS.values() for requirement in every if _import_name(requirement) == module]
    if not module or not named or _is_importable(named[0]):
        return " ".join(str(error).split())
    lacking = list(dict.fromkeys([*named, *missing(*extras)]))
    return f"{user} needs {', '.join(map(name_of, lacking))}: {install_command(lacking)}"


def install_command(requirements: Iterable[str]) -> str:
    """Return the command line that installs requirements into this environment."""
    words = ["pip", "install"]
    if not has_pip() and shutil.which("uv"):
        words = ["uv", "pip", "install", "--python", sys.executable]
    return shlex.join([*words, *requirements])


def has_pip() -> bool:
    """Return whether this environment has pip; those that uv makes have none."""
    # Past sys.meta_path: setuptools puts a finder there that changes distutils when pip is looked for.
    return importlib.machinery.PathFinder.find_spec("pip") is not None


def _import_name(requirement: str) -> str:
    name = name_of(requirement)
    return _IMPORTED_AS.get(name, name.replace("-", "_"))


def _is_importable(requirement: str) -> bool:
    name = _import_name(requirement)
    if name in sys.modules:  # find_spec raises for a module without a spec, which a program may have put there
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def version_of(name: str) -> str | None:
    """Return the installed version of a package; None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
