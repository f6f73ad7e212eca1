"""The `flora` command, run in this process: what it prints, writes and returns."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import flora_core
from flora_core.cli.main import _joined, main
from flora_core.config.recipe import load
from flora_core.runs.progress import RunProgress
from tests.support.federations import make_model, make_records, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, forty records, and a recipe for two clients."""
    folder = tmp_path_factory.mktemp("cli")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    lines = [json.dumps(record) + "\n" for record in make_records("a", 40)]
    (folder / "data.jsonl").write_text("".join(lines))
    (folder / "tiny.yaml").write_text(
        f"model: {folder}/model\n"
        f"data: {{path: {folder}/data.jsonl, per_client: 4, test_items: 4}}\n"
        "clients: {names: [a, b], ranks: [4, 2]}\n"
        "train: {lr: 1e-2, batch_size: 2, max_length: 32}\n"
        "federation: {rounds: 2}\n"
    )
    return folder


@pytest.fixture
def flora(folder, tmp_path, capsys):
    """Run the command; return its code and what it printed to standard output and to standard error."""

    def run(*words, out=tmp_path / "run"):
        place = ["--out", str(out)] if words[0] == "run" else []
        code = main([str(word).replace("tiny", f"{folder}/tiny.yaml") for word in words] + place)
        return code, *capsys.readouterr()

    return run


def test_run_trains_prints_tables_and_writes_everything(flora, tmp_path, folder):
    code, out, err = flora("run", "tiny")
    assert code == 0
    assert all(
        words in out for words in ("Clients", "Held-out data", "aggregation error", "peak memory", "report.html")
    )
    assert "s] before training: loss" in err
    assert "round 2/2: done in" in err
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "metrics.jsonl", "recipe.json", "rounds", "model", "report.html", "loss.png"} <= names
    for client in ("a", "b"):
        assert (tmp_path / "run/rounds/0002" / client / "adapter_model.safetensors").is_file()


def test_the_recipe_beside_the_results_makes_the_same_run(flora, tmp_path):
    assert flora("run", "tiny", "clients.overrides.b.train.lr=0.5")[0] == 0
    saved = tmp_path / "run/recipe.json"
    code, _, err = flora("run", saved)
    assert code == 0
    assert "holds this run, finished: nothing is trained" in err
    assert load(saved).clients.overrides["b"].train == {"lr": 0.5}


def test_a_run_with_other_settings_is_not_continued(flora):
    assert flora("run", "tiny", "federation.rounds=1")[0] == 0
    code, _, err = flora("run", "tiny", "federation.rounds=1", "train.lr=0.5")
    assert code == 2
    assert "another configuration: train.lr was 0.01, is 0.5" in err
    assert "Traceback" not in err


def test_a_finished_run_succeeds_without_matplotlib(flora, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = flora("run", "tiny", "federation.rounds=1")
    assert code == 0
    assert "report.html" in out
    note, _, training = err.partition("before training")
    assert "no plots" in note, "before training, when it costs nothing to stop"
    assert training
    again = flora("run", "tiny", "federation.rounds=1")
    assert again[0] == 0
    assert "report.html" in again[1]
    code, _, err = flora("report", tmp_path / "run")
    assert code == 0
    assert "matplotlib" in err


def test_a_finished_run_succeeds_whatever_hinders_its_report(flora, monkeypatch, tmp_path):
    def fail(_):
        raise RuntimeError("no font\nis here")

    monkeypatch.setattr("flora_core.runs.write_report", fail)
    code, out, err = flora("run", "tiny", "federation.rounds=1")
    assert code == 0, err
    assert "report: not written (no font is here); the run is finished and saved: mend that, then run flora" in out
    assert (tmp_path / "run" / "model").is_dir()


def test_ctrl_c_says_what_is_saved_and_the_same_command_goes_on(flora, monkeypatch):
    def stop(self, event):
        if event["event"] == "round_end":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "__call__", stop)
        code, _, err = flora("run", "tiny")
    assert code == 130
    assert "Rounds up to 1 are saved" in err
    assert "the same command goes on from there, and trains the round that Ctrl-C broke off anew. SIGTERM" in err
    code, _, err = flora("run", "tiny")
    assert code == 0
    assert "resumed after round 1" in err
    assert "round 1/2" not in err


def test_ctrl_c_before_the_first_round(flora, monkeypatch):
    def stop(self, event):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunProgress, "__call__", stop)
    code, _, err = flora("run", "tiny")
    assert code == 130
    assert "No round is over yet" in err


def test_dry_run_prints_the_plan_and_writes_nothing(flora, tmp_path):
    code, out, err = flora("run", "tiny", "--dry-run")
    assert (code, err) == (0, "")
    for words in ("4 layers: q_proj, v_proj", "memory: together", "cohorts", "sent up in a round", "parameters"):
        assert words in out
    # Two layers, q and v of 16 x 16: R * (16 + 16) numbers each.
    assert "512" in out
    assert "256" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_demo_counts_its_data(flora, folder):
    demo = ("data.path=demo", "data.per_client=5", "data.test_items=10", "train.max_length=64")
    code, out, _ = flora("run", "tiny", "--dry-run", *demo)
    assert code == 0
    assert "10" in out


