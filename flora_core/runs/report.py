"""Turn a run's metrics.jsonl and run.json into plots (PNG) and one self-contained report.html."""

from __future__ import annotations

import base64
import json
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import remedy
from .plots import plot_accuracy, plot_bytes, plot_errors, plot_loss, plot_server
from .summary import History, summary_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read_history(run_dir: str | Path) -> History:
    """Read the events of a run.

    Raises:
        FileNotFoundError: If the folder holds no metrics.jsonl.
        ValueError: If a line of it is not an event (a torn last line of a killed run is left out).
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} holds no metrics.jsonl, so it is not the folder of a run; give the run's out="
        )
    lines = path.read_text("utf-8").split("\n")
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: malformed JSON: {error.msg}") from None
    if not all(isinstance(event, dict) and "event" in event for event in events):
        raise ValueError(f"{path}: every line must be an object with an event; this is another program's file")
    return History.of(events)


def write_report(run_dir: str | Path) -> Path:
    """Write loss.png, accuracy.png, errors.png, bytes.png, server.png and report.html into a run's folder.

    Args:
        run_dir: Folder with metrics.jsonl and, for the facts about the run, run.json.
    Returns:
        The path of report.html; plots without data are left out, and all of them without matplotlib, which the page
        says (``missing_plots``).
    Raises:
        FileNotFoundError: If the folder holds no run.
        OSError: If the files cannot be written.
    """
    run_dir = Path(run_dir)
    history = read_history(run_dir)
    plots: dict[str, Callable[[History], Figure | None]] = {
        "loss": plot_loss,
        "accuracy": plot_accuracy,
        "errors": plot_errors,
        "bytes": plot_bytes,
        "server": plot_server,
    }
    images: list[Path] = []
    without = missing_plots(run_dir)
    for name, plot in plots.items() if without is None else ():
        figure = plot(history)
        if figure is not None:
            with warnings.catch_warnings():
                # Names in other scripts show as boxes, which is no reason for a line on the terminal for each sign.
                warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
                figure.savefig(run_dir / f"{name}.png", dpi=110)
            images.append(run_dir / f"{name}.png")
    path = run_dir / "report.html"
    path.write_text(_page(history, images, _read_facts(run_dir), without), "utf-8")
    return path


def missing_plots(run_dir: str | Path) -> str | None:
    """Describe why reports have no plots here and how to get them; None where they have."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        why = remedy(error, "plotting", "cli")
        return f"the report has tables and no plots: {why}; then run: flora report {shlex.quote(str(run_dir))}"
    return None


def _read_facts(run_dir: Path) -> dict[str, Any]:
    try:
        facts = json.loads((run_dir / "run.json").read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{run_dir / 'run.json'}: malformed JSON: {error}") from None
    return facts if isinstance(facts, dict) else {}


def _page(history: History, images: list[Path], facts: dict[str, Any], without: str | None) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # torch needs it too

    start = history.start
    clients, rounds = len(start.get("clients", [])), start.get("rounds", "?")
    size = f"{clients} client{'s' * (clients != 1)}, {rounds} round{'s' * (rounds != 1)}"
    pages = Environment(loader=PackageLoader("flora_core.runs", ""), autoescape=True, undefined=StrictUndefined)
    return pages.get_template("report.html.jinja").render(
        title=f"{start.get('strategy', 'Federated')} run: {size}",
        warnings=[event["message"] for event in history.warnings],
        finished=bool(history.end),
        tables=summary_tables(history),
        without=without,
        images=[(image.stem, base64.b64encode(image.read_bytes()).decode("ascii")) for image in images],
        facts=json.dumps(facts, indent=2) if facts else "",
    )
