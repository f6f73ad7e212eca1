"""Answers of the `flora` command before torch is imported: help, the version, and every wrong argument."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import flora_core
from flora_core.common.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
# Importing any of these takes seconds on a slow disk; a command that does it although its arguments are wrong fails.
HEAVY = ("torch", "transformers", "tokenizers", "numpy", "matplotlib", "flwr", "datasets", "accelerate")
# Words of the command line -> exit code and what it prints.
CASES: dict[tuple[str, ...], tuple[int, str]] = {
    ("--version",): (0, f"flora-core {flora_core.__version__}\n"),
    ("--help",): (0, "flora run quickstart --dry-run"),
    (): (2, "flora: a command is required"),
    ("-x",): (2, "unknown arguments: -x"),
    ("rnu",): (2, "unknown command 'rnu'; did you mean 'run'?"),
    ("train",): (2, "unknown command 'train'; known: adapter, aggregate, bench, deploy, doctor, report, run\n"),
    ("adapter", "--help"): (0, "--layout"),
    ("adapter",): (2, "flora adapter: error: the following arguments are required: "),
    ("run", "--help"): (0, "key=value"),
    ("aggregate", "--help"): (0, "--as-adapter"),
    ("aggregate", "--scale", "nan"): (2, "argument --scale: must be a finite number other than 0, such as 0.5 or"),
    ("aggregate", "--scale", "-inf"): (2, "-1e-3, got '-inf'"),
    ("aggregate", "--scale", "-1e-3"): (2, "the following arguments are required: --base"),
    ("deploy", "--help"): (0, "--nodes"),
    ("report", "--help"): (0, "run_dir"),
    ("doctor", "--help"): (0, "--json"),
    ("run",): (2, "flora run: error: the following arguments are required: recipe\n"),
    ("run", "quickstrat"): (2, "did you mean 'quickstart'?"),
    ("run", "quickstrat.yaml"): (2, "recipe quickstrat.yaml does not exist"),
    ("run", "nowhere/x"): (2, "packaged recipes, by name: dolly, quickstart"),
    ("run", "."): (2, "recipe . is a folder; give a YAML file in it"),
    ("run", "train.lr=1"): (2, "the recipe comes before key=value, got 'train.lr=1'"),
    ("run", "quickstart", "--dryrun"): (2, "unknown arguments: --dryrun; did you mean '--dry-run'?"),
    ("run", "quickstart", "lr"): (2, "override 'lr' must read key=value, such as train.lr=1e-3"),
    ("run", "quickstart", "train.lrr=1"): (2, "did you mean 'train.lr'?"),
    ("run", "quickstart", "train.lr=fast"): (2, "the value must be a number, got 'fast'"),
    ("run", "quickstart", "train.lr=-1"): (2, "lr must be at least 0, got -1.0"),
    ("run", "quickstart", "clients.ranks=[-4]"): (2, "ranks must be at least 0, got -4"),
    ("run", "quickstart", "federation.rounds=0"): (2, "rounds must be at least 1, got 0"),
    ("run", "quickstart", "federation.rounding=up"): (2, "federation.rounding=up': the value must be low_bits"),
    ("run", "quickstart", "clients.overrides.a.adapter.rnk=1"): (2, "unknown key adapter.'rnk'; did you mean 'rank'?"),
    ("run", "quickstart", "data=nowhere.jsonl"): (2, "file nowhere.jsonl does not exist"),
    ("run", "quickstart", "strategy=flroa"): (2, "unknown strategy 'flroa'; did you mean 'flora'?"),
    ("report",): (2, "the following arguments are required: run_dir"),
    ("report", "nowhere"): (2, "nowhere holds no metrics.jsonl"),
    ("report", "a", "b"): (2, "unknown arguments: b"),
    ("aggregate", "--base", "x"): (2, "the following arguments are required: --adapter, --out"),
    ("aggregate", "--base", "x", "--adapter", "a=-1", "--out", "y"): (2, "--adapter a=-1: expected DIR or DIR=WEIGHT"),
    ("aggregate", "--base", "x", "--adapter", "a", "--out", "y", "--strategy", "flroa"): (2, "did you mean 'flora'?"),
    ("aggregate", "--base", "x", "--adapter", "a", "--out", "y", "--verfy"): (2, "did you mean '--verify'?"),
    ("aggregate", "--base", "x", "--adapter", "a", "--out", "y", "--as-adapter", "vlm"): (
        2,
        "layout must be one of peft",
    ),
    ("adapter", "x", "--out", "y", "--layout", "vlm"): (2, "layout must be one of peft, vllm, got 'vlm'"),
    ("deploy",): (2, "flora deploy needs a recipe"),
    ("deploy", "quickstart", "--out", "d"): (2, "flora deploy needs --host HOST"),
    ("doctor", "--jsn"): (2, "unknown arguments: --jsn; did you mean '--json'?"),
}
DRIVER = """
import contextlib, io, json, sys
sys.path[:0] = json.loads(sys.argv[1])

class Guard:
    def find_spec(self, name, path=None, target=None):
        # No kind of error that the command itself reports.
        assert name.partition(".")[0] not in HEAVY, f"imported {name}"

HEAVY = set(json.loads(sys.argv[2]))
sys.meta_path.insert(0, Guard())
from flora_core.cli import main
found = []
for words in json.loads(sys.argv[3]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
        except AssertionError as error:
            code = str(error)
    found.append((code, out.getvalue()))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[tuple[str, ...], tuple[int | str, str]]:
    """The answers of one fresh process, in which a heavy import raises, to all cases."""
    parts = [[str(ROOT), str(ROOT / "kernels")], HEAVY, list(CASES)]
    command = [sys.executable, "-c", DRIVER, *map(json.dumps, parts)]
    folder = tmp_path_factory.mktemp("empty")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return {words: (code, text) for words, (code, text) in zip(CASES, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_answers_without_torch(words, answers):
    code, text = answers[words]
    assert (code, CASES[words][1] in text) == (CASES[words][0], True), f"{code}: {text}"
    assert "Traceback" not in text


def test_a_correct_run_does_import_torch(tmp_path):
    """The guard of these tests sees an import when there is one."""
    parts = [[str(ROOT), str(ROOT / "kernels")], HEAVY, [["run", "quickstart", "--dry-run"]]]
    command = [sys.executable, "-c", DRIVER, *map(json.dumps, parts)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)[0][0].startswith("imported ")


def test_every_command_names_its_packages():
    from flora_core.cli.main import _parsers

    for name, parser in _parsers()[1].items():
        assert name == "bench" or set(parser.get_default("extras")) <= set(EXTRAS), name


def test_the_names_of_strategies_are_those_that_are_registered():
    from flora_core.aggregation import STRATEGIES
    from flora_core.config.strategy_names import STRATEGY_NAMES

    # Other tests may have registered strategies of their own.
    built_in = {name for name, one in STRATEGIES.items() if type(one).__module__.startswith("flora_core.")}
    assert sorted(built_in) == list(STRATEGY_NAMES)
