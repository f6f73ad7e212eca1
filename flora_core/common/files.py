"""Files that are either whole or not there: write beside the target, fsync, rename.

A writer killed at any instant leaves the target as it was, plus a ``.tmp-*`` entry that readers ignore
and the next writer of the same target removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TEMPORARY = ".tmp-"
_OLD = ".tmp-old-"
_counter = itertools.count()
_LONGEST_NAME = 100
# Windows keeps these for devices, with any suffix.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3])(\.|$)")
_in_flight: set[Path] = set()

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space and try again",
    errno.EDQUOT: "the disk quota is used up: free some space and try again",
    errno.EFBIG: "the file is larger than this file system or process may write: choose another place",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.EACCES: "no permission to write there: choose another place or change its permissions",
    errno.EPERM: "no permission to write there: choose another place or change its permissions",
    errno.ENOLCK: "its file system has no locks: choose a folder on a local disk",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another place",
}


class SaveError(OSError):
    """A file could not be written; what was there before is unchanged."""


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str], *, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """Fill a new folder that appears at ``path`` all at once, or not at all.

    Args:
        path: The folder to make; missing parents are made too.
        replaceable: Names of entries that an existing folder may hold; a folder that holds nothing else is
            replaced as a whole.
    Yields:
        A temporary folder in the same parent, to be filled.
    Raises:
        FileExistsError: If ``path`` holds anything that is not ``replaceable``.
        SaveError: If writing fails; ``path`` is then as it was.
    """
    target = Path(os.path.abspath(path))
    with explained(target):
        _check_replaceable(target, replaceable)
        target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(target) as temporary:
        temporary.mkdir()
        yield temporary
        publish_dir(temporary, target)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that appears at ``path`` whole, or not at all; an existing file is replaced.

    Raises:
        SaveError: If writing fails; an existing file is then as it was.
    """
    target = Path(os.path.abspath(path))
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(target) as temporary:
        temporary.write_bytes(data)
        _fsync(temporary)
        os.replace(temporary, target)
        _fsync(target.parent)


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON (sorted keys, UTF-8, a final newline) with ``atomic_write_bytes``.

    Raises:
        ValueError: If the value holds NaN or infinity, which JSON does not have.
        SaveError: If writing fails; an existing file is then as it was.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, not atomically: for use inside ``atomic_dir``.

    Raises:
        OSError: If writing fails, with the system's error number, which safetensors hides in a text.
    """
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with system_errors(path):
        save_file(contiguous, path, metadata=dict(metadata or {"format": "pt"}))


def folder_names(names: Iterable[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Name a folder for each name, such that they differ on every file system.

    A name of letters, digits, ``.``, ``_`` and ``-`` stays as it is. Another one has its other characters replaced by
    ``-``; where that, or upper and lower case, leaves two alike, or a name is too long or a system's own, a digest of
    the name is added. The result depends on the set of names alone.

    Args:
        names: Any texts.
        taken: Names that the folder's parent keeps for itself.
    Returns:
        Name -> folder, in the order of the names.

    Example:
        >>> from flora_core.common.files import folder_names
        >>> folder_names(["St. Mary Hospital", "a", "A"])
        {'St. Mary Hospital': 'St.-Mary-Hospital', 'a': 'a-ca978112', 'A': 'A-559aead0'}
    """
    plain = {name: _plain_name(name) for name in names}
    uses = Counter(_folded(part) for part in (*taken, *plain.values()))
    return {
        name: _with_digest(part, name) if _needs_digest(part) or uses[_folded(part)] > 1 else part
        for name, part in plain.items()
    }


def _plain_name(name: str) -> str:
    """Replace what some file system does not keep in a name."""
    text = unicodedata.normalize("NFC", name)
    kept = "".join(ch if ch in "._-" or unicodedata.category(ch)[0] in "LNM" else "-" for ch in text)
    # Windows drops dots at the end; a dot in front hides a file.
    return kept.lstrip(".") if kept.strip(".-") else ""


def _needs_digest(part: str) -> bool:
    too_long = len(part.encode()) > _LONGEST_NAME
    return not part or part.endswith(".") or too_long or bool(_DEVICE.match(part.lower()))


def _with_digest(part: str, name: str) -> str:
    """Name a folder by the beginning of ``part`` and a digest of the whole ``name``."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    beginning = part.encode()[:_LONGEST_NAME].decode(errors="ignore").strip(".-") or "unnamed"
    # A device's name ends at its first dot.
    return f"{beginning.replace('.', '-') if _DEVICE.match(beginning.lower()) else beginning}-{digest}"


def _folded(name: str) -> str:
    """Key of a name on a file system that ignores case."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


