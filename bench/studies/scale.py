"""Cost of a round at 10,000 clients of a 70B model: unit costs measured on its real shapes, the rest arithmetic.

python -m bench.studies.scale            measures, and writes bench/results/scale.json
python -m bench.studies.scale publish    writes the tables of docs/scale.md from it

Letters: K in_features, N out_features, P the sum of ranks of a round's clients, n their number.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness.protocol import ROOT, Result, Timing, latest, machine_folder
from flora_core.adapters.update import ClientUpdate, RoundResult
from flora_core.aggregation import aggregate
from flora_core.common.formatting import show_bytes, show_seconds
from flora_core.common.seeds import generator
from flora_core.federation.judge import judge_updates
from flora_core.merge.in_place import apply_base_delta_, new_low_bits

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
CLIENTS, FRACTIONS = 10_000, (0.01, 0.1, 1.0)
FLOAT, MASTER, BF16 = 4, 4, 2  # bytes: a factor's element; bf16 weight with its low bits; bf16 weight
# Llama-3-70B: hidden 8192, 80 layers, 8 key heads of 128, inner 28672: module -> (N, K).
LAYERS, PARAMETERS = 80, 70.55e9
LAYER = {
    "q_proj": (8192, 8192),
    "k_proj": (1024, 8192),
    "v_proj": (1024, 8192),
    "o_proj": (8192, 8192),
    "gate_proj": (28672, 8192),
    "up_proj": (28672, 8192),
    "down_proj": (8192, 28672),
}
TARGETS = {"q, v": ("q_proj", "v_proj"), "all linears": tuple(LAYER)}
LINE_BYTES_PER_S = 1.25e9  # 10 Gbit/s at the server, assumed
MEASURED_CLIENTS, REPEATS = (10, 20, 40), 3


def sizes(targets: str) -> list[tuple[int, int]]:
    """(N, K) of every adapted module of the model."""
    return [LAYER[name] for name in TARGETS[targets]] * LAYERS


def update_bytes(targets: str, rank: float) -> float:
    """Bytes that a client of this rank sends: both factors of every module, float32."""
    return rank * FLOAT * sum(N + K for N, K in sizes(targets))


def dense_bytes(targets: str) -> float:
    """The target weights themselves, exact: bfloat16 with their low bits."""
    return MASTER * sum(N * K for N, K in sizes(targets))


def stack_bytes(targets: str, P: float) -> float:
    """A round's change in the smallest form of each module, as ``flora`` sends it."""
    return sum(min(P * (N + K) * FLOAT, N * K * MASTER) for N, K in sizes(targets))


@dataclass(frozen=True)
class Units:
    """Measured unit costs: seconds a byte, an element, an operation; bytes held for each byte of updates."""

    unpack: float
    judge: float
    stack: float
    gram: float
    write_element: float
    write_operation: float
    held: float


def seconds_of(work: Callable[[], Any]) -> float:
    """Median processor seconds of a few calls on one thread, after one that warms up."""
    work()
    timing = Timing()
    for _ in range(REPEATS):
        timing.run(work)
    return statistics.median(timing.cpu_s)


def make_updates(clients: int, N: int, K: int) -> list[ClientUpdate]:
    """Random updates of one module, of ranks 64 to 4 in turn."""
    updates = []
    for i in range(clients):
        random, rank = generator(0, "scale", i), RANKS[i % len(RANKS)]
        pair = tuple(torch.rand(rank, width, generator=random).sub_(0.5) for width in (K, N))
        updates.append(ClientUpdate(f"c{i}", {"m": pair}, {"m": 2.0}, weight=50.0 + i))  # pyright: ignore[reportArgumentType]
    return updates


def measure_module(name: str, clients: int) -> dict[str, Any]:
    """Time each step of a server's round for one module of the 70B model."""
    N, K = LAYER[name]
    updates = make_updates(clients, N, K)
    promised = {update.client: update for update in updates}
    size = sum(update.size_bytes for update in updates)
    weight = (torch.rand(N, K, generator=generator(1, name)) * 0.02).bfloat16()
    low = new_low_bits({"m": weight})
    result: list[RoundResult] = []
    times = {
        "unpack": seconds_of(lambda: [_there_and_back(update) for update in updates]),
        "judge": seconds_of(lambda: judge_updates(updates, promised)),
        "aggregate": seconds_of(lambda: result.append(aggregate(updates, "flora"))),
    }
    stack = {"m": result[-1].base_delta["m"]}
    times["write"] = seconds_of(lambda: apply_base_delta_({"m": weight}, stack, low_bits=low, check_rows=64))
    P = sum(RANKS[i % len(RANKS)] for i in range(clients))
    return {"module": name, "N": N, "K": K, "clients": clients, "P": P, "update_bytes": size, "seconds": times}


