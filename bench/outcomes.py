"""How every benchmark of the last run ended, written after each, so that the page can say what is missing and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.protocol import environment
from flora_core.files import atomic_write_json


class Outcomes:
    """One run's list of (test, outcome, reason, seconds); the file appears with the first of them."""

    def __init__(self, path: Path):
        self.path, self.data = path, {"tests": {}}

    def add(self, test: str, report: Any) -> None:
        """Note a pytest report; set-up and tear-down count only where they decide."""
        failed = self.data["tests"].get(test, {}).get("outcome") == "failed"
        if failed or (report.when != "call" and report.outcome == "passed"):
            return
        self.data.setdefault("environment", environment())
        found = {"outcome": report.outcome, "reason": _reason(report), "seconds": round(report.duration, 1)}
        self.data["tests"][test] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.path, self.data)


def _reason(report: Any) -> str:
    """The last line of an error, or why it was skipped."""
    if report.outcome == "passed":
        return ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash else str(report.longrepr)).split())[:300]


__all__ = ["Outcomes"]
