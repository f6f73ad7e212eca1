"""Held-out loss of the strategies side by side on Dolly, over rounds and seeds; stops and resumes on request.

    python -m bench.studies.quality run --data ../shared/data/dolly --label short --rounds 8 --seeds 0,1,2 --minutes 60
    python -m bench.studies.quality publish --label short          # tables into docs/quality.md, plots into docs/img

`run` does every combination of split, ranks, strategy and seed that is not done yet and stops after ``--minutes``;
started again with the same arguments it goes on, also in the middle of a run. Strategies that cannot take mixed ranks
are left out there. A strategy may have options: ``flora_svd:tau=0.9``, ``flora_warm:start=directions``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness.protocol import RESULTS, ROOT, environment
from flora_core.aggregation import STRATEGIES, get_strategy
from flora_core.common.files import atomic_write_bytes
from flora_core.common.formatting import show_bytes

RANKS = {"mixed": [64, 32, 16, 16, 8, 8, 4, 4, 4, 4], "equal": [16]}
SPLITS = ("dirichlet05_10", "stratified_10")
DEFAULT = [
    name for name in STRATEGIES if name not in ("flora_svd", "raflora")
]  # flora_svd is flora at tau = 1, and raflora flexlora at equal ranks.
# What a run's numbers depend on; they go into the results and must not change under one label.
SETTINGS = (
    "rounds",
    "per_client",
    "test_items",
    "max_length",
    "max_steps",
    "batch_size",
    "lr",
    "targets",
    "fraction",
    "eval_every",
)
_START, _END = "<!-- quality:start -->", "<!-- quality:end -->"

Run = dict[str, Any]


class OutOfTime(Exception):  # noqa: N818
    """The minutes are over; the run in flight goes on from its last round next time."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.quality", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    publish = commands.add_parser("publish")
    publish.add_argument("--label", default="quality")
    run = commands.add_parser("run")
    run.add_argument("--data", type=Path, required=True, help="folder with dolly15k.jsonl and partitions.json")
    run.add_argument("--label", default="quality", help="of the results: bench/results/quality_LABEL.json")
    run.add_argument("--work", type=Path, default=Path("runs/quality"), help="where runs in flight lie")
    run.add_argument("--strategies", default=",".join([*DEFAULT, "flora_warm:start=directions", "raflora"]))
    run.add_argument("--splits", default=",".join(SPLITS))
    run.add_argument("--ranks", default="mixed,equal", help="mixed (64..4), equal (16)")
    run.add_argument("--seeds", default="0,1,2")
    run.add_argument("--rounds", type=int, default=8)
    run.add_argument("--fraction", type=float, default=1.0)
    run.add_argument("--eval-every", type=int, default=1, help="rounds from one evaluation to the next")
    run.add_argument("--per-client", type=int, default=32)
    run.add_argument("--test-items", type=int, default=80)
    run.add_argument("--max-length", type=int, default=192)
    run.add_argument("--max-steps", type=int, default=None, help="optimizer steps of a client in a round")
    run.add_argument("--batch-size", type=int, default=4)
    run.add_argument("--lr", type=float, default=1e-3)
    run.add_argument("--targets", default="q_proj,v_proj")
    run.add_argument("--device", default="auto")
    run.add_argument("--threads", type=int, default=None)
    run.add_argument("--minutes", type=float, default=1e9)
    return parser.parse_args(argv)


def combinations(args: argparse.Namespace) -> Iterator[Run]:
    """Every run that is asked for: seeds last, so that a stop leaves whole comparisons."""
    lists = (args.seeds, args.splits, args.ranks, args.strategies)
    for seed, split, ranks, text in itertools.product(*(value.split(",") for value in lists)):
        name, _, options = text.partition(":")
        if ranks == "equal" or get_strategy(name).mixed_ranks:
            pairs = dict(pair.split("=", 1) for pair in options.split(";") if pair)
            one = {"seed": int(seed), "split": split, "ranks": ranks, "strategy": text, "name": name, "options": pairs}
            yield {**one, "key": f"{split}-{ranks}-{text.replace(':', '-').replace('=', '_')}-{seed}"}


