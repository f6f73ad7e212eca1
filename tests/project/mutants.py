"""Mutation testing: a seeded sample of small changes to the code, each tried against the tests that concern it.

    python -m tests.project.mutants     about an hour on one core (make mutants); writes docs/logs/mutants.json and .txt

cosmic-ray makes the changes, in a copy of the checkout. A mutant that no test notices is a gap in the tests, unless no
behaviour changes with it: ``equivalent_mutants.toml`` says why for those. The sample depends on the seed and on each
line's own text, so that most of it outlives changes to other lines.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import hashlib
import json
import os
import py_compile
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from cosmic_ray.commands import init
from cosmic_ray.modules import find_modules
from cosmic_ray.mutating import mutate_and_test, mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "docs" / "logs" / "mutants.json"
SEED, COUNT = 0, 20
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.toml")
# Of the mutants that change behaviour, at least this share must be killed.
NEEDED = 0.9
# None and interned values make identity and equality the same.
NOT_TRIED = re.compile(r"_(Eq_Is|NotEq_IsNot|Is_Eq|IsNot_NotEq)$")
COPIED = ("flora_core", "kernels", "recipes", "examples", "tests", "bench", "docs", "README.md", "pyproject.toml")


class Package(NamedTuple):
    """Code to mutate, and the tests that must notice."""

    code: str
    tests: tuple[str, ...]


PACKAGES = {
    "config": Package("flora_core/config", ("tests/config", "tests/common/test_argument_errors.py", "tests/cli")),
    "adapters": Package("flora_core/adapters", ("tests/adapters", "tests/merge/test_adapters.py")),
    "data": Package("flora_core/data", ("tests/data", "tests/runs/test_loading.py")),
    "aggregation": Package("flora_core/aggregation", ("tests/aggregation", "tests/federation/test_strategies.py")),
    "evaluation": Package(
        "flora_core/model/evaluation.py",
        ("tests/model/test_evaluation.py", "tests/federation/test_evaluate_clients.py"),
    ),
    "federation": Package("flora_core/federation", ("tests/federation",)),
}


class Outcome(NamedTuple):
    """One mutant: where it is, the line that it changes, and how the tests took it."""

    module: str
    place: str
    before: str
    after: str
    survived: bool


def _ignored(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of a module that are not mutated: annotations, which nothing evaluates, and the ``strict`` of zips."""
    found: list[Any] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        found += [getattr(node, name, None) for name in ("annotation", "returns")]
        found += [node] if isinstance(node, ast.keyword) and node.arg == "strict" else []
    return [((one.lineno, one.col_offset), (one.end_lineno, one.end_col_offset)) for one in found if one]


def _mutations(code: str) -> Iterator[MutationSpec]:
    """Every mutation of the code of a package that can change behaviour."""
    modules = sorted(find_modules([Path(code)]))
    ignored = {module: _ignored(module) for module in modules}
    with use_db(":memory:") as db:
        init(modules, db, {})
        for item in db.work_items:
            (one,) = item.mutations
            ignored_here = any(start <= one.start_pos < end for start, end in ignored[one.module_path])
            if not ignored_here and not NOT_TRIED.search(one.operator_name):
                yield one


def sample(code: str, count: int, seed: int) -> list[MutationSpec]:
    """Choose places in the code, and one mutation at each, by hashes of the seed and the text."""

    def rank(*words: object) -> bytes:
        return hashlib.sha256(repr((seed, *words)).encode()).digest()

    places: dict[tuple[object, ...], list[MutationSpec]] = defaultdict(list)
    for one in _mutations(code):
        line = one.module_path.read_text("utf-8").splitlines()[one.start_pos[0] - 1]
        column = one.start_pos[1] - len(line) + len(line.lstrip())
        places[str(one.module_path), one.definition_name, line.strip(), column].append(one)
    chosen: list[MutationSpec] = []
    for place in sorted(places, key=lambda place: rank(*place)):
        there = sorted(places[place], key=lambda one: rank(*place, one.operator_name, one.occurrence))
        chosen += list(islice(filter(_is_other_code, there), min(1, count - len(chosen))))
    return chosen


def _is_other_code(one: MutationSpec) -> bool:
    """Return whether a mutation gives code that can be compiled and differs by more than its layout."""
    source = one.module_path.read_text("utf-8")
    mutated = mutate_code(source, get_operator(one.operator_name)(**one.operator_args), one.occurrence)
    try:
        return mutated is not None and ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def _command(tests: Iterable[str], module: Path, definition: str) -> str:
    """Run the tests until the first fails: first those that have the module's name, then those that name the code."""
    files = [file for test in map(Path, tests) for file in ([test] if test.suffix else test.rglob("test_*.py"))]
    words = {module.stem, definition.rpartition(".")[2]}
    texts = {file: set(re.findall(r"\w+", file.read_text("utf-8"))) for file in files}
    files.sort(key=lambda file: (file.stem != f"test_{module.stem}", -len(words & texts[file]), str(file)))
    return shlex.join([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, files)])


