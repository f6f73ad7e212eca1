"""`flora adapter`: one PEFT adapter on a run's original base, of a client's round or of the global model."""

from __future__ import annotations

import argparse
from typing import Any

from ..common import check_choice

LAYOUTS = ("peft", "vllm")
_EXAMPLES = """examples:
  flora adapter runs/demo --out served                            the global model as one adapter on the original base
  flora adapter runs/demo --out served --layout vllm              of one rank that vLLM serves
  flora adapter runs/demo --round 3 --client clinic-a --out a3    the adapter of clinic-a after round 3
"""


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "adapter",
        help="write one PEFT adapter of a run's result, or of a client's round",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", help="the out= folder of a run, finished or not")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder of the adapter")
    parser.add_argument("--round", type=int, metavar="N", help="the round; the newest unless given")
    parser.add_argument(
        "--client", metavar="NAME", help="the client of the adapter; the global model's adapter unless given"
    )
    parser.add_argument("--layout", default="peft", metavar="peft|vllm", help="vllm: one rank that vLLM serves")
    parser.add_argument(
        "--strategy", metavar="FILE.py:NAME", help="where the run's strategy is defined, if it is one of your own"
    )
    parser.set_defaults(command=run, extras=("train", "cli"))


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    check_choice("layout", options.layout, LAYOUTS)
    from ..aggregation import load_strategy
    from ..common import print_tables, show_bytes
    from ..federation import rebase_adapter

    if options.strategy:
        load_strategy(options.strategy)
    report = rebase_adapter(options.run_dir, options.out, options.round, options.client, layout=options.layout)
    ranks = sorted(set(report.ranks.values()))
    rows = [
        ["adapter", str(report.out)],
        ["base", report.base or "the model that the run began with; it has no name"],
        ["modules", str(len(report.ranks))],
        ["rank", ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")],
        ["size", show_bytes(report.size_bytes)],
    ]
    if report.error is not None:
        rows.append(["from the run's weights", f"{report.error:.1e} of their change, by rounding"])
    print_tables([("Adapter", ["", ""], rows)])
    return 0
