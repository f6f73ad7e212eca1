"""A federation over Flower's messages gives the bytes of the same run in one process, whatever gets lost."""

from __future__ import annotations

import copy
import json
import re
import shutil
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message
from flwr.common.constant import ErrorCode

import flora_core as flora
from flora_core.aggregation import get_strategy
from flora_core.federation.party import Site
from flora_core.federation.protocol import Terms
from flora_core.flower import link as flower
from flora_core.flower import messages, node
from tests.support.federations import files, make_clients, make_model, make_tokenizer
from tests.support.flower.grid import MemoryGrid, in_process, make_sites, serve


def assert_same_model(one: Any, two: Any) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def assert_follows(site: Site, model: Any) -> None:
    """A party ends with the global model."""
    assert site.copy.weights
    for module, weight in site.copy.weights.items():
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
    order, tensors = messages.unpack(reply.content)
    return Message(flower.pack({**order, "client": "b"}, tensors), reply_to=message)


def changed(**values: Any) -> Any:
    """A reply whose JSON has other values, a mapping's one by one."""

    def how(message: Message, reply: Message) -> Message:
        order, tensors = messages.unpack(reply.content)
        for name, value in values.items():
            order[name] = {**order[name], **value} if isinstance(value, dict) and value else value
        return Message(flower.pack(order, tensors), reply_to=message)

    return how


def by_superlink(code: int, reason: str) -> Any:
    """Answer of the SuperLink itself."""

    def how(message: Message, reply: Message) -> Message:
        answer = Message(Error(code, reason), reply_to=message)
        answer.metadata.__dict__["_src_node_id"] = 1
        return answer

    return how


def of_another(**versions: Any) -> Any:
    """A reply of a node that has another flora-core."""

    def how(message: Message, reply: Message) -> Message:
        order = {**json.loads(str(reply.content["order"]["json"])), **versions}
        reply.content["order"] = ConfigRecord({"json": json.dumps(order)})
        return reply

    return how


