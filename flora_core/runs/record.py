"""run.json: what a run is, compared when it is resumed, and where it ran."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common import atomic_write_json, differences, folder_names, parse_json, require
from ..ops import autotune
from .fingerprint import ROUNDS as NUM_ROUNDS
from .fingerprint import check_rounds

RUN = "run.json"


class RunRecord:
    """One run's record.

    Args:
        folder: The run's folder.
        reserved: Names in a round's folder that no client's folder may have.
    """

    def __init__(self, folder: Path, reserved: tuple[str, ...]):
        self.folder, self.reserved = folder, reserved
        self.facts: dict[str, Any] = {}

    def begin(self, identity: Mapping[str, Any], environment: Mapping[str, Any], start: str = "") -> list[str]:
        """Write run.json for a new run, or make sure that the run in the folder is this one.

        Args:
            identity: What makes the run what it is, by dotted name (``flora_core.runs.fingerprint``).
            environment: What else its last bits depend on.
            start: Digest of the weights that a new run begins with.
        Returns:
            One warning for each part of the environment that is not as it was.
        Raises:
            ValueError: If the folder holds another run; the fields that differ are named. More rounds are no other run
                where those already done would be the same (``extend``).
        """
        if not (self.folder / RUN).exists():
            folders = folder_names(identity.get("clients", []), taken=self.reserved)
            self._write(identity=identity, environments=[environment], start=start, folders=folders, finished=False)
            return []
        self.facts = self._read()
        autotune.use(self.facts["fuse"])
        both = [{name: one[name] for name in one if name != NUM_ROUNDS} for one in (self.facts["identity"], identity)]
        fields = differences(*both)
        some = "; ".join(fields[:8]) + (f"; and {len(fields) - 8} more" if len(fields) > 8 else "")
        require(
            not fields,
            f"{self.folder} holds a run with another configuration: {some}. Choose another out, or set these back to "
            "go on with that run",
        )
        more = check_rounds(self.facts["identity"], identity)
        changes = differences(self.facts["environments"][-1], environment)
        if (self.finished and not more) or not changes:
            return []
        self._write(environments=[*self.facts["environments"], environment])
        return [f"{text} since the run stopped: it may not repeat an unstopped run bit for bit" for text in changes]

    def extend(self, identity: Mapping[str, Any]) -> list[str]:
        """Write down that the run goes on to more rounds than it had; a note of it, if it does."""
        was, now = self.facts["identity"].get(NUM_ROUNDS), identity.get(NUM_ROUNDS)
        if was == now:
            return []
        self._write(identity=identity, finished=False)
        return [f"federation.rounds was {was}, is {now}: the run goes on, and its results are replaced at its end"]

    def check_start(self, start: str) -> None:
        """Make sure that a run without a whole round begins again with the weights that it began with."""
        require(
            self.facts["start"] == start,
            f"{self.folder} has no whole round to go on from, and the model's weights are not those that its run began "
            "with: load the model anew",
        )

    @property
    def finished(self) -> bool:
        """Return whether the run in the folder is over."""
        return bool(self.facts.get("finished"))

    @property
    def kept(self) -> dict[str, Any] | None:
        """The settings of what the finished run left; None if it does not say."""
        return self.facts.get("kept") or None

    def _write(self, **facts: Any) -> None:
        self.facts = {**self.facts, **facts}
        atomic_write_json(self.folder / RUN, self.facts)

    def _read(self) -> dict[str, Any]:
        try:
            facts = parse_json(self.folder / RUN, (self.folder / RUN).read_bytes())
            kept = {name: facts[name] for name in ("identity", "environments", "start", "finished")}
            lists = [kept["identity"], *kept["environments"]]
            require(len(lists) > 1 and all(isinstance(one, dict) for one in lists), "these are mappings")
            folders = facts.get("folders") or {name: name for name in kept["identity"].get("clients", [])}
            what = dict(facts.get("kept") or {})
            return {**kept, "folders": dict(folders), "fuse": dict(facts.get("fuse", {})), "kept": what}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.folder / RUN} is damaged, or of another program: choose another out, or put it back"
            ) from None

    def keep_choices(self) -> None:
        """Write down which ways to fuse were measured to be fastest; a resumed run goes on with them."""
        used = autotune.used()
        if used != self.facts.get("fuse", {}):
            self._write(fuse=used)

    def finish(self, kept: Mapping[str, Any] | None = None) -> None:
        """Mark the run as over; ``kept`` are the settings of what it left."""
        self._write(finished=True, kept=dict(kept or {}))

    def client_folder(self, client: str) -> str:
        """Name of a client's folder within a round's: its own name, or a safe form of it."""
        return self.facts.get("folders", {}).get(client) or folder_names([client], taken=self.reserved)[client]
