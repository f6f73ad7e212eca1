"""How every benchmark ended when it last ran, written after each, so that the page can say what is missing and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.harness.protocol import environment
from flora_core.common.files import atomic_write_json


class Outcomes:
    """Test -> outcome, reason, seconds and commit; what ran before stays until it runs again."""

    def __init__(self, path: Path):
        self.path, self.seen = path, set[str]()

    def add(self, test: str, report: Any) -> None:
        """Note a pytest report; set-up and tear-down count only where they decide."""
        known: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        failed = test in self.seen and known[test]["outcome"] == "failed"
        if failed or (report.when != "call" and report.outcome == "passed"):
            return
        found = {"outcome": report.outcome, "reason": _reason(report), "seconds": round(report.duration, 1)}
        self.seen.add(test)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.path, {**known, test: {**found, "commit": environment()["commit"]}})


def _reason(report: Any) -> str:
    """The last line of an error, or why it was skipped."""
    if report.outcome == "passed":
        return ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash else str(report.longrepr)).split())[:300]


__all__ = ["Outcomes"]