def recipe_of(args: argparse.Namespace, one: Run, out: Path) -> Any:
    """The recipe of one run."""
    from flora_core.config.recipe import load

    values = {
        "data": args.data / "dolly15k.jsonl",
        "data.partitions": args.data / "partitions.json",
        "data.split": one["split"],
        "data.per_client": args.per_client,
        "data.test_items": args.test_items,
        "clients.ranks": RANKS[one["ranks"]],
        "target_modules": f"[{args.targets}]",
        "train.max_length": args.max_length,
        "train.max_steps": "null" if args.max_steps is None else args.max_steps,
        "train.batch_size": args.batch_size,
        "train.lr": args.lr,
        "federation.rounds": args.rounds,
        "federation.fraction": args.fraction,
        "federation.eval_every": args.eval_every,
        "federation.keep_snapshots": 1,
        "federation.save_model": "false",
        "strategy": one["name"],
        "seed": one["seed"],
        "device": args.device,
        "out": out,
    }
    values |= {f"federation.strategy_options.{name}": value for name, value in one["options"].items()}
    return load("dolly", [f"{key}={value}" for key, value in values.items()])


def do(args: argparse.Namespace, one: Run, deadline: float) -> list[dict[str, Any]]:
    """Run one combination, or go on with it; its events."""
    from flora_core.federation.rounds import Federation
    from flora_core.runs.build import build_run

    out = args.work / args.label / one["key"]
    recipe = recipe_of(args, one, out)
    model, tokenizer, clients, test = build_run(recipe)

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "evaluated":
            print(f"{one['key']} round {event['round']}: loss {event['loss']:.4f}", flush=True)
        if event["event"] == "round_end" and time.monotonic() > deadline:
            raise OutOfTime

    federation = Federation(
        model,
        tokenizer,
        clients,
        recipe.strategy,
        recipe.federation,
        recipe.train,
        recipe.target_modules,
        test,
        [watch],
    )
    events = federation.run().events
    # Adapters of all rounds, a good 30 MB each: not needed once the numbers are written.
    shutil.rmtree(out)
    return events


