"""Pages, plots and terminal tables, written from results alone."""

from __future__ import annotations

import json

import pytest

from bench import grid, publish, tables
from bench.rivals import FROZEN
from tests.bench_clock import timed


def test_pages_are_written_from_results_alone(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    data = timed(folder, "cohort_step_batch1", 0, monkeypatch)
    data["speedups"]["peft"] = data["speedups"].pop("PEFT")
    data["times"]["peft"] = data["times"].pop("PEFT")
    (folder / "cohort_step_batch1.json").write_text(json.dumps(data))
    linear = timed(folder, "linear_forward_x", 0, monkeypatch)
    linear |= {"rates": {"copy_bytes_per_s": 1e10, "matrix_flops_per_s": 1e11}, "flops": 10**9, "bytes": 10**7}
    linear["settings"] = grid.Case(linear="q_proj").settings
    linear["missing"] = {"Unsloth": "needs a GPU"}
    (folder / "linear_forward_x.json").write_text(json.dumps(linear))
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    for path in (page, readme):
        path.write_text(f"before\n{publish.START}\nold 9.99\n{publish.END}\nafter\n")
    large = json.loads(json.dumps(linear))
    large["settings"] = grid.Case("Llama-7B", tokens=819, linear="q_proj").settings
    large["speedups"]["PEFT"]["target"] = 1.7
    (folder / "gpu").mkdir()
    (folder / "gpu" / "linear_forward_y.json").write_text(json.dumps(large))
    gone = tmp_path / "img" / "bench_parts.png"
    gone.parent.mkdir()
    gone.write_text("of a result that is not there any more")
    publish.publish(page, readme, tmp_path / "img", folder)
    times = f"{data['speedups']['peft']['times']:.2f} times faster"
    assert times in page.read_text()
    assert times in readme.read_text()
    assert "bench/results/cohort_step_batch1.json" in readme.read_text()
    assert "Unsloth | needs a GPU" in page.read_text()
    assert "9.99" not in page.read_text() + readme.read_text()
    for text in (page.read_text(), readme.read_text()):
        assert text.startswith("before\n")
        assert text.endswith("after\n")
    assert {path.name for path in (tmp_path / "img").iterdir()} == {
        f"bench{where}_{kind}.png" for where in ("", "_gpu") for kind in ("speedups", "roofline", "scaling")
    }
    gpu = page.read_text().partition("## On a GPU")[2]
    for words in ("(img/bench_gpu_roofline.png)", "target >= 1.7", "bench/results/gpu/linear_forward_x.json"):
        assert words in gpu
    assert "target >= 1.7" in readme.read_text()


def test_page_without_any_result_says_what_to_run(tmp_path):
    assert "Nothing measured yet: `make bench-gpu`" in publish.body({}, {}, tmp_path, tmp_path)
    assert publish.headlines({}) == "Nothing measured yet: `make bench`."


def test_page_without_marks_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text")
    with pytest.raises(ValueError, match="must have <!-- bench:start -->"):
        publish.write_between(page, "new")


def test_losses_and_the_limit_are_worded_as_what_they_are():
    assert tables.ratio(0.5, "PEFT") == "**2.00 times slower**"
    assert tables.ratio(0.8, FROZEN) == "1.25 times the limit"
    assert tables.ratio(0.4, FROZEN) == "**2.50 times the limit**"


def test_terminal_tables_tell_speed_who_is_missing_and_what_failed(tmp_path, monkeypatch):
    good = timed(tmp_path, "good", 0, monkeypatch)
    good["missing"] = {"Unsloth": "needs a GPU"}
    failed = {"name": "bad", "question": "?", "failed": "out of memory: no room", "settings": {}}
    speed, missing, others = tables.summary({"good": good, "bad": failed, "memory": {"finished": True}})
    assert (speed[2][0][0], speed[2][0][2]) == ("good", "PEFT")
    assert "times faster" in speed[2][0][4]
    assert speed[2][1][4] == "failed: out of memory: no room"
    assert missing[2] == [["Unsloth", "needs a GPU", "good"]]
    assert others[2] == [["memory", "yes"]]
