"""Runs in several processes of torchrun, over gloo on loopback, end as the run in one process does.

One launch of two processes does all jobs of ``JOBS``, one after another: starting Python takes longer than they do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from flora_core import cli, distributed
from flora_core.device import pick_device
from flora_core.exchange import Way, choose
from flora_core.planner import spread
from flora_core.testing import budget_ratio
from flora_core.update import ClientUpdate
from tests.distributed_worker import arguments
from tests.federation_cases import files, make_federation, make_model, make_records, make_tokenizer, stop_after
from tests.test_kill_resume import told

ROOT = Path(__file__).resolve().parents[1]
# One client a cohort: what a client computes then depends on nothing but itself.
ALONE: dict[str, Any] = {"token_budget": 1}
# Cases whose bytes must be those of one process: what each carries from round to round differs.
SAME: dict[str, dict[str, Any]] = {
    "flora": {"ranks": [4, 2, 3, 8]},
    "bf16": {"base": "bfloat16", "keep_optimizer": True, "schedule": "linear", "schedule_scope": "run", "dropout": 0.2},
    "zero_pad": {"strategy": "zero_pad", "fraction": 0.7, "ranks": [4, 2, 3, 5, 2], "rounds": 3},
    "flora_warm": {"strategy": "flora_warm", "eval_every": 2},
    "poisoned": {"poisoned": "b"},
    "one client": {"ranks": [4]},
    "no folder": {"out": None},
}
# More rank than 2 N K 8 / ((N + K) 4) = 32 in 16 x 16 modules, and nobody who asks for single adapters.
MANY: dict[str, Any] = {"ranks": [16, 12, 16, 8], "save_adapters": False, "base": "float64"}
JOBS: dict[str, dict[str, Any]] = {
    **{name: {"changes": {**ALONE, **changes}} for name, changes in SAME.items()},
    "packed": {"changes": {"base": "float64", "ranks": [4, 2, 3, 8]}},
    "reduced": {"changes": MANY},
    "reduced in part": {"changes": {**MANY, "own_targets": ["q_proj"], "poisoned": "b"}},
    "reduced by none": {"changes": {**MANY, "clip_update": 0.5}},
    "from one": {"changes": {**ALONE, "rounds": 3, "keep_optimizer": True}},
    "to one": {"changes": {**ALONE, "rounds": 3, "keep_optimizer": True}, "fault": "stop_after_round_1"},
    "finished": {"changes": {**ALONE, "rounds": 1}},
    "paused by 0": {"changes": {**ALONE, "keep_optimizer": True}, "fault": "term_to_rank_0"},
    "paused by 1": {"changes": {**ALONE, "keep_optimizer": True}, "fault": "term_to_rank_1"},
    "no memory": {"changes": {"base": "float64", "ranks": [4, 2, 3, 8]}, "fault": "no_memory"},
    "rounds otherwise": {"changes": ALONE, "fault": "rounds_otherwise"},
    **{
        name: {"changes": {}, "fault": name}
        for name in ("missing_data", "other_rate", "other_weights", "other_version", "fails_in_round_1")
    },
    "a file": {"changes": {}},
    "privacy": {"changes": {"private": True}},
    "remote": {"changes": {"elsewhere": True}},
}
AGAIN = {f"{name} again": {**JOBS[name], "at": name, "fault": None} for name in ("paused by 0", "paused by 1")}


def torchrun(count: int, arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start processes as a user would; what they say comes out of one pipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(port)]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *launcher, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


@dataclass
class Launch:
    """What the processes of one launch left: results of every job by rank, and the jobs' folders."""

    folder: Path
    size: int
    said: str
    code: int

    def of(self, name: str) -> list[dict[str, Any]]:
        return [json.loads((self.folder / "results" / f"{name}-{rank}.json").read_text()) for rank in range(self.size)]

    def out(self, name: str) -> Path:
        return self.folder / name


