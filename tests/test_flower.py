"""A federation over Flower's messages gives the bytes of the same run in one process, whatever gets lost."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'flora-core[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

import flora_core as flora
from flora_core import flower, flower_node
from flora_core.aggregate import get_strategy
from flora_core.remote import ordered
from flora_core.site import Site
from tests.federation_cases import make_clients, make_model, make_tokenizer
from tests.flower_cases import MemoryGrid, in_process, make_sites, serve
from tests.flower_deployment import write_recipe


def assert_same_model(one: Any, two: Any) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def assert_follows(site: Site, model: Any) -> None:
    """A party ends with the global model."""
    assert site.weights
    for module, weight in site.weights.items():
        assert torch.equal(weight, model.get_submodule(module).weight), module


@pytest.mark.parametrize(
    "strategy", ["flora", "flora_warm", "zero_pad", "ffa", "rolora", "fedex", "flexlora", "hetlora"]
)
def test_a_run_over_messages_has_the_bytes_of_the_run_in_one_process(strategy, tmp_path, monkeypatch):
    clients = make_clients() if get_strategy(strategy).mixed_ranks else make_clients((4, 4, 4))
    grid = MemoryGrid(make_sites(tmp_path / "sites", clients))
    link, result = serve(grid, monkeypatch, tmp_path / "out", strategy=strategy, rounds=3, keep_optimizer=True)
    alone = in_process(tmp_path / "alone", clients=clients, strategy=strategy, rounds=3, keep_optimizer=True)
    assert_same_model(link.model, alone.model)
    assert {**(result.after or {}), "seconds": 0} == {**alone.result.after, "seconds": 0}
    if result.adapter is not None:
        for module, pair in result.adapter.adapters.items():
            assert all(map(torch.equal, pair, alone.result.adapter.adapters[module]))
    for site in grid.sites.values():
        if strategy not in ("zero_pad", "ffa", "rolora", "hetlora", "flexlora"):  # their base never changes
            assert_follows(site, link.model)


@pytest.mark.parametrize("rounding", ["low_bits", "stochastic", "nearest"])
def test_bfloat16_survives(rounding, tmp_path, monkeypatch):
    grid = MemoryGrid(make_sites(tmp_path / "sites", dtype=torch.bfloat16))
    link, _ = serve(grid, monkeypatch, None, model=make_model(torch.bfloat16), rounding=rounding)
    alone = in_process(None, model=make_model(torch.bfloat16), rounding=rounding)
    assert_same_model(link.model, alone.model)
    for site in grid.sites.values():
        assert_follows(site, link.model)


class Faults:
    """Spoil the answers of one client in one round: ``how(message, reply)`` gives what arrives."""

    def __init__(self, kind: str, number: int, node: int, how: Any = lambda message, reply: None):
        self.kind, self.number, self.node, self.how = kind, number, node, how

    def __call__(self, message: Message, reply: Message) -> Message | None:
        meta = message.metadata
        hit = (meta.message_type, meta.group_id, meta.dst_node_id) == (self.kind, str(self.number), self.node)
        return self.how(message, reply) if hit else reply


def spoiled(change: Any) -> Any:
    """A reply whose payload's bytes went through ``change``."""

    def how(message: Message, reply: Any) -> Message:
        data = change(reply.content["payload"]["tensors"].data)
        reply.content["payload"] = ArrayRecord({"tensors": Array("uint8", (len(data),), "safetensors", data)})
        return reply

    return how


def renamed(message: Message, reply: Message) -> Message:
    """A reply in another client's name."""
    order, tensors = flower.unpack(reply.content)
    return Message(flower.pack({**order, "client": "b"}, tensors), reply_to=message)


def changed(**values: Any) -> Any:
    """A reply whose JSON has other values, a mapping's one by one."""

    def how(message: Message, reply: Message) -> Message:
        order, tensors = flower.unpack(reply.content)
        for name, value in values.items():
            order[name] = {**order[name], **value} if isinstance(value, dict) and value else value
        return Message(flower.pack(order, tensors), reply_to=message)

    return how


