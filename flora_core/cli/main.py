"""The `flora` command: run, adapter, aggregate, report, bench, doctor.

Exit codes: 0 done, 2 bad input or a file that cannot be read or written (one paragraph, no traceback), 130 stopped by
Ctrl-C. This module and the parsers of its commands import nothing heavy: torch takes seconds, so each command imports
it once its arguments, and its recipe, are known to be right (tests/cli/test_without_torch.py).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..common import extras, nearest
from ..version import __version__
from . import adapter, aggregate, deploy

if TYPE_CHECKING:
    from ..config import Recipe

_EXAMPLES = """examples:
  flora run quickstart                                      the demo: ten clients, mixed ranks, three rounds
  flora run quickstart --dry-run                            what it would do, and the memory it would take
  flora run quickstart clients.count=4 federation.rounds=1  change anything by its dotted name
  flora run quickstart data=my.jsonl clients.ranks=[8,4]    your own examples
  torchrun --nproc-per-node 2 -m flora_core.cli run RECIPE  the clients spread over processes, each with its GPU
  flora aggregate --base DIR --adapter A=2 --adapter B=1 --out DIR  merge adapters into a checkpoint on disk
  flora adapter runs/quickstart --out DIR                   the result as one PEFT adapter on the original base
  flora report runs/quickstart                              plots and report.html again
  flora bench --list                                        what can be measured against PEFT, from a checkout
  flora doctor                                              what this machine has
