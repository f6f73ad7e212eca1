"""Write docs/benchmarks.md and docs/img/*.png from bench/results/*.json, so that no number is typed by hand.

python -m bench.publish
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.protocol import RESULTS, ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "img"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
Data = dict[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def seconds(timing: Data) -> str:
    """Median with p20 and p80."""
    unit, factor = ("ms", 1e3) if timing["median_s"] < 1 else ("s", 1)
    low, middle, high = (timing[key] * factor for key in ("p20_s", "median_s", "p80_s"))
    return f"{middle:.3g} {unit} ({low:.3g}-{high:.3g}, {timing['rounds']} rounds)"


def verdict(value: float, target: float | None, at_least: bool = True) -> str:
    """Whether a target was met, and by which comparison."""
    if target is None:
        return ""
    met = value >= target if at_least else value <= target
    return f"{'met' if met else '**missed**'} (target {'>=' if at_least else '<='} {target:g})"


def source(data: Data) -> str:
    """Which file the numbers come from, and where it was measured."""
    env, load = data["environment"], data["environment"]["load"]
    others = load.get("other_cores")
    busy = "not known" if others is None else f"{others:.2f} cores"
    dirty = " with local changes" if env["changed_files"] else ""
    name = data["name"]
    return (
        f"`bench/results/{name}.json`, `{data['command']}`; commit {env['commit'][:10]}{dirty}, {env['processor']}, "
        f"{env['threads']} threads, torch {env['versions']['torch']}, peft {env['versions']['peft']}, "
        f"other load {busy}"
    )


def step_table(found: Sequence[Data]) -> str:
    """Speed of one contender against its rivals; a red or unfinished check has no speed-up."""
    rows = []
    for data in found:
        if "speedups" not in data:
            why = "red" if "check" in data else "not finished"
            rows.append([data["question"], f"check {why}: no speed-up", "", "", "", ""])
            continue
        ours = next(name for name in data["times"] if name not in data["speedups"])
        for rival, speedup in data["speedups"].items():
            times = speedup["times"]
            win = f"{times:.2f} times faster" if times >= 1 else f"**{1 / times:.2f} times slower**"
            timings = [f"{name}: {seconds(data['times'][name])}" for name in (ours, rival)]
            check = f"{data['check']['ratio']:.2f} of the budget"
            rows.append([data["question"], *timings, win, verdict(times, speedup["target"]), check])
    return table(["question", "ours", "rival", "ours is", "target", "error"], rows)


def memory_table(data: Data) -> str:
    """Memory against speed, case by case."""
    peft = data["rows"][0]
    rows = [
        [
            row["case"],
            f"{row['beyond_base_bytes'] / 1e9:.2f} GB",
            f"{row['beyond_base_bytes'] / peft['beyond_base_bytes']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['tokens_per_s'] / peft['tokens_per_s']:.2f}",
        ]
        for row in data["rows"]
    ]
    text = table(["case (token budget)", "peak beyond the base", "of PEFT's", "tokens/s", "of PEFT's"], rows)
    if "one_client_over_peft" in data:
        text += "\n\nAt a budget of one client's tokens: " + verdict(
            data["one_client_over_peft"], data["target"], at_least=False
        )
    return text


def saved_table(data: Data) -> str:
    """Bytes kept for backward, case by case."""
    rows = [[row["case"], f"{row['bytes_per_token']:.0f}", f"{row['per_hidden']:.1f}"] for row in data["rows"]]
    return table(["case", "bytes per token", "per hidden unit and layer"], rows)


def demo_table(found: Sequence[Data]) -> str:
    """What the demo reached with each seed, and its time."""
    rows = []
    for data in found:
        first, last = data["rows"][0], data["rows"][-1]
        losses = [f"{row['loss']:.2f}" for row in (first, last)]
        matches = [f"{row['exact_match']:.0%}" for row in (first, last)]
        spent = f"{data['seconds'] / 60:.1f} min, {verdict(data['seconds'], data['target_seconds'], at_least=False)}"
        rows.append([str(data["settings"]["seed"]), *losses, *matches, spent])
    heads = ["loss before", "after", "exact match before", "after"]
    return table(["seed", *heads, "from start to end (target in seconds)"], rows)


def plot_memory(data: Data, path: Path) -> None:
    """The curve of speed against memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    peft, *ours = data["rows"]
    points = [(row["beyond_base_bytes"] / 1e9, row["tokens_per_s"], row["case"]) for row in ours]
    axes.plot([p[0] for p in points], [p[1] for p in points], "o-", label="flora, by token budget")
    for gigabytes, speed, case in points:
        name = case.removeprefix("flora, ")
        axes.annotate(name, (gigabytes, speed), textcoords="offset points", xytext=(4, 6), fontsize=8)
    axes.plot(peft["beyond_base_bytes"] / 1e9, peft["tokens_per_s"], "s", color="tab:red", label=peft["case"])
    axes.set(xlabel="peak memory beyond the base, GB", ylabel="tokens per second", xlim=(0, None), ylim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


def plot_speedups(found: Sequence[Data], path: Path) -> None:
    """Every green speed-up over PEFT, with each round's ratio."""
    from matplotlib.figure import Figure

    shown = [data for data in found if "peft" in data.get("speedups", {})]
    figure = Figure(figsize=(7, 0.7 + 0.55 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for at, data in enumerate(shown):
        speedup = data["speedups"]["peft"]
        axes.barh(at, speedup["times"], color="tab:blue" if speedup["times"] >= 1 else "tab:red", alpha=0.7)
        axes.plot(speedup["rounds"], [at] * len(speedup["rounds"]), "k.", markersize=4)
        if speedup["target"]:
            axes.plot([speedup["target"]] * 2, [at - 0.4, at + 0.4], "k--", linewidth=1)
    axes.axvline(1, color="k", linewidth=1)
    axes.set(yticks=range(len(shown)), yticklabels=[data["name"] for data in shown])
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as PEFT (bar: medians, dots: rounds, dashes: target)")
    figure.savefig(path, dpi=130)


def load(folder: Path = RESULTS) -> dict[str, Data]:
    """Every result by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def write_between(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page."""
    before, _, rest = page.read_text().partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n{text}\n{END}{after}")


def body(found: dict[str, Data]) -> str:
    """Everything between the marks."""
    steps = [data for name, data in found.items() if name.startswith("cohort_step")]
    merges = [data for name, data in found.items() if name.startswith("merge")]
    parts = []
    if steps:
        parts += ["### Cohort step", step_table(steps)]
    if merges:
        parts += ["### Aggregation", step_table(merges)]
    if any("peft" in data.get("speedups", {}) for data in [*steps, *merges]):
        parts.append("![times as fast as PEFT](img/bench_speedups.png)")
    if found.get("memory", {}).get("rows"):
        memory = found["memory"]
        parts += ["### Memory", memory["question"] + ".", memory_table(memory)]
        parts.append("![speed against memory](img/bench_memory.png)")
    if found.get("saved_activations", {}).get("rows"):
        saved = found["saved_activations"]
        parts += ["### Saved for backward", saved["question"] + ".", saved_table(saved)]
    demos = [data for name, data in found.items() if name.startswith("demo") and data.get("finished")]
    if demos:
        parts += ["### The demo", "`flora run quickstart seed=N`, on held-out questions.", demo_table(demos)]
    if found:
        parts += ["### Sources", "\n".join(f"- {source(data)}" for data in found.values())]
    return "\n\n".join(parts or ["No results yet: run `make bench`."])


def main() -> None:
    found = load()
    IMAGES.mkdir(parents=True, exist_ok=True)
    compared = [data for data in found.values() if "peft" in data.get("speedups", {})]
    if compared:
        plot_speedups(compared, IMAGES / "bench_speedups.png")
    if len(found.get("memory", {}).get("rows", [])) > 1:
        plot_memory(found["memory"], IMAGES / "bench_memory.png")
    write_between(PAGE, body(found))
    print(f"wrote {PAGE.relative_to(ROOT)} from {len(found)} results")


if __name__ == "__main__":
    main()