def _there_and_back(update: ClientUpdate) -> None:
    """Cost of a message for both its sides; the node's half is counted for the server too."""
    from safetensors.torch import load, save

    A, B = update.adapters["m"]
    load(save({"m/A": A, "m/B": B}))


def fit(cases: list[dict[str, Any]], known: dict[str, Any]) -> Units:
    """Unit costs that fit the cases: each step's processor seconds are a sum of at most two products.

    aggregate = bytes * stack + P^2 (N + K) * gram;   write = N K * element + 2 N K P * operation
    """

    def total(step: str) -> float:
        return sum(c["seconds"][step] for c in cases) / sum(c["update_bytes"] for c in cases)

    def both(step: str, one: Callable[[Any], float], two: Callable[[Any], float]) -> tuple[float, float]:
        # Each case counts by its relative error; a cost that comes out negative is none.
        seconds = torch.tensor([c["seconds"][step] for c in cases], dtype=torch.float64)
        rows = torch.tensor([[one(c), two(c)] for c in cases], dtype=torch.float64) / seconds[:, None]
        scale = rows.max(0).values
        found = torch.linalg.lstsq(rows / scale, torch.ones(len(cases), 1, dtype=torch.float64)).solution[:, 0] / scale
        for place in (0, 1):
            if found[place] < 0:
                other, alone = 1 - place, rows[:, 1 - place]
                found[place], found[other] = 0, alone.sum() / (alone * alone).sum()
        return float(found[0]), float(found[1])

    stack, gram = both("aggregate", lambda c: c["update_bytes"], lambda c: c["P"] ** 2 * (c["N"] + c["K"]))
    element, operation = both("write", lambda c: c["N"] * c["K"], lambda c: 2 * c["N"] * c["K"] * c["P"])
    held = known["peak_bytes"] / known["update_bytes"]
    return Units(total("unpack"), total("judge"), stack, gram, element, operation, held)


def aggregate_seconds(units: Units, sizes_NK: list[tuple[int, int]], P: float) -> float:
    """The time of ``aggregate``; whether a stack's rank is tested only counts where it is smaller than the weight."""
    tested = [(N, K) for N, K in sizes_NK if P < N * K / (N + K)]
    size = P * FLOAT * sum(N + K for N, K in sizes_NK)
    return size * units.stack + units.gram * P**2 * sum(N + K for N, K in tested)


def extrapolate(units: Units, targets: str, fraction: float) -> dict[str, float]:
    """One round of ``flora``: n of 10,000 clients, ranks 64 to 4 in turn."""
    n, everything = int(CLIENTS * fraction), sizes(targets)
    P = n * sum(RANKS) / len(RANKS)
    up, elements = P * FLOAT * sum(N + K for N, K in everything), sum(N * K for N, K in everything)
    down = stack_bytes(targets, P)
    return {
        "clients": n,
        "P": P,
        "up_bytes": up,
        "down_bytes_each": down,
        "down_bytes": n * down,
        "adapters_down_bytes": up,
        "base_bytes": PARAMETERS * BF16 + elements * (MASTER - BF16),
        "held_bytes": units.held * up,
        "unpack_s": units.unpack * up,
        "judge_s": units.judge * up,
        "aggregate_s": aggregate_seconds(units, everything, P),
        "write_s": elements * units.write_element + 2 * elements * P * units.write_operation,
        "line_up_s": up / LINE_BYTES_PER_S,
        "line_down_s": n * down / LINE_BYTES_PER_S,
        "line_adapters_s": up / LINE_BYTES_PER_S,
    }