def launch(folder: Path, size: int, jobs: dict[str, dict[str, Any]], seconds: float = 600) -> Launch:
    """Run jobs on so many ranks."""
    (folder / "results").mkdir(parents=True)
    listed = []
    for name, job in jobs.items():
        changes = {"out": str(folder / job.get("at", name)), **job["changes"]}
        listed.append({**job, "name": name, "out": changes.pop("out"), "changes": changes})
    (folder / "jobs.json").write_text(json.dumps(listed))
    worker = str(ROOT / "tests" / "distributed_worker.py")
    process = torchrun(size, [worker, str(folder / "jobs.json"), str(folder / "results")])
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return Launch(folder, size, said, process.returncode)


def alone(out: Path | None, job: dict[str, Any]) -> Any:
    """The same job in this process."""
    changes = {"out": out, **arguments(job)}
    return make_federation(changes.pop("out"), **changes).run()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Launch:
    folder = tmp_path_factory.mktemp("two")
    changes = arguments(JOBS["from one"])
    stop_after(1, folder / "from one", **changes)
    alone(folder / "finished", JOBS["finished"])
    (folder / "a file").write_text("x")
    found = launch(folder, 2, {**JOBS, **AGAIN})
    assert found.code == 0, found.said
    return found


# The same bytes.


@pytest.mark.filterwarnings("ignore:client 'b' was:RuntimeWarning")
@pytest.mark.parametrize("name", [name for name in SAME if name != "no folder"])
def test_two_processes_leave_the_bytes_of_one(name, two, tmp_path):
    alone(tmp_path, JOBS[name])
    assert files(two.out(name), ".safetensors") == files(tmp_path, ".safetensors")
    events = [without_ranks(told(out)) for out in (two.out(name), tmp_path)]
    assert events[0] == events[1]
    results = two.of(name)
    assert results[0] == results[1]
    assert "digest" in results[0]


