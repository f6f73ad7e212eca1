"""A run's outputs: its events, its result, its files, and the model, also where it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flora_core as flora
from tests.support.federations import make_clients, make_federation, make_model, make_records, make_tokenizer


def test_the_events_of_a_run(tmp_path):
    events = []
    clients = make_clients()
    result = make_federation(tmp_path, rounds=3, eval_every=2, callbacks=[events.append], clients=clients).run()
    told = [(event["event"], event.get("round")) for event in events if event["event"] != "train_progress"]
    round_of = lambda n: [("round_start", n), *[("client_done", n)] * 3, ("aggregated", n)]  # noqa: E731
    assert told == [
        ("run_start", None),
        ("evaluated", 0),
        *round_of(1),
        ("round_end", 1),
        *round_of(2),
        ("evaluated", 2),
        ("round_end", 2),
        *round_of(3),
        ("evaluated", 3),
        ("round_end", 3),
        ("run_end", None),
    ]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [event for event in events if event["event"] != "train_progress"] == result.events
    steps = [event["step"] for event in events if event["event"] == "train_progress"]
    assert steps == [1, 2, 3, 4] * 3
    start, end = events[0], [event for event in events if event["event"] == "round_end"][-1]
    assert start["clients"][0] == {"name": "a", "rank": 4, "examples": 5, "parameters": 4 * 4 * (16 + 16)}
    assert (start["rounds"], start["strategy"], start["device"], start["seed"]) == (3, "flora", "cpu", 0)
    assert Path(end["checkpoint"]) == tmp_path / "rounds" / "0003"
    assert end["peak_memory_bytes"] > 0
    (aggregated, *_) = [event for event in events if event["event"] == "aggregated"]
    assert aggregated["bytes_up"] == 4 * sum(client["parameters"] for client in start["clients"])
    assert aggregated["clients"] == 3


def test_the_report_and_the_progress_take_the_events_of_a_run(tmp_path):
    import io

    from flora_core.runs.progress import RunProgress
    from flora_core.runs.summary import History, summary_tables

    stream = io.StringIO()
    result = make_federation(tmp_path, callbacks=[RunProgress(stream, 0.0)]).run()
    assert "round 2/2: done" in stream.getvalue()
    assert [title for title, *_ in summary_tables(History.of(result.events))] == [
        "Clients",
        "Traffic",
        "Held-out data",
        "Certificate",
        "The whole run",
    ]


def test_the_result_of_a_run():
    model, tokenizer, data = make_model(), make_tokenizer(), make_records("held out", 6)
    before = flora.evaluate(model, tokenizer, data, max_length=32)
    result = make_federation(model=model, tokenizer=tokenizer, eval_data=data).run()
    after = flora.evaluate(model, tokenizer, data, max_length=32)
    assert result.before is not None
    assert result.after is not None
    assert before.items() <= result.before.items()
    assert after.items() <= result.after.items()
    assert [one["round"] for one in result.history] == [1, 2]
    assert [one["evaluation"]["round"] for one in result.history] == [1, 2]
    assert set(result.history[0]["clients"]) == {"a", "b", "c"}
    assert (result.adapter, result.out) == (None, None)
    without = make_federation(eval_data=None).run()
    assert (without.before, without.after) == (None, None)


def test_a_run_without_out_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_federation().run()
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_given_back_when_a_round_fails():
    model = make_model()

    def fail(event) -> None:
        if event["event"] == "train_progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_federation(model=model, callbacks=[fail]).run()
    make_federation(model=model, rounds=1).run()