def gone(message: Message, reply: Message) -> Message:
    """What the SuperLink answers, in its own name, for a node that is offline."""
    answer = Message(Error(3, "Node Unavailable"), reply_to=message)
    answer.metadata.__dict__["_src_node_id"] = 1
    return answer


def of_another_version(message: Message, reply: Message) -> Message:
    """A reply of a node that has another flora-core."""
    text = str(reply.content["order"]["json"]).replace(f'"version": "{flora.__version__}"', '"version": "9.9"')
    reply.content["order"] = ConfigRecord({"json": text})
    return reply


LOST = {
    "offline": (gone, "its node failed: Node Unavailable"),
    "another version": (of_another_version, "its flora-core is 9.9, and this side's .*install the same"),
    "a share of its own making": (changed(metrics={"examples": 1e9, "tokens": float("nan")}), "its tokens must be"),
    "fields of ours": (changed(metrics={"tokens": "many"}), "its tokens must be a finite number"),
    "no metrics": (changed(metrics=[]), "its loss_first must be|its examples must be"),
    "lost": (lambda message, reply: None, "no answer within 9 s"),
    "cut off": (spoiled(lambda data: data[:-5]), "damaged"),
    "no tensors at all": (spoiled(lambda data: b"\xff" * 40), "damaged"),
    "too large": (spoiled(lambda data: data + b" " * 100_000), "announced at most"),
    "another name": (renamed, "answers as client 'b'"),
}


@pytest.mark.parametrize("fault", LOST)
def test_an_update_that_does_not_arrive_whole_is_refused_and_the_round_goes_on(fault, tmp_path, monkeypatch):
    how, reason = LOST[fault]
    grid = MemoryGrid(make_sites(tmp_path / "sites"), Faults("train", 2, 102, how))
    link, result = serve(grid, monkeypatch, tmp_path / "out", rounds=3, round_timeout=9.0)
    assert re.search(reason, result.history[1]["refused"]["c"])
    names = ["a", "b", "c"]
    alone = in_process(None, {1: names, 2: ["a", "b"], 3: names}, rounds=3)
    assert_same_model(link.model, alone.model)
    assert_follows(grid.sites[102], link.model)
    assert result.history[2]["catch_up"]["c"]["kind"] == "log"


def test_who_did_not_get_a_rounds_change_gets_it_with_the_next_orders(tmp_path, monkeypatch):
    events: list[Any] = []
    grid = MemoryGrid(make_sites(tmp_path / "sites"), Faults("evaluate", 1, 100))
    link, _ = serve(grid, monkeypatch, tmp_path / "out", rounds=3, events=events)
    assert any("'a' did not follow" in event.get("message", "") for event in events)
    assert_same_model(link.model, in_process(None, rounds=3).model)
    assert_follows(grid.sites[100], link.model)


class Crowd(MemoryGrid):
    """Parties come and go: ``there[round]`` are the nodes that are connected before that round's orders."""

    there: dict[int, list[int]]
    asked = 0

    def get_node_ids(self) -> list[int]:
        """Who is connected: asked twice before each round, and at the start."""
        done = sum(message.metadata.message_type == "evaluate" for message in self.sent)
        ended = {message.metadata.group_id for message in self.sent if message.metadata.message_type == "evaluate"}
        return self.there[len(ended) + 1] if done or not ended else []


@pytest.mark.parametrize(
    "there",
    [{1: "ab", 2: "abc", 3: "abc"}, {1: "abc", 2: "ab", 3: "ab", 4: "abc"}, {1: "abc", 2: "c", 3: "ab"}],
    ids=["joins at round 2", "away for two rounds", "nobody stays"],
)
def test_parties_may_come_and_go(there, tmp_path, monkeypatch):
    grid = Crowd(make_sites(tmp_path / "sites"))
    grid.there = {number: [100 + "abc".index(name) for name in names] for number, names in there.items()}
    grid.there[len(there) + 1] = list(grid.sites)
    link, _ = serve(grid, monkeypatch, tmp_path / "out", rounds=len(there), min_nodes=2)
    alone = in_process(None, {number: list(names) for number, names in there.items()}, rounds=len(there))
    assert_same_model(link.model, alone.model)
    for name in there[len(there)]:
        assert_follows(grid.sites[100 + "abc".index(name)], link.model)


