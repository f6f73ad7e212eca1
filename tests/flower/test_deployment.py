"""A rehearsal on loopback with Flower's own processes, TLS and node authentication, and what happens when some die."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from flora_core.cli.deploy import write_app
from flora_core.config import recipe as recipes
from flora_core.federation.rounds import Federation
from flora_core.runs.build import build_run
from tests.support.federations import RANKS
from tests.support.flower.deployment import Deployment, deployed, write_recipe
from tests.support.flower.relay import Relay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODEL = "model/model.safetensors"


@pytest.fixture(autouse=True)
def _at_full_scale(scale) -> None:
    if not scale.full:
        pytest.skip("Flower's processes take minutes to start on two cores: make test-all runs this")


def in_process(recipe: Path, out: Path, taking_part: dict[int, list[str]] | None = None) -> bytes:
    """The bytes of the model that the same recipe gives in one process."""
    chosen: Any = recipes.load(str(recipe), [f"out={out}"])
    model, tokenizer, clients, test = build_run(chosen)
    federation = Federation(
        model, tokenizer, clients, chosen.strategy, chosen.federation, chosen.train, chosen.target_modules, test
    )
    if taking_part:
        federation.sampled = taking_part.__getitem__  # pyright: ignore[reportAttributeAccessIssue]
    federation.run()
    return (out / MODEL).read_bytes()


def resume(processes: Sequence[Any]) -> None:
    """Go on with processes that were stopped."""
    for process in processes:
        process.resume()


def test_ten_nodes_give_the_bytes_of_one_process_and_strangers_are_refused(tmp_path):
    recipe = write_recipe(tmp_path, RANKS, 2)
    names = [chr(ord("a") + i) for i in range(len(RANKS))]
    with deployed(tmp_path, recipe, names) as world:
        world.start_node("stranger", client="a")
        world.start_node("keyless", client="a", with_key=False)
        for name in names:
            world.start_node(name)
        world.submit(join_timeout=240, round_timeout=300)
        world.wait_for("run", "run_end", 800)
        assert world.log("run").count("client_done") == 20
        for name in ("stranger", "keyless"):
            assert "SuperNode ID" not in world.log(name), world.log(name)
    assert (tmp_path / "out" / MODEL).read_bytes() == in_process(recipe, tmp_path / "alone")


# The test's own app: the node whose environment names a round spoils what it sends in that round, stops itself with its
# finished answer, or keeps that back until there is a file.
SPOILING = '''"""The app, with a node that spoils its payload, or holds it back."""

import os
import pathlib
import signal
import time

from flora_core.flower import client_app, server_app
from flwr.app import Array, ArrayRecord
from flwr.clientapp import ClientApp

# Flower looks for these assignments in the text.
server = server_app()
client = ClientApp()
inner = client_app()


@client.query()
def query(message, context):
    return inner(message, context)


@client.evaluate()
def evaluate(message, context):
    return inner(message, context)


@client.train()
def train(message, context):
    reply = inner(message, context)
    if message.metadata.group_id == os.environ.get("FLORA_TEST_SPOIL"):
        data = reply.content["payload"]["tensors"].data[:-7]
        reply.content["payload"] = ArrayRecord({"tensors": Array("uint8", (len(data),), "safetensors", data)})
    if message.metadata.group_id == os.environ.get("FLORA_TEST_STOP"):
        os.kill(os.getpid(), signal.SIGSTOP)
    while message.metadata.group_id == os.environ.get("FLORA_TEST_HOLD") and not pathlib.Path("go").exists():
        time.sleep(0.1)
    return reply
'''


def spoiling_app(folder: Path) -> Path:
    write_app(folder)
    (folder / "flora_app" / "apps.py").write_text(SPOILING)
    return folder


def test_damage_delay_absence_and_a_newcomer(tmp_path):
    """Round 1: c's payload is damaged. 2: b is new, c is dead. 3: b stands still, c is still away. 4: all are there."""
    recipe = write_recipe(tmp_path, (4, 2, 3), 4)
    with deployed(tmp_path, recipe, "abc") as world:
        for name in "ac":
            world.start_node(name, FLORA_TEST_SPOIL="1" if name == "c" else "")
        world.submit(spoiling_app(tmp_path / "app"), join_timeout=240, round_timeout=150, min_nodes=2)
        # Round 1 waits for a, until b is there: it is asked who it is before round 2.
        world.wait_for_round(1)
        stopped = world.stop("a")
        world.start_node("b")
        world.wait_for("b", "SuperNode ID")
        resume(stopped)
        world.wait_for_round(2)
        world.kill("c")
        world.wait_for_round(3)
        stopped = world.stop("b")
        world.start_node("c", until_taken=True)
        world.wait_for_round(3, "aggregated")
        resume(stopped)
        world.wait_for("c", "SuperNode ID", times=2)
        world.wait_for("run", "run_end", 400)
        refused: dict[tuple[int, str], Any] = {
            (event["round"], event["client"]): event.get("refused") for event in world.events("client_done")
        }
    gone = "Node Unavailable|no answer within 150 s"
    assert "its message is damaged" in refused.pop((1, "c"))
    assert re.search(gone, refused.pop((2, "c")))
    assert re.search(gone, refused.pop((3, "b")))
    taking_part = {1: ["a"], 2: ["a", "b"], 3: ["a"], 4: ["a", "b", "c"]}
    assert refused == {(number, name): None for number, names in taking_part.items() for name in names}
    assert (tmp_path / "out" / MODEL).read_bytes() == in_process(recipe, tmp_path / "alone", taking_part)


