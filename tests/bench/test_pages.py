"""Pages, plots and terminal tables, written from results alone."""

from __future__ import annotations

import json
import statistics

import pytest

from bench.cases import grid
from bench.cases.rivals import FROZEN
from bench.harness.protocol import paired
from bench.reporting import publish, tables
from tests.support.bench_clock import timed


def test_pages_are_written_from_results_alone(tmp_path, monkeypatch):
    folder, top = tmp_path / "results" / "some-processor-avx2", tmp_path / "results"
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
    (top / "gpu").mkdir()
    (top / "gpu" / "linear_forward_y.json").write_text(json.dumps(large))
    gone = tmp_path / "img" / "bench_some-processor-avx2_parts.png"
    gone.parent.mkdir()
    gone.write_text("of a result that is not there any more")
    publish.publish(page, readme, tmp_path / "img", top)
    times = f"{data['speedups']['peft']['times']:.2f}x ({data['speedups']['peft']['p20']:.2f}-"
    assert times in page.read_text()
    assert times in readme.read_text()
    assert "`cohort_step_batch1.json`" in readme.read_text()
    assert "bench/results/some-processor-avx2/cohort_step_batch1.json" in page.read_text()
    assert "Unsloth | needs a GPU" in page.read_text()
    assert "9.99" not in page.read_text() + readme.read_text()
    for text in (page.read_text(), readme.read_text()):
        assert text.startswith("before\n")
        assert text.endswith("after\n")
    assert {path.name for path in (tmp_path / "img").iterdir()} == {
        f"bench_{machine}_{kind}.png"
        for machine in ("some-processor-avx2", "gpu")
        for kind in ("speedups", "roofline", "scaling")
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


def test_processors_stand_side_by_side_and_what_both_measured_comes_first(tmp_path, monkeypatch):
    for slug, names in (("one", ("merge_float32", "cohort_step_batch4")), ("two", ("cohort_step_batch4",))):
        for name in names:
            path = tmp_path / slug / f"{name}.json"
            data = timed(tmp_path / slug, name, 0, monkeypatch)
            data["speedups"]["peft"] = data["speedups"].pop("PEFT")
            data["environment"] |= {"processor": slug, "generation": None, "capability": "AVX2", "held": {}}
            path.write_text(json.dumps(data))
    machines = tables.load_machines(tmp_path)
    header, _, first, second = publish.headlines(machines).splitlines()
    assert {"one, AVX2", "two, AVX2"} < set(header.split(" | "))
    assert "four sequences" in first
    assert "x (" in second
    assert second.count("| - |") == 1


def test_ratio_of_fewer_than_nine_paired_rounds_is_not_published(tmp_path, monkeypatch):
    data = timed(tmp_path / "one", "cohort_step_batch1", 0, monkeypatch)
    speedup = data["speedups"]["PEFT"] | paired(data["speedups"]["PEFT"]["rounds"][:8]) | {"target": 1.3}
    assert tables.ratio(speedup, "PEFT") == "not published: 8 of 9 rounds"
    assert tables.verdict_of(speedup) == "**not known** (target >= 1.3)"
    data["speedups"] = {"peft": speedup}
    assert "cohort_step_batch1" not in publish.headlines({"one": {"cohort_step_batch1": data}})


def test_ratio_of_a_file_that_holds_two_medians_is_paired_when_it_is_read(tmp_path, monkeypatch):
    data = timed(tmp_path, "old", 0, monkeypatch)
    data["speedups"]["PEFT"]["times"] = 99.0
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert tables.load(tmp_path)["old"]["speedups"]["PEFT"]["times"] == statistics.median(
        data["speedups"]["PEFT"]["rounds"]
    )


def test_losses_and_the_limit_are_worded_as_what_they_are():
    assert tables.ratio(paired([0.5] * 9), "PEFT") == "**0.50x (0.50-0.50)**"
    assert tables.ratio(paired([0.8] * 9), FROZEN) == "1.25x its time (1.25-1.25)"
    assert tables.ratio(paired([0.4] * 9), FROZEN) == "**2.50x its time (2.50-2.50)**"


def test_terminal_tables_tell_speed_who_is_missing_and_what_failed(tmp_path, monkeypatch):
    good = timed(tmp_path, "good", 0, monkeypatch)
    good["missing"] = {"Unsloth": "needs a GPU"}
    failed = {"name": "bad", "question": "?", "failed": "out of memory: no room", "settings": {}}
    speed, missing, others = tables.summary({"good": good, "bad": failed, "memory": {"finished": True}})
    assert (speed[2][0][0], speed[2][0][2]) == ("good", "PEFT")
    assert "x (" in speed[2][0][4]
    assert speed[2][1][4] == "failed: out of memory: no room"
    assert missing[2] == [["Unsloth", "needs a GPU", "good"]]
    assert others[2] == [["memory", "yes"]]
