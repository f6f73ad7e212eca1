"""Results as rows of words: what ``flora bench`` prints and ``bench.reporting.publish`` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.cases.rivals import FROZEN
from bench.harness.protocol import LEAST_ROUNDS, PARTIAL, RESULTS, ROOT, paired

Data = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]


def load(folder: Path = RESULTS) -> dict[str, Data]:
    """Every result of a folder, or of a file, by name; a file that is no result of this protocol is left out.

    A result that was stopped stands where there is no whole one. Speed-ups are paired anew from the rounds that the
    file keeps: files of former editions hold the ratio of two medians.
    """
    paths = [folder] if folder.is_file() else [*(folder / PARTIAL).glob("*.json"), *folder.glob("*.json")]
    found = {path.stem: json.loads(path.read_text()) for path in sorted(paths, key=lambda path: path.stem)}
    results = {name: data for name, data in found.items() if isinstance(data, dict) and "question" in data}
    for data in results.values():
        for rival, speedup in data.get("speedups", {}).items():
            data["speedups"][rival] = {**speedup, **paired(speedup["rounds"])}
    return results


def load_machines(folder: Path = RESULTS) -> dict[str, dict[str, Data]]:
    """The results of every processor that has a folder of its own, the latest measured first; no GPU's."""
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    found = {path.name: load(path) for path in folders if path.name not in ("gpu", "smoke", PARTIAL)}
    measured = {slug: results for slug, results in found.items() if results}
    return dict(sorted(measured.items(), key=lambda item: _newest(item[1]), reverse=True))


def _newest(results: dict[str, Data]) -> str:
    return max(data["environment"].get("started", "") for data in results.values())


def is_published(speedup: Data) -> bool:
    """Return whether a ratio has the rounds that a published one needs."""
    return len(speedup["rounds"]) >= LEAST_ROUNDS


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def duration(seconds: float) -> tuple[float, str]:
    """Factor and unit in which a time reads well."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1, 1e3, "ms")):
        if seconds < limit:
            return factor, unit
    return 1, "s"


def seconds(timing: Data) -> str:
    """Median with p20 and p80."""
    factor, unit = duration(timing["median_s"])
    low, middle, high = (timing[key] * factor for key in ("p20_s", "median_s", "p80_s"))
    return f"{middle:.3g} {unit} ({low:.3g}-{high:.3g}, {timing['rounds']} rounds)"


def verdict(value: float, target: float | None, at_least: bool = True) -> str:
    """Return whether a target was met, and by which comparison."""
    if target is None:
        return ""
    met = value >= target if at_least else value <= target
    return f"{'met' if met else '**missed**'} (target {'>=' if at_least else '<='} {target:g})"


def ratio(speedup: Data, rival: str) -> str:
    """The speed-up with its spread, a loss in bold; against the frozen base our time in units of the base's."""
    rounds = len(speedup["rounds"])
    if not is_published(speedup):
        return f"not published: {rounds} of {LEAST_ROUNDS} rounds"
    values = [speedup[key] for key in ("times", "p20", "p80")]
    if rival == FROZEN:
        middle, high, low = (1 / value for value in values)
        text = f"{middle:.2f}x its time ({low:.2f}-{high:.2f})"
        return text if middle <= 2 else f"**{text}**"
    middle, low, high = values
    text = f"{middle:.2f}x ({low:.2f}-{high:.2f})"
    return text if middle >= 1 else f"**{text}**"


def verdict_of(speedup: Data) -> str:
    """Return whether a speed-up meets its target; too few rounds decide nothing."""
    if speedup["target"] is not None and not is_published(speedup):
        return f"**not known** (target >= {speedup['target']:g})"
    return verdict(speedup["times"], speedup["target"])


def why_no_speedup(data: Data) -> str:
    """Red, failed with a reason, or not finished."""
    check = data.get("check")
    if check is not None and not check["green"]:
        return f"check red at {check['ratio']} of its budget: no speed-up"
    if "failed" in data:
        return f"failed: {data['failed']}"
    return f"not finished: {data.get('stopped', 'killed')}"


