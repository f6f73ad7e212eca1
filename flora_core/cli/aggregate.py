"""`flora aggregate`: adapters on disk into a merged checkpoint, or into one adapter."""

from __future__ import annotations

import argparse
import ast
import logging
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common import Table, check_choice, show_bytes, show_number, show_seconds
from ..config import check_strategy_name
from .adapter import LAYOUTS

if TYPE_CHECKING:
    from ..merge import ExportReport, MergeReport

_log = logging.getLogger(__name__)
_EXAMPLES = """examples:
  flora aggregate --base llama --adapter a=120 --adapter b=80 --out merged            weights are relative: 0.6 and 0.4
  flora aggregate --base llama --adapter a --adapter b --out merged --verify          read everything again, certify it
  flora aggregate --base llama --adapter a --out half --scale 0.5                     one adapter at half strength
  flora aggregate --base llama --adapter a --adapter b --out stacked --as-adapter     one PEFT adapter instead
  flora aggregate --base llama --adapter a --adapter b --out served --as-adapter vllm one that vLLM serves
  flora aggregate ... --strategy flora_svd --option tau=0.99 --as-adapter             recompressed, 1% of energy lost

The output appears when it is whole. A merge that was stopped goes on where it was when the same command runs again.
"""


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "aggregate",
        help="merge adapters into a checkpoint on disk, or into one adapter",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", required=True, metavar="DIR", help="checkpoint with safetensors, sharded or not")
    parser.add_argument(
        "--adapter",
        required=True,
        action="append",
        metavar="DIR[=WEIGHT]",
        help="folder of a PEFT LoRA adapter and its weight (1 unless given); once for each adapter",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder of the result")
    parser.add_argument(
        "--strategy", default="flora", metavar="NAME", help="flora (exact) unless given; or flora_svd, ..."
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the strategy, such as tau=0.99"
    )
    parser.add_argument(
        "--scale",
        type=_scale,
        default=1.0,
        metavar="NUMBER",
        help="factor of the weighted sum: 0.5 merges at half strength, -1 or -1e-3 subtracts (1 unless given)",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("base", "adapter"),
        help="the tokenizer and chat template of the merged model (the base's unless given)",
    )
    parser.add_argument(
        "--partial", action="store_true", help="merge what is there of an adapter that lacks modules of its config"
    )
    parser.add_argument("--verify", action="store_true", help="read everything again and certify it before it appears")
    parser.add_argument(
        "--as-adapter",
        nargs="?",
        const="peft",
        metavar="peft|vllm",
        help="write one PEFT adapter instead of a merged base; vllm: of one rank, as vLLM and llama.cpp read it",
    )
    parser.add_argument(
        "--mixed-dtypes", action="store_true", help="allow weights of several dtypes among those that are merged into"
    )
    parser.set_defaults(command=run, extras=("train", "cli"))


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.verify and options.as_adapter:
        raise ValueError("--verify certifies a merged base, and --as-adapter writes none; leave one out")
    if options.tokenizer and options.as_adapter:
        raise ValueError("--tokenizer chooses files of a merged model, and --as-adapter writes none; leave one out")
    common: dict[str, Any] = {
        "strategy": options.strategy,
        "options": dict(parse_option(word) for word in options.option),
        "scale": options.scale,
        "partial": options.partial,
        "mixed_dtypes": options.mixed_dtypes,
    }
    adapters = parse_adapters(options.adapter)
    if options.as_adapter:
        check_choice("layout", options.as_adapter, LAYOUTS)
    check_strategy_name(options.strategy)
    from ..common import print_tables
    from ..merge import export_adapter, merge_into_checkpoint
    from ..runs import Bar

    try:
        with Bar(modules=bool(options.as_adapter)) as bar:
            if options.as_adapter:
                tables = _export_tables(
                    export_adapter(
                        options.base, adapters, options.out, layout=options.as_adapter, progress=bar, **common
                    )
                )
            else:
                tables = _merge_tables(
                    merge_into_checkpoint(
                        options.base,
                        adapters,
                        options.out,
                        tokenizer=options.tokenizer,
                        verify=options.verify,
                        progress=bar,
                        **common,
                    )
                )
    except KeyboardInterrupt:
        _log.error("stopped; the same command goes on from there")
        return 130
    print_tables(tables)
    return 0


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale) or scale == 0:
        raise argparse.ArgumentTypeError(f"must be a finite number other than 0, such as 0.5 or -1e-3, got {text!r}")
    return scale