def measure() -> None:
    """Measure two modules at three sizes of a round, fit, check against a round that was measured, extrapolate."""
    torch.set_num_threads(1)
    settings = {"ranks": RANKS, "modules": ("q_proj", "v_proj"), "clients": MEASURED_CLIENTS, "dtype": "float32"}
    question = "A server's unit costs for modules of Llama-3-70B, and what they give for 10,000 clients"
    result = Result("scale", question, settings, machine_folder(), "python -m bench.studies.scale")
    cases = [measure_module(name, clients) for name in ("q_proj", "v_proj") for clients in MEASURED_CLIENTS]
    known = json.loads(latest("strategies_flora").read_text())["measured"]
    units = fit(cases, known)
    spent = known["seconds"]
    predicted = aggregate_seconds(units, [(4096, 4096)] * known["modules"], known["sum_of_ranks"])
    rounds = {
        f"{targets}; {share:.0%}": extrapolate(units, targets, share) for targets in TARGETS for share in FRACTIONS
    }
    check = {"what": "aggregate of strategies_flora.json", "measured_s": spent, "predicted_s": predicted}
    result.save(measured=cases, units=vars(units), check=check, extrapolated=rounds, finished=True)
    print(json.dumps({"units": vars(units), "check": check}, indent=1))


def _table(header: str, rows: list[list[str]]) -> str:
    width = header.count("|") + 1
    return "\n".join([f"| {header} |", "|" + " --- |" * width, *("| " + " | ".join(row) + " |" for row in rows)])


def publish() -> None:
    """Write the tables of docs/scale.md."""
    path = latest("scale")
    data = json.loads(path.read_text())
    units, rounds = data["units"], data["extrapolated"]
    rank_rows = [
        [str(rank), *(show_bytes(update_bytes(targets, rank)) for targets in TARGETS)] for rank in (64, 32, 16, 8, 4)
    ]
    fixed = [["dense change, or a snapshot", *(show_bytes(dense_bytes(targets)) for targets in TARGETS)]]
    names = list(rounds)

    def row(text: str, show: Callable[[Any], str], *keys: str) -> list[str]:
        return [text, *(show(sum(rounds[name][key] for key in keys)) for name in names)]

    traffic = [
        row("clients of a round, n", lambda v: f"{v:.0f}", "clients"),
        row("P, the sum of their ranks", lambda v: f"{v:.0f}", "P"),
        row("up, all", show_bytes, "up_bytes"),
        row("down, each, `flora`", show_bytes, "down_bytes_each"),
        row("down, all, `flora`", show_bytes, "down_bytes"),
        row("down, all, adapters of the clients' ranks", show_bytes, "adapters_down_bytes"),
        row("server: base and low bits", show_bytes, "base_bytes"),
        row("server: updates and what aggregation holds", show_bytes, "held_bytes"),
        row("reading messages", show_seconds, "unpack_s"),
        row("judging them", show_seconds, "judge_s"),
        row("aggregation", show_seconds, "aggregate_s"),
        row("writing into the base", show_seconds, "write_s"),
        row("the line, up", show_seconds, "line_up_s"),
        row("the line, down, `flora`", show_seconds, "line_down_s"),
        row("the line, down, adapters", show_seconds, "line_adapters_s"),
    ]
    check, env = data["check"], data["environment"]
    costs = [
        ["reading a message and packing one", f"{units['unpack'] * 1e9:.2f} s a GB of updates"],
        ["judging (finite, shapes, norm of the product)", f"{units['judge'] * 1e9:.2f} s a GB"],
        ["stacking", f"{units['stack'] * 1e9:.2f} s a GB"],
        ["proof that a stack is of full rank", f"{units['gram'] * 1e12:.3f} s per 10^12 P^2 (N + K)"],
        ["write: float64 sum, low bits", f"{units['write_element'] * 1e9:.2f} s per 10^9 elements of W"],
        ["write: the product", f"{units['write_operation'] * 1e12:.1f} s per 10^12 operations (2 N K P)"],
        ["memory of updates and aggregation", f"{units['held']:.2f} bytes a byte of updates"],
    ]
    source = (
        f"`{path.relative_to(ROOT)}`, `{data['command']}`; commit {env['commit'][:10]}, {env['processor']}, "
        f"processor seconds of one thread; other load {env['load'].get('other_cores') or 0:.2f} cores. "
        f"The same costs give {check['predicted_s']:.1f} s for the `flora` round of docs/strategies.md, where "
        f"{check['measured_s']:.1f} s were measured, with two threads."
    )
    parts = {
        "bytes": _table("rank | q, v | all linears", rank_rows + fixed),
        "units": source + "\n\n" + _table("step, measured | cost", costs),
        "rounds": _table("extrapolated | " + " | ".join(names), traffic),
    }
    path = ROOT / "docs" / "scale.md"
    text = path.read_text()
    for name, part in parts.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        text = f"{text.split(start)[0]}{start}\n{part}\n{end}{text.split(end)[1]}"
    path.write_text(text)


if __name__ == "__main__":
    publish() if sys.argv[1:] == ["publish"] else measure()
