"""A run is resumed as the same one or not at all; a full disk loses nothing; a finished run is left as it is."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.common import files as files_module
from flora_core.common.files import SaveError
from flora_core.runs.fingerprint import check_rounds
from flora_core.runs.folder import RunFolder
from tests.support.federations import (
    files,
    largest_file,
    make_clients,
    make_federation,
    make_model,
    new_folder,
    no_training,
    stop_after,
    target_weights,
)

# The same run or an error.


def test_another_configuration_is_named_field_by_field(tmp_path):
    folder = new_folder(tmp_path)
    with pytest.raises(ValueError, match=r"another configuration: rounds was 3, is 4; seed was null, is 1\. Choose"):
        folder.record.begin({"rounds": 4, "seed": 1}, {"torch": "1"})


def test_another_environment_is_a_warning_and_remembered(tmp_path):
    new_folder(tmp_path)
    folder = RunFolder(tmp_path)
    (warning,) = folder.record.begin({"rounds": 3}, {"torch": "2"})
    assert warning.startswith('torch was "1", is "2" since the run stopped')
    assert RunFolder(tmp_path).record.begin({"rounds": 3}, {"torch": "2"}) == []
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["environments"] == [{"torch": "1"}, {"torch": "2"}]
    folder.record.finish()
    assert RunFolder(tmp_path).record.begin({"rounds": 3}, {"torch": "3"}) == [], (
        "it is over: nothing of it is run any more"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "another program"}'])
def test_a_run_json_of_another_program_is_left_alone(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged, or of another program"):
        make_federation(tmp_path).run()
    assert (tmp_path / "run.json").read_text() == text


def test_a_folder_with_foreign_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"already holds thesis\.tex .*choose a new or empty out"):
        make_federation(tmp_path).run()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_out_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(FileExistsError, match="is a file, and the results need a folder"):
        make_federation(tmp_path / "out").run()


def test_two_runs_cannot_work_in_one_folder(tmp_path):
    with RunFolder(tmp_path).locked():
        with pytest.raises(
            BlockingIOError, match=rf"another process \(pid {os.getpid()}\) works in .*choose another out"
        ):
            make_federation(tmp_path).run()
        assert not (tmp_path / "run.json").exists()
    make_federation(tmp_path, rounds=1).run()


# A full disk.


def test_a_full_disk_loses_nothing_and_the_run_goes_on(tmp_path):
    # Wide enough for the state to be the largest file: metrics.jsonl must fit.
    make_federation(tmp_path / "whole", rounds=3, save_model=False, model=make_model(hidden=64)).run()
    out = tmp_path / "out"
    stop_after(1, out, save_model=False, model=make_model(hidden=64))
    before = files(out, ".safetensors", "round.json")
    size = (out / "rounds" / "0001" / "state.safetensors").stat().st_size
    with largest_file(size - 1), pytest.raises(SaveError, match=r"0002.* what was saved before is unchanged"):
        make_federation(out, rounds=3, save_model=False, model=make_model(hidden=64)).run()
    assert files(out, ".safetensors", "round.json") == before
    make_federation(out, rounds=3, save_model=False, model=make_model(hidden=64)).run()
    assert files(out, ".safetensors") == files(tmp_path / "whole", ".safetensors")


def test_a_disk_too_small_for_the_model_is_an_error_at_the_end_that_loses_no_round(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    make_federation(whole, rounds=1).run()
    size = (whole / "model" / "model.safetensors").stat().st_size
    with largest_file(size - 1), pytest.raises(SaveError, match=r"could not save .*model: "):
        make_federation(out, rounds=1).run()
    assert not (out / "model").exists()
    assert not list(out.rglob(".tmp-*"))
    trained = []
    result = make_federation(out, rounds=1, callbacks=[trained.append]).run()
    assert "train_progress" not in {event["event"] for event in trained}
    assert files(out, ".safetensors") == files(whole, ".safetensors")
    assert [event["event"] for event in result.events].count("run_end") == 1


@pytest.mark.parametrize("at", range(0, 60, 13))
def test_no_space_left_at_any_file(at, tmp_path, monkeypatch):
    """Every place that opens a file for writing, one after another."""
    out, opened = tmp_path / "out", 0

    def full(path: Path, *rest):
        nonlocal opened
        opened += 1
        if opened > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return fsync(path, *rest)

    fsync = files_module._fsync
    with monkeypatch.context() as patch:
        patch.setattr(files_module, "_fsync", full)
        with pytest.raises(SaveError, match="the disk is full: free some space and try again"):
            make_federation(out, rounds=2).run()
    make_federation(out, rounds=2).run()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_metrics_that_cannot_be_written_say_what_to_do(tmp_path):
    folder = new_folder(tmp_path)
    with (
        largest_file(30),
        pytest.raises(SaveError, match=r"could not write .*metrics\.jsonl: .*start the same run again"),
    ):
        folder.metrics.append({"event": "round_end", "text": "x" * 100})


def test_too_little_room_is_told_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    told = []
    with pytest.raises(SaveError, match=r"has 1\.0 kB free, and a checkpoint and the final model need"):
        make_federation(tmp_path, callbacks=[told.append]).run()
    assert told == []


# A finished run.


def test_a_finished_run_gives_its_result_and_trains_nothing(tmp_path):
    first = make_federation(tmp_path, model=(model := make_model()))
    result = first.run()
    before, told, fresh = files(tmp_path, ""), [], make_model()
    again = make_federation(tmp_path, model=fresh, callbacks=[told.append]).run()
    assert [event["event"] for event in told] == ["warning"]
    assert "finished: nothing is trained" in told[0]["message"]
    assert (again.history, again.before, again.after) == (result.history, result.before, result.after)
    assert files(tmp_path, "") == before
    for path, weight in target_weights(model).items():
        assert torch.equal(weight, target_weights(fresh)[path]), path


# More rounds.

# What a run of so many rounds leaves, whatever led to it.
RESULTS = (".safetensors", "adapter_config.json", "README.md", "config.json")
EXTENDED: dict[str, dict[str, Any]] = {
    "flora": {},
    "an adapter beside the base": dict(strategy="flexlora"),
    "optimizer kept": dict(keep_optimizer=True),
    "schedule of a round": dict(schedule="linear", warmup_steps=1),
    "constant schedule of a run": dict(schedule_scope="run"),
    "16 bits": dict(dtype_of_base=torch.bfloat16),
    "fewer evaluations": dict(eval_every=3),
}


def losses_of(result: flora.FederationResult) -> list[float]:
    """The held-out loss before and after a run."""
    return [evaluation["loss"] for evaluation in (result.before, result.after) if evaluation]


@pytest.mark.parametrize("case", EXTENDED)
def test_more_rounds_end_with_the_bytes_of_a_run_that_had_them_from_the_start(case, tmp_path):
    changes = dict(EXTENDED[case])
    dtype = changes.pop("dtype_of_base", torch.float32)
    whole = make_federation(tmp_path / "whole", model=make_model(dtype), rounds=4, **changes).run()
    make_federation(tmp_path / "more", model=make_model(dtype), rounds=2, **changes).run()
    told: list[Any] = []
    result = make_federation(
        tmp_path / "more", model=make_model(dtype), rounds=4, callbacks=[told.append], **changes
    ).run()
    assert [event["round"] for event in told if event["event"] == "round_start"] == [3, 4]
    assert any("federation.rounds was 2, is 4: the run goes on" in event.get("message", "") for event in told)
    assert files(tmp_path / "more", *RESULTS) == files(tmp_path / "whole", *RESULTS)
    assert json.loads((tmp_path / "more/run.json").read_text())["finished"] is True
    assert [entry["round"] for entry in result.history] == [1, 2, 3, 4]
    again = make_federation(
        tmp_path / "more", model=make_model(dtype), rounds=4, callbacks=[no_training], **changes
    ).run()
    assert [losses_of(one) for one in (result, again)] == [losses_of(whole)] * 2


def test_more_rounds_may_be_asked_of_a_run_that_stopped_and_stop_again(tmp_path):
    make_federation(tmp_path / "whole", rounds=4).run()
    out = tmp_path / "more"
    stop_after(1, out)
    stop_after(2, out, rounds=4)
    assert json.loads((out / "run.json").read_text())["identity"]["federation.rounds"] == 4
    make_federation(out, rounds=4).run()
    assert files(out, *RESULTS) == files(tmp_path / "whole", *RESULTS)


OVER_THE_RUN = dict(schedule="linear", schedule_scope="run")
NOT_EXTENDED = {
    "fewer": (dict(rounds=1), "federation.rounds was 2, is 1: rounds are added to a run, not taken away; give 2"),
    "schedule of the run": (
        dict(rounds=3, schedule="cosine", schedule_scope="run"),
        "federation.rounds was 2, is 3: train.schedule_scope is 'run', so that the learning rates of the rounds done",
    ),
    "a client's schedule": (
        dict(rounds=3, clients=[replace(one, train=OVER_THE_RUN) for one in make_clients()]),
        "clients.a.train.schedule_scope is 'run'",
    ),
    "another setting too": (dict(rounds=3, lr=0.5), "another configuration: train.lr was 0.01, is 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_EXTENDED)
def test_refuses_another_number_of_rounds_that_would_have_changed_those_done(case, tmp_path):
    changes, words = NOT_EXTENDED[case]
    first = {name: value for name, value in changes.items() if name != "lr"}
    make_federation(tmp_path, **{**first, "rounds": 2}).run()
    before = files(tmp_path, "")
    with pytest.raises(ValueError, match=re.escape(words)):
        make_federation(tmp_path, callbacks=[no_training], **changes).run()
    assert files(tmp_path, "") == before


def test_refuses_more_rounds_where_the_noise_was_chosen_for_their_number():
    facts = {"federation.rounds": 2, "federation.privacy.epsilon": None}
    assert check_rounds(facts, {**facts, "federation.rounds": 3})
    assert not check_rounds(facts, facts)
    facts["federation.privacy.epsilon"] = 8.0
    with pytest.raises(ValueError, match=r"federation.rounds was 2, is 3: privacy\.epsilon bounds the whole run"):
        check_rounds(facts, {**facts, "federation.rounds": 3})


def test_what_is_only_kept_may_change_between_runs(tmp_path):
    stop_after(1, tmp_path)
    make_federation(tmp_path, rounds=3, keep_snapshots=1, save_model=False).run()
    assert not (tmp_path / "model").exists()
    assert len(list(tmp_path.rglob("state.safetensors"))) == 1


DIFFERENT = {
    "seed": (dict(seed=1), "federation.seed was 0, is 1"),
    "lr": (dict(lr=1e-3), "train.lr was 0.01, is 0.001"),
    "strategy": (dict(strategy="zero_pad"), 'strategy was "flora", is "zero_pad"'),
    "targets": (dict(target_modules=["q_proj"]), "target_modules was"),
    "rank": (dict(clients=make_clients((4, 2, 5))), "clients.c.adapter.rank was 3, is 5"),
    "client's training": (
        dict(clients=[*make_clients()[:2], *make_clients()[2:]][::-1]),
        r'clients was \["a", "b", "c"\], is \["c", "b", "a"\]',
    ),
    "held-out data": (dict(eval_data=None), "eval_data differs"),
    "model": (dict(model=make_model(seed=1)), "model.weights differs"),
    "dtype": (dict(model=make_model(torch.float64)), 'model.dtype was "torch.float32", is "torch.float64"'),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    stop_after(1, out)
    return out


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_run_is_not_resumed_as_another(what, stopped):
    changes, words = DIFFERENT[what]
    before = files(stopped, "")
    with pytest.raises(ValueError, match=f"holds a run with another configuration: .*{words}"):
        make_federation(stopped, **{"rounds": 3, **changes}).run()
    del before[".lock"]
    assert before.items() <= files(stopped, "").items()


def test_data_that_changed_are_another_run(stopped):
    clients = make_clients()
    clients[0].data[0]["output"] += " w1"
    with pytest.raises(ValueError, match=r"another configuration: clients\.a\.data differs\."):
        make_federation(stopped, rounds=3, clients=clients).run()


def test_only_json_safetensors_and_a_card_are_left(tmp_path):
    make_federation(tmp_path, rounds=1).run()
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors", ".md", ""}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and not path.suffix] == [".lock"]


def test_what_a_kill_after_the_last_round_left_is_dropped(tmp_path, monkeypatch):
    """The window between a round that is whole and what it makes superfluous, where kills at random seldom fall."""

    whole, drop = make_federation(tmp_path / "whole", rounds=4), RunFolder.drop_superfluous

    def killed(self: RunFolder, number: int, pause: bool = True) -> None:
        if number == 4:
            raise KeyboardInterrupt
        drop(self, number, pause)

    whole.run()
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "drop_superfluous", killed)
        with pytest.raises(KeyboardInterrupt):
            make_federation(tmp_path / "out", rounds=4).run()
    assert (tmp_path / "out" / "rounds" / "0002" / "state.safetensors").exists()
    make_federation(tmp_path / "out", rounds=4).run()
    assert not (tmp_path / "out" / "rounds" / "0002" / "state.safetensors").exists()
    assert sorted(files(tmp_path / "out", ".safetensors")) == sorted(files(tmp_path / "whole", ".safetensors"))