def our_name(data: Data) -> str:
    """The contender that is ours."""
    return data.get("ours") or next(name for name in data["times"] if name not in data["speedups"])


def speed_rows(data: Data) -> list[list[str]]:
    """Question, ours, rival, how ours compares, target, error; rivals that are missing with their reason."""
    if "speedups" not in data:
        return [[data["question"], why_no_speedup(data), "", "", "", ""]]
    ours, check = our_name(data), f"{data['check']['ratio']:.2f} of the budget"
    rows = []
    for rival, found in data["speedups"].items():
        timings = [f"{name}: {seconds(data['times'][name])}" for name in (ours, rival)]
        cells = ratio(found, rival), verdict_of(found), check
        rows.append([data["question"], *timings, *cells])
    for rival, why in data.get("missing", {}).items():
        rows.append([data["question"], "", rival, f"not measured: {why}", "", ""])
    return rows


def is_compared(data: Data) -> bool:
    """Return whether a result sets contenders against each other."""
    return bool({"times", "speedups", "failed", "stopped"} & data.keys())


TARGET_HEADER = ["what must be shown", "is", "target", "where"]


def target_rows(found: dict[str, Data]) -> list[list[str]]:
    """Everything that has a target: what it is, and whether the target is met."""
    rows = []
    for name, data in found.items():
        for rival, speedup in data.get("speedups", {}).items():
            if speedup["target"] is not None:
                what = f"{data['question']}: speed-up over {rival}"
                rows.append([what, ratio(speedup, rival), verdict_of(speedup), name])
        if "speedups" not in data and is_compared(data):
            rows.append([data["question"], "-", f"**not known**: {why_no_speedup(data)}", name])
        for row in data.get("targets", []):
            rows.append([row["what"], f"{row['is']:.3g}", verdict(row["is"], row["target"], row["at_least"]), name])
    return rows


def verdict_rows(folder: Path) -> list[list[str]]:
    """The same of the linears that ``bench.gpu.check`` times."""
    path = folder / "gpu_check_triton.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    rows = []
    for what, row in found.get("verdicts", {}).items():
        at_least, value = "at least" in row, row["is"]
        target = row["at least" if at_least else "at most"]
        known = value is not None
        cells = f"{value:.3g}" if known else "-", verdict(value, target, at_least) if known else "**not known**"
        rows.append([what, *cells, path.stem])
    rows += [[name, "-", "**not begun**: out of time", path.stem] for name in found.get("not begun: out of time", [])]
    checks = {name: row["green"] for name, row in found.items() if isinstance(row, dict) and "green" in row}
    return [[f"check: {name}", "", "**red**", path.stem] for name, green in checks.items() if not green] + rows


SPEED_HEADER = ["question", "ours", "rival", "speed-up (p20-p80)", "target", "error"]


def cases_rows(found: Iterable[Data]) -> tuple[list[str], list[list[str]]]:
    """One row a case, one column a rival: how many times as fast ours is, with p20 and p80 over the rounds."""
    found = sorted(found, key=_place)
    rivals = list(dict.fromkeys(rival for data in found for rival in data.get("speedups", {})))
    rows = []
    for data in found:
        name = case_name(data)
        if "speedups" not in data:
            rows.append([name, why_no_speedup(data), *[""] * len(rivals)])
            continue
        cells = [_cell(data["speedups"].get(rival), rival) for rival in rivals]
        rows.append([name, seconds(data["times"][our_name(data)]), *cells])
    heads = ["time over the frozen base's" if rival == FROZEN else f"speed-up over {rival}" for rival in rivals]
    return ["case", "ours", *heads], rows


def _place(data: Data) -> tuple[Any, ...]:
    """Cases of a grid by model, linear, targets, cohort, tokens and dropout; the others as they come."""
    s = data["settings"]
    ranks = s.get("clients", 0), s.get("mix", "") != "mixed"
    return *(s.get(key, "") for key in ("model", "linear", "targets")), *ranks, s.get("tokens", 0), s.get("dropout", 0)


def _cell(found: Data | None, rival: str) -> str:
    return "-" if found is None else ratio(found, rival).replace(" its time", "")


