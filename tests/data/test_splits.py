"""Splits of a recipe's data: who trains on what, what is held out, and that nothing is lost in silence."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from flora_core.cli.dry_run import describe_held_out
from flora_core.config.recipe import Recipe, load
from flora_core.data.splits import Split, split_held_out, split_names
from flora_core.data.splits import split as split_data
from flora_core.runs.build import build_client, build_clients

WARDS = ["St. Mary Hospital", "Clinic B", "clinic b", "a/b"]


def write(path: Path, count: int, **columns) -> Path:
    """Write `count` records with ids from 0; a column is a function of the id."""
    rows = [
        {"id": i, "instruction": f"say {i}", "output": str(i), **{key: make(i) for key, make in columns.items()}}
        for i in range(count)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def recipe_of(tmp_path: Path, *overrides: str, text: str = "") -> Recipe:
    file = tmp_path / "mine.yaml"
    file.write_text("model: smollm2-135m-instruct\nfederation: {rounds: 2}\n" + text, "utf-8")
    return load(file, overrides)


def natural(tmp_path: Path, wards: list, *overrides: str) -> Recipe:
    """A recipe of records whose wards these are, in turn."""
    data = write(tmp_path / "d.jsonl", len(wards), ward=lambda i: wards[i])
    return recipe_of(tmp_path, f"data={data}", "data.partition=natural", "data.client_column=ward", *overrides)


def ids(records) -> list[int]:
    return [record["id"] for record in records]


def check_whole(split: Split, count: int) -> None:
    """Each record trains one client or is held out, once."""
    used = [number for part in [*split.train.values(), split.held_out] for number in ids(part)]
    assert sorted(used) == list(range(count))
    assert (split.unused, split.count) == (0, count)
    assert all(split.train.values())


def test_every_client_of_a_column_trains_and_has_held_out_records_of_its_own(tmp_path):
    split = split_data(natural(tmp_path, WARDS * 10, "data.test_fraction=0.2"))
    check_whole(split, 40)
    assert set(split.train) == set(split.own) == set(WARDS)
    assert {name: len(part) for name, part in split.own.items()} == dict.fromkeys(WARDS, 2)
    assert {record["ward"] for record in split.own["Clinic B"]} == {"Clinic B"}
    assert sum(map(len, split.own.values())) == len(split.held_out)
    clients, held_out = build_clients(natural(tmp_path, WARDS * 10, "data.test_fraction=0.2"))
    assert [ids(spec.eval_data) for spec in clients] == [ids(split.own[spec.name]) for spec in clients]
    assert ids(held_out) == ids(split.held_out)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_count_that_is_not_that_of_the_column_is_refused(tmp_path, count):
    words = rf"clients\.count asks for {count} clients, and the data has 4 \(.*set clients\.count=null for all of them"
    with pytest.raises(ValueError, match=words):
        split_data(natural(tmp_path, WARDS * 3, f"clients.count={count}"))
    assert len(split_data(natural(tmp_path, WARDS * 3, "clients.count=4")).train) == 4


def test_a_count_below_the_number_of_files_is_refused(tmp_path):
    files = json.dumps({name: str(write(tmp_path / f"{name}.jsonl", 4)) for name in "abc"})
    recipe = recipe_of(tmp_path, f"data.path={files}", "clients.count=2")
    for read in (split_data, split_names):
        with pytest.raises(ValueError, match=r"clients\.count asks for 2 clients, and the data has 3 \(a, b, c\)"):
            read(recipe)
    with pytest.raises(ValueError, match=r"clients\.names asks for 1 clients, and the data has 3"):
        split_data(recipe_of(tmp_path, f"data.path={files}", "clients.names=[x]"))
    assert list(split_data(recipe_of(tmp_path, f"data.path={files}", "clients.names=[x, y, z]")).train) == [
        "x",
        "y",
        "z",
    ]


def test_names_of_a_natural_split_order_its_clients_and_rename_none(tmp_path):
    split = split_data(natural(tmp_path, ["b", "a", "c"] * 3, "clients.names=[c, a, b]"))
    assert {name: {record["ward"] for record in part} for name, part in split.train.items()} == {
        "c": {"c"}, "a": {"a"}, "b": {"b"}}  # fmt: skip
    assert list(split.train) == ["c", "a", "b"]
    with pytest.raises(ValueError, match=r"clients\.names must be the values of column 'ward'.*unknown: c, x"):
        split_data(natural(tmp_path, ["b", "a", "c"] * 3, "clients.names=[x, a, b]"))


@pytest.mark.parametrize("hold_out", ["client", "pool"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_no_client_loses_its_last_training_record(tmp_path, hold_out, fraction):
    wards = ["large"] * 12 + ["one", "two", "two", *(f"single {i}" for i in range(6))]
    for seed in range(4):
        recipe = natural(tmp_path, wards, f"data.hold_out={hold_out}", f"data.test_fraction={fraction}", f"seed={seed}")
        split = split_data(recipe)
        check_whole(split, len(wards))
        assert set(split.train) == set(wards)
        assert "one" not in split.own
        assert ids(split_data(recipe).held_out) == ids(split.held_out)


@pytest.mark.parametrize("scheme", ["iid", "shard", "dirichlet"])
def test_dealt_clients_can_hold_out_records_of_their_own(tmp_path, scheme):
    data = write(tmp_path / "d.jsonl", 60, category=lambda i: f"c{i % 3}")
    options = [f"data={data}", f"data.partition={scheme}", "clients.count=4", "data.hold_out=client"]
    split = split_data(recipe_of(tmp_path, *options))
    check_whole(split, 60)
    assert all(len(split.own[name]) >= 1 for name, part in split.train.items() if len(part) > 1)
    pool = split_data(recipe_of(tmp_path, *options[:3]))
    check_whole(pool, 60)
    assert not pool.own


def test_a_file_each_holds_out_of_each_client(tmp_path):
    files = {name: str(write(tmp_path / f"{name}.jsonl", 10)) for name in ("x", "y")}
    recipe = recipe_of(tmp_path, f"data.path={json.dumps(files)}", "data.test_fraction=0.2")
    split = split_data(recipe)
    assert {name: len(part) for name, part in split.own.items()} == {"x": 2, "y": 2}
    assert ids(split.held_out) == ids(split.own["x"]) + ids(split.own["y"])
    alone = build_client(recipe, "y")
    assert (ids(alone.data), ids(alone.eval_data)) == (ids(split.train["y"]), ids(split.own["y"]))
    capped = split_data(recipe_of(tmp_path, f"data.path={json.dumps(files)}", "data.test_items=1"))
    assert len(capped.held_out) == sum(map(len, capped.own.values())) == 1


def test_sources_may_be_folders_globs_and_lists(tmp_path):
    for name in ("clinics/a.jsonl", "clinics/b.jsonl", "more.jsonl"):
        write(tmp_path / name, 6)
    folder, more = tmp_path / "clinics", tmp_path / "more.jsonl"
    for source in (folder, f"{folder}/*.jsonl", f"[{folder}/a.jsonl, {folder}/b.jsonl]"):
        assert split_data(recipe_of(tmp_path, f"data={source}", "clients.count=2")).count == 12
    text = f"data:\n  path:\n    north: {folder}\n    south: [{more}]\n  test: {{south: {folder}/a*}}\n"
    split = split_data(recipe_of(tmp_path, text=text))
    assert {name: len(part) for name, part in split.train.items()} == {"north": 12, "south": 6}
    assert {name: len(part) for name, part in split.own.items()} == {"south": 6}
    assert split_data(recipe_of(tmp_path, text=f"data: [{folder}, {more}]\n")).count == 18


def test_a_glob_may_begin_with_a_star(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", 6)
    assert split_data(recipe_of(tmp_path, "data=*.jsonl", "clients.count=2")).count == 6


def test_held_out_data_may_be_the_clients_own(tmp_path):
    files = {name: str(write(tmp_path / f"{name}.jsonl", 4)) for name in "ab"}
    test = json.dumps({"b": files["a"]})
    recipe = recipe_of(tmp_path, f"data.path={json.dumps(files)}", f"data.test={test}")
    split = split_data(recipe)
    assert {name: len(part) for name, part in split.train.items()} == {"a": 4, "b": 4}
    assert (len(split.held_out), list(split.own)) == (4, ["b"])
    assert len(build_client(recipe, "b").eval_data) == 4
    assert len(split_held_out(recipe)) == 4
    with pytest.raises(ValueError, match=r"data\.test names c, no client; the clients: a, b"):
        split_data(recipe_of(tmp_path, f"data.path={json.dumps(files)}", f"data.test={json.dumps({'c': 'd.jsonl'})}"))


def test_test_data_with_the_column_are_the_clients_own(tmp_path):
    test = write(tmp_path / "t.jsonl", 6, ward=lambda i: ["x", "y", "z"][i % 3])
    split = split_data(natural(tmp_path, ["x", "y"] * 4, f"data.test={test}"))
    assert {name: ids(part) for name, part in split.own.items()} == {"x": [0, 3], "y": [1, 4]}
    assert len(split.held_out) == 6


def test_the_dry_run_names_clients_without_held_out_records(tmp_path):
    split = split_data(natural(tmp_path, ["x"] * 10 + ["lonely"]))
    assert describe_held_out(split) == "1; clients without any of their own: lonely"
    assert describe_held_out(split_data(natural(tmp_path, ["x", "y"] * 5))) == "2"


def test_records_that_no_one_uses_are_counted(tmp_path):
    split = split_data(natural(tmp_path, ["x", "y"] * 10, "data.per_client=3", "data.test_items=1"))
    assert (split.unused, split.count) == (13, 20)


@pytest.mark.parametrize(
    ("ward", "words"),
    [
        (None, r"d\.jsonl, line 3: column 'ward' is null; fill it in"),
        (" ", r"d\.jsonl, line 3: column 'ward' is empty"),
        (["a"], r"d\.jsonl, line 3: column 'ward' must be text or a number, got \['a'\]"),
        (float("nan"), r"d\.jsonl, line 3: column 'ward' must be text or a number"),
        ("two\nlines", r"d\.jsonl, line 3, column 'ward': a client's name must be text of one line"),
    ],
)
def test_values_that_name_no_client_are_reported_with_file_and_line(tmp_path, ward, words):
    with pytest.raises(ValueError, match=words):
        split_data(natural(tmp_path, ["x", "y", ward, "x"]))


@pytest.mark.parametrize("scheme", ["dirichlet", "shard"])
def test_null_labels_are_reported_with_file_and_line(tmp_path, scheme):
    data = write(tmp_path / "d.jsonl", 8, category=lambda i: None if i == 5 else "x")
    overrides = [f"data.partition={scheme}", "data.test_fraction=0", "clients.count=2"]
    with pytest.raises(ValueError, match=r"d\.jsonl, line 6: column 'category' is null"):
        split_data(recipe_of(tmp_path, f"data={data}", *overrides))


def test_numbers_name_clients(tmp_path):
    assert Counter(map(len, split_data(natural(tmp_path, [17, 4, "17"] * 4)).train.values())) == {7: 1, 3: 1}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.hold_out=pool"], "hold_out=pool: the demo has held-out data of its own"),
        (["data.path={a: a.jsonl}", "data.hold_out=pool"], "hold_out=pool: the clients' records lie apart"),
        (
            ["data=a.jsonl", "data.test=a.jsonl", "data.hold_out=client"],
            "hold_out=client holds out records of path, and",
        ),
        (["clients.names=[a, '']"], "a client's name must be text of one line, got ''"),
    ],
)
def test_settings_that_cannot_hold_are_refused_before_data_are_read(tmp_path, monkeypatch, overrides, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", 4)
    with pytest.raises(ValueError, match=words):
        recipe_of(tmp_path, *overrides)


def test_a_partition_file_without_held_out_records_may_hold_out_of_each_client(tmp_path):
    data = write(tmp_path / "d.jsonl", 9)
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"s": {"u": [0, 1, 2], "v w": [5, 3, 4]}, "t": {"u": [0], "test": [1]}}), "utf-8")
    options = [f"data={data}", f"data.partitions={file}", "data.hold_out=client"]
    split = split_data(recipe_of(tmp_path, *options, "data.split=s"))
    assert {name: len(part) for name, part in split.train.items()} == {"u": 2, "v w": 2}
    assert {name: len(part) for name, part in split.own.items()} == {"u": 1, "v w": 1}
    assert split.unused == 3
    with pytest.raises(ValueError, match=r"names the held-out records of split 't'; leave data\.hold_out out"):
        split_data(recipe_of(tmp_path, *options, "data.split=t"))
