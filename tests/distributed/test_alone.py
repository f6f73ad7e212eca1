"""Parts of runs in several processes that need no second one: the variables of a launcher, who trains what, what
moves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from flora_core import distributed
from flora_core.adapters.update import ClientUpdate
from flora_core.cli import main
from flora_core.common.devices import pick_device
from flora_core.config.federation import FederationConfig
from flora_core.distributed import world
from flora_core.federation.exchange import Way, choose
from flora_core.federation.parties import Parties
from flora_core.federation.rounds import Federation
from flora_core.training.planner import spread
from tests.federation.test_kill_resume import events_of
from tests.support.federations import make_federation, make_model


def test_work_is_dealt_out_evenly_and_in_order():
    work = {"a": 1.0, "b": 7.0, "c": 3.0, "d": 3.0, "e": 2.0}
    assert spread(work, 2) == [["b", "a"], ["c", "d", "e"]] or spread(work, 2) == [["a", "b"], ["c", "d", "e"]]
    assert spread(work, 1) == [list(work)]
    assert spread({"a": 1.0}, 3) == [["a"], [], []]


VARIABLES = {
    "no address": ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 needs MASTER_ADDR, MASTER_PORT too, which torchrun"),
    "no number": ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number above 0, got 'two'; start the processes with"),
    "rank": (
        {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        "RANK must be from 0 to 1, got '2'",
    ),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_variables_of_the_launcher_that_make_no_sense(name, monkeypatch, capsys, tmp_path):
    variables, words = VARIABLES[name]
    for variable in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert main(["run", "quickstart", f"out={tmp_path}"]) == 2
    assert words in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"WORLD_SIZE|RANK"):
        make_federation()


def test_a_federation_that_joined_nobody_says_what_to_do(monkeypatch):
    found = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, value in found.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(
        ValueError, match=r"has not joined them: put `with flora_core\.distributed\.session\(\):` around"
    ):
        make_federation()


def test_others_that_are_not_there_are_an_error_in_time(monkeypatch):
    found = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, value in found.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(world, "_JOIN_SECONDS", 1)
    with (
        pytest.raises(world.WorldError, match=r"not found at MASTER_ADDR:MASTER_PORT = 127\.0\.0\.1:1 .*rdzv"),
        world.session(),
    ):
        pass


def test_a_timeout_that_is_no_number(monkeypatch):
    monkeypatch.setenv("FLORA_RANK_TIMEOUT_S", "soon")
    with pytest.raises(ValueError, match="FLORA_RANK_TIMEOUT_S must be a number of seconds above 0, got 'soon'"):
        world._wait_seconds()


def test_processes_of_one_machine_have_a_gpu_each_or_none(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device='cuda:0' would put all processes on one GPU; use device=cuda"):
        pick_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"process 1 of this machine has no GPU of its own \(1 here\)"):
        pick_device("auto")


@pytest.fixture
def group_of_one(monkeypatch, tmp_path):
    """A process group with nobody else in it."""
    monkeypatch.setattr(world, "_JOINED", [])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_is_one_process(group_of_one, tmp_path):
    make_federation(tmp_path / "group", rounds=1).run()
    with world.session() as alone:
        assert (alone.process, alone.size, alone.moved_bytes) == (0, 1, 0)
    starts = [event for event in events_of(tmp_path / "group") if event["event"] == "round_start"]
    assert "shares" not in starts[0]


def test_a_sharded_base_is_refused_by_name(group_of_one):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(
        ValueError, match=r"18 parameters are sharded over processes, such as model\.layers\.0\.self_attn"
    ):
        make_federation(model=model).run()


def test_a_server_of_parties_elsewhere_is_one_process(monkeypatch):
    monkeypatch.setattr("flora_core.federation.parties.World", SimpleNamespace(current=lambda: SimpleNamespace(size=2)))
    with pytest.raises(ValueError, match="a server of parties elsewhere is one process, got 2 processes; do without"):
        Federation(make_model(), None, partial(Parties, link=None), config=FederationConfig(rounds=1))  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_what_moves_is_what_is_counted():
    """The bytes of a ring that adds, and of a gather: at W = 2, P = 48 and 16 x 16 modules, and where P decides."""
    update = {"q": (torch.empty(48, 16, device="meta"), torch.empty(48, 16, device="meta"))}
    one = ClientUpdate("a", update, {"q": 1.0})
    assert choose([one], 2, None) == Way(("q",), "sums are smaller than adapters in 1 of 1 modules", 6144, 4096)
    assert choose([one], 2, "no") == Way((), "no", 6144, 6144)
    half = ClientUpdate("a", {"q": tuple(factor[:32] for factor in update["q"])}, {"q": 1.0})  # pyright: ignore
    assert choose([half], 4, None).reduced == ()
    assert choose([half, replace(one, client="b")], 4, None).moved_bytes == 12288


def test_names_of_the_first_edition_are_deprecated():
    for old, new in (("Ranks", world.World), ("RankError", world.WorldError)):
        with pytest.warns(DeprecationWarning, match=rf"distributed\.{old} is {new.__name__} now"):
            assert getattr(distributed, old) is new
    with pytest.warns(DeprecationWarning, match=r"distributed\.ranks is World\.current now"):
        assert distributed.ranks().size == 1
    with pytest.raises(AttributeError, match="has no attribute 'rankz'; it has: ShardedBase, World"):
        _ = distributed.rankz