def digest(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Record of a run: curves over rounds."""
    # A resumed run tells its evaluations of rounds that were redone again; the last one counts.
    seen = {event["round"]: event for event in events if event["event"] == "evaluated"}
    rounds = {event["round"]: event for event in events if event["event"] == "aggregated"}
    categories = next(iter(seen.values()))["groups"]
    return {
        "rounds": list(seen),
        "loss": [event["loss"] for event in seen.values()],
        "by_category": {name: [event["groups"][name]["loss"] for event in seen.values()] for name in categories},
        "aggregation_error": [event["aggregation_error"] for event in rounds.values()],
        "bytes_up": sum(event["bytes_up"] for event in rounds.values()),
        "bytes_down": sum(event["bytes_down"] for event in rounds.values()),
        "server_seconds": sum(event["seconds"] for event in rounds.values()),
    }


def run_all(args: argparse.Namespace) -> None:
    """Do what is not done, writing the results after every run."""
    path, deadline = RESULTS / f"quality_{args.label}.json", time.monotonic() + 60 * args.minutes
    settings = {name: getattr(args, name) for name in SETTINGS}
    data: dict[str, Any] = {"settings": settings, "ranks": RANKS, "environment": environment(), "runs": {}}
    if path.is_file():
        data = json.loads(path.read_text())
        if data["settings"] != settings:
            raise SystemExit(f"{path} holds runs with {data['settings']}, not {settings}; choose another --label")
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    for one in combinations(args):
        if one["key"] in data["runs"]:
            continue
        if time.monotonic() > deadline:
            break
        try:
            events = do(args, one, deadline)
        except OutOfTime:
            break
        data["runs"][one["key"]] = {**one, **digest(events)}
        atomic_write_bytes(path, (json.dumps(data, indent=1) + "\n").encode())
    left = [one["key"] for one in combinations(args) if one["key"] not in data["runs"]]
    print(f"{len(data['runs'])} runs done, {len(left)} to do" + (f", next {left[0]}" if left else ""))


def table(data: dict[str, Any], split: str, ranks: str) -> list[str]:
    """One comparison: the loss before, at its best and at the end, over seeds, and what it cost.

    Seeds differ by more than strategies do, so the distance to the first is reported seed by seed.
    """
    names = (
        "strategy",
        "before",
        "best round",
        "best",
        "last",
        "behind the first, seed by seed",
        "rise after the best",
        "aggregation error",
        "up",
        "down",
    )
    lines = ["| " + " | ".join([*names, "seeds"]) + " |", "|" + " --- |" * (len(names) + 1)]
    found = grouped(data, split, ranks)
    ahead = {run["seed"]: run["loss"][-1] for run in next(iter(found.values()))}
    for strategy, runs in found.items():
        curve = mean_curve(runs)
        best = min(range(len(curve)), key=curve.__getitem__)
        lasts = [run["loss"][-1] for run in runs]
        spread = f" ({min(lasts):.3f}-{max(lasts):.3f})" if len(lasts) > 1 else ""
        errors = [error for run in runs for error in run["aggregation_error"] if error is not None]
        behind = [run["loss"][-1] - ahead[run["seed"]] for run in runs]
        gap = f"{statistics.mean(behind):.3f}" + (
            f" ({min(behind):.3f} to {max(behind):.3f})" if len(behind) > 1 else ""
        )
        losses = [
            f"{curve[0]:.3f}",
            str(runs[0]["rounds"][best]),
            f"{curve[best]:.3f}",
            f"{curve[-1]:.3f}{spread}",
            gap,
        ]
        bytes_ = [show_bytes(runs[0][way]) for way in ("bytes_up", "bytes_down")]
        cells = [f"`{strategy}`", *losses, f"{curve[-1] - curve[best]:.3f}", f"{max(errors):.1e}", *bytes_]
        lines.append("| " + " | ".join([*cells, str(len(runs))]) + " |")
    return lines


def category_table(data: dict[str, Any], split: str, ranks: str) -> list[str]:
    """The last round's loss by category."""
    found = grouped(data, split, ranks)
    names = sorted(next(iter(found.values()))[0]["by_category"])
    lines = ["| strategy | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for strategy, runs in found.items():
        cells = [f"{statistics.mean(run['by_category'][name][-1] for run in runs):.3f}" for name in names]
        lines.append(f"| `{strategy}` | " + " | ".join(cells) + " |")
    return lines


def grouped(data: dict[str, Any], split: str, ranks: str) -> dict[str, list[Run]]:
    """Strategy -> its runs, best last loss first; of the seeds that all of them have, so that means compare."""
    found: dict[str, list[Run]] = {}
    for run in data["runs"].values():
        if (run["split"], run["ranks"]) == (split, ranks):
            found.setdefault(run["strategy"], []).append(run)
    if not found:
        return {}
    common = set.intersection(*({run["seed"] for run in runs} for runs in found.values()))
    found = {strategy: [run for run in runs if run["seed"] in common] for strategy, runs in found.items() if common}
    return dict(sorted(found.items(), key=lambda item: mean_curve(item[1])[-1]))


def mean_curve(runs: Sequence[Run]) -> list[float]:
    """Mean held-out loss over seeds, round by round."""
    return [statistics.mean(values) for values in zip(*(run["loss"] for run in runs), strict=True)]


def plot(data: dict[str, Any], split: str, ranks: str, path: Path) -> None:
    """One curve per strategy, with the range over seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    found = grouped(data, split, ranks)
    colors = colormaps["tab10" if len(found) <= 10 else "tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for number, (strategy, runs) in enumerate(found.items()):
        color, rounds = colors[number % len(colors)], runs[0]["rounds"]
        axes.plot(rounds, mean_curve(runs), label=strategy, color=color, marker=".", linewidth=1.2)
        losses = list(zip(*(run["loss"] for run in runs), strict=True))
        axes.fill_between(rounds, [min(x) for x in losses], [max(x) for x in losses], color=color, alpha=0.12)
    axes.set_title(f"{split}, {ranks} ranks {RANKS[ranks]}")
    axes.set_xlabel("round")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("held-out loss per labelled token (nats)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def publish(label: str) -> None:
    """Write tables between the marks of docs/quality.md and plots into docs/img."""
    data = json.loads((RESULTS / f"quality_{label}.json").read_text())
    lines = [f"## {label}", "", f"`bench/results/quality_{label}.json`: {json.dumps(data['settings'])}", ""]
    for split, ranks in itertools.product(SPLITS, RANKS):
        if grouped(data, split, ranks):
            image = ROOT / "docs" / "img" / f"quality_{label}_{split}_{ranks}.png"
            plot(data, split, ranks, image)
            lines += [f"### {split}, {ranks} ranks", "", f"![{split}, {ranks} ranks](img/{image.name})", ""]
            lines += [*table(data, split, ranks), "", "Loss after the last round by category:", ""]
            lines += [*category_table(data, split, ranks), ""]
    path, start, end = ROOT / "docs" / "quality.md", f"{_START} {label}", f"{_END} {label}"
    text = path.read_text() if path.is_file() else "# Quality\n"
    if start not in text:
        text += f"\n{start}\n{end}\n"
    before, rest = text.split(start, 1)
    atomic_write_bytes(path, (before + "\n".join([start, *lines]) + end + rest.split(end, 1)[1]).encode())
    print(path)


if __name__ == "__main__":
    arguments = parse()
    run_all(arguments) if arguments.command == "run" else publish(arguments.label)