def test_answers_that_are_ready_before_the_deadline_and_arrive_after_it(tmp_path):
    """b's process of round 1 is stopped with its answer, c's keeps it back: both go on when round 2 has begun.

    Of a stopped process Flower says so itself, before the deadline; one that is slow is waited for until then.
    """
    recipe = write_recipe(tmp_path, (4, 2, 3), 3, keep_optimizer=True)
    with deployed(tmp_path, recipe, "abc") as world:
        world.start_node("a")
        world.start_node("b", FLORA_TEST_STOP="1")
        world.start_node("c", FLORA_TEST_HOLD="1")
        world.submit(spoiling_app(tmp_path / "app"), join_timeout=240, round_timeout=110)
        world.wait_for_round(2)
        late = [one for one in world.processes("b", "flwr-clientapp") if one.status() == psutil.STATUS_STOPPED]
        late += world.processes("c", "flwr-clientapp")
        assert len(late) == 2
        (tmp_path / "go").touch()
        resume(late[:1])
        world.wait_for("run", "run_end", 600)
        # They went on, and ended, while the run did.
        assert not any(one.is_running() for one in late)
        refused: dict[tuple[int, str], Any] = {
            (event["round"], event["client"]): event.get("refused") for event in world.events("client_done")
        }
        told = [event for event in world.events("warning") if "did not follow" in event["message"]]
    assert "ClientApp stopped responding" in refused.pop((1, "b"))
    assert "no answer within 110 s (round-timeout)" in refused.pop((1, "c"))
    taking_part = {1: ["a"], 2: ["a", "b", "c"], 3: ["a", "b", "c"]}
    assert refused == {(number, name): None for number, names in taking_part.items() for name in names}
    assert told == []
    assert (tmp_path / "out" / MODEL).read_bytes() == in_process(recipe, tmp_path / "alone", taking_part)


def test_a_superlink_that_is_killed_and_started_again_with_its_database(tmp_path):
    """A node that keeps running comes back by itself; one that died too is started again until it is let in."""
    recipe = write_recipe(tmp_path, (4, 2), 2)
    with deployed(tmp_path, recipe, "ab") as world:
        for name in "ab":
            world.start_node(name)
        world.submit(join_timeout=240, round_timeout=240)
        world.wait_for_round(2)
        for name in ("run", "link", "b"):
            world.kill(name)
        world.start_link()
        world.start_node("b", until_taken=True)
        world.submit(join_timeout=240, round_timeout=240, min_nodes=2)
        world.wait_for("run", "run_end", 400)
        starts, kept_running = world.events("run_start"), world.running["a"].poll() is None
    assert kept_running, "node a ended with the link"
    assert [event["resumed_from"] for event in starts][-1] == 1
    assert (tmp_path / "out" / MODEL).read_bytes() == in_process(recipe, tmp_path / "alone")


def test_bytes_on_the_wire_are_those_that_the_strategy_counts(tmp_path):
    """TLS, HTTP, Flower's envelopes, its polling and heartbeats included, within 3%, each client and each way."""
    recipe = write_recipe(tmp_path, (64, 48), 2, hidden=1024)
    with deployed(tmp_path, recipe, "ab") as world:
        relays = {name: Relay(world.port) for name in "ab"}
        for name, relay in relays.items():
            world.start_node(name, port=relay.port)
        world.submit(join_timeout=240, round_timeout=240)
        seen = []
        for number, kind in ((1, "round_start"), (2, "round_start"), (2, "round_end")):
            world.wait_for_round(number, kind)
            seen.append({name: (relay.up, relay.down) for name, relay in relays.items()})
        counted = world.events("aggregated")
        for relay in relays.values():
            relay.close()
    for number, (before, after) in enumerate(pairwise(seen)):
        for place, way in enumerate(("up", "down")):
            for name, size in counted[number][way].items():
                found = after[name][place] - before[name][place]
                print(f"round {number + 1} {name} {way}: counted {size}, on the wire {found} ({found / size:.4f})")
                assert size <= found <= 1.03 * size, (number + 1, name, way, size, found)


def test_flowers_simulation_gives_the_bytes_of_one_process(tmp_path):
    pytest.importorskip("ray", reason="Flower's simulation needs Ray: pip install 'flwr[simulation]'")
    recipe = write_recipe(tmp_path, (4, 2), 2)
    world = Deployment(tmp_path, recipe, [])
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "rehearsal"\n\n[superlink.rehearsal]\naddress = "127.0.0.1:{world.port}"\n'
        "insecure = true\noptions.num-supernodes = 2\noptions.backend.client-resources.num-cpus = 1\n"
    )
    try:
        port = ["--host", "127.0.0.1", "--port", str(world.port), "--disable-runtime-dependency-installation"]
        world.start("link", "flower-superlink", "--insecure", "--simulation", *port)
        world.wait_for("link", "Uvicorn running")
        world.submit(join_timeout=240, round_timeout=240)
        world.wait_for("run", "run_end", 400)
    finally:
        for name in list(world.running):
            world.kill(name)
    assert (tmp_path / "out" / MODEL).read_bytes() == in_process(recipe, tmp_path / "alone")
