"""Plots of the results: every point is a number of a JSON file in bench/results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases.rivals import FROZEN
from bench.reporting.tables import Data, is_published, our_name


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_memory(data: Data, path: Path) -> None:
    """The curve of speed against memory."""
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    ours = [row for row in data["rows"] if not row["case"].startswith("PEFT")]
    points = [(row["beyond_base_bytes"] / 1e9, row["tokens_per_s"], row["case"]) for row in ours]
    axes.plot([p[0] for p in points], [p[1] for p in points], "o-", label="flora, by token budget")
    for gigabytes, speed, case in points:
        name = case.removeprefix("flora, ")
        axes.annotate(name, (gigabytes, speed), textcoords="offset points", xytext=(4, -13), fontsize=8)
    for row, mark in zip((row for row in data["rows"] if row not in ours), ("s", "D"), strict=False):
        axes.plot(row["beyond_base_bytes"] / 1e9, row["tokens_per_s"], mark, color="tab:red", label=row["case"])
    top = 1.15 * max(row["tokens_per_s"] for row in data["rows"])
    axes.set(xlabel="peak memory beyond the base, GB", ylabel="tokens per second", xlim=(0, None), ylim=(0, top))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


def peft_of(data: Data) -> Data | None:
    """The speed-up over PEFT as it comes, if it has the rounds of a published one."""
    speedups = data.get("speedups", {})
    found = speedups.get("PEFT") or speedups.get("peft")
    return found if found is not None and is_published(found) else None


def plot_speedups(found: Sequence[Data], path: Path) -> None:
    """Every green speed-up over PEFT: bar, p20 to p80 of the rounds, each round, and the target."""
    shown = [data for data in found if peft_of(data)]
    figure = _figure(8, 1 + 0.24 * len(shown))
    axes = figure.subplots()
    for at, data in enumerate(shown):
        speedup: Any = peft_of(data)
        times, rounds = speedup["times"], speedup["rounds"]
        low, high = speedup.get("p20", min(rounds)), speedup.get("p80", max(rounds))
        axes.barh(at, times, color="tab:blue" if times >= 1 else "tab:red", alpha=0.7)
        axes.plot([low, high], [at, at], "k-", linewidth=2)
        axes.plot(rounds, [at] * len(rounds), "k.", markersize=2)
        if speedup["target"]:
            axes.plot([speedup["target"]] * 2, [at - 0.4, at + 0.4], "k--", linewidth=1)
    axes.axvline(1, color="k", linewidth=1)
    axes.set(yticks=range(len(shown)), yticklabels=[data["name"] for data in shown])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("times as fast as PEFT\n(bar: medians, line: p20 to p80, dots: rounds, dashes: target)")
    figure.savefig(path, dpi=130)


def plot_roofline(found: Sequence[Data], path: Path) -> None:
    """Operations a second of ours and the rivals over operations per byte, below the roof of the same run."""
    from matplotlib.ticker import LogLocator

    shown = [data for data in found if "flops" in data and "bytes" in data and "speedups" in data]
    figure = _figure(7, 4.6)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for data in shown for name in data["times"]))
    for name in names:
        points = [
            (data["flops"] / data["bytes"], data["flops"] / data["times"][name]["median_s"] / 1e9)
            for data in shown
            if name in data["times"]
        ]
        ours = name == our_name(shown[0])
        marker = "*" if ours else "_" if name == FROZEN else "."
        axes.plot(*zip(*points, strict=True), marker, markersize=11 if ours else 8, label=name, alpha=0.8)
    copied, flops = (
        max(data["rates"][key] for data in shown) / 1e9 for key in ("copy_bytes_per_s", "matrix_flops_per_s")
    )
    low, high = (pick(data["flops"] / data["bytes"] for data in shown) for pick in (min, max))
    xs = [min(low, 0.3 * flops / copied), flops / copied, max(high, 3 * flops / copied)]
    axes.plot(xs, [min(flops, x * copied) for x in xs], "k-", label="copy and product rate of the same run")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            set_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=7)
    figure.legend(fontsize=7, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)


def around(found: Sequence[Data], model: str) -> list[Data]:
    """The points of one linear of a model without dropout, which have a speed-up over PEFT."""
    base = {"model": model, "linear": "q_proj", "dropout": 0.0}
    return [data for data in found if base.items() <= data["settings"].items() and peft_of(data)]


def plot_scaling(points: Sequence[Data], tokens: int, path: Path) -> None:
    """How the speed-up over PEFT and the share of the limit move with tokens, clients and ranks."""
    panels = (("tokens of each client", "tokens"), ("clients", "clients"), ("ranks", "mix"))
    figure = _figure(9.5, 3.6)
    for axes, (label, axis) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for part, colour in (("forward", "tab:blue"), ("backward", "tab:orange")):
            own = [
                data for data in points if data["name"].startswith(f"linear_{part}") and _on_axis(data, axis, tokens)
            ]
            own.sort(key=lambda data: (data["settings"]["clients"], data["settings"]["tokens"]))
            xs = [str(data["settings"][axis]) for data in own]
            # Ranks are kinds, with nothing between them.
            for rival, style in (("PEFT", "o" if axis == "mix" else "o-"), (FROZEN, "x" if axis == "mix" else "x--")):
                there = [
                    (x, data["speedups"][rival]) for x, data in zip(xs, own, strict=True) if rival in data["speedups"]
                ]
                label_of = f"{part} / {rival}"
                ys, errors = [speedup["times"] for _, speedup in there], _errors([speedup for _, speedup in there])
                axes.errorbar([x for x, _ in there], ys, errors, fmt=style, color=colour, capsize=3, label=label_of)
        axes.axhline(1, color="k", linewidth=0.8)
        axes.set_xlabel(label)
    figure.axes[0].set_ylim(bottom=0)  # all panels share it: set before the last is drawn, it would cut that one off
    settings = points[0]["settings"]
    figure.suptitle(f"{settings['model']}, {settings['linear']}, around {tokens} tokens of ten clients", fontsize=10)
    figure.axes[0].set_ylabel("times as fast")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def _errors(speedups: Sequence[Data]) -> list[list[float]]:
    """How far p20 and p80 lie below and above."""
    below = [max(0.0, speedup["times"] - speedup["p20"]) for speedup in speedups]
    return [below, [max(0.0, speedup["p80"] - speedup["times"]) for speedup in speedups]]


def _on_axis(data: Data, axis: str, tokens: int) -> bool:
    """Return whether a point differs from the base case in this axis alone."""
    settings = data["settings"]
    clean = {"tokens": settings["tokens"] == tokens, "mix": settings["mix"] == "mixed"}
    if axis == "tokens":
        return clean["mix"]
    if axis == "clients":
        return clean["tokens"] and settings["mix"] != "equal16"
    return clean["tokens"] and settings["clients"] == 10


def plot_parts(data: Data, path: Path) -> None:
    """Time and memory of a step by part."""
    figure = _figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    parts = sorted(data["shares"], key=lambda part: -data["shares"][part])
    times = [1e3 * data["seconds"] * data["shares"][part] for part in parts]
    left.barh(parts, times, color="tab:blue", alpha=0.7, label="measured")
    left.barh(parts, [1e3 * data["limits"][part] for part in parts], color="k", alpha=0.5, height=0.3, label="limit")
    left.invert_yaxis()
    left.set_xlabel("ms of a step")
    left.locator_params(axis="x", nbins=5)
    left.legend(fontsize=8)
    sizes = {"base weights": data["weights_bytes"], "adapters": data["adapter_bytes"]}
    sizes |= {"gradients, moments": data["optimizer_bytes"]}
    kept = sorted(data["saved_bytes"].items(), key=lambda item: -item[1])
    sizes |= {f"kept: {part}": size for part, size in kept if size >= 1e5}
    right.barh(list(sizes), [size / 1e6 for size in sizes.values()], color="tab:green", alpha=0.7)
    right.invert_yaxis()
    right.set_xlabel("MB")
    figure.savefig(path, dpi=130)


__all__ = ["peft_of", "plot_memory", "plot_parts", "plot_roofline", "plot_scaling", "plot_speedups"]
