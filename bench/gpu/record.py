"""One JSON and one archive of a run on a lent GPU, written anew after every step, within the time that there is.

A step that fails, or is stopped at its limit, leaves what it had found so far; the steps after it run all the same.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.deadline import within
from bench.harness.machine import environment
from bench.harness.protocol import finite
from flora_core.common.files import atomic_write_bytes

# With less than this left nothing begins: its imports alone would take as long.
LEAST_SECONDS = 2.0


class Record:
    """Findings of a run, step by step.

    Args:
        out: The folder that ``NAME.json`` and ``NAME.tar.gz`` are written to.
        name: Of the run.
        minutes: No step begins after so many minutes, and none goes on.
    Attributes:
        folder: What steps leave there (logs, reports, JSON of their own) is in the archive.
        data: What is in the JSON.
    """

    def __init__(self, out: Path, name: str, minutes: float):
        self.out, self.name = out, name
        self.end = time.monotonic() + 60 * minutes
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.data: dict[str, Any] = {"name": name, "minutes": minutes, "setting": environment(), "steps": {}}
        out.mkdir(parents=True, exist_ok=True)
        self.save()

    @property
    def seconds_left(self) -> float:
        """Until the end of the run."""
        return self.end - time.monotonic()

    def step(self, name: str, run: Callable[[dict[str, Any]], None], seconds: float = 3600.0) -> dict[str, Any]:
        """Run a step for at most so many seconds; it fills the mapping that it is given, which is also the result."""
        found: dict[str, Any] = {}
        self.data["steps"][name] = found
        began, limit = time.monotonic(), min(seconds, self.seconds_left)
        if limit < LEAST_SECONDS:
            found["not begun"] = "out of time"
        else:
            try:
                with within(limit, name):
                    run(found)
            except Exception as error:  # the steps after it may still find something
                found |= {"green": False, "error": f"{type(error).__name__}: {error}"[:2000]}
                (self.folder / f"{file_name(name)}.error.txt").write_text(traceback.format_exc())
        found["seconds"] = round(time.monotonic() - began, 2)
        self.save()
        print(f"{name} ({found['seconds']:.1f} s): {self._line(found)}", flush=True)
        return found

    @staticmethod
    def _line(found: dict[str, Any]) -> str:
        shown = {key: value for key, value in found.items() if key != "rows"}
        return json.dumps(shown, default=str)[:700]

    def save(self) -> None:
        """Write both files; each is whole at any time."""
        text = json.dumps(finite(self.data), indent=1, default=str, allow_nan=False) + "\n"
        atomic_write_bytes(self.out / f"{self.name}.json", text.encode())
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(self.folder, arcname=self.name)
        atomic_write_bytes(self.out / f"{self.name}.tar.gz", packed.getvalue())

    def close(self) -> bool:
        """Write both files a last time; whether every step was green."""
        self.data["green"] = green = all(step.get("green", True) for step in self.data["steps"].values())
        self.save()
        shutil.rmtree(self.folder, ignore_errors=True)
        return green


def file_name(text: str) -> str:
    """A name in letters, digits, dots and dashes."""
    return "".join(ch if ch.isalnum() or ch in ".-" else "-" for ch in text)


__all__ = ["Record", "file_name"]
