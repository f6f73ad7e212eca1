"""Files from people one does not trust: refused with their name and a reason, never a crash, a hang or a stray access.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from flora_core.adapters.peft import CONFIG, WEIGHTS, load_peft_adapter, save_peft_adapter
from flora_core.adapters.update import ClientUpdate
from flora_core.common import files as files_module
from flora_core.common.safetensors_header import read_header
from flora_core.federation.callable_clients import receive
from flora_core.federation.judge import examine, judge_updates
from flora_core.federation.quarantine import quarantine
from flora_core.runs.folder import RunFolder
from tests.federation.test_judge import make_update, promised
from tests.support.federations import new_folder
from tests.support.hostile_files import LIES, mutate, mutate_json, mutate_safetensors, overwrite, tree


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """The folder of a client that did nothing wrong."""
    save_peft_adapter(make_update(), tmp_path / "sent")
    return tmp_path / "sent"


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


# Headers.


def test_a_header_is_read_as_it_is(sent):
    header = read_header(sent / WEIGHTS)
    assert {name: info.shape for name, info in header.items()} == {
        "base_model.model.x.lora_A.weight": (4, 12),
        "base_model.model.x.lora_B.weight": (20, 4),
        "base_model.model.y.lora_A.weight": (3, 12),
        "base_model.model.y.lora_B.weight": (20, 3),
    }
    assert max(info.end for info in header.values()) == 4 * (4 + 3) * (12 + 20)


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_with_the_file_s_name(lie, tmp_path):
    data, words = LIES[lie]
    path = tmp_path / "some.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*{re.escape(words)}"):
        read_header(path)


def test_a_file_is_not_read_beyond_its_limits(sent, monkeypatch):
    size = (sent / WEIGHTS).stat().st_size
    assert read_header(sent / WEIGHTS, max_bytes=size)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has .* kB, more than the .* kB that it may have"):
        read_header(sent / WEIGHTS, max_bytes=size - 1)
    with pytest.raises(ValueError, match=r"its header claims .* bytes, and may have at most 10"):
        read_header(sent / WEIGHTS, max_header_bytes=10)


# What a client left in a folder.


def test_what_a_client_left_is_read_as_it_is(sent):
    update = receive(sent, promised())
    assert update.client == "ann"
    assert not isinstance(examine(update, promised()), str)
    for module, pair in make_update().adapters.items():
        assert all(torch.equal(got, want) for got, want in zip(update.adapters[module], pair, strict=True))


def test_more_than_was_promised_is_not_read(sent, monkeypatch):
    from flora_core.common import safetensors_header

    os.truncate(sent / WEIGHTS, 3_000_000)
    monkeypatch.setattr(safetensors_header, "_checked", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr("flora_core.federation.callable_clients.ROOM_BYTES", 1000)
    with pytest.raises(ValueError, match=r"safetensors has 3\.0 MB, more than the 2\.8 kB that it may have"):
        receive(sent, promised())


def as_link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "elsewhere")
    (folder / WEIGHTS).symlink_to("elsewhere")


def as_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def as_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def config_as_pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def config_of_ten_megabytes(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 10_000_000)


SENT = {
    "weights are a link": (as_link, "must be a plain file, not a link"),
    "weights are a pipe": (as_pipe, "must be a plain file"),
    "weights are a folder": (as_folder, "must be a plain file"),
    "weights are a pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        "holds adapter_model.bin, a pickle",
    ),
    "config is a pipe": (config_as_pipe, "must be a plain file"),
    "config of 10 MB": (config_of_ten_megabytes, "more than the 4.0 MB"),
    "config nested": (lambda f: (f / CONFIG).write_text("[" * 100_000), "does not hold valid JSON"),
    "config of another form": (lambda f: (f / CONFIG).write_text("[]"), "must hold a JSON object"),
    "r twice": (lambda f: (f / CONFIG).write_text('{"r": 1, "r": 2}'), "the key 'r' comes twice"),
    "a rank of 10^400": (lambda f: edit_config(f, r=10**400), "must hold numbers"),
    "patterns that are no mapping": (lambda f: edit_config(f, rank_pattern=[1]), "rank_pattern must map modules"),
    "an expression that takes for ever": (
        lambda f: edit_config(f, rank_pattern={"(.*.*.*.*.*.*.*.*)*y": 3}),
        "is a regular expression; an update from outside must name its modules",
    ),
    "targets that take for ever": (lambda f: edit_config(f, target_modules="(x+x+)+y"), "is a regular expression"),
    "targets that are numbers": (lambda f: edit_config(f, target_modules=[1]), "target_modules must be a list"),
    "layers that are text": (lambda f: edit_config(f, layers_to_transform=["1"]), "layers_to_transform must hold"),
    "nothing": (shutil.rmtree, "holds no PEFT adapter"),
}


@pytest.mark.parametrize("what", SENT)
def test_what_is_no_safe_adapter_is_refused(what, sent):
    change, words = SENT[what]
    change(sent)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(sent)) + ".*" + re.escape(words)):
        receive(sent, promised())


def test_a_folder_that_is_a_link_is_refused(sent, tmp_path):
    (tmp_path / "link").symlink_to(sent)
    with pytest.raises(ValueError, match="link must be a folder, not a link"):
        receive(tmp_path / "link", promised())


@pytest.mark.parametrize("answer", [None, 3, b"x", {"a": 1}, [make_update()]])
def test_an_answer_of_another_kind_is_refused(answer):
    with pytest.raises(ValueError, match=f"it sent a {type(answer).__name__}, and not an update"):
        receive(answer, promised())


def test_a_user_s_own_adapter_may_be_a_link_and_have_patterns(sent):
    as_link(sent)
    edit_config(sent, rank_pattern={"y|z": 3}, r=4, target_modules="x|y")
    assert load_peft_adapter(sent).ranks == {"x": 4, "y": 3}
    edit_config(sent, rank_pattern={"(": 3})
    with pytest.raises(ValueError, match="'\\(' is not a regular expression"):
        load_peft_adapter(sent)


# Quarantine.


def test_what_is_refused_is_kept_with_the_reason(sent, tmp_path):
    place = quarantine(tmp_path, 3, "ann", "too large", sent, promised())
    assert place == tmp_path / "quarantine" / "0003" / "ann"
    reason = json.loads((place / "reason.json").read_text())
    assert reason == {"round": 3, "client": "ann", "reason": "too large", "kept": [CONFIG, WEIGHTS]}
    assert (place / WEIGHTS).read_bytes() == (sent / WEIGHTS).read_bytes()
    again = quarantine(tmp_path, 3, "ann", "not finite", make_update(), promised())
    assert sorted(os.listdir(again)) == ["reason.json", "update.safetensors"]
    assert {info.shape for info in read_header(again / "update.safetensors").values()} == {
        (4, 12), (4, 20), (3, 12), (3, 20),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["../../up", "/etc", "..", ".", "", "a/b", "a\0b", "é" * 300, "x" * 300, ".hidden"])
def test_nobody_chooses_a_path_by_a_name(name, tmp_path):
    home = tmp_path / "deep" / "home"
    place = quarantine(
        home, 1, name, "unasked", ClientUpdate(name, {name: (torch.ones(1, 1), torch.ones(1, 1))}, {}), promised()
    )
    assert place.parent == home / "quarantine" / "0001"
    assert re.fullmatch(r"unnamed-[0-9a-f]{16}", place.name)
    assert json.loads((place / "reason.json").read_text())["client"] == name
    assert sorted(os.listdir(tmp_path)) == ["deep"]
    assert sorted(os.listdir(tmp_path / "deep")) == ["home"]


def test_no_more_than_a_few_times_the_promise_is_kept(sent, tmp_path, monkeypatch):
    monkeypatch.setattr("flora_core.federation.quarantine.ROOM_BYTES", 0)
    os.truncate(sent / WEIGHTS, 4 * 8 * 7 * 32 + 1)
    place = quarantine(tmp_path, 1, "ann", "too large", sent, promised())
    assert sorted(os.listdir(place)) == [CONFIG, "reason.json"]
    huge = ClientUpdate("ann", {"x": (torch.ones(1000, 12), torch.ones(1000, 20))}, {})
    assert os.listdir(quarantine(tmp_path, 1, "ann", "too large", huge, promised())) == ["reason.json"]


@pytest.mark.parametrize("adapters", [None, {"x": 3}, {"x": (torch.ones(2).to_sparse(), torch.ones(2, device="meta"))}])
def test_whatever_the_adapters_are_they_can_be_quarantined(adapters, tmp_path):
    place = quarantine(tmp_path, 1, "ann", "odd", ClientUpdate("ann", adapters, {}), promised())
    assert os.listdir(place) == ["reason.json"]


# Mutated files.


def attempt(read: Callable[[], Any], errors: tuple[type[Exception], ...]) -> tuple[Any, str]:
    """Result of reading, or the text of a refusal of these types; anything else ends the test."""
    try:
        return read(), ""
    except errors as error:
        return None, str(error)


@pytest.mark.slow
def test_mutated_adapters_never_crash_or_hang_or_touch_anything(sent, tmp_path, scale):
    """Each loads, or is refused by a typed error that names its file; what loads is then judged."""
    random, slowest, loaded = Random("adapters"), 0.0, 0
    config, weights = ((sent / name).read_bytes() for name in (CONFIG, WEIGHTS))
    before, total = list(tree(tmp_path)), scale(800, 100_000, "mutated adapters")
    for number in range(total):
        name, whole = (CONFIG, config) if random.random() < 0.4 else (WEIGHTS, weights)
        if name == CONFIG and random.random() < 0.5:
            changed = json.dumps(mutate_json(json.loads(config), random)).encode()
        else:
            changed = mutate(config, random) if name == CONFIG else mutate_safetensors(weights, random)
        overwrite(sent / name, changed)
        began = time.monotonic()
        read = partial(receive, sent, promised()) if number % 2 else partial(load_peft_adapter, sent, client="ann")
        update, refusal = attempt(read, (ValueError, FileNotFoundError))
        if update is None:
            assert str(sent) in refusal, f"{number}: {refusal}"
        else:
            verdict = judge_updates([update], {"ann": promised()})
            good, refused = verdict.good, verdict.refused
            assert len(good) + len(refused) == 1
            assert not good or all(t.isfinite().all() for pair in good[0].adapters.values() for t in pair)
        loaded, slowest = loaded + (update is not None), max(slowest, time.monotonic() - began)
        overwrite(sent / name, whole)
    assert list(tree(tmp_path)) == before
    assert 0 < loaded < total
    assert slowest < 10, f"one took {slowest:.1f} s"


@pytest.mark.slow
def test_mutated_checkpoints_are_found_out_and_the_round_before_is_used(tmp_path, scale, monkeypatch):
    # Nothing is lost with the power here, and waiting for the disk would be nine parts in ten of the time.
    monkeypatch.setattr(files_module, "_fsync", lambda path: None)
    folder, random = new_folder(tmp_path / "run"), Random("checkpoints")
    for number in (1, 2):
        state = {"weights": {"m": torch.full((3, 4), float(number))}, "numbers": [number, None, {"x": 0.5}]}
        event = {"event": "round_end", "round": number}
        update = ClientUpdate("a", {"m": (torch.ones(2, 4), torch.ones(2, 3))}, {"m": 2.0})
        folder.save_round(number, [update], state, [event])
        folder.metrics.append(event)
    found = sorted(path.relative_to(tmp_path) for path in (tmp_path / "run").rglob("*") if path.is_file())
    files = [tmp_path / path for path in found if "0001" not in path.parts]
    contents = {path: path.read_bytes() for path in files}
    for number in range(scale(400, 20_000, "mutated checkpoints")):
        path = random.choice(files)
        data = contents[path]
        if path.suffix == ".json" and random.random() < 0.5:
            changed = json.dumps(mutate_json(json.loads(data), random)).encode()
        else:
            changed = mutate_safetensors(data, random) if path.suffix == ".safetensors" else mutate(data, random)
        overwrite(path, changed)
        again = RunFolder(tmp_path / "run")
        notes, refusal = attempt(partial(again.record.begin, {"rounds": 3}, {"torch": "1"}, "start"), (ValueError,))
        if notes is None:
            assert path.name == "run.json", f"{number}: {refusal}"
            assert "run.json is damaged" in refusal or "another configuration" in refusal
        snapshot, damaged = again.newest()
        assert snapshot is not None, f"{number}: {path.name}: {damaged}"
        if path.name not in ("run.json", "metrics.jsonl"):
            same = changed == data or (path.name == "round.json" and _json(changed) == json.loads(data))
            assert snapshot.round == (2 if same else 1), f"{number}: {path.name}"
        assert len(damaged) == 2 - snapshot.round
        assert torch.equal(snapshot.state["weights"]["m"], torch.full((3, 4), float(snapshot.round)))
        assert all(event["event"] for event in again.restore_metrics(snapshot))
        for one in files:
            overwrite(one, contents[one])


def _json(data: bytes) -> object:
    """Parse the text; None if it is no JSON or has a key twice."""
    try:
        return json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)