LOST = {
    "offline": (by_superlink(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), "its node failed: Node Unavailable"),
    "expired": (by_superlink(ErrorCode.MESSAGE_UNAVAILABLE, "Error: Message Unavailable"), "no answer within 9 s"),
    "another version": (
        of_another(version="0.2.0"),
        r"its flora-core is 0\.2\.0 \(protocol 1\), and this side's .*install the same 0\.1 on both sides",
    ),
    "another protocol": (of_another(protocol=0), r"\(protocol 0\), and this side's .*\(protocol 1\)"),
    "before there were protocols": (of_another(protocol=None), r"\(protocol None\), and this side's"),
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


class LateGrid(MemoryGrid):
    """The answer of c for round 1 arrives in round 2, beside its own answer or posing as that."""

    def __init__(self, sites: dict[int, Site], posing: bool):
        super().__init__(sites, self.delay)
        self.late: list[Message] = []
        self.posing = posing

    def delay(self, message: Message, reply: Message) -> Message | None:
        """Keep c's answer back, and bring it in the place of the next."""
        meta = message.metadata
        which = meta.message_type, meta.group_id, meta.dst_node_id
        if which == ("train", "1", 102):
            self.late.append(reply)
            return None
        if which != ("train", "2", 102) or not self.posing:
            return reply
        self.late[0].metadata.__dict__["_reply_to_message_id"] = meta.message_id
        return self.late[0]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        """As usual, with what is late first."""
        replies = super().send_and_receive(messages, timeout=timeout)
        return [*self.late, *replies] if self.sent[-1].metadata.group_id == "2" else replies


@pytest.mark.parametrize("posing", [False, True])
def test_an_answer_after_the_deadline_counts_in_no_round(posing, tmp_path, monkeypatch):
    grid = LateGrid(make_sites(tmp_path / "sites"), posing)
    link, result = serve(grid, monkeypatch, tmp_path / "out", rounds=3, round_timeout=9.0)
    assert grid.late
    assert "no answer within 9 s" in result.history[0]["refused"]["c"]
    assert ["answers for round 1" in why for why in result.history[1]["refused"].values()] == [True] * posing
    second = ["a", "b"] if posing else ["a", "b", "c"]
    alone = in_process(None, {1: ["a", "b"], 2: second, 3: ["a", "b", "c"]}, rounds=3)
    assert_same_model(link.model, alone.model)
    assert_follows(grid.sites[102], link.model)


def test_a_process_that_was_held_up_does_not_overwrite_what_a_later_one_kept(tmp_path, monkeypatch):
    """Flower starts a process for each message: the one of round 1 may end after that of round 2."""
    slow: list[Site] = []

    def hold(message: Message, reply: Message) -> None:
        slow.append(copy.deepcopy(grid.sites[102]))

    grid = MemoryGrid(make_sites(tmp_path / "sites"), Faults("train", 1, 102, hold))
    serve(grid, monkeypatch, tmp_path / "out", keep_optimizer=True)
    terms = Terms(**messages.unpack(grid.sent[-1].content)[0]["terms"])
    kept = files(tmp_path / "sites" / "c", ".safetensors", ".json")
    assert kept
    with pytest.raises(ValueError, match=r"'c' is too late with the orders of round 1: .* by those of round 2"):
        slow[0].train(terms, 1, ["A", "B"], {}, True)
    assert files(tmp_path / "sites" / "c", ".safetensors", ".json") == kept


def test_a_copy_that_is_at_another_round_than_the_server_thinks_costs_one_round(tmp_path, monkeypatch):
    def step_back(message: Message, reply: Message) -> Message:
        grid.sites[102].copy.round = 0
        return reply

    grid = MemoryGrid(make_sites(tmp_path / "sites"), Faults("evaluate", 1, 102, step_back))
    link, result = serve(grid, monkeypatch, tmp_path / "out", rounds=3)
    assert "its node says: ValueError: client 'c' has round 0, and the changes" in result.history[1]["refused"]["c"]
    assert_same_model(
        link.model, in_process(None, {1: ["a", "b", "c"], 2: ["a", "b"], 3: ["a", "b", "c"]}, rounds=3).model
    )
    assert_follows(grid.sites[102], link.model)


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
        module = next(iter(grid.sites[100].copy.weights))
        with torch.no_grad():
            grid.sites[100].copy.weights[module][0, 0] += 1
        order, _ = messages.unpack(reply.content)
        return Message(flower.pack({**order, "weights": grid.sites[100].copy.digest()}), reply_to=message)

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


def test_two_parties_cannot_have_one_name_and_both_sides_are_told(tmp_path, monkeypatch, caplog):
    events: list[Any] = []
    sites = make_sites(tmp_path / "sites")
    sites[103] = Site(make_model(), make_tokenizer(), make_clients()[0], tmp_path / "second")
    link, _ = serve(MemoryGrid(sites), monkeypatch, None, min_nodes=3, events=events)
    assert any("client 'a' is there already" in event.get("message", "") for event in events)
    reported = r"the server refuses this node: client 'a' is there already, as node 10[03]"
    assert re.search(reported, caplog.text)
    assert_same_model(link.model, in_process(None).model)


def test_releases_that_differ_are_warned_of_with_both_sides(tmp_path, monkeypatch):
    events: list[Any] = []
    sites = make_sites(tmp_path / "sites")
    for at, versions in ((100, {"torch": "2.5.1"}), (101, {"torch": "2.5.1+cu124"}), (102, {"transformers": "4.0"})):
        sites[at].environment |= versions
    link, _ = serve(MemoryGrid(sites), monkeypatch, None, events=events)
    found = [event["message"] for event in events if "last bits" in event.get("message", "")]
    assert [text.partition(":")[0] for text in found] == [
        f"torch is 2.5.1 at a, b, and {torch.__version__.partition('+')[0]} at the server",
        f"transformers is 4.0 at c, and {transformers.__version__} at the server",
    ]
    assert_same_model(link.model, in_process(None).model)


def test_a_newcomers_release_is_warned_of_and_one_of_the_same_release_is_not(tmp_path, monkeypatch):
    events: list[Any] = []
    grid = Crowd(make_sites(tmp_path / "sites"))
    grid.there = {1: [100, 101], 2: [100, 101, 102], 3: list(grid.sites)}
    grid.sites[100].environment["torch"] = torch.__version__.partition("+")[0] + "+another.build"
    grid.sites[102].environment["flora_core"] = "0.1.99"
    serve(grid, monkeypatch, None, min_nodes=2, events=events)
    (warning,) = (event for event in events if "last bits" in event.get("message", ""))
    assert (warning["round"], warning["client"]) == (2, "c")
    assert warning["message"].startswith(f"flora_core is 0.1.99 at c, and {flora.__version__} at the server")


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


def test_the_old_name_of_a_server_still_runs(tmp_path, monkeypatch):
    grid = MemoryGrid(make_sites(tmp_path / "sites"))
    monkeypatch.setattr(node, "site_of", lambda values: grid.sites[values["node"]])
    config = flora.FederationConfig(rounds=1)
    with pytest.warns(DeprecationWarning, match=r"call flora_core\.flower\.serve"):
        old = flower.FloraStrategy(make_model(), make_tokenizer(), min_nodes=3, config=config, callbacks=[print])
    assert old.start(grid).history[0]["applied"]  # pyright: ignore[reportArgumentType]
