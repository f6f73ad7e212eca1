"""Paths of data: a file, a folder with all its data files, a glob, or a list of these."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = "JSON lines, a JSON list, CSV, TSV, parquet or arrow"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
_PACKED = (".zst", ".zip", ".bz2", ".xz", ".7z", ".tar", ".tgz", ".xls", ".xlsx")
# Files that ``datasets`` writes beside saved data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")


def is_path(source: Any) -> bool:
    """Return whether a source is a path or a list of paths, and not data itself."""
    if isinstance(source, (list, tuple)):
        return bool(source) and all(isinstance(item, (str, os.PathLike)) for item in source)
    return isinstance(source, (str, os.PathLike))


def data_files(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """List the files of a path, a folder (subfolders too), a glob, or a list of these.

    Raises:
        FileNotFoundError: If one of them does not exist, or holds no data.
        ValueError: If a folder holds data that cannot be read, or a file is given twice.
    """
    if isinstance(source, (str, os.PathLike)):
        return _expand(source)
    files: list[Path] = []
    for item in source:
        for path in _expand(item, " in a list of files; a list of texts is written [{'text': ...}, ...]"):
            if path in files:
                raise ValueError(
                    f"data file {path} is given twice: a record could be held out and trained on at once; list it once"
                )
            files.append(path)
    return files


def _expand(source: str | os.PathLike[str], where: str = "") -> list[Path]:
    """List the files of one path; ``where`` is added to the error that there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_files(path)
    if path.is_file():
        return [path]
    if path.exists():
        raise ValueError(f"data file {source} is a pipe or a device; write it to a file first")
    if not set("*?[") & set(str(path)):
        raise FileNotFoundError(
            f"data file {source} does not exist{where}; give a file, a folder or a glob of {KINDS} "
            f"(relative paths start at {Path.cwd()})"
        )
    found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [file for match in found for file in (_folder_files(match) if match.is_dir() else [match])]
    if not files:
        raise FileNotFoundError(f"no data file matches {source} (relative paths start at {Path.cwd()})")
    # `**` finds a folder and what is in it.
    return list(dict.fromkeys(files))


def _folder_files(folder: Path) -> list[Path]:
    """List a folder's data files in the order of their paths; hidden files and descriptions of data are none."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise ValueError(f"{folder} holds several splits ({splits}); give the folder of one, such as {folder}/train")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    packed = [path for path in files if kind_of(path) in _PACKED]
    if packed:
        raise ValueError(
            f"{packed[0]} cannot be read; unpack it to {KINDS} (gzip is read as it stands), or move it away"
        )
    found = [path for path in files if kind_of(path) in SUFFIXES and path.name not in _DESCRIPTIONS]
    if not found:
        raise FileNotFoundError(f"folder {folder} holds no data files; their names end in {', '.join(SUFFIXES)}")
    return found


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def kind_of(path: Path) -> str:
    """The suffix that names the kind of a file, .gz set aside."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
