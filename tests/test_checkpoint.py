"""The run's folder: whole or not there, the same run or an error, and damage found before it is used."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flora_core import files as files_module
from flora_core.checkpoint import RunFolder
from flora_core.files import SaveError
from flora_core.update import ClientUpdate
from tests.federation_cases import files, make_clients, make_federation, make_model, target_weights


def make_update(name: str = "a") -> ClientUpdate:
    return ClientUpdate(name, {"m": (torch.ones(2, 4), torch.ones(2, 3))}, {"m": 2.0})


def new_folder(path: Path, **options) -> RunFolder:
    folder = RunFolder(path, **options)
    path.mkdir(exist_ok=True)
    folder.begin({"rounds": 3}, {"torch": "1"}, "start")
    return folder


def save(folder: RunFolder, number: int, value: float = 0.0, events=()) -> None:
    folder.save_round(number, [make_update()], {"weights": {"m": torch.full((3, 4), value)}}, list(events))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a full disk is like, for this process: no file may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# A state that is saved is the state that is read.


def test_every_tensor_and_number_of_the_state_comes_back_bit_for_bit(tmp_path):
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 5, generator=random)
    state = {
        "bf16": noise.bfloat16(),
        "low": torch.tensor([[-32768, 32767]], dtype=torch.int16),
        "nested": {
            "f64": noise.double() / 3,
            "list": [noise[:, 1], {"deep": noise[0, 0]}, 3],
            "empty": {},
            "none": None,
        },
        "transposed": noise.T,
        "model.layers.0/x": noise[1:],
        "numbers": {"int": 2**53 + 1, "float": 0.1 + 0.2, "tiny": 5e-324, "text": "ä$tensor", "yes": True},
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
    }
    new_folder(tmp_path).save_round(1, [make_update()], state, [])
    snapshot, warnings = RunFolder(tmp_path).newest()
    assert snapshot is not None
    assert warnings == []
    assert snapshot.round == 1

    def same(got, want) -> None:
        assert type(got) is type(want)
        if isinstance(want, torch.Tensor):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            bytes_of = [t.flatten().contiguous().view(torch.uint8) for t in (got, want)]
            assert torch.equal(*bytes_of)
        elif isinstance(want, dict):
            assert list(got) == list(want)
            for key in want:
                same(got[key], want[key])
        elif isinstance(want, list):
            assert len(got) == len(want)
            for pair in zip(got, want, strict=True):
                same(*pair)
        else:
            assert got == want

    same(snapshot.state, state)


def test_a_state_that_json_cannot_name_is_an_error_and_not_a_damaged_checkpoint(tmp_path):
    folder = new_folder(tmp_path)
    with pytest.raises(ValueError, match="keys must be text, got \\[3\\]"):
        folder.save_round(1, [], {"strategy": {3: torch.ones(2)}}, [])
    with pytest.raises(ValueError, match="one name: a/b"):
        folder.save_round(1, [], {"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)}, [])
    assert folder.newest() == (None, [])
    assert not (tmp_path / "rounds").exists()


def test_weights_are_kept_for_the_newest_rounds_and_adapters_for_all(tmp_path):
    folder = new_folder(tmp_path, keep_snapshots=2)
    for number in range(1, 5):
        save(folder, number, number)
    assert [path.parent.name for path in sorted(tmp_path.rglob("state.safetensors"))] == ["0003", "0004"]
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 4
    assert len(list(tmp_path.rglob("round.json"))) == 4


def test_nothing_is_dropped_before_the_newer_round_is_safe(tmp_path):
    folder = new_folder(tmp_path, keep_snapshots=1)
    save(folder, 1)
    before = files(tmp_path, "")
    with (
        largest_file(700),
        pytest.raises(SaveError, match=r"rounds.* choose another place.* saved before is unchanged"),
    ):
        folder.save_round(2, [], {"weights": torch.ones(1000)}, [])
    assert files(tmp_path, "") == before
    save(folder, 2)
    assert [path.parent.name for path in sorted(tmp_path.rglob("state.safetensors"))] == ["0002"]


# Damage is found.


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"round": 2', '"round": 7'))


DAMAGES = {
    "state flipped": lambda folder: flip(folder / "state.safetensors"),
    "state torn": lambda folder: os.truncate(folder / "state.safetensors", 100),
    "state lost": lambda folder: (folder / "state.safetensors").unlink(),
    "adapter flipped": lambda folder: flip(folder / "a" / "adapter_model.safetensors"),
    "adapter lost": lambda folder: shutil.rmtree(folder / "a"),
    "round.json torn": lambda folder: os.truncate(folder / "round.json", 100),
    "round.json empty": lambda folder: os.truncate(folder / "round.json", 0),
    "round.json edited": lambda folder: edit(folder / "round.json"),
    "round.json lost": lambda folder: (folder / "round.json").unlink(),
    "round.json of another": lambda folder: (folder / "round.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_round_is_not_used_and_the_one_before_is(damage, tmp_path):
    folder = new_folder(tmp_path)
    save(folder, 1, 1.0)
    save(folder, 2, 2.0)
    DAMAGES[damage](tmp_path / "rounds" / "0002")
    snapshot, warnings = folder.newest()
    assert snapshot is not None
    assert snapshot.round == 1
    assert torch.equal(snapshot.state["weights"]["m"], torch.full((3, 4), 1.0))
    assert len(warnings) == 1
    assert "0002 cannot be used" in warnings[0]
    assert "going on after round 1" in warnings[0]
    save(folder, 2, 2.0)
    again, warnings = folder.newest()
    assert again is not None
    assert (again.round, warnings) == (2, [])


@pytest.mark.parametrize("damaged", [["0002"], ["0001", "0002"]], ids=["newest", "all"])
def test_a_run_goes_on_before_the_damage_and_ends_with_the_same_bytes(damaged, tmp_path):
    make_federation(tmp_path / "whole", rounds=3).run()
    out, model = tmp_path / "out", make_model()
    stop_after(2, out, model)
    for name in damaged:
        flip(out / "rounds" / name / "state.safetensors")
    told = []
    # The weights in memory are those of round 2: they are put back, or a model that was loaded anew is asked for.
    if len(damaged) == 2:
        with pytest.raises(ValueError, match=r"no whole round to go on from.*load the model anew"):
            make_federation(out, rounds=3, model=model).run()
        model = None
    make_federation(out, rounds=3, model=model, callbacks=[told.append]).run()
    text = " ".join(event["message"] for event in told if event["event"] == "warning")
    assert "0002 cannot be used (state.safetensors is not what was saved)" in text
    assert ("starting from the beginning" in text) == (len(damaged) == 2)
    assert files(out, ".safetensors") == files(tmp_path / "whole", ".safetensors")


class Stop(Exception):  # noqa: N818 (it is how a test stops a run, and no error)
    pass


def stop_after(number: int, out: Path, model=None, **changes) -> None:
    """Run until a round is over."""

    def callback(event) -> None:
        if event["event"] == "round_end" and event["round"] == number:
            raise Stop

    with pytest.raises(Stop):
        make_federation(out, model=model, callbacks=[callback], **{"rounds": 3, **changes}).run()


# metrics.jsonl.


def events_of(out: Path) -> list[tuple[str, int | None]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [(event["event"], event.get("round")) for event in map(json.loads, lines)]


def test_a_torn_line_is_dropped_and_no_round_stands_in_metrics_twice(tmp_path):
    make_federation(tmp_path / "whole", rounds=3).run()
    out = tmp_path / "out"
    stop_after(2, out)
    # As if killed in round 3, after some of its events, within the line of another.
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"event": "round_start", "round": 3, "clients": []}\n{"event": "client_done", "ro')
    make_federation(out, rounds=3).run()
    resumed = [event for event in events_of(out) if event != ("run_start", None)]
    assert resumed == [event for event in events_of(tmp_path / "whole") if event != ("run_start", None)]
    starts = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "run_start" in line]
    assert [start["resumed_from"] for start in starts] == [None, 2]


def test_an_end_that_was_not_marked_is_told_once(tmp_path):
    make_federation(tmp_path).run()
    facts = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**facts, "finished": False}))
    before = events_of(tmp_path)
    make_federation(tmp_path).run()
    assert [event for event in events_of(tmp_path) if event[0] != "run_start"] == before[1:]


@pytest.mark.parametrize("lines", [-1, -2, 0], ids=["round_end", "evaluated and round_end", "the whole file"])
def test_events_of_a_whole_round_that_did_not_reach_metrics_are_put_back(lines, tmp_path):
    out = tmp_path / "out"
    stop_after(1, out)
    before = events_of(out)
    kept = (out / "metrics.jsonl").read_text().splitlines(keepends=True)[: lines if lines else 0]
    (out / "metrics.jsonl").write_text("".join(kept))
    make_federation(out, rounds=3).run()
    after = events_of(out)
    own = [event for event in before if event[1] == 1]
    assert [event for event in after if event[1] == 1] == own


def test_metrics_are_json_that_every_reader_takes(tmp_path):
    folder = new_folder(tmp_path)
    folder.append({"event": "train", "round": 1, "loss": math.nan, "groups": [{"x": math.inf}], "name": "ä"})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert read == {"event": "train", "round": 1, "loss": None, "groups": [{"x": None}], "name": "ä"}


# The same run or an error.


def test_another_configuration_is_named_field_by_field(tmp_path):
    folder = new_folder(tmp_path)
    with pytest.raises(ValueError, match=r"another configuration: rounds was 3, is 4; seed was null, is 1\. Choose"):
        folder.begin({"rounds": 4, "seed": 1}, {"torch": "1"})


def test_another_environment_is_a_warning_and_remembered(tmp_path):
    new_folder(tmp_path)
    folder = RunFolder(tmp_path)
    (warning,) = folder.begin({"rounds": 3}, {"torch": "2"})
    assert warning.startswith('torch was "1", is "2" since the run stopped')
    assert RunFolder(tmp_path).begin({"rounds": 3}, {"torch": "2"}) == []
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["environments"] == [{"torch": "1"}, {"torch": "2"}]
    folder.finish()
    assert RunFolder(tmp_path).begin({"rounds": 3}, {"torch": "3"}) == [], "it is over: nothing of it is run any more"


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
    make_federation(tmp_path / "whole", rounds=3, save_model=False).run()
    out = tmp_path / "out"
    stop_after(1, out, save_model=False)
    before = files(out, ".safetensors", "round.json")
    size = (out / "rounds" / "0001" / "state.safetensors").stat().st_size
    with largest_file(size - 1), pytest.raises(SaveError, match=r"0002.* what was saved before is unchanged"):
        make_federation(out, rounds=3, save_model=False).run()
    assert files(out, ".safetensors", "round.json") == before
    make_federation(out, rounds=3, save_model=False).run()
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
        folder.append({"event": "round_end", "text": "x" * 100})


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


def test_what_is_only_kept_may_change_between_runs(tmp_path):
    stop_after(1, tmp_path)
    make_federation(tmp_path, rounds=3, keep_snapshots=1, save_model=False).run()
    assert not (tmp_path / "model").exists()
    assert len(list(tmp_path.rglob("state.safetensors"))) == 1


DIFFERENT = {
    "rounds": (dict(rounds=4), "federation.rounds was 3, is 4"),
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


def test_only_json_and_safetensors_are_left(tmp_path):
    make_federation(tmp_path, rounds=1).run()
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors", ""}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and not path.suffix] == [".lock"]
