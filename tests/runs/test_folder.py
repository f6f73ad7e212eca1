"""The run's folder: whole or not there, the same run or an error, and damage found before it is used."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from flora_core.adapters.update import ClientUpdate
from flora_core.common.files import SaveError
from flora_core.runs.folder import RunFolder
from tests.support.federations import files, largest_file, make_federation, make_model, new_folder, stop_after


def make_update(name: str = "a") -> ClientUpdate:
    return ClientUpdate(name, {"m": (torch.ones(2, 4), torch.ones(2, 3))}, {"m": 2.0})


def save(folder: RunFolder, number: int, value: float = 0.0, events=()) -> None:
    folder.save_round(number, [make_update()], {"weights": {"m": torch.full((3, 4), value)}}, list(events))


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
    assert folder.newest() == (None, [])
    assert not (tmp_path / "rounds").exists()


def test_keys_of_a_state_may_hold_what_names_of_tensors_may_not(tmp_path):
    folder = new_folder(tmp_path)
    keys = ["a/b", "..", "", "x\\y", "n" * 300, "~a"]
    state = {"a": {"b": torch.zeros(1)}, **{key: torch.full((1,), 1.0 + i) for i, key in enumerate(keys)}}
    folder.save_round(1, [], state, [])
    found, warnings = folder.newest()
    assert not warnings
    assert found is not None
    assert [found.state[key].item() for key in keys] == [1.0 + i for i in range(len(keys))]
    assert found.state["a"]["b"].item() == 0.0


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


@pytest.mark.parametrize("lines", [0, 1, 4], ids="{} lines left".format)
@pytest.mark.parametrize("good", [1, 2], ids="after round {}".format)
def test_events_of_earlier_rounds_are_put_back(good, lines, tmp_path):
    out = tmp_path / "out"
    stop_after(2, out)
    before = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(before[:lines]))
    if good == 1:
        flip(out / "rounds" / "0002" / "state.safetensors")
    make_federation(out, rounds=3).run()
    after = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in before if json.loads(line).get("round", 0) <= good]
    assert after[: len(kept)] == kept


def test_metrics_are_json_that_every_reader_takes(tmp_path):
    folder = new_folder(tmp_path)
    folder.metrics.append({"event": "train", "round": 1, "loss": math.nan, "groups": [{"x": math.inf}], "name": "ä"})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert read == {"event": "train", "round": 1, "loss": None, "groups": [{"x": None}], "name": "ä"}
