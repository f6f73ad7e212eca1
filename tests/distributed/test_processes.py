"""Runs in several processes of torchrun, over gloo on loopback, end as the run in one process does.

One launch of two processes does all jobs of ``JOBS``, one after another: starting Python takes longer than they do.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from flora_core.cli import main
from tests.federation.test_kill_resume import events_of
from tests.support.distributed.jobs import (
    AGAIN,
    ALONE,
    JOBS,
    SAME,
    Launch,
    aggregations,
    alone,
    check_weights,
    end,
    launch,
    torchrun,
    wait_for,
    without_processes,
    write_recipe,
)
from tests.support.distributed.worker import arguments
from tests.support.federations import files, stop_after


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
    events = [without_processes(events_of(out)) for out in (two.out(name), tmp_path)]
    assert events[0] == events[1]
    results = two.of(name)
    assert results[0] == results[1]
    assert "digest" in results[0]


def test_a_poisoned_client_is_refused_wherever_it_trains(two):
    refused = {event["client"]: event["refused"] for event in events_of(two.out("poisoned")) if event.get("refused")}
    assert set(refused) == {"b"}
    shares = [event["shares"] for event in events_of(two.out("poisoned")) if event["event"] == "round_start"]
    assert all("b" in share[1] for share in shares), "it is process 1's, so that its failure had to travel"


def test_nothing_is_needed_but_the_processes(two):
    one, other = two.of("no folder")
    assert one == other
    assert one["digest"] == two.of("flora")[0]["digest"] or one["evaluated"] == 3
    result = alone(None, JOBS["no folder"])
    assert one["evaluated"] == len([event for event in result.events if event["event"] == "evaluated"])


def test_idle_processes_are_fine_and_told_of(two):
    messages = [event["message"] for event in events_of(two.out("one client")) if event["event"] == "warning"]
    assert messages == ["2 processes share 1 clients of a round: at least 1 stay idle"]


@pytest.mark.parametrize("name", ["packed", "no memory"])
def test_packed_cohorts_agree_within_the_budget(name, two, tmp_path):
    """In float64: clients that share passes with others, and passes that were split where memory ran out."""
    alone(tmp_path, JOBS["packed"])
    check_weights(two.out(name), tmp_path)
    said = [event["message"] for event in events_of(two.out(name)) if event["event"] == "warning"]
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
    exchanged = [event for event in events_of(two.out(name)) if event["event"] == "exchanged"]
    modules, reason = REDUCED[name]
    assert {(event["reduced"], event["reason"]) for event in exchanged} == {(modules, reason)}
    if name not in SAME:
        alone(tmp_path, JOBS[name])
        check_weights(two.out(name), tmp_path)
        events = [without_processes(events_of(out)) for out in (two.out(name), tmp_path)]
        for mine, whole in zip(*(map(aggregations, events)), strict=True):
            assert mine == whole
        assert two.of(name)[0]["digest"] == two.of(name)[1]["digest"]


def test_machines_that_round_otherwise_are_told_of_and_do_not_drift(two, tmp_path):
    results = two.of("rounds otherwise")
    assert results[0]["digest"] == results[1]["digest"]
    messages = [event["message"] for event in events_of(two.out("rounds otherwise")) if event["event"] == "warning"]
    assert len(messages) == 2
    assert all("processes 1 came to other weights than process 0 and take its" in text for text in messages)
    alone(tmp_path, JOBS["rounds otherwise"])
    assert files(two.out("rounds otherwise"), ".safetensors") == files(tmp_path, ".safetensors")


# Stopped here, resumed there.


def test_a_run_of_one_process_is_resumed_by_two(two, tmp_path):
    alone(tmp_path, JOBS["from one"])
    assert files(two.out("from one"), ".safetensors") == files(tmp_path, ".safetensors")


def test_a_run_of_two_processes_is_resumed_by_one(two, tmp_path):
    first, second = two.of("to one")
    assert (first["error"], second["error"]) == ("Stop", "WorldError")
    assert "process 0 of 2 failed, and no process goes on without it: Stop: as the test wants it" in second["text"]
    assert not (two.out("to one") / "rounds" / "0002").exists()
    alone(two.out("to one"), JOBS["to one"])
    alone(tmp_path, JOBS["to one"])
    assert files(two.out("to one"), ".safetensors") == files(tmp_path, ".safetensors")


# Process 0 trains c alone, process 1 a and then b; the process that is not asked ends its share.
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
    starts = [event for event in events_of(two.out("finished")) if event["event"] == "round_start"]
    assert "shares" not in starts[0]


# Errors end all processes.

ERRORS = {
    "missing_data": ("FileNotFoundError", r"not-there\.jsonl does not exist"),
    "other_rate": (
        "ValueError",
        "process 1 would run something else than process 0: train.lr was 0.01, is 0.5 here; start",
    ),
    "other_weights": (
        "ValueError",
        r"else than process 0: model\.weights differs; start differs here; start all processes",
    ),
    "other_version": ("ValueError", r'flora_core was ".*", is "0\.0\.7" here; start all processes with the same'),
    "fails_in_round_1": ("RuntimeError", "the disk of this machine is on fire"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_on_one_process_ends_all_with_its_words(name, two):
    kind, words = ERRORS[name]
    first, second = two.of(name)
    assert (first["error"], second["error"]) == ("WorldError", kind)
    with pytest.raises(ValueError, match=words):
        raise ValueError(second["text"])
    assert first["text"] == f"process 1 of 2 failed, and no process goes on without it: {kind}: {second['text']}"
    assert f"process 1 of 2 failed ({kind}: {second['text']}); telling the others" in two.said


def test_out_that_cannot_be_written_ends_all(two):
    first, second = two.of("a file")
    assert first["error"] == "FileExistsError"
    assert "is a file, and the results need a folder: choose another out" in second["text"]


@pytest.mark.parametrize("name", ["privacy", "remote"])
def test_what_is_for_one_process_is_refused(name, two):
    for result in two.of(name):
        assert result["error"] == "ValueError"
        assert result["text"].startswith(f"{name} is for a run in one process, got 2; leave it out")


# A process that is killed, under the command.


def test_a_killed_process_ends_the_command_and_the_run_goes_on_with_the_same_bytes(tmp_path, capsys):
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
        end(process)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    assert "a process was lost, and no process goes on without it (" in said, said
    assert "Traceback" not in said.partition("torch/distributed")[0]
    done = len(list((out / "rounds").iterdir()))
    assert 2 <= done < 9
    for folder in (out, whole):
        assert main(["run", str(recipe), f"out={folder}"]) == 0
    assert f"resumed after round {done}" in capsys.readouterr().err
    assert files(out, ".safetensors") == files(whole, ".safetensors")


# Larger worlds.


@pytest.mark.filterwarnings("ignore:client 'b' was:RuntimeWarning")
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
    assert "a process was lost, and no process goes on without it" in four.said
    alone(four.out("killed"), job)
    alone(tmp_path / "whole", job)
    assert files(four.out("killed"), ".safetensors") == files(tmp_path / "whole", ".safetensors")
