"""A node on Flower finds its client in its configuration and its recipe, and needs nobody else's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from flwr.app import Context, RecordDict

from flora_core.data.splits import split_held_out, split_names
from flora_core.federation.parties import ordered
from flora_core.flower import node as flower_node
from flora_core.runs.build import build_client, build_clients
from flora_core.runs.recipe import load_recipe
from tests.support.flower.deployment import write_recipe


def test_a_simulated_node_is_the_recipes_client_of_its_number(tmp_path):
    recipe = write_recipe(tmp_path, (4, 2), 1)

    def of(node: dict[str, Any], **run: Any) -> Any:
        return flower_node.settings_of(Context(1, 1, node, RecordDict(), {"recipe": str(recipe), **run}))

    simulated = {"partition-id": 1, "num-partitions": 2}
    found = of(simulated)
    assert (found["client"], found["folder"]) == ("b", str(tmp_path / "out-sites" / "b"))
    real = {"recipe": "x", "client": "y", "folder": "z"}
    assert of(real) == real
    with pytest.raises(ValueError, match="2 clients, and the simulation more nodes: num-supernodes"):
        of({"partition-id": 2, "num-partitions": 3})
    with pytest.raises(ValueError, match="set out in the recipe"):
        of(simulated, overrides="out=null")


@pytest.mark.parametrize("overrides", [[], ["clients.names=[x, b]", "data.per_client=3", "data.test=null"]])
def test_nobody_needs_the_data_of_others(overrides, tmp_path):
    """A node reads its client's file alone, and a server none of theirs if some are not there."""
    text = str(write_recipe(tmp_path, (4, 2), 1))
    recipe = load_recipe(text, overrides)
    whole, held_out = build_clients(recipe)
    assert split_held_out(recipe) == held_out
    (tmp_path / "a.jsonl").unlink()
    assert split_names(recipe) == [spec.name for spec in whole]
    assert build_client(recipe, "b") == whole[1]
    assert split_held_out(recipe) == ([] if overrides else held_out)
    with pytest.raises(OSError, match=r"a\.jsonl"):
        build_client(recipe, whole[0].name)
    with pytest.raises(ValueError, match="the node's recipe has no client 'z'; it has "):
        build_client(recipe, "z")


def test_a_sites_recipe_of_the_docs_is_enough(tmp_path, monkeypatch):
    """It names its model, its data and its adapter; relative paths begin where the node was started."""
    monkeypatch.chdir(write_recipe(tmp_path, (4, 2), 1).parent)
    text = (Path(__file__).parents[2] / "docs" / "flower.md").read_text()
    shown = [part.partition("```")[0] for part in text.split("```yaml\n")[1:]]
    (tmp_path / "hospitals.yaml").write_text(shown[0].replace("/models/base", str(tmp_path / "model")))
    (tmp_path / "b.jsonl").unlink()
    site = flower_node.site_of({"recipe": "hospitals.yaml", "client": "a", "folder": "copies"})
    assert (site.spec.name, site.spec.adapter.rank, len(site.spec.data)) == ("a", 16, 5)
    (tmp_path / "server.yaml").write_text(shown[1].replace("/srv/flora/held-out.jsonl", "test.jsonl"))
    (tmp_path / "a.jsonl").unlink()
    assert split_names(load_recipe("server.yaml")) == ["a", "b"]
    assert len(split_held_out(load_recipe("server.yaml"))) == 6


def test_names_are_in_the_order_of_people():
    assert ordered(["client-10", "client-2", "b", "client-1"]) == ["b", "client-1", "client-2", "client-10"]


@pytest.mark.parametrize("lacking", ["recipe", "client", "folder"])
def test_a_node_that_is_not_configured_says_what_it_lacks(lacking):
    values = {"recipe": "quickstart", "client": "client-0", "folder": "x"}
    with pytest.raises(ValueError, match=f"lacks {lacking}"):
        flower_node.site_of({**values, lacking: ""})
