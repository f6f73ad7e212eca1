"""A run's events on their way to the terminal, the tables, the plots and the page."""

from __future__ import annotations

import io
import json
import math
import re
import sys

import numpy as np
import pytest

from flora_core.common.formatting import show_bytes, show_number, show_seconds
from flora_core.common.tables import print_tables
from flora_core.runs.plots import plot_accuracy, plot_bytes, plot_errors, plot_loss, plot_server
from flora_core.runs.progress import Bar, RunProgress, sentence
from flora_core.runs.report import read_history, write_report
from flora_core.runs.summary import History, summary_tables


def events(clients: int = 3, rounds: int = 2, groups: bool = True):
    """The events of a small run in which client-1 is refused in round 2."""
    people = [dict(name=f"client-{i}", rank=4 * (i + 1), examples=10 + i) for i in range(clients)]
    yield dict(event="run_start", rounds=rounds, strategy="flora", clients=people, device="cpu", out="runs/x")
    yield evaluated(0, 3.0, 0.1, groups)
    for number in range(1, rounds + 1):
        names = [client["name"] for client in people]
        yield dict(event="round_start", round=number, rounds=rounds, clients=names, cohorts=2)
        yield dict(event="train_progress", round=number, step=1, steps=4, loss=2.5, tokens=100, seconds=2.0)
        for index, client in enumerate(people):
            refused = "gradients are not finite" if (number, index) == (2, 1) else None
            last = math.nan if refused else 2.0 / number
            yield dict(event="client_done", round=number, client=client["name"], rank=client["rank"], refused=refused,
                       examples=client["examples"], tokens=500, steps=4, loss_first=3.0 / number, loss_last=last,
                       seconds=2.5, tokens_per_s=200.0)  # fmt: skip
        yield dict(event="aggregated", round=number, strategy="flora", clients=clients, aggregation_error=1e-8 * number,
                   application_error=None, bytes_up=1_500_000, bytes_down=2_500_000, seconds=0.1,
                   seconds_of={"aggregate": 0.06, "write": 0.04})  # fmt: skip
        yield evaluated(number, 3.0 / (number + 1), 0.1 + 0.3 * number, groups)
        yield dict(event="round_end", round=number, rounds=rounds, applied=True, seconds=30.0, checkpoint="c",
                   peak_memory_bytes=2.0e9 + number)  # fmt: skip
    yield dict(event="warning", message="client-1 was refused <in round 2>", round=2)
    yield dict(event="run_end", rounds=rounds, seconds=65.0, peak_memory_bytes=2.0e9, out="runs/x")


def evaluated(number: int, loss: float, exact: float, groups: bool = True):
    skills = {name: dict(loss=loss, exact_match=exact, examples=5) for name in ("sum", "reverse")}
    return dict(event="evaluated", round=number, loss=loss, exact_match=exact, examples=10, seconds=1.0,
                groups=skills if groups else None)  # fmt: skip