class StoppedError(Exception):
    """The server goes down."""


def test_a_server_that_restarts_goes_on_from_its_checkpoint_and_parties_from_their_disks(tmp_path, monkeypatch):
    def stop(message: Message, reply: Message) -> Message:
        raise StoppedError

    grid = MemoryGrid(make_sites(tmp_path / "sites"), Faults("train", 3, 101, stop))
    with pytest.raises(StoppedError):
        serve(grid, monkeypatch, tmp_path / "out", rounds=4)
    # One party's disk is lost, the others' processes are new.
    shutil.rmtree(tmp_path / "sites" / "a")
    again = MemoryGrid(make_sites(tmp_path / "sites"))
    link, result = serve(again, monkeypatch, tmp_path / "out", rounds=4)
    assert [event["resumed_from"] for event in result.events if event["event"] == "run_start"][-1] == 2
    assert_same_model(link.model, in_process(None, rounds=4).model)
    for site in again.sites.values():
        assert_follows(site, link.model)


def test_a_copy_that_is_not_the_servers_is_replaced(tmp_path, monkeypatch):
    events: list[Any] = []

    def spoil(message: Message, reply: Message) -> Message:
        module = next(iter(grid.sites[100].weights))
        with torch.no_grad():
            grid.sites[100].weights[module][0, 0] += 1
        order, _ = flower.unpack(reply.content)
        return Message(flower.pack({**order, "weights": grid.sites[100].digest()}), reply_to=message)

    grid = MemoryGrid(make_sites(tmp_path / "sites"), Faults("evaluate", 1, 100, spoil))
    link, _ = serve(grid, monkeypatch, tmp_path / "out", rounds=3, events=events)
    assert any("copy of the global model differs" in event.get("message", "") for event in events)
    assert_same_model(link.model, in_process(None, rounds=3).model)
    assert_follows(grid.sites[100], link.model)


def test_what_a_party_tells_of_itself_changes_neither_its_share_nor_the_events(tmp_path, monkeypatch):
    boast = changed(metrics={"examples": 10**9, "event": "run_end", "round": 7, "client": "b"})
    grid = MemoryGrid(make_sites(tmp_path / "sites"), Faults("train", 1, 100, boast))
    link, _ = serve(grid, monkeypatch, tmp_path / "out")
    assert_same_model(link.model, in_process(None).model)


@pytest.mark.parametrize("weights", [[], {"modules": ["no such module"], "digest": "x"}, {"modules": 3}, "x"])
def test_a_digest_that_is_none_costs_a_snapshot_and_not_the_run(weights, tmp_path, monkeypatch):
    grid = MemoryGrid(make_sites(tmp_path / "sites"), Faults("evaluate", 1, 100, changed(weights=weights)))
    link, _ = serve(grid, monkeypatch, tmp_path / "out", rounds=3)
    assert_same_model(link.model, in_process(None, rounds=3).model)
    assert_follows(grid.sites[100], link.model)


def test_whoever_has_another_base_cannot_take_part(tmp_path, monkeypatch):
    events: list[Any] = []
    sites = make_sites(tmp_path / "sites")
    sites[102] = Site(make_model(seed=1), make_tokenizer(), make_clients()[2], tmp_path / "other")
    link, _ = serve(MemoryGrid(sites), monkeypatch, None, min_nodes=2, events=events)
    assert any("another base model" in event.get("message", "") for event in events)
    assert_same_model(link.model, in_process(None, {1: ["a", "b"], 2: ["a", "b"]}).model)


def test_two_parties_cannot_have_one_name(tmp_path, monkeypatch):
    events: list[Any] = []
    sites = make_sites(tmp_path / "sites")
    sites[103] = Site(make_model(), make_tokenizer(), make_clients()[0], tmp_path / "second")
    serve(MemoryGrid(sites), monkeypatch, None, min_nodes=3, events=events)
    assert any("client 'a' is there already" in event.get("message", "") for event in events)