def _lines(diff: str, sign: str) -> str:
    """The removed or added lines of a diff as one."""
    lines = [line[1:].strip() for line in diff.splitlines() if line.startswith(sign) and not line.startswith(sign * 3)]
    return " ".join(lines)


def seconds_of(name: str) -> float:
    """Time the tests of a package, which must pass without a mutant."""
    began = time.monotonic()
    outcome, output = run_tests(_command(PACKAGES[name].tests, Path(PACKAGES[name].code), ""), 1200)
    if outcome is not TestOutcome.SURVIVED:
        raise SystemExit(f"the tests of {name} fail without a mutant:\n{output[-3000:]}")
    return time.monotonic() - began


def try_package(name: str, mutations: Iterable[MutationSpec], timeout: float, until: float) -> Iterator[Outcome]:
    """Try mutants of a package until the time is up."""
    for one in mutations:
        if time.monotonic() > until:
            return
        definition = one.definition_name or ""
        result = mutate_and_test([one], _command(PACKAGES[name].tests, one.module_path, definition), timeout)
        before, after = _lines(result.diff or "", "-"), _lines(result.diff or "", "+")
        place = f"line {one.start_pos[0]}, {definition or 'module'}"
        survived = result.test_outcome is TestOutcome.SURVIVED
        yield Outcome(str(one.module_path), place, before, after, survived)
        print("survived" if survived else "killed", one.module_path, place, "|", after, flush=True)


def report(found: Mapping[str, Mapping[str, Any]]) -> tuple[str, float]:
    """Text of the log, and the share of the mutants that change behaviour which was killed."""
    reasons = {
        (one["module"], one["before"], one["after"]): one["why"] for one in tomllib.loads(_text(EQUIVALENT))["mutant"]
    }
    outcomes = {name: [Outcome(*one) for one in found[name]["outcomes"]] for name in PACKAGES if name in found}
    outcomes["all"] = list(chain(*outcomes.values()))
    columns = ("tried", "killed", "survived", "equivalent", "killed of the others", "commit")
    rows, share = [f"{'package':12}" + "".join(f"{column:>{len(column) + 3}}" for column in columns)], 1.0
    for name, some in outcomes.items():
        survived = [one for one in some if one.survived]
        equivalent = [one for one in survived if (one.module, one.before, one.after) in reasons]
        killed, counted = len(some) - len(survived), len(some) - len(equivalent)
        share = killed / counted if counted else 1.0
        commit = found[name]["commit"] if name in found else ""
        values = (len(some), killed, len(survived), len(equivalent), f"{share:.0%}", f"   {commit}")
        rows.append(f"{name:12}" + "".join(f"{v!s:>{len(c) + 3}}" for c, v in zip(columns, values, strict=True)))
    lines = [
        f"make mutants (cosmic-ray {version('cosmic-ray')}, seed {SEED}, {COUNT} mutants a package)",
        "",
        *rows,
        "",
    ]
    for one in outcomes["all"]:
        if one.survived:
            reason = reasons.get((one.module, one.before, one.after))
            verdict = "survived" if reason is None else f"equivalent: {reason}"
            lines += [f"{one.module}, {one.place}", f"  - {one.before}", f"  + {one.after}", f"  {verdict}", ""]
    return "\n".join(lines), share


def _text(path: Path) -> str:
    return path.read_text("utf-8")


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def _prepare(copy: Path) -> None:
    """Work in a copy: mutants are written into the files that the tests import."""
    copy.mkdir()
    for part in map(ROOT.joinpath, COPIED):
        if part.is_dir():
            shutil.copytree(part, copy / part.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(part, copy)
    # Compiled once; a file that is mutated differs from its hash and is compiled anew.
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(copy / "flora_core", quiet=1, invalidation_mode=mode)
    os.chdir(copy)
    os.environ.update(
        TMPDIR=str(copy.parent), PYTHONPATH=f"{copy}:{copy / 'kernels'}", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Try the sample, write the log, and return 1 if too many survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(PACKAGES)}; all unless named")
    parser.add_argument("--count", type=int, default=COUNT, help="mutants of each package")
    parser.add_argument("--seed", type=int, default=SEED, help="another sample, which does not go into the log")
    parser.add_argument("--minutes", type=float, default=120, help="mutants are left out once it has taken so long")
    options = parser.parse_args(argv)
    logged = (options.seed, options.count) == (SEED, COUNT)
    until, commit = time.monotonic() + 60 * options.minutes, _commit()
    found: dict[str, Any] = json.loads(_text(LOG)) if logged and LOG.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder) / "flora")
        for name in options.packages or PACKAGES:
            mutations, timeout = sample(PACKAGES[name].code, options.count, options.seed), 60 + 3 * seconds_of(name)
            found[name] = {"commit": commit, "outcomes": list(try_package(name, mutations, timeout, until))}
            if logged:
                LOG.write_text(json.dumps(found, indent=1), "utf-8")
                LOG.with_suffix(".txt").write_text(report(found)[0], "utf-8")
        os.chdir(ROOT)
    text, share = report(found)
    print(text)
    return int(share < NEEDED)


if __name__ == "__main__":
    sys.exit(main())
