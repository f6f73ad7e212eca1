"""Events of a run."""

from __future__ import annotations

from typing import Any

Event = dict[str, Any]
