"""Evaluation on the clients' own held-out records: their numbers, mean and spread, in the result and the report."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import flora_core as flora
from flora_core.runs.report import write_report
from flora_core.runs.summary import History, summary_tables
from tests.support.federations import files, make_federation, make_model, make_records, make_tokenizer, stop_after

NAMES = ("St. Mary $1$ Hospital", "_b", "医院 🏥")


def clients(**held_out: int) -> list[flora.ClientSpec]:
    """Three clients, with so many held-out records of their own."""
    return [
        flora.ClientSpec(
            name, make_records(name, 5), flora.AdapterConfig(2, 4), eval_data=make_records("x" + name, own) or None
        )
        for name, own in zip(NAMES, held_out.values(), strict=True)
    ]


def test_each_client_has_the_numbers_of_its_own_records():
    model, tokenizer = make_model(), make_tokenizer()
    common = make_records("common", 4)
    own = {name: make_records(name, count) for name, count in zip(NAMES, (2, 3, 7), strict=True)}
    found = flora.evaluate(model, tokenizer, common, clients=own)
    alone = {name: flora.evaluate(model, tokenizer, part) for name, part in own.items()}
    for name, one in alone.items():
        assert found["clients"][name]["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert {key: found["clients"][name][key] for key in ("exact_match", "examples", "tokens")} == {
            key: one[key] for key in ("exact_match", "examples", "tokens")
        }
    assert found["loss"] == pytest.approx(flora.evaluate(model, tokenizer, common)["loss"], rel=1e-6)
    losses = [one["loss"] for one in found["clients"].values()]
    mean = sum(losses) / 3
    over = found["over_clients"]["loss"]
    assert over["mean"] == pytest.approx(mean, rel=1e-12)
    assert over["weighted_mean"] == pytest.approx((2 * losses[0] + 3 * losses[1] + 7 * losses[2]) / 12, rel=1e-12)
    assert over["std"] == pytest.approx(math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 3), rel=1e-12)
    assert set(found["over_clients"]) == {"loss", "exact_match"}


def test_multiple_choice_is_counted_by_client_too():
    questions = [{"question": "w1 w2", "choices": ["w3", "w4"], "answer": i % 2, "subject": "s"} for i in range(4)]
    own = {"a": questions[:1], "b": questions[1:]}
    found = flora.evaluate(make_model(), make_tokenizer(), questions, clients=own)
    assert set(found) == {"accuracy", "examples", "groups", "clients", "over_clients"}
    right = [found["clients"][name]["accuracy"] * len(part) for name, part in own.items()]
    assert sum(right) == pytest.approx(4 * found["accuracy"])
    assert found["over_clients"]["accuracy"]["weighted_mean"] == pytest.approx(found["accuracy"])


def test_a_run_reports_every_client_that_has_held_out_records(tmp_path):
    result = make_federation(tmp_path, clients=clients(a=2, b=0, c=3), eval_data=None).run()
    assert result.before is not None
    assert result.after is not None
    assert list(result.after["clients"]) == [NAMES[0], NAMES[2]]
    assert result.after["examples"] == 5
    tables = {title: (columns, rows) for title, columns, rows in summary_tables(History.of(result.events))}
    columns, rows = tables["Held-out data of each client"]
    assert columns[:4] == ["client", "examples", "loss before", "loss round 2"]
    assert [row[0] for row in rows] == [NAMES[0], NAMES[2], "mean of 2", "mean, by examples", "standard deviation"]
    assert [row[1] for row in rows] == ["2", "3", "-", "-", "-"]
    assert float(rows[2][3]) == pytest.approx(result.after["over_clients"]["loss"]["mean"], abs=1e-3)
    page = write_report(tmp_path).read_text("utf-8")
    assert "St. Mary $1$ Hospital" in page
    assert "医院 🏥" in page
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_records_of_clients_that_are_evaluated_anyway_change_nothing_else(tmp_path):
    """A run of before, which knew no records of clients' own, goes on."""
    records = flora_records("x", 4)
    plain = [flora.ClientSpec(spec.name, spec.data, spec.adapter) for spec in clients(a=0, b=0, c=0)]
    stop_after(1, tmp_path / "a", clients=plain, eval_data=records, rounds=2)
    own = [
        flora.ClientSpec(spec.name, spec.data, spec.adapter, eval_data=records[i : i + 1])
        for i, spec in enumerate(plain)
    ]
    after = make_federation(tmp_path / "a", clients=own, eval_data=records, rounds=2).run().after
    assert after is not None
    assert {name: one["examples"] for name, one in after["clients"].items()} == dict.fromkeys(NAMES, 1)
    assert after["examples"] == 4
    whole = make_federation(tmp_path / "b", clients=plain, eval_data=records, rounds=2).run().after
    assert whole is not None
    assert (whole["loss"], "clients" in whole) == (after["loss"], False)
    assert files(tmp_path / "a" / "model", ".safetensors") == files(tmp_path / "b" / "model", ".safetensors")


def test_other_records_of_clients_are_another_run(tmp_path):
    stop_after(1, tmp_path, clients=clients(a=2, b=2, c=2), rounds=2)
    with pytest.raises(ValueError, match=r"eval_data\.clients"):
        make_federation(tmp_path, clients=clients(a=2, b=2, c=3), rounds=2).run()


def flora_records(name: str, count: int) -> list[Any]:
    from flora_core.data import check_records

    return check_records(make_records(name, count), "records", known=("category",))


class Rows:
    """Like ``datasets.Dataset``: sized, indexable, no iterator of its own."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_data_of_every_kind_train_the_same(tmp_path):
    rows = make_records("a", 6)
    (tmp_path / "clinics").mkdir()
    for number, part in enumerate((rows[:2], rows[2:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / "clinics" / f"{number}.jsonl").write_text(lines, "utf-8")
    kinds = {
        "list": rows,
        "rows": Rows(rows),
        "generator": (row for row in rows),
        "columns": {key: [row[key] for row in rows] for key in rows[0]},
        "folder": tmp_path / "clinics",
        "glob": f"{tmp_path}/clinics/*.jsonl",
        "files": [tmp_path / "clinics" / "0.jsonl", tmp_path / "clinics" / "1.jsonl"],
    }
    losses = {}
    for kind, data in kinds.items():
        federation = make_federation(
            clients=[flora.ClientSpec("a", data, flora.AdapterConfig(2, 4))], rounds=1, eval_data=None
        )
        losses[kind] = federation.run().history[0]["clients"]["a"]["loss_last"]
    assert len(set(losses.values())) == 1, losses


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (["x"], FileNotFoundError, "data file x does not exist in a list of files; a list of texts is written"),
        ([], ValueError, "eval_data has no records"),
        (3, TypeError, "eval_data must be a path, a list of paths, an iterable of dicts"),
        ({"instruction": "a", "output": "b"}, TypeError, "put a single record into a list"),
    ],
)
def test_held_out_data_of_no_kind_are_refused_before_training(data, kind, words):
    with pytest.raises(kind, match=words):
        make_federation(eval_data=data)