"""


_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    # Before torch loads OpenMP: threads that spin while they wait make a step many times slower beside other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = _parse(list(sys.argv[1:] if argv is None else argv))
    formatter, warnings.formatwarning = warnings.formatwarning, _format_warning
    handler = _logged_to_stderr()
    try:
        return options.command(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("FLORA_TRACEBACK"):
            raise
        _log.error(_paragraph(error, options))
        return 2
    except KeyboardInterrupt:
        _log.error("stopped")
        return 130
    finally:
        warnings.formatwarning = formatter
        logging.getLogger("flora_core").removeHandler(handler)


def _logged_to_stderr() -> logging.Handler:
    """Write what the package logs as the command's own lines."""
    handler, logger = logging.StreamHandler(sys.stderr), logging.getLogger("flora_core")
    handler.setFormatter(logging.Formatter("flora: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


def _format_warning(message: Warning | str, *place: object, **more: object) -> str:
    """Write a warning as the command's own line: where in the code it arose says nothing to its user."""
    return f"flora: warning: {' '.join(str(message).split())}\n"


def _parse(words: list[str]) -> argparse.Namespace:
    """Read the command line; exit with usage and code 2 where it is wrong."""
    if words[:1] == ["bench"]:  # the benchmarks bring their own arguments
        return argparse.Namespace(command=_bench, words=words[1:], name="bench", extras=())
    parser, commands = _parsers()
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2, "\nflora: a command is required\n")
    if not words[0].startswith("-") and words[0] not in commands:
        parser.error(f"unknown command {words[0]!r}; {nearest(words[0], commands)}")
    options, rest = parser.parse_known_args(_join_numbers(words))
    if words[0] not in commands:
        parser.error(f"unknown arguments: {' '.join(words)}")
    options.name = words[0]
    # argparse takes positional arguments in one piece only; overrides may also stand after an option.
    overrides = [word for word in rest if options.command is _run and "=" in word and not word.startswith("-")]
    if len(overrides) < len(rest):
        _refuse(commands[options.name], [word for word in rest if word not in overrides])
    if options.command is _run:
        options.overrides = [*options.overrides, *overrides, *([f"out={options.out}"] if options.out else [])]
    return options


def _join_numbers(words: list[str]) -> list[str]:
    """Write ``--name -1e-3`` as ``--name=-1e-3``: argparse takes the exponent of a negative number for an option."""
    joined: list[str] = []
    for word in words:
        if joined and re.fullmatch(r"--[a-z][a-z-]*", joined[-1]) and _is_negative(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _is_negative(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return word.startswith("-")


def _refuse(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Exit with the usage of a command that does not know these words, and the option that may be meant."""
    option = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    known = re.findall(r"(?<![\w-])--[a-z][a-z-]*", parser.format_help())
    meant = f"; {nearest(option, set(known))}" if option else ""
    parser.error(f"unknown arguments: {' '.join(words)}{meant}")


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and those of its commands by name."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="flora",
        description="Federated LoRA fine-tuning: many clients of different ranks, one base, exact aggregation.",
        epilog=_EXAMPLES + "\nFLORA_CACHE: folder of the demo model. FLORA_TRACEBACK=1: show where an error came from.",
        formatter_class=shape,
    )
    parser.set_defaults(extras=())
    parser.add_argument("--version", action="version", version=f"flora-core {__version__}")
    commands = parser.add_subparsers(metavar="run | adapter | aggregate | deploy | report | bench | doctor")
    run = commands.add_parser("run", help="train by a recipe", epilog=_EXAMPLES, formatter_class=shape)
    run.add_argument("recipe", help="a YAML file, or the bare name of a packaged recipe (quickstart, dolly)")
    run.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe, such as train.lr=1e-3"
    )
    run.add_argument("--dry-run", action="store_true", help="print the plan and a memory estimate; train nothing")
    run.add_argument("--out", metavar="DIR", help="folder of the results (short for out=DIR)")
    run.set_defaults(command=_run, extras=("train", "cli"))
    adapter.add_parser(commands)
    aggregate.add_parser(commands)
    deploy.add_parser(commands)
    report = commands.add_parser("report", help="write plots and report.html of a run")
    report.add_argument("run_dir", help="the out= folder of a run, finished or not")
    report.set_defaults(command=_report, extras=("cli",))
    commands.add_parser("bench", help="measure against PEFT on this machine (from a checkout)", add_help=False)
    doctor = commands.add_parser("doctor", help="show what this machine has, and what is missing")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(command=_doctor, extras=())
    return parser, commands.choices


def _paragraph(error: BaseException, options: argparse.Namespace) -> str:
    """Write an error as one paragraph; the system's own errors get their file, a missing package its installation."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ImportError):
        return extras.remedy(error, f"flora {options.name}", *options.extras)
    return _joined(error)


def _joined(error: BaseException) -> str:
    """Join the lines of an error's text; indented ones are a table, and stay as they are."""
    text, after_table = "", False
    for line in str(error).splitlines():
        in_table = line.startswith("  ")
        text += "\n" if in_table or after_table else " "
        text += line.rstrip() if in_table else " ".join(line.split())
        after_table = in_table
    return text.strip("\n ") or type(error).__name__


def _run(options: argparse.Namespace) -> int:
    from ..config import load

    recipe = load(options.recipe, options.overrides)
    from ..runs import use_strategy

    use_strategy(recipe)
    from ..distributed import session

    with session() as world:
        return _run_recipe(recipe, options.dry_run, world.first)


def _run_recipe(recipe: Recipe, plan_only: bool, first: bool) -> int:
    """Train by a recipe in this process; of those that torchrun started, only the first one prints."""
    from ..common import limit_threads

    limit_threads(recipe.threads)
    if plan_only:
        from ..common import print_tables
        from .dry_run import dry_run

        if first:
            print_tables(dry_run(recipe))
        return 0
    try:
        return _train(recipe, first)
    except KeyboardInterrupt:
        _log.error("stopped. %s", _what_is_saved(recipe.out))
        return 130


def _train(recipe: Recipe, first: bool) -> int:
    from ..common import print_tables
    from ..federation import Federation
    from ..runs import History, RunProgress, build_run, missing_plots, save_inputs, summary_tables

    without = missing_plots(recipe.out) if recipe.out else None
    if first and without is not None:
        _log.info("note: %s", without)
    model, tokenizer, clients, test_records = build_run(recipe, spread=True)
    # A client's failure is reported by its event; the warning is for callers without callbacks.
    warnings.filterwarnings("ignore", "client .* was (stopped|refused)", RuntimeWarning)
    with RunProgress() if first else nullcontext() as progress:
        result = Federation(
            model,
            tokenizer,
            clients,
            strategy=recipe.strategy,
            config=recipe.federation,
            train=recipe.train,
            target_modules=recipe.target_modules,
            eval_data=test_records or None,
            callbacks=[progress, lambda event: save_inputs(event, recipe, clients, test_records)] if progress else [],
        ).run()
    if not first:
        return 0
    print_tables(summary_tables(History.of(result.events)))
    if result.out is not None:
        print(f"{_write_report(result.out)}\nmodel and adapters: {result.out}")
    return 0


def _write_report(out: Path) -> str:
    """Write the report of a run that is saved already: whatever hinders that is no failure of the run."""
    from ..runs import write_report

    try:
        return f"report: {write_report(out)}"
    except Exception as error:
        if os.environ.get("FLORA_TRACEBACK"):
            raise
        why = _joined(error)
        return f"report: not written ({why}); the run is finished and saved: mend that, then run flora report {out}"


def _what_is_saved(out: str | None) -> str:
    from ..runs import ROUNDS

    if out is None:
        return "Nothing is saved, for out= is null."
    done = sorted(path.name for path in (Path(out) / ROUNDS).glob("[0-9]*"))
    if not done:
        return f"No round is over yet in {out}; the same command begins again."
    return (
        f"Rounds up to {int(done[-1])} are saved in {out}; the same command goes on from there, and trains the round "
        "that Ctrl-C broke off anew. SIGTERM (kill PID) stops a run after the step in flight and loses none."
    )


def _report(options: argparse.Namespace) -> int:
    from ..runs import missing_plots, write_report

    print(write_report(options.run_dir))
    without = missing_plots(options.run_dir)
    if without is not None:
        _log.info("note: %s", without)
    return 0


def _bench(options: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "run.py").is_file():
        raise ValueError(
            f"flora bench needs a checkout of the repository, and there is no bench/ beside {root / 'flora_core'}; "
            "clone it, install it with pip install -e '.[dev]', and run flora bench from there"
        )
    sys.path[:0] = [path for path in (str(root), str(root / "kernels")) if path not in sys.path]
    try:
        from bench.run import main as run
    except ImportError as error:
        raise ImportError(
            f"flora bench lacks a package ({error}); install them with pip install -e '.[dev]'"
        ) from error
    return run(options.words)


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import doctor, doctor_text

    facts = doctor()
    print(json.dumps(facts, indent=2) if options.json else doctor_text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
