"""Overhead of Flower: seconds from the command to the first round, per round against one process, idle traffic.

python -m bench.studies.deployment            runs two SuperNodes over TLS, and writes bench/results/deployment.json
python -m bench.studies.deployment publish    writes the table of docs/flower.md from it
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness.protocol import ROOT, Result, latest, machine_folder
from flora_core.common.formatting import show_bytes, show_seconds
from flora_core.federation.rounds import Federation
from flora_core.runs.build import build_run
from flora_core.runs.recipe import load_recipe
from tests.support.flower.deployment import Deployment, deployed, write_recipe
from tests.support.flower.relay import Relay

ROUNDS, IDLE_S = 2, 10.0
# Factors that are large beside what goes with them: some MB a client.
RANKS, WIDTH = (64, 48), 1024


def in_process(recipe: Path, out: Path) -> dict[str, Any]:
    """Seconds of the same rounds in one process, its start left out."""
    chosen: Any = load_recipe(str(recipe), [f"out={out}"])
    start = time.perf_counter()
    model, tokenizer, clients, test = build_run(chosen)
    settings = (chosen.strategy, chosen.federation, chosen.train, chosen.target_modules, test)
    events: list[tuple[float, str]] = []
    note = lambda event: events.append((time.perf_counter(), event["event"]))  # noqa: E731
    Federation(model, tokenizer, clients, *settings, callbacks=[note]).run()
    ends = [at for at, kind in events if kind == "round_end"]
    first = next(at for at, kind in events if kind == "round_start")
    return {"first_round_s": first - start, "rounds_s": [b - a for a, b in zip([first, *ends], ends, strict=False)]}


def cpu_seconds(world: Deployment) -> float:
    """Processor seconds that the SuperLink has used."""
    return sum(sum(process.cpu_times()[:2]) for process in world.processes("link"))


def traffic(seen: list[dict[str, tuple[int, int]]], counted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes that each client sent and received in each round: on the wire, and by the strategy's own account."""
    return [
        {"round": event["round"], "client": name, "way": way, "counted": size, "wire": after[name][i] - before[name][i]}
        for event, before, after in zip(counted, seen, seen[1:], strict=False)
        for i, way in enumerate(("up", "down"))
        for name, size in event[way].items()
    ]


def over_flower(folder: Path, recipe: Path) -> dict[str, Any]:
    """The same run over a SuperLink: when what was there, and what idle nodes cost."""
    names, start = [chr(ord("a") + i) for i in range(len(RANKS))], time.perf_counter()
    found: dict[str, Any] = {}

    def note(what: str) -> None:
        found[what] = time.perf_counter() - start

    with deployed(folder, recipe, names) as world:
        note("superlink_s")
        relays = {name: Relay(world.port) for name in names}
        for name, relay in relays.items():
            world.start_node(name, port=relay.port)
        for name in names:
            world.wait_for(name, "SuperNode ID")
        note("nodes_s")
        cpu, before = cpu_seconds(world), sum(relay.up + relay.down for relay in relays.values())
        time.sleep(IDLE_S)
        nodes_minutes = len(names) * IDLE_S / 60
        found["idle_bytes_node_minute"] = (sum(r.up + r.down for r in relays.values()) - before) / nodes_minutes
        found["idle_cpu_s_node_minute"] = (cpu_seconds(world) - cpu) / nodes_minutes
        start = time.perf_counter()
        world.submit(join_timeout=240, round_timeout=240)
        seen = []
        for number, kind in [*((number, "round_start") for number in range(1, ROUNDS + 1)), (ROUNDS, "round_end")]:
            world.wait_for_round(number, kind)
            note(f"{kind}_{number}_s")
            seen.append({name: (relay.up, relay.down) for name, relay in relays.items()})
        found["bytes"] = traffic(seen, world.events("aggregated"))
        found["rounds_s"] = [event["seconds"] for event in world.events("round_end")]
    return found


def measure() -> None:
    """Run both, one after the other."""
    settings = {"ranks": RANKS, "rounds": ROUNDS, "width": WIDTH, "layers": 2, "idle_s": IDLE_S}
    question = "What Flower adds to a run of two clients on loopback, with TLS and node authentication"
    result = Result("deployment", question, settings, machine_folder(), "python -m bench.studies.deployment")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(folder, RANKS, ROUNDS, hidden=WIDTH)
        alone = in_process(recipe, folder / "alone")
        result.save(flower=over_flower(folder, recipe), in_process=alone, finished=True)
    print(json.dumps({key: result.data[key] for key in ("flower", "in_process")}, indent=1))


def publish() -> None:
    """Write the table of docs/flower.md."""
    path = latest("deployment")
    data = json.loads(path.read_text())
    flower, alone, env = data["flower"], data["in_process"], data["environment"]
    mean = {key: sum(part["rounds_s"]) / len(part["rounds_s"]) for key, part in (("flower", flower), ("alone", alone))}
    rows = [
        ("SuperLink answers and knows the keys", show_seconds(flower["superlink_s"]), "-"),
        ("all nodes are connected, from then", show_seconds(flower["nodes_s"] - flower["superlink_s"]), "-"),
        ("from the command to round 1", show_seconds(flower["round_start_1_s"]), show_seconds(alone["first_round_s"])),
        ("a round", show_seconds(mean["flower"]), f"{mean['alone']:.2f} s"),
        ("an idle node's traffic, a minute", show_bytes(flower["idle_bytes_node_minute"]), "-"),
        ("the SuperLink's processor time for it", f"{flower['idle_cpu_s_node_minute']:.2f} s", "-"),
    ]
    worst = max(row["wire"] / row["counted"] for row in flower["bytes"])
    rows.append(("bytes on the wire against the strategy's count, at most", f"{100 * (worst - 1):.2f}% more", "-"))
    table = [
        "| | over Flower | in one process |",
        "| --- | --- | --- |",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    source = (
        f"`{path.relative_to(ROOT)}`, `{data['command']}`; commit {env['commit'][:10]}, {env['processor']}, "
        f"{env['cores']} cores."
    )
    path, start, end = ROOT / "docs" / "flower.md", "<!-- deployment:start -->", "<!-- deployment:end -->"
    text = path.read_text()
    body = "\n".join([source, "", *table])
    path.write_text(f"{text.split(start)[0]}{start}\n{body}\n{end}{text.split(end)[1]}")


if __name__ == "__main__":
    publish() if sys.argv[1:] == ["publish"] else measure()