def write_run(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_client_rows_count_only_good_rounds():
    rows = History.of(events()).client_rows()
    assert [row["rank"] for row in rows] == [4, 8, 12]
    assert rows[0] == dict(client="client-0", rank=4, examples=10, rounds=2, loss_before=3.0, loss_after=1.0,
                           tokens_per_s=200.0, refused=0)  # fmt: skip
    assert (rows[1]["rounds"], rows[1]["refused"], rows[1]["loss_after"]) == (1, 1, 2.0)


def test_a_round_redone_after_a_crash_counts_once():
    once = list(events())
    redone = once[:8] + once[2:]
    assert History.of(redone).client_rows() == History.of(once).client_rows()
    assert History.of(redone).totals() == History.of(once).totals()


def test_totals_add_traffic_and_keep_the_largest_error():
    totals = History.of(events()).totals()
    assert totals == dict(aggregation_error=2e-8, application_error=None, bytes_up=3_000_000, bytes_down=5_000_000,
                          seconds=60.0, peak_memory_bytes=2.0e9 + 2)  # fmt: skip


@pytest.mark.parametrize("fold", [events(), events(groups=False), list(events())[:1], list(events())[:6], []])
def test_tables_are_rectangular_at_every_moment(fold):
    for _, columns, rows in summary_tables(History.of(fold)):
        assert all(len(row) == len(columns) and all(isinstance(cell, str) for cell in row) for row in rows)


def test_evaluation_table_says_before_and_after():
    _, columns, rows = summary_tables(History.of(events()))[1]
    assert columns == ["skill", "examples", "loss before", "loss round 2", "exact before", "exact round 2"]
    assert rows[0] == ["all", "10", "3.000", "1.000", "10.0%", "70.0%"]
    assert [row[0] for row in rows] == ["all", "sum", "reverse"]


def test_every_event_but_an_unknown_one_is_a_sentence():
    lines = [sentence(event) for event in events()]
    assert all(lines)
    assert sentence(dict(event="something_new")) is None
    text = "\n".join(map(str, lines))
    for words in ("before training: loss 3.000, exact match 10.0% of 10", "in 2 cohorts", "1.5 MB up, 2.5 MB down",
                  "REFUSED: gradients are not finite", "loss 2.500, 50 tokens/s"):  # fmt: skip
        assert words in text


def test_plain_progress_has_timed_lines_and_spares_training_steps():
    stream = io.StringIO()
    with RunProgress(stream) as progress:
        for event in events():
            progress(event)
    lines = stream.getvalue().splitlines()
    assert all(line.startswith("[") and "s] " in line for line in lines)
    assert not any("tokens/s" in line for line in lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_has_bars_below_the_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with RunProgress(stream) as progress:
        for event in events():
            progress(event)
    text = stream.getvalue()
    assert "finished in 1 min 05 s" in text
    assert "2/2" in text
    assert "━" in text
    assert not any("tokens/s" in line for line in text.splitlines() if "━" not in line)
    assert "s] before training" not in text


def test_a_bar_elsewhere_writes_a_line_for_each_stage_that_ends():
    stream = io.StringIO()
    with Bar(stream) as bar:
        for what in ("merge", "verify"):
            for done in (5_000_000, 6_000_000, 10_000_000):
                bar(what, done, 10_000_000)
    lines = stream.getvalue().splitlines()
    assert [line.split()[:3] for line in lines] == [["merge", "10.0/10.0", "MB"], ["verify", "10.0/10.0", "MB"]]
    with Bar(stream := io.StringIO(), every_s=0.0, modules=True) as bar:
        bar("export", 1, 4)
        bar("export", 4, 4)
    assert [line.split()[:2] for line in stream.getvalue().splitlines()] == [["export", "1/4"], ["export", "4/4"]]


def test_a_bar_on_a_terminal_draws_what_is_done():
    stream = Terminal()
    with Bar(stream) as bar:
        bar("merge", 10_000_000, 10_000_000)
    assert "━" in stream.getvalue()
    assert "10.0/10.0 MB" in stream.getvalue()


def test_all_tables_are_printed():
    stream = io.StringIO()
    print_tables(summary_tables(History.of(events())), stream)
    assert all(title in stream.getvalue() for title in ("Clients", "Held-out data", "The whole run"))


def test_a_pipe_gets_whole_words_and_numbers_stand_under_each_other():
    stream, name = io.StringIO(), "a-result-" + "with-a-name-" * 12
    rows = [[name, "9 ms", "of " * 30], ["b", "12 ms", ""]]
    print_tables([("Results", ["result", "takes", "reason"], rows)], stream)
    lines = stream.getvalue().splitlines()
    (whole,) = [line for line in lines if name in line]
    assert "  9 ms" in whole
    assert ("of " * 30).strip() in whole


def test_numbers_for_people():
    assert [show_bytes(size) for size in (None, 0, 999, 1500, 2.5e9, 3e15)] == [
        "-", "0 B", "999 B", "1.5 kB", "2.5 GB", "3000.0 TB"]  # fmt: skip
    assert [show_seconds(value) for value in (None, 1.26, 65, 3660)] == ["-", "1.3 s", "1 min 05 s", "1 h 01 min"]
    assert show_number(None) == "-"


def test_report_is_one_self_contained_page(tmp_path):
    run = write_run(tmp_path / "run", events())
    (run / "run.json").write_text('{"versions": {"torch": "<2>"}}')
    page = write_report(run).read_text()
    assert {path.stem for path in run.glob("*.png")} == {"loss", "accuracy", "errors", "bytes", "server"}
    assert page.count('src="data:image/png;base64,') == 5
    assert "http" not in page
    assert "client-1 was refused &lt;in round 2&gt;" in page
    assert "&lt;2&gt;" in page


def test_plots_show_every_client_and_the_global_model():
    history = History.of(events())
    figure = plot_loss(history)
    assert figure is not None
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert list(lines) == [
        "client-0 (rank 4)",
        "client-1 (rank 8)",
        "client-2 (rank 12)",
        "global model, held-out data",
    ]
    assert np.asarray(lines["client-0 (rank 4)"].get_ydata()).tolist() == [3.0, 2.0, 1.0]
    # The refused round leaves no point, so no NaN breaks the axis.
    assert np.asarray(lines["client-1 (rank 8)"].get_xdata()).tolist() == [0, 1]
    assert np.asarray(lines["global model, held-out data"].get_xdata()).tolist() == [0, 1, 2]
    accuracy, traffic = plot_accuracy(history), plot_bytes(history)
    assert accuracy is not None
    assert [line.get_label() for line in accuracy.axes[0].lines] == ["sum", "reverse", "all"]
    assert traffic is not None
    assert len(traffic.axes[0].patches) == 4


def test_errors_of_the_rounds_are_plotted_where_there_are_any():
    rounds = [dict(event="aggregated", round=at, aggregation_error=0.0, application_error=error, bytes_up=1,
                   bytes_down=1, seconds=1.0) for at, error in ((1, 1e-3), (2, 2e-3), (3, None))]  # fmt: skip
    figure = plot_errors(History.of(rounds))
    assert figure is not None
    assert figure.axes[0].get_yscale() == "log"
    lines = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].lines}
    assert lines == {"aggregation: the strategy, exactly 0": [1, 2, 3], "application: the write": [1, 2]}
    assert plot_errors(History.of(list(events())[:1])) is None


