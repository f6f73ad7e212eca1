"""A folder that is filled over several attempts and appears at its place all at once.

.merging-NAME/          beside the target NAME
    lock                held by the process that works here
    plan.json           what is being made; another plan starts anew
    model/              becomes NAME by one rename
        FILE.partial    grows in order; FILE once it is whole and on the disk
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..common import atomic_write_json, explained, locked, parse_json, publish_dir

PARTIAL = ".partial"
_KEPT = "what is done so far is kept, and the same command goes on from there"


class Staging:
    """The folder beside ``target`` in which it is made.

    Args:
        target: Where the folder shall appear.
    """

    def __init__(self, target: Path):
        self.target = Path(os.path.abspath(target))
        self.folder = self.target.with_name(f".merging-{self.target.name}")
        self.model = self.folder / "model"
        self.notes = self.folder / "notes.jsonl"

    @contextmanager
    def opened(self, plan: Mapping[str, Any]) -> Iterator[None]:
        """Keep other processes out, and keep what an earlier attempt at the same plan has done.

        Raises:
            BlockingIOError: If another process works here.
            SaveError: If the system refuses; what is done is kept.
        """
        with self._locked(), explained(self.target, _KEPT):
            self._begin(plan)
            try:
                yield
            except (ValueError, TypeError):
                # What was made cannot be right, and a second attempt would fail likewise.
                shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self.folder / "lock", self.target, "is making")

    def _begin(self, plan: Mapping[str, Any]) -> None:
        path, now = self.folder / "plan.json", {**plan, "boot": _boot()}
        try:
            before = parse_json(path, path.read_bytes())
        except (OSError, ValueError):
            before = {}
        if {**before, "boot": ""} != {**now, "boot": ""}:
            shutil.rmtree(self.model, ignore_errors=True)
            self.notes.unlink(missing_ok=True)
        elif before["boot"] != now["boot"] or not now["boot"]:
            # A file's length tells what a killed process wrote, not what a machine that lost power did.
            for partial in self.model.glob(f"*{PARTIAL}"):
                partial.unlink()
        if before != now:
            atomic_write_json(path, now)
        self.model.mkdir(exist_ok=True)

    def publish(self) -> None:
        """Make the folder appear at its place, and remove the rest."""
        publish_dir(self.model, self.target)
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        """Remove what a process left that was killed between publishing and cleaning up."""
        if self.folder.is_dir():
            with self._locked():
                shutil.rmtree(self.folder, ignore_errors=True)


def _boot() -> str:
    """An identifier of this start of the machine; empty where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