def test_overrides_may_stand_after_options(flora, tmp_path):
    assert flora("run", "tiny", "--dry-run", "federation.rounds=7")[1].count("7 rounds") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "nowhere"), "recipe nowhere does not exist"),
        (("run", "tiny", "federation.round=1"), "did you mean 'federation.rounds'"),
        (("run", "tiny", "train.lr=fast"), "train.lr=fast': the value must be a number"),
        (("run", "tiny", "model=./nowhere"), "model ./nowhere is not a folder"),
        (("run", "tiny", "data=nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("run", "tiny", "target_modules=[q_porj]"), "q_proj"),
        (("run", "tiny", "clients.ranks=[99]"), "99"),
        (("run", "tiny", "clients.ranks=[0]"), "every rank is 0; give at least one"),
        (("run", "tiny", "strategy=flora2"), "did you mean 'flora'"),
        (("run", "tiny", "device=tpu9"), "device must be auto, cpu, cuda"),
        (("run", "tiny", "device=cuda:99"), "is not here"),
        (("run", "tiny", "data.partition=dirichlet", "data.label=colour"), "no column 'colour'"),
        (("run", "tiny", "clients.overrides.z.train.lr=1"), "names 'z', which is not a client"),
        (("report", "nowhere"), "holds no metrics.jsonl"),
    ],
)
def test_bad_input_is_one_paragraph_and_code_2(flora, words, says):
    code, out, err = flora(*words)
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert err.startswith("flora: ")
    assert err.count("\n") == 1


def test_a_foreign_folder_is_left_alone(flora, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("mine")
    code, _, err = flora("run", "tiny")
    assert code == 2
    assert "already holds thesis.txt" in err
    assert (tmp_path / "run/thesis.txt").read_text() == "mine"


def test_errors_show_where_they_come_from_on_request(flora, monkeypatch):
    monkeypatch.setenv("FLORA_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        flora("run", "nowhere")


def test_report_is_made_again(flora, tmp_path):
    assert flora("run", "tiny", "federation.rounds=1")[0] == 0
    page = tmp_path / "run/report.html"
    page.unlink()
    code, out, _ = flora("report", tmp_path / "run")
    assert code == 0
    assert out.strip() == str(page)
    assert page.is_file()


def test_doctor_tells_what_runs_and_why_others_do_not(flora):
    code, out, _ = flora("doctor")
    assert code == 0
    assert "backend reference  runs" in out
    assert all(words in out for words in ("python", "torch", "cache", "extra train", "products"))
    facts = json.loads(flora("doctor", "--json")[1])
    assert facts["backends"]["reference"] is None
    assert facts["cores"] >= 1


def test_doctor_says_how_to_get_what_is_missing(flora, monkeypatch):
    from flora_core.cli import doctor
    from flora_core.common import extras

    monkeypatch.setattr(extras, "version_of", lambda name: None if name in ("gguf", "flwr") else "1")
    monkeypatch.setattr(doctor, "_product_gflops", lambda dtype: {"torch.float32": 60.0}.get(str(dtype), 0.5))
    out = flora("doctor")[1]
    assert "gguf MISSING" in out
    assert "advice: flora run needs more packages: pip install 'gguf>=0.13'" in out
    assert "not installed; a run between machines needs it: pip install 'flwr>=1.41,<1.42'" in out
    assert out.startswith(f"flora-core         {flora_core.__version__} (")
    assert "bfloat16 products are slow on this CPU" in out


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], []])
def test_help_has_examples(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == (0 if words else 2)
    text = capsys.readouterr()
    assert ("flora run quickstart --dry-run" in text.out) if words else ("a command is required" in text.err)


@pytest.mark.parametrize("words", [["run", "tiny", "--fast"], ["run", "tiny", "lr"], ["report", "a", "b"]])
def test_unknown_arguments_are_refused(words, capsys):
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert capsys.readouterr().err


def test_the_module_is_the_command():
    # This is how make calls it, also where nothing is installed.
    done = subprocess.run([sys.executable, "-m", "flora_core.cli", "report", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("flora: nowhere holds no metrics.jsonl")


def test_an_error_is_one_paragraph_and_keeps_its_table():
    error = ValueError("no such\n thing;   known:\n  name   rule\n  flora  stacks\nchoose one")
    assert _joined(error) == "no such thing; known:\n  name   rule\n  flora  stacks\nchoose one"
    assert _joined(ValueError(" ")) == "ValueError"


def test_a_warning_is_one_line_without_the_code_it_arose_in(capfd):
    code = (
        "import sys, warnings; from flora_core.cli import main\ncommand = sys.modules['flora_core.cli.main']\n"
        "command._doctor = lambda options: [warnings.warn('cut\\nshort', UserWarning) for _ in range(3)] and 0\n"
        "raise SystemExit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "flora: warning: cut short\n")