@contextlib.contextmanager
def system_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Tell what safetensors meets while it writes ``path`` as the system does.

    Raises:
        OSError: In place of a ``SafetensorError`` that hides one.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


@contextlib.contextmanager
def locked(path: Path, target: Path, doing: str) -> Iterator[None]:
    """Hold the lock file ``path`` against other processes, in a folder that is made if it is not there.

    Args:
        path: The lock file. Who holds it stands in a file beside it: Windows lets no other process read what is locked.
        target: What the lock protects, for errors.
        doing: What its holder does to the target: "works in".
    Raises:
        BlockingIOError: If another process holds it.
        SaveError: If nothing can be written or locked there.
    """
    from filelock import FileLock, Timeout

    lock, holder = FileLock(path, timeout=0), path.with_name(f"{path.name}-holder")
    with explained(target), contextlib.suppress(Timeout):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    if not lock.is_locked:
        who = holder.read_text() if holder.is_file() else "just started"
        raise BlockingIOError(f"another process ({who}) {doing} {target}: wait until it ends, or choose another out")
    try:
        with explained(target):
            holder.write_text(f"pid {os.getpid()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Give an unused path beside the target; nothing is left of it when the block ends, well or badly."""
    _remove_leftovers(target)
    temporary = target.with_name(f"{TEMPORARY}{os.getpid()}-{next(_counter)}-{target.name}")
    _in_flight.add(temporary)
    try:
        with explained(target):
            yield temporary
    finally:
        _remove(temporary)
        _in_flight.discard(temporary)


@contextlib.contextmanager
def explained(target: Path, kept: str = "what was saved before is unchanged") -> Iterator[None]:
    """Explain whatever the system refuses while ``target`` is saved; ``kept`` says what is left of it.

    Raises:
        SaveError: In place of another ``OSError``, with a remedy.
    """
    try:
        yield
    except (SaveError, FileExistsError):
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the path and the disk, then try again")
        text = f"could not save {target}: {error.strerror or error}; {remedy}; {kept}"
        raise SaveError(error.errno, text) from error


def publish_dir(made: Path, target: Path) -> None:
    """Wait until a folder and all that is in it are on the disk, then let it appear at its place on the same disk."""
    for folder, _, names in os.walk(made):
        for name in names:
            _fsync(Path(folder, name))
        _fsync(Path(folder))
    _swap_in(made, target)
    _fsync(target.parent)


def _check_replaceable(target: Path, replaceable: Collection[str]) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file, and a folder is to be saved there: choose another place")
    names = {entry.name for entry in target.iterdir() if not entry.name.startswith(TEMPORARY)}
    foreign = sorted(names - set(replaceable))
    if foreign:
        raise FileExistsError(f"{target} already holds {', '.join(foreign[:5])}: choose a new or an empty folder")


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of this target left; put an old folder back if its replacement never came."""
    old = target.with_name(_OLD + target.name)
    if old.exists():
        _remove(old) if target.exists() else old.rename(target)
    for leftover in target.parent.glob(f"{TEMPORARY}*-{_escape(target.name)}"):
        writer = re.fullmatch(rf"{re.escape(TEMPORARY)}(\d+)-\d+-{re.escape(target.name)}", leftover.name)
        if writer and leftover not in _in_flight and not _is_other_live_process(int(writer[1])):
            _remove(leftover)


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_other_live_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    if os.name == "nt":
        return _is_live_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _is_live_windows(pid: int) -> bool:
    """Ask Windows, where ``os.kill(pid, 0)`` would send Ctrl-C."""
    import ctypes

    kernel: Any = ctypes.windll.kernel32  # pyright: ignore[reportAttributeAccessIssue]
    query, still_active, code = 0x1000, 259, ctypes.c_ulong()
    handle = kernel.OpenProcess(query, False, pid)
    if not handle:
        return False
    try:
        return bool(kernel.GetExitCodeProcess(handle, ctypes.byref(code))) and code.value == still_active
    finally:
        kernel.CloseHandle(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _swap_in(temporary: Path, target: Path) -> None:
    """Rename onto the target; a folder that is there steps aside first, where ``_remove_leftovers`` finds it."""
    try:
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        old = target.with_name(_OLD + target.name)
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        _remove(old)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