def test_one_round_is_drawn_on_an_axis_of_whole_rounds(tmp_path):
    history = History.of(list(events(rounds=1))[1:])
    for figure in (plot_errors(history), plot_bytes(history), plot_server(history)):
        assert figure is not None
        figure.draw_without_rendering()
        axes = figure.axes[0]
        assert (axes.get_xlim(), axes.get_xlabel()) == ((0, 2), "round")
        assert [tick for tick in axes.get_xticks() if tick % 1] == []


def test_the_certificate_of_every_round_is_told_with_its_largest_module():
    parts = {"x": 0.1, "y": 0.9}
    rounds = [dict(event="aggregated", round=at, aggregation_error=0.5, aggregation_error_by_module=parts,
                   application_error=0.0, bytes_up=1, bytes_down=1, seconds=2.0, forms={"stack": 3, "dense": 1},
                   catch_up={"a": {"kind": "log", "bytes": 2000}}, peak_memory_bytes=5e9, clients=2)
              for at in range(1, 31)]  # fmt: skip
    (table,) = [one for one in summary_tables(History.of(rounds)) if one[0].startswith("Certificate")]
    assert table[0] == "Certificate, every 3 rounds"
    assert [row[0] for row in table[2]] == [str(at) for at in range(3, 31, 3)]
    assert table[2][0][1:] == ["5.0e-01 (9.0e-01)", "0", "1 B", "1 B", "3 stack, 1 dense", "2.0 s", "5.0 GB"]
    said = str(sentence(rounds[0]))
    assert "aggregation error 5.0e-01, application error 0, 1 B up, 1 B down (3 stack, 1 dense), " in said
    assert said.endswith("2.0 kB to catch up in 2.0 s")


