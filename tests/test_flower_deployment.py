"""A rehearsal on loopback with Flower's own processes, TLS and node authentication, and what happens when some die."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'flora-core[flower]'")

from flora_core import recipes
from flora_core.build import build
from flora_core.federation import Federation
from tests.federation_cases import RANKS
from tests.flower_deployment import deployed, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODEL = "model/model.safetensors"


@pytest.fixture(autouse=True)
def _at_full_scale(scale) -> None:
    if not scale.full:
        pytest.skip("Flower's processes take minutes to start on two cores: make test-all runs this")


def in_process(recipe: Path, out: Path, taking_part: dict[int, list[str]] | None = None) -> bytes:
    """The bytes of the model that the same recipe gives in one process."""
    chosen: Any = recipes.load(str(recipe), [f"out={out}"])
    model, tokenizer, clients, test = build(chosen)
    federation = Federation(
        model, tokenizer, clients, chosen.strategy, chosen.federation, chosen.train, chosen.target_modules, test
    )
    if taking_part:
        federation.sampled = taking_part.__getitem__  # pyright: ignore[reportAttributeAccessIssue]
    federation.run()
    return (out / MODEL).read_bytes()


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


def test_a_node_that_is_killed_in_a_round_and_comes_back(tmp_path):
    recipe = write_recipe(tmp_path, (4, 2, 3), 3)
    with deployed(tmp_path, recipe, "abc") as world:
        for name in "abc":
            world.start_node(name)
        world.submit(join_timeout=240, round_timeout=60)
        world.wait_for("run", "round_start round=2")
        world.kill("c")
        world.wait_for("run", "no answer within 60 s")
        world.start_node("c")
        world.wait_for("run", "run_end", 400)
        text = world.log("run")
    last = [name for name in "abc" if f"client_done round=3 client={name}" in text]
    taking_part = {1: ["a", "b", "c"], 2: ["a", "b"], 3: last}
    assert (tmp_path / "out" / MODEL).read_bytes() == in_process(recipe, tmp_path / "alone", taking_part)
