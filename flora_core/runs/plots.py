"""Plots of a run's report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .summary import History, hit_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY_CLIENTS = MANY_ROUNDS = 12
_GLOBAL: dict[str, Any] = dict(color="black", linewidth=2.5, marker="o", zorder=5)


def plot_loss(history: History) -> Figure | None:
    """Plot every client's training loss at the end of each round, and the global model's on held-out data."""
    if not history.clients and not history.evaluated:
        return None
    figure, axes = _canvas("Loss over the rounds", "loss per labelled token (nats)")
    rows = history.start.get("clients", [])
    many = len(rows) > MANY_CLIENTS
    for number, client in enumerate(rows):
        done = [e for key, e in sorted(history.clients.items()) if key[1] == client["name"] and not e.get("refused")]
        if done:
            # The first point is the loss before the client's first step, at the round it started from.
            rounds = [done[0]["round"] - 1, *(event["round"] for event in done)]
            losses = [done[0]["loss_first"], *(event["loss_last"] for event in done)]
            label = None if many else _label(f"{client['name']} (rank {client['rank']})")
            axes.plot(rounds, losses, label=label, color=_color(number, len(rows)), linewidth=1, alpha=0.8, marker=".")
    points = [(at, e["loss"]) for at, e in sorted(history.evaluated.items()) if e.get("loss") is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label="global model, held-out data", **_GLOBAL)
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, "clients, training data" if not many else f"{len(rows)} clients (thin)")


def plot_accuracy(history: History) -> Figure | None:
    """Plot the share of right answers on held-out data per group, and over all."""
    rounds = {number: event for number, event in sorted(history.evaluated.items()) if hit_rate(event) is not None}
    if not rounds:
        return None
    kind = "Exact match" if "exact_match" in rounds[min(rounds)] else "Accuracy"
    figure, axes = _canvas(f"{kind} on held-out data", f"{kind.lower()} (%)")
    groups = list(dict.fromkeys(name for event in rounds.values() for name in event.get("groups") or {}))
    for number, name in enumerate(groups):
        found = {at: hit_rate((event.get("groups") or {}).get(name, {})) for at, event in rounds.items()}
        points = [(at, 100 * rate) for at, rate in found.items() if rate is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=_label(name),
                color=_color(number, len(groups)),
                linewidth=1,
                marker=".",
            )
    axes.plot(list(rounds), [100 * (hit_rate(event) or 0.0) for event in rounds.values()], label="all", **_GLOBAL)
    axes.set_ylim(-2, 102)
    return _finish(figure, axes, "skill" if groups else "")


def plot_errors(history: History) -> Figure | None:
    """Plot each round's distance from the exact sum: what the strategy lost and what the write lost."""
    kinds = ("aggregation_error", "application_error")
    if not any(event.get(kind) is not None for event in history.aggregated.values() for kind in kinds):
        return None
    figure, axes = _canvas("Distance from the exact sum", "relative error")
    axes.set_yscale("log")
    _plot_error(axes, history, "aggregation", "aggregation: the strategy", "tab:blue")
    _plot_error(axes, history, "application", "application: the write", "tab:orange")
    return _finish(figure, axes, "all modules (bars: each)")


def _plot_error(axes: Axes, history: History, kind: str, label: str, color: str) -> None:
    """Draw the rounds' errors, the range over modules as bars, and rounds without an error on the axis's floor."""
    errors = {at: event.get(f"{kind}_error") for at, event in history.aggregated.items()}
    above, none = {at: error for at, error in errors.items() if error}, [at for at, e in errors.items() if e == 0]
    if above:
        axes.plot(*zip(*above.items(), strict=True), label=label, color=color, marker="o")
    if none:
        # A logarithmic axis has no zero.
        place: dict[str, Any] = dict(transform=axes.get_xaxis_transform(), linestyle="", marker="v", clip_on=False)
        axes.plot(none, [0.0] * len(none), label=f"{label}, exactly 0", color=color, **place)
    for at in above:
        found = (history.aggregated[at].get(f"{kind}_error_by_module") or {}).values()
        parts = [error for error in found if error]
        if parts:
            axes.vlines(at, min(parts), max(parts), color=color, alpha=0.4)


def plot_bytes(history: History) -> Figure | None:
    """Plot what travelled up and down in each round."""
    if not history.aggregated:
        return None
    figure, axes = _canvas("Traffic per round", "megabytes, all clients together")
    rounds, events = list(history.aggregated), history.aggregated.values()
    up, down = ([event[way] / 1e6 for event in events] for way in ("bytes_up", "bytes_down"))
    late = [sum(one["bytes"] for one in (event.get("catch_up") or {}).values()) / 1e6 for event in events]
    bars = [
        axes.bar([at - 0.2 for at in rounds], up, 0.38, label="up: updates to the server"),
        axes.bar([at + 0.2 for at in rounds], down, 0.38, label="down: to the round's clients"),
    ]
    if any(late):
        axes.bar([at + 0.2 for at in rounds], late, 0.38, down, label="down: rounds that they had missed")
    for bar in bars if len(rounds) <= MANY_ROUNDS else ():
        axes.bar_label(bar, fmt="%.1f", fontsize=8)
    axes.margins(y=0.1)
    return _finish(figure, axes, "")


def plot_server(history: History) -> Figure | None:
    """Plot what each round cost the server: time by part, and the process's peak memory so far."""
    events = {at: event for at, event in history.aggregated.items() if event.get("seconds_of")}
    parts = list(dict.fromkeys(part for event in events.values() for part in event["seconds_of"]))
    if not parts:
        return None
    figure, axes = _canvas("The server's work per round", "seconds")
    floor = [0.0] * len(events)
    for part in parts:
        spent = [event["seconds_of"].get(part, 0.0) for event in events.values()]
        axes.bar(list(events), spent, 0.6, floor, label=part)
        floor = [low + more for low, more in zip(floor, spent, strict=True)]
    peaks = [(at, event["peak_memory_bytes"] / 1e9) for at, event in events.items() if event.get("peak_memory_bytes")]
    if peaks:
        memory = axes.twinx()
        memory.plot(*zip(*peaks, strict=True), label="peak memory (right)", color="black", marker=".")
        memory.set_ylabel("peak memory of the process so far (GB)")
        memory.set_ylim(0, 1.2 * max(peak for _, peak in peaks))
        memory.spines["top"].set_visible(False)
    return _finish(figure, axes, "")


def _canvas(title: str, unit: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    # A Figure of its own draws with Agg and touches neither pyplot's state nor a display.
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_ylabel(unit)
    return figure, axes


def _finish(figure: Figure, axes: Axes, legend_title: str) -> Figure:
    from matplotlib.ticker import MaxNLocator

    first, last = axes.dataLim.intervalx
    axes.set_xlabel("round (0: before training)" if first == 0 else "round")
    axes.set_axisbelow(True)
    if last - first < 1:
        # One round alone would stand on an axis of a tenth of a round.
        axes.set_xlim(round(last) - 1, round(last) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        # Outside, so that it never covers a line.
        figure.legend(loc="outside right upper", title=legend_title or None, fontsize=9, frameon=False)
    return figure


def _label(name: str) -> str:
    """A name as matplotlib shows it, which reads formulas between dollars and leaves out labels that begin with _."""
    return f"{' ' * name.startswith('_')}{name}".replace("$", r"\$")


def _color(number: int, count: int) -> Any:
    from matplotlib import colormaps

    if count <= 10:
        return colormaps["tab10"](number)
    return colormaps["viridis"](number / count)
