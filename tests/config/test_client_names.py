"""Clients' names are any text: folders, keys and tensors get safe forms of them, and all else the names themselves."""

from __future__ import annotations

import json
import os
import unicodedata

import pytest

import flora_core as flora
from flora_core.cli.main import main
from flora_core.common.files import folder_names
from tests.support.federations import files, make_federation, make_records, stop_after

ODD_NAMES = {
    "St. Mary Hospital": "St.-Mary-Hospital",
    "clinic-b.2_x": "clinic-b.2_x",
    "Klinik Süd": "Klinik-Süd",
    "医院": "医院",
    "..": "unnamed-5ec1f7e7",
    "../../etc/passwd": "-..-etc-passwd",
    "a/b": "a-b",
    "C:\\x": "C--x",
    "con": "con-1143da2b",
    "NUL.txt": "NUL-txt-0241e4ee",
    "x.": "x-c92f00b1",
    "🏥": "unnamed-a8c80691",
}


def test_folder_names_are_safe_for_every_file_system():
    names = [*ODD_NAMES, "long " * 100, "ä" * 200]
    found = folder_names(names)
    assert list(found) == names
    assert {name: found[name] for name in ODD_NAMES} == ODD_NAMES
    assert all(len(folder.encode()) <= 110 for folder in found.values())
    forbidden = set('<>:"/\\|?* \0')
    assert not [
        folder for folder in found.values() if forbidden & set(folder) or folder.startswith(".") or folder.endswith(".")
    ]


def test_folder_names_differ_where_names_do():
    alike = ["A", "a", "a b", "a-b", "é", "e\u0301", "\ufb01", "fi", "round.json", "x" * 200 + "1", "x" * 200 + "2"]
    found = folder_names(alike, taken=("Round.JSON",))
    assert len({unicodedata.normalize("NFKC", folder).casefold() for folder in found.values()}) == len(alike)
    assert found["round.json"] != "round.json"
    assert folder_names(reversed(alike), taken=("Round.JSON",)) == found
    assert folder_names(["A", "b"]) == {"A": "A", "b": "b"}


def test_clients_of_any_name_have_folders_and_keep_their_names(tmp_path):
    """Optimizer state lies under the clients' names in a snapshot: a resumed run reads it back."""
    names = ["St. Mary Hospital", "a", "A", "../x", "a/b", "state.safetensors", "n" * 600, "Klinik \\ S\u00fcd $5$"]
    clients = [flora.ClientSpec(name, make_records("a", 4), flora.AdapterConfig(2, 4)) for name in names]
    changes = {"clients": clients, "rounds": 2, "keep_optimizer": True}
    stop_after(1, tmp_path / "stopped", **changes)
    result = make_federation(tmp_path / "stopped", **changes).run()
    assert [list(one["clients"]) for one in result.history] == [names, names]
    folders = json.loads((tmp_path / "stopped" / "run.json").read_text("utf-8"))["folders"]
    assert list(folders) == sorted(names)
    for number in ("0001", "0002"):
        made = {path.name for path in (tmp_path / "stopped" / "rounds" / number).iterdir() if path.is_dir()}
        assert made == set(folders.values())
    make_federation(tmp_path / "whole", **changes).run()
    ours, theirs = (files(tmp_path / run / "rounds", ".safetensors") for run in ("stopped", "whole"))
    assert ours == theirs
    assert not list(tmp_path.parent.glob("x*"))


def test_a_refused_update_lies_in_the_folder_of_its_client(tmp_path):
    clients = [flora.ClientSpec("Clinic B", make_records("a", 4)), flora.ClientSpec("a", make_records("a", 4))]
    federation = make_federation(
        tmp_path, clients=clients, rounds=1, weights="uniform", remote={"Clinic B": lambda task: 3}
    )
    with pytest.warns(RuntimeWarning, match="client 'Clinic B' was refused"):
        federation.run()
    reason = json.loads((tmp_path / "quarantine" / "0001" / "Clinic-B" / "reason.json").read_text())
    assert reason["client"] == "Clinic B"


def test_a_run_of_an_older_version_keeps_its_folders(tmp_path):
    stop_after(1, tmp_path, rounds=2)
    facts = json.loads((tmp_path / "run.json").read_text())
    del facts["folders"]
    (tmp_path / "run.json").write_text(json.dumps(facts))
    make_federation(tmp_path, rounds=2).run()
    assert {"a", "b", "c"} <= set(os.listdir(tmp_path / "rounds" / "0002"))


def test_keys_and_commands_of_nodes_of_any_name(tmp_path, capsys):
    pytest.importorskip("cryptography")
    words = ["quickstart", "--out", str(tmp_path / "d"), "--host", "127.0.0.1", "--nodes", "St. Mary,ca"]
    assert main(["deploy", *words]) == 0
    made = set(os.listdir(tmp_path / "d" / "keys"))
    assert {"St.-Mary.key", "St.-Mary.pub", "ca.crt"} < made
    assert len(made) == 7
    assert 'client="St. Mary"' in capsys.readouterr().out