def test_bytes_are_told_for_every_client_and_errors_with_their_rows():
    start = dict(event="run_start", rounds=2, strategy="flora", out=None, clients=[
        dict(name=name, rank=1, examples=1) for name in "ab"])  # fmt: skip
    rounds = [dict(event="aggregated", round=at, aggregation_error=0.0, application_error=1e-7, application_rows=64,
                   bytes_up=1000, bytes_down=2000, up={"a": 1000}, down={"a": 2000}, clients=1, seconds=1.0,
                   catch_up={"a": {"kind": "log", "bytes": 5000}}) for at in (1, 2)]  # fmt: skip
    tables = {table[0]: table[2] for table in summary_tables(History.of([start, *rounds]))}
    assert tables["Traffic"] == [["a", "2.0 kB", "4.0 kB", "10.0 kB"]]
    assert ["application error (largest, 64 rows of each weight)", "1.0e-07"] in tables["The whole run"]
    assert "application error 1.0e-07 in 64 rows a weight, 1.0 kB up" in str(sentence(rounds[0]))


def test_multiple_choice_has_an_accuracy_and_no_loss():
    scores = [dict(event="evaluated", round=at, accuracy=rate, examples=4, seconds=1.0,
                   groups={"law": dict(accuracy=rate, examples=4)}) for at, rate in ((0, 0.25), (1, 0.5))]  # fmt: skip
    history = History.of([next(iter(events())), *scores])
    assert sentence(scores[1]) == "after round 1: accuracy 50.0% of 4 held-out examples"
    assert summary_tables(history)[1][1:] == (
        ["skill", "examples", "accuracy before", "accuracy round 1"],
        [["all", "4", "25.0%", "50.0%"], ["law", "4", "25.0%", "50.0%"]],
    )
    figure = plot_accuracy(history)
    assert figure is not None
    assert figure.axes[0].get_ylabel() == "accuracy (%)"


def test_many_clients_get_no_legend_entries_each():
    figure = plot_loss(History.of(events(clients=40)))
    assert figure is not None
    assert len(figure.axes[0].get_legend_handles_labels()[1]) == 1


def test_unfinished_run_with_a_torn_last_line_is_reported_as_such(tmp_path):
    run = write_run(tmp_path / "run", list(events())[:10])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "evalu')
    assert "has not finished" in write_report(run).read_text()


def test_writes_the_tables_without_matplotlib_and_how_to_get_plots(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run(tmp_path / "my run", events())
    page = write_report(run).read_text()
    assert "Held-out data" in page
    assert "no plots" in page
    assert "<img" not in page
    assert list(run.glob("*.png")) == []
    assert re.search(r"plotting needs matplotlib: .*matplotlib.*; then run: flora report &#39;.*my run&#39;", page)
    monkeypatch.undo()
    assert "<img" in write_report(run).read_text()


def test_without_data_a_plot_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", list(events())[:1])
    write_report(run)
    assert not list(run.glob("*.png"))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no metrics\.jsonl.*give the run's out="):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{oops\n{}\n", "line 1: malformed JSON"),
        ('{"loss": 1}\n', "another program's file"),
        ("3\n", "another program's"),
    ],
)
def test_metrics_of_something_else_are_refused(tmp_path, text, words):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_history(tmp_path)


def test_malformed_run_json_is_refused(tmp_path):
    run = write_run(tmp_path / "run", events())
    (run / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: malformed JSON"):
        write_report(run)


def test_shortens_long_client_names_in_tables_of_the_terminal(capsys):
    print_tables([("Clients", ["client", "rank"], [["a" * 300, "8"], ["b", "4"]])])
    text = capsys.readouterr().out
    assert "a" * 37 + "..." in text
    assert "a" * 38 not in text


def test_counts_one_client_in_the_singular():
    start = {"event": "run_start", "rounds": 1, "strategy": "flora", "clients": [{"name": "a"}]}
    assert str(sentence(start)).startswith("1 client, 1 round of flora")
    assert sentence({"event": "round_start", "round": 1, "rounds": 2, "clients": ["a"]}) == "round 1/2: 1 client trains"