def without_ranks(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events in an order of their own, but for those that speak of ranks; who shares a cohort depends on them."""
    kept = [event for event in events if "ranks share" not in event.get("message", "")]
    kept = [event for event in kept if event["event"] != "exchanged"]
    kept = [{key: value for key, value in event.items() if key != "shares"} for event in kept]
    return sorted(kept, key=lambda event: json.dumps(event, sort_keys=True))


def test_a_poisoned_client_is_refused_wherever_it_trains(two):
    refused = {event["client"]: event["refused"] for event in told(two.out("poisoned")) if event.get("refused")}
    assert set(refused) == {"b"}
    shares = [event["shares"] for event in told(two.out("poisoned")) if event["event"] == "round_start"]
    assert all("b" in share[1] for share in shares), "it is rank 1's, so that its failure had to travel"


def test_nothing_is_needed_but_the_processes(two):
    one, other = two.of("no folder")
    assert one == other
    assert one["digest"] == two.of("flora")[0]["digest"] or one["evaluated"] == 3
    result = alone(None, JOBS["no folder"])
    assert one["evaluated"] == len([event for event in result.events if event["event"] == "evaluated"])


def test_idle_processes_are_fine_and_told_of(two):
    messages = [event["message"] for event in told(two.out("one client")) if event["event"] == "warning"]
    assert messages == ["2 ranks share 1 clients of a round: at least 1 train nobody"]


def check_weights(out: Path, whole: Path) -> None:
    """What two rounds changed in a float64 base agrees within the budget, module by module."""
    state = Path("rounds") / "0002" / "state.safetensors"
    got, wanted = load_file(out / state), load_file(whole / state)
    assert got.keys() == wanted.keys()
    before = make_model(torch.float64)
    for key, weight in wanted.items():
        start = before.get_submodule(key.removeprefix("server/weights/")).weight
        assert budget_ratio(got[key] - start, weight - start, weight - start) <= 1, key


@pytest.mark.parametrize("name", ["packed", "no memory"])
def test_packed_cohorts_agree_within_the_budget(name, two, tmp_path):
    """In float64: clients that share passes with others, and passes that were split where memory ran out."""
    alone(tmp_path, JOBS["packed"])
    check_weights(two.out(name), tmp_path)
    said = [event["message"] for event in told(two.out(name)) if event["event"] == "warning"]
    assert bool(said) == (name == "no memory")
    assert all("memory ran out at step" in text for text in said)


REDUCED = {
    "reduced": (4, "sums are smaller than adapters in 4 of 4 modules"),
    "reduced in part": (2, "sums are smaller than adapters in 2 of 4 modules"),
    "reduced by none": (0, "clip_update compares the clients' updates"),
    "packed": (0, "save_adapters keeps every client's adapter"),
    "zero_pad": (0, "strategy 'zero_pad' looks at single clients' factors"),
}


@pytest.mark.filterwarnings("ignore:client 'b' was:RuntimeWarning")
@pytest.mark.parametrize("name", REDUCED)
def test_sums_move_where_they_are_smaller_and_enough(name, two, tmp_path):
    exchanged = [event for event in told(two.out(name)) if event["event"] == "exchanged"]
    modules, reason = REDUCED[name]
    assert {(event["reduced"], event["reason"]) for event in exchanged} == {(modules, reason)}
    if name not in SAME:
        alone(tmp_path, JOBS[name])
        check_weights(two.out(name), tmp_path)
        events = [without_ranks(told(out)) for out in (two.out(name), tmp_path)]
        for mine, whole in zip(*(map(aggregations, events)), strict=True):
            assert mine == whole
        assert two.of(name)[0]["digest"] == two.of(name)[1]["digest"]


def aggregations(events: list[dict[str, Any]]) -> list[Any]:
    """Who was refused, how many were aggregated, and the bytes of each client: what sums do not show by themselves."""
    names = ("client", "refused", "clients", "up", "down", "forms", "aggregation_error")
    kept = [event for event in events if event["event"] in ("client_done", "aggregated")]
    return [{name: event.get(name) for name in names} for event in kept]


def test_what_moves_is_what_is_counted():
    """The bytes of a ring that adds, and of a gather: at W = 2, P = 48 and 16 x 16 modules, and where P decides."""
    update = {"q": (torch.empty(48, 16, device="meta"), torch.empty(48, 16, device="meta"))}
    one = ClientUpdate("a", update, {"q": 1.0})
    assert choose([one], 2, None) == Way(("q",), "sums are smaller than adapters in 1 of 1 modules", 6144, 4096)
    assert choose([one], 2, "no") == Way((), "no", 6144, 6144)
    half = ClientUpdate("a", {"q": tuple(factor[:32] for factor in update["q"])}, {"q": 1.0})  # pyright: ignore
    assert choose([half], 4, None).reduced == ()
    assert choose([half, replace(one, client="b")], 4, None).moved_bytes == 12288


def test_machines_that_round_otherwise_are_told_of_and_do_not_drift(two, tmp_path):
    results = two.of("rounds otherwise")
    assert results[0]["digest"] == results[1]["digest"]
    messages = [event["message"] for event in told(two.out("rounds otherwise")) if event["event"] == "warning"]
    assert len(messages) == 2
    assert all("ranks 1 came to other weights than rank 0" in text for text in messages)
    alone(tmp_path, JOBS["rounds otherwise"])
    assert files(two.out("rounds otherwise"), ".safetensors") == files(tmp_path, ".safetensors")


# Stopped here, resumed there.


def test_a_run_of_one_process_is_resumed_by_two(two, tmp_path):
    alone(tmp_path, JOBS["from one"])
    assert files(two.out("from one"), ".safetensors") == files(tmp_path, ".safetensors")


def test_a_run_of_two_processes_is_resumed_by_one(two, tmp_path):
    first, second = two.of("to one")
    assert (first["error"], second["error"]) == ("Stop", "RankError")
    assert "rank 0 of 2 failed, and no rank goes on without it: Stop: as the test wants it" in second["text"]
    assert not (two.out("to one") / "rounds" / "0002").exists()
    alone(two.out("to one"), JOBS["to one"])
    alone(tmp_path, JOBS["to one"])
    assert files(two.out("to one"), ".safetensors") == files(tmp_path, ".safetensors")


# Rank 0 trains c alone, rank 1 a and then b; the rank that is not asked ends its share.
PAUSED = {"paused by 0": {"a": 3, "b": 3, "c": 2}, "paused by 1": {"a": 2, "c": 4}}


@pytest.mark.parametrize("name", PAUSED)
def test_a_pause_of_one_process_pauses_all_and_loses_no_step(name, two, tmp_path):
    for result in two.of(name):
        assert result["error"] == "Stopped"
        assert "stopped within round 1, as was asked" in result["text"]
        assert result["steps"] == PAUSED[name]
    assert "digest" in two.of(f"{name} again")[1]
    alone(tmp_path, JOBS[name])
    assert files(two.out(name), ".safetensors") == files(tmp_path, ".safetensors")


def test_a_finished_run_trains_nothing(two):
    assert all(result["evaluated"] == 2 for result in two.of("finished"))
    starts = [event for event in told(two.out("finished")) if event["event"] == "round_start"]
    assert "shares" not in starts[0]


# Errors end all ranks.

ERRORS = {
    "missing_data": ("FileNotFoundError", r"not-there\.jsonl does not exist"),
    "other_rate": ("ValueError", "rank 1 would run something else than rank 0: train.lr was 0.01, is 0.5 here; start"),
    "other_weights": ("ValueError", r"else than rank 0: model\.weights differs; start differs here; start all ranks"),
    "other_version": ("ValueError", r'flora_core was ".*", is "0\.0\.7" here; start all ranks with the same'),
    "fails_in_round_1": ("RuntimeError", "the disk of this machine is on fire"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_on_one_rank_ends_all_with_its_words(name, two):
    kind, words = ERRORS[name]
    first, second = two.of(name)
    assert (first["error"], second["error"]) == ("RankError", kind)
    with pytest.raises(ValueError, match=words):
        raise ValueError(second["text"])
    assert first["text"] == f"rank 1 of 2 failed, and no rank goes on without it: {kind}: {second['text']}"
    assert f"flora: rank 1 of 2 failed ({kind}: {second['text']}); telling the others" in two.said


def test_out_that_cannot_be_written_ends_all(two):
    first, second = two.of("a file")
    assert first["error"] == "FileExistsError"
    assert "is a file, and the results need a folder: choose another out" in second["text"]


@pytest.mark.parametrize("name", ["privacy", "remote"])
def test_what_is_for_one_process_is_refused(name, two):
    for result in two.of(name):
        assert result["error"] == "ValueError"
        assert result["text"].startswith(f"{name} is for a run in one process, got 2 ranks; leave it out")


# A rank that is killed, under the command.


def wait_for(what: Callable[[], Any], seconds: float = 120) -> Any:
    """What a function gives as soon as that is not empty."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def write_recipe(folder: Path, rounds: int) -> Path:
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    paths = {}
    for name in "abc":
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(record) + "\n" for record in make_records(name, 6)))
    recipe = {"model": str(folder / "base"), "device": "cpu", "threads": 1, "federation": {"rounds": rounds}}
    recipe |= {"data": {"path": paths}, "clients": {"ranks": [4, 2, 3]}}
    recipe |= {"train": {"lr": 1e-2, "batch_size": 2, "max_length": 32, "token_budget": 1}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def test_a_killed_rank_ends_the_command_and_the_run_goes_on_with_the_same_bytes(tmp_path, capsys):
    psutil = pytest.importorskip("psutil")
    recipe, out, whole = write_recipe(tmp_path, 9), tmp_path / "out", tmp_path / "whole"
    process = torchrun(2, ["-m", "flora_core.cli", "run", str(recipe), f"out={out}"])
    try:
        wait_for(lambda: (out / "rounds" / "0002").exists() or process.poll() is not None)
        workers = psutil.Process(process.pid).children(recursive=True)
        (victim,) = [worker for worker in workers if worker.environ().get("RANK") == "1"]
        os.kill(victim.pid, signal.SIGKILL)
        began = time.monotonic()
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    assert "flora: a rank was lost, and no rank goes on without it (" in said, said
    assert "Traceback" not in said.partition("torch/distributed")[0]
    done = len(list((out / "rounds").iterdir()))
    assert 2 <= done < 9
    for folder in (out, whole):
        assert cli.main(["run", str(recipe), f"out={folder}"]) == 0
    assert f"resumed after round {done}" in capsys.readouterr().err
    assert files(out, ".safetensors") == files(whole, ".safetensors")


# Larger worlds.


def test_four_processes_and_a_resume_with_three(tmp_path, scale):
    if scale(2, 4, "processes") == 2:
        pytest.skip("two processes are tested above; four in make test-all")
    jobs = {name: JOBS[name] for name in ("flora", "bf16", "zero_pad", "poisoned", "paused by 1", "to one")}
    four = launch(tmp_path / "four", 4, jobs)
    assert four.code == 0, four.said
    rest = {name: {**jobs[name], "fault": None} for name in ("paused by 1", "to one")}
    (tmp_path / "three").mkdir()
    for name in rest:
        four.out(name).rename(tmp_path / "three" / name)
    three = launch(tmp_path / "three", 3, rest)
    assert three.code == 0, three.said
    for name in jobs:
        alone(tmp_path / name, JOBS[name])
        out = three.out(name) if name in rest else four.out(name)
        assert files(out, ".safetensors") == files(tmp_path / name, ".safetensors"), name


def test_one_of_four_that_is_killed_ends_the_others(tmp_path, scale):
    if scale(2, 4, "processes") == 2:
        pytest.skip("two processes are tested above; four in make test-all")
    job = {"changes": {**ALONE, "ranks": [4, 2, 3, 8]}, "fault": "killed_in_round_2", "ends": True}
    four = launch(tmp_path / "four", 4, {"killed": job}, seconds=120)
    assert four.code != 0
    assert "a rank was lost, and no rank goes on without it" in four.said
    alone(four.out("killed"), job)
    alone(tmp_path / "whole", job)
    assert files(four.out("killed"), ".safetensors") == files(tmp_path / "whole", ".safetensors")


# What needs no second process.


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
    assert cli.main(["run", "quickstart", f"out={tmp_path}"]) == 2
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
    monkeypatch.setattr(distributed, "_JOIN_SECONDS", 1)
    with (
        pytest.raises(distributed.RankError, match=r"not found at MASTER_ADDR:MASTER_PORT = 127\.0\.0\.1:1 .*rdzv"),
        distributed.session(),
    ):
        pass


def test_a_timeout_that_is_no_number(monkeypatch):
    monkeypatch.setenv("FLORA_RANK_TIMEOUT_S", "soon")
    with pytest.raises(ValueError, match="FLORA_RANK_TIMEOUT_S must be a number of seconds above 0, got 'soon'"):
        distributed._wait_seconds()


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
def group_of_one(monkeypatch):
    """A process group with nobody else in it."""
    monkeypatch.setattr(distributed, "_JOINED", [])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_is_one_process(group_of_one, tmp_path):
    make_federation(tmp_path / "group", rounds=1).run()
    with distributed.session() as ranks:
        assert (ranks.rank, ranks.size, ranks.moved_bytes) == (0, 1, 0)
    starts = [event for event in told(tmp_path / "group") if event["event"] == "round_start"]
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