def parse_adapters(words: Sequence[str]) -> dict[str, float]:
    """Read ``DIR[=WEIGHT]`` words; a folder whose own name has a ``=`` is taken as it is.

    Raises:
        ValueError: If a weight is not a number of at least 0, or an adapter is given twice.
    """
    found: dict[str, float] = {}
    for word in words:
        path, equals, text = word.rpartition("=")
        if not equals or os.path.isdir(word):
            path, text = word, "1"
        weight = _weight(word, path, text)
        if os.path.realpath(path) in map(os.path.realpath, found):
            raise ValueError(f"--adapter {word}: {path} is given twice; give it once, with the sum of both weights")
        found[path] = weight
    return found


def _weight(word: str, path: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = float("nan")
    if not (0 <= weight < float("inf") and path):
        raise ValueError(
            f"--adapter {word}: expected DIR or DIR=WEIGHT, the weight a finite number of at least 0, got {text!r};"
            " weights are relative: --scale merges at a stated strength, a negative one too"
        )
    return weight


def parse_option(word: str) -> tuple[str, Any]:
    """Read a ``KEY=VALUE`` word; a value that is no number, list or quoted text is text."""
    key, equals, text = word.partition("=")
    if not (key and equals):
        raise ValueError(f"--option must be KEY=VALUE, such as tau=0.99, got {word!r}")
    try:
        return key, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return key, text


def _merge_tables(report: MergeReport) -> list[Table]:
    rows = [
        ["merged model", str(report.out)],
        *_share_rows(report),
        ["weights changed", f"{report.modules}, {show_bytes(report.merged_bytes)} of {show_bytes(report.size_bytes)}"],
        ["aggregation error", f"{report.aggregation_error:.1e}"],
        ["time", f"{show_seconds(report.seconds)}, {show_bytes(_rate(report))}/s"],
    ]
    if report.resumed_bytes:
        rows.append(["done before", show_bytes(report.resumed_bytes)])
    if report.left_out:
        rows.append(["not copied", ", ".join(report.left_out)])
    if report.certificate is not None:
        found = report.certificate
        rows += [
            [
                "certified",
                f"every merged weight uses at most {found['largest_share_of_bound']:.0%} of its rounding bound",
            ],
            ["", "every other byte is the base's"],
            ["error of the change", f"{show_number(found['error'], '.1e')} of the exact sum, by rounding alone"],
        ]
    return [("Aggregated", ["", ""], rows + _note_rows(report))]


def _share_rows(report: MergeReport | ExportReport) -> list[list[str]]:
    """The part of each adapter in the result: its share of the weights, times alpha / r, times the scale."""
    rows = []
    for one in report.adapters:
        ranks, scaling = (_span(one[key]) for key in ("ranks", "scaling"))
        rows.append([f"share of {one['name']}", f"{one['share']:.4g} (rank {ranks}, alpha / r {scaling})"])
    if report.scale != 1:
        rows.append(["scale of the sum", f"{report.scale:g}"])
    return rows


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:.4g}" for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"


def _note_rows(report: MergeReport | ExportReport) -> list[list[str]]:
    return [["note", note] for note in report.notes]


def _rate(report: MergeReport) -> float:
    return (report.size_bytes - report.resumed_bytes) / report.seconds if report.seconds else 0.0


def _export_tables(report: ExportReport) -> list[Table]:
    ranks = sorted(set(report.ranks.values()))
    rows = [
        ["adapter", str(report.out)],
        *_share_rows(report),
        ["modules", str(len(report.ranks))],
        ["rank", ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")],
        ["size", show_bytes(report.size_bytes)],
        ["aggregation error", f"{report.aggregation_error:.1e}"],
    ]
    return [("Aggregated", ["", ""], rows + _note_rows(report))]