def test_too_few_parties_are_waited_for_and_then_named(tmp_path, monkeypatch):
    with pytest.raises(TimeoutError, match=r"3 clients are connected \(a, b, c\), and 5 are needed.*min-nodes"):
        serve(MemoryGrid(make_sites(tmp_path / "sites")), monkeypatch, None, min_nodes=5, join_timeout=0.1)


def test_what_travels_is_what_the_strategy_counts(tmp_path, monkeypatch):
    """With factors that are large beside their names, within 3%."""
    clients = make_clients((64, 32, 16))
    sites = make_sites(tmp_path / "sites", clients, hidden=256)
    _, result = serve(MemoryGrid(sites), monkeypatch, tmp_path / "out", model=make_model(hidden=256), rounds=2)
    wire = [event for event in result.events if event["event"] == "wire"]
    for event, counted in zip(wire, (e for e in result.events if e["event"] == "aggregated"), strict=True):
        for way in ("up", "down"):
            for name, size in counted[way].items():
                assert size <= event[way][name] <= 1.03 * size, (way, name)


def test_what_all_clients_are_sent_is_one_record_for_all(tmp_path, monkeypatch):
    grid = MemoryGrid(make_sites(tmp_path / "sites"))
    serve(grid, monkeypatch, tmp_path / "out")
    for kind in ("train", "evaluate"):
        orders = [m.content for m in grid.sent if (m.metadata.message_type, m.metadata.group_id) == (kind, "2")]
        sent = [content["shared"] for content in orders if "shared" in content]
        # All have round 1 already when they are to train round 2: there is nothing to send then.
        assert [part is sent[0] for part in sent] == [True] * (3 if kind == "evaluate" else 0)


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


def test_names_are_in_the_order_of_people():
    assert ordered(["client-10", "client-2", "b", "client-1"]) == ["b", "client-1", "client-2", "client-10"]


@pytest.mark.parametrize("lacking", ["recipe", "client", "folder"])
def test_a_node_that_is_not_configured_says_what_it_lacks(lacking):
    values = {"recipe": "quickstart", "client": "client-0", "folder": "x"}
    with pytest.raises(ValueError, match=f"lacks {lacking}"):
        flower_node.site_of({**values, lacking: ""})


def test_keys_and_certificates(tmp_path: Path):
    import ssl

    from flora_core.keys import make_keys

    folder = make_keys(tmp_path / "keys", ["127.0.0.1", "server.example"], ["client-0", "client-1"])
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / "server.crt", folder / "server.key")
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(folder / "ca.crt")
    assert {path.name for path in folder.glob("*.key") if path.stat().st_mode & 0o77} == set()
    assert (folder / "client-0.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    with pytest.raises(FileExistsError):
        make_keys(folder, ["127.0.0.1"], ["client-0"])
    with pytest.raises(ValueError, match="hosts must name"):
        make_keys(tmp_path / "none", [], ["client-0"])


def test_deploy_makes_keys_app_and_commands(tmp_path, capsys):
    from flora_core.cli import main

    assert main(["deploy", "quickstart", "--out", str(tmp_path / "d"), "--host", "127.0.0.1", "--nodes", "a,b"]) == 0
    told = capsys.readouterr().out
    words = ("flower-superlink --host 127.0.0.1", "flwr supernode register", "until flower-supernode", 'client="b"')
    for word in (*words, "flwr run"):
        assert word in told
    assert {path.name for path in (tmp_path / "d" / "keys").iterdir()} >= {"ca.crt", "a.key", "b.pub"}
    app, ready = tmp_path / "d" / "flower" / "app", Path(__file__).parents[1] / "examples" / "flower"
    for name in ("flora_app/__init__.py", "flora_app/apps.py"):
        assert (app / name).read_text() == (ready / name).read_text()
    assert tomllib.loads((app / "pyproject.toml").read_text()) == tomllib.loads((ready / "pyproject.toml").read_text())


def test_deploy_says_what_is_wrong(tmp_path, capsys):
    from flora_core.cli import main

    assert main(["deploy", "quickstart", "--out", str(tmp_path), "--host", "x", "--nodes", "../a"]) == 2
    assert "cannot be files here: '../a'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