def case_name(data: Data) -> str:
    """Model, linear, cohort, tokens, dropout."""
    s = data["settings"]
    where = s.get("linear") or {"qv": "q and v", "all": "all linears"}.get(s.get("targets", ""), "")
    layers = f"{s['layers']} layers" if "layers" in s and "shapes" not in s else ""
    drop = f"dropout {s['dropout']:g}" if s.get("dropout") else ""
    clients = f"{s['clients']} clients ({s['mix']})" if s.get("clients", 0) > 1 and "mix" in s else ""
    clients = clients or ("one client" if s.get("clients") == 1 else "")
    tokens = f"{s['tokens']} tokens each" if "tokens" in s else ""
    kind = f"{s['shapes']}, {s['dtype']}" if "shapes" in s and "dtype" in s else ""
    return ", ".join(part for part in (s.get("model", ""), kind, where, layers, clients, tokens, drop) if part)


def missing_rows(found: dict[str, Data]) -> list[list[str]]:
    """Rivals that did not take part: the reason, and in how many results."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, data in found.items():
        for rival, why in data.get("missing", {}).items():
            reasons.setdefault((rival, why), []).append(name)
    return [
        [rival, why, names[0] if len(names) == 1 else f"{len(names)} results"]
        for (rival, why), names in reasons.items()
    ]


def outcome_rows(folder: Path) -> list[list[str]]:
    """Benchmarks that did not pass or end when they last ran, and why."""
    stopped = {path.stem: json.loads(path.read_text()) for path in sorted((folder / PARTIAL).glob("*.json"))}
    rows = [[name, "stopped", data.get("stopped", "killed")] for name, data in stopped.items()]
    for path in sorted((folder / "outcomes").glob("*.json")):
        for test, found in json.loads(path.read_text()).items():
            if found["outcome"] != "passed" and (ROOT / test.partition("::")[0]).is_file():
                rows.append([test.removeprefix("bench/"), found["outcome"], found["reason"]])
    return rows


def summary(found: dict[str, Data]) -> list[Table]:
    """Tables for a terminal: who is how fast, who did not take part, what else was measured."""
    compared = {name: data for name, data in found.items() if is_compared(data)}
    rows = [row for data in compared.values() for row in _short_rows(data)]
    tables: list[Table] = []
    if rows:
        tables.append(("Benchmarks", ["result", "ours", "rival", "takes", "speed-up", "error"], rows))
    absent = missing_rows(compared)
    if absent:
        tables.append(("Rivals that did not take part", ["rival", "reason", "where"], absent))
    others = [[name, "yes" if data.get("finished") else "no"] for name, data in found.items() if name not in compared]
    if others:
        tables.append(
            ("Other results: python -m bench.reporting.publish writes their tables", ["result", "finished"], others)
        )
    return tables or [("Benchmarks", ["result"], [["nothing was measured"]])]


def _short_rows(data: Data) -> list[list[str]]:
    """One row a rival, the result's name and our time in the first alone."""
    if "speedups" not in data:
        return [[data["name"], "", "", "", why_no_speedup(data), ""]]
    first, check = [data["name"], _median(data["times"][our_name(data)])], f"{data['check']['ratio']:.2f} of the budget"
    rows = []
    for rival, speedup in data["speedups"].items():
        cells = [rival, _median(data["times"][rival]), ratio(speedup, rival).replace("**", ""), check]
        rows.append([*first, *cells])
        first, check = ["", ""], ""
    return rows


def _median(timing: Data) -> str:
    factor, unit = duration(timing["median_s"])
    return f"{timing['median_s'] * factor:.3g} {unit}"


__all__ = [
    "SPEED_HEADER",
    "TARGET_HEADER",
    "Data",
    "case_name",
    "cases_rows",
    "duration",
    "is_compared",
    "is_published",
    "load",
    "load_machines",
    "missing_rows",
    "our_name",
    "outcome_rows",
    "ratio",
    "seconds",
    "speed_rows",
    "summary",
    "table",
    "target_rows",
    "verdict",
    "verdict_of",
    "verdict_rows",
    "why_no_speedup",
]
