"""Two sets of results against each other: what became slower or faster by more than the noise.

python -m bench.compare OLD NEW        each a folder of JSON files or a commit whose bench/results is meant

A machine's own speed drifts by a tenth unseen, so not times are compared but ratios to the rivals of the same run:
round by round, ours against the rival next to it. A change counts where the two runs' spreads do not meet.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.protocol import ROOT, quantile
from bench.reporting.tables import Data, load, load_machines, table

# p20 to p80 of a handful of rounds is narrower than the truth: below so many rounds all of them count.
FEW_ROUNDS = 8


def spread(rounds: Sequence[float]) -> tuple[float, float]:
    """The interval in which a ratio lies: p20 to p80, or least to largest of few rounds."""
    few = len(rounds) < FEW_ROUNDS
    return (min(rounds), max(rounds)) if few else (quantile(list(rounds), 0.2), quantile(list(rounds), 0.8))


def of_commit(commit: str) -> dict[str, Data]:
    """The results that a commit holds.

    Raises:
        ValueError: If git does not know the commit, or it has no results.
    """
    listed = _git("ls-tree", "-r", "--name-only", commit, "bench/results/")
    names = [name for name in listed.splitlines() if name.endswith(".json")]
    if not names:
        raise ValueError(f"{commit!r} must be a folder, or a commit with bench/results/*.json; it has none")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_git("show", f"{commit}:{name}"))
        return of_folder(Path(folder) / "bench/results")


def of_folder(folder: Path) -> dict[str, Data]:
    """The results of a folder, by machine and name; those that stand in the folder itself by their name."""
    by_machine = {
        f"{slug}/{name}": data for slug, found in load_machines(folder).items() for name, data in found.items()
    }
    return load(folder) | by_machine


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def results(where: str) -> dict[str, Data]:
    """The results of a folder or a commit."""
    return of_folder(Path(where)) if Path(where).is_dir() else of_commit(where)


def changes(old: dict[str, Data], new: dict[str, Data]) -> list[dict[str, Any]]:
    """Every ratio that both have, with its change and whether it is beyond the noise; regressions first."""
    rows = []
    for name in sorted(old.keys() & new.keys()):
        before, after = (data.get("speedups", {}) for data in (old[name], new[name]))
        if before and not after:
            rows.append({"name": name, "rival": "", "change": 0.0, "verdict": "**no speed-up any more**", "order": -1})
        if old[name]["settings"] != new[name]["settings"]:
            continue
        for rival in before.keys() & after.keys():
            rows.append(_change(name, rival, before[rival], after[rival]))
    return sorted(rows, key=lambda row: (row["order"], row["change"], row["name"], row["rival"]))


def _change(name: str, rival: str, before: Data, after: Data) -> dict[str, Any]:
    (low, high), (new_low, new_high) = spread(before["rounds"]), spread(after["rounds"])
    slower, faster = new_high < low, new_low > high
    verdict = "**slower**" if slower else "faster" if faster else "within the noise"
    return {
        "name": name,
        "rival": rival,
        "before": f"{before['times']:.3g} ({low:.3g}-{high:.3g})",
        "after": f"{after['times']:.3g} ({new_low:.3g}-{new_high:.3g})",
        "change": after["times"] / before["times"] - 1,
        "verdict": verdict,
        "order": 0 if slower else 1 if faster else 2,
    }


def report(old: dict[str, Data], new: dict[str, Data]) -> tuple[str, bool]:
    """A Markdown table, and whether anything became slower beyond the noise."""
    found = changes(old, new)
    rows = [
        [r["name"], r["rival"], r.get("before", ""), r.get("after", ""), f"{r['change']:+.1%}", r["verdict"]]
        for r in found
    ]
    text = table(["result", "speed-up over", "before", "after", "change", "verdict"], rows)
    alone = sorted(old.keys() ^ new.keys())
    other = [name for name in old.keys() & new.keys() if old[name]["settings"] != new[name]["settings"]]
    notes = [f"Not compared, for only one of them has it: {', '.join(alone)}."] * bool(alone)
    notes += [f"Not compared, for the settings differ: {', '.join(sorted(other))}."] * bool(other)
    return "\n\n".join([text, *notes]), any(row["order"] <= 0 for row in found)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; 1 if something became slower beyond the noise."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 2:
        print("python -m bench.compare OLD NEW: each a folder of results or a commit", file=sys.stderr)
        return 2
    try:
        text, slower = report(*map(results, words))
    except ValueError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    print(text)
    return int(slower)


if __name__ == "__main__":
    raise SystemExit(main())
