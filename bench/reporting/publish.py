"""Write docs/benchmarks.md, the README's numbers and docs/img/bench_*.png from bench/results, none typed by hand.

python -m bench.reporting.publish
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.cases.rivals import FROZEN, Rival
from bench.harness.machine import machine_label
from bench.harness.protocol import RESULTS, ROOT
from bench.reporting import plots
from bench.reporting.tables import (
    SPEED_HEADER,
    TARGET_HEADER,
    Data,
    cases_rows,
    is_published,
    load,
    load_machines,
    missing_rows,
    outcome_rows,
    ratio,
    speed_rows,
    table,
    target_rows,
    verdict,
    verdict_rows,
)

PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
IMAGES = ROOT / "docs" / "img"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"

# Prefix of the results, title, and what the table is about.
GRIDS = (
    ("cohort_rivals", "A step of a whole model against every rival", ""),
    ("decoder_layer", "One decoder layer, forward and backward", ""),
    ("linear_forward", "One LoRA linear, forward", ""),
    ("linear_backward", "One LoRA linear, backward", ""),
    ("federated_round", "A federated round: training, aggregation, the write into the base", ""),
    ("optimizer", "An AdamW step over all adapters", ""),
    ("data_loading", "From records to batches", "Against the tokenizer with transformers' padding collator."),
    ("cpu_merge", "The CPU's merge kernel", "Against torch's products; `large fp32 product` is the processor's rate."),
)
PLOTS = {
    "speedups": "times as fast as PEFT",
    "roofline": "operations a second below the roof",
    "scaling": "scaling with tokens, clients and ranks",
    "parts": "time and memory of a step by part",
}
# The case that a machine's scaling is around: model, tokens of each client.
CPU_CASE, GPU_CASE = ("SmolLM2-135M", 128), ("Llama-7B", 819)
# The README's rows: result, rival, what is compared.
HEADLINES = (
    ("cohort_step_batch1", "peft", "training step of ten clients, one sequence of 128 tokens each, against PEFT"),
    ("cohort_step_batch4", "peft", "the same with four sequences each"),
    ("cohort_step_dolly", "peft", "the same with four Dolly records each, which PEFT pads"),
)
MERGES = (
    ("merge_float32", "peft", "adding ten clients' updates to all linears, against PEFT's cat and merge"),
    ("merge_float32", "addmm per layer", "the same against `addmm_` by hand"),
)
Machines = dict[str, dict[str, Data]]


def label_of(results: dict[str, Data]) -> str:
    """The processor of a machine's results."""
    return machine_label(next(iter(results.values()))["environment"])


def source(data: Data, folder: str) -> str:
    """Which file the numbers come from, and where it was measured."""
    env, load = data["environment"], data["environment"]["load"]
    others = load.get("other_cores")
    busy = "not known" if others is None else f"{others:.2f} cores"
    dirty = " with local changes" if env["changed_files"] else ""
    gpu = ", ".join(str(env[key]) for key in ("gpu", "driver_version", "clocks.sm") if key in env)
    return (
        f"`{folder}/{data['name']}.json`, `{data['command']}`; commit {env['commit'][:10]}{dirty}, "
        f"{gpu or machine_label(env)}, {env['threads']} threads, torch {env['versions']['torch']}, "
        f"peft {env['versions']['peft']}, other load {busy}"
    )


def step_table(found: Sequence[Data]) -> str:
    """Speed of one contender against its rivals; a red or unfinished check has no speed-up."""
    return table(SPEED_HEADER, [row for data in found for row in speed_rows(data)])


def memory_table(data: Data) -> str:
    """Memory against speed, case by case."""
    peft = data["rows"][0] if data["rows"][0]["case"].startswith("PEFT") else None
    rows = [
        [
            row["case"],
            f"{row['beyond_base_bytes'] / 1e9:.2f} GB",
            f"{row['beyond_base_bytes'] / row['tokens_in_flight'] / 1e3:.0f} kB" if "tokens_in_flight" in row else "-",
            f"{row['beyond_base_bytes'] / peft['beyond_base_bytes']:.2f}" if peft else "-",
            f"{row['tokens_per_s']:.0f}",
        ]
        for row in data["rows"]
    ]
    heads = ["peak beyond the base", "a token in flight", "of PEFT's peak", "tokens/s"]
    text = table(["case (token budget)", *heads], rows)
    if "one_client_over_peft" in data:
        met = verdict(data["one_client_over_peft"], data["target"], at_least=False)
        text += f"\n\nAt a budget of one client's tokens {data['one_client_over_peft']:.2f} of PEFT's peak: {met}."
    return text


def saved_table(data: Data) -> str:
    """Bytes kept for backward, case by case."""
    rows = [[row["case"], f"{row['bytes_per_token']:.0f}", f"{row['per_hidden']:.1f}"] for row in data["rows"]]
    return table(["case", "bytes per token", "per hidden unit and layer"], rows)


def demo_table(found: Sequence[Data]) -> str:
    """Table of the demo's result with each seed, and its time."""
    rows = []
    for data in found:
        first, last = data["rows"][0], data["rows"][-1]
        losses = [f"{row['loss']:.2f}" for row in (first, last)]
        matches = [f"{row['exact_match']:.0%}" for row in (first, last)]
        spent = f"{data['seconds'] / 60:.1f} min, {verdict(data['seconds'], data['target_seconds'], at_least=False)}"
        rows.append([str(data["settings"]["seed"]), *losses, *matches, spent])
    heads = ["loss before", "after", "exact match before", "after"]
    return table(["seed", *heads, "from start to end (target in seconds)"], rows)


def parts_table(data: Data) -> str:
    """Where a step's time and memory go."""
    whole, kept = data["seconds"], data["saved_bytes"]
    rows = [
        [
            part,
            f"{1e3 * share * whole:.0f}",
            f"{share:.1%}",
            f"{1e3 * data['limits'][part]:.0f}",
            f"{kept.get(part, 0) / 1e6:.1f}",
        ]
        for part, share in sorted(data["shares"].items(), key=lambda item: -item[1])
    ]
    held = {"base weights": "weights_bytes", "adapters": "adapter_bytes", "gradients and moments": "optimizer_bytes"}
    sizes = ", ".join(f"{name} {data[key] / 1e6:.0f} MB" for name, key in held.items())
    text = table(["part", "ms", "share", "limit, ms", "kept for backward, MB"], rows)
    return f"{text}\n\nHeld all the time: {sizes}.\n\n{data['text']}"


def gpu_linears(folder: Path) -> str | None:
    """The linears that ``bench.gpu.check`` timed: forward and backward together, in frozen linears."""
    path = folder / "gpu_check_triton.json"
    if not path.is_file():
        return None
    timed = {
        name: row for name, row in json.loads(path.read_text()).items() if isinstance(row, dict) and "to frozen" in row
    }
    names = list(dict.fromkeys(name for row in timed.values() for name in row["to frozen"]))
    rows = [
        [case, *(f"{row['to frozen'][name]:.2f}" if name in row["to frozen"] else "-" for name in names)]
        for case, row in timed.items()
    ]
    return table(["forward and backward, in frozen linears", *names], rows) if rows else None


def fairness() -> str:
    """How every rival is set up, from the same tables that the benchmarks run."""
    from bench.cases import linears, rounds, steps
    from bench.suites import test_data_loading, test_decoder_layer, test_optimizer

    tables: list[tuple[str, Iterable[Rival]]] = [
        ("step of a model", steps.RIVALS),
        ("decoder layer", test_decoder_layer.RIVALS),
        ("linear", linears.RIVALS),
        ("federated round", rounds.RIVALS),
        ("optimizer", test_optimizer.RIVALS),
    ]
    rows = [[where, rival.name, rival.fair] for where, rivals in tables for rival in rivals]
    name, fair = test_data_loading.FAIR.split(": ", 1)
    return table(["question", "rival", "how it is set up"], [*rows, ["data loading", name, fair]])


def grids(found: dict[str, Data]) -> list[str]:
    """A table for every question that is measured over a grid."""
    parts = []
    for prefix, title, note in GRIDS:
        own = [data for name, data in found.items() if name.startswith(prefix)]
        if own:
            parts += [f"### {title}", *([note] if note else []), table(*cases_rows(own))]
        shares = [data for data in own if "not_training" in data]
        parts += [f"Not training: {data['not_training']:.1%} of our round ({data['name']})." for data in shares]
    return parts


def sections(found: dict[str, Data], slug: str, images: Path) -> list[str]:
    """Targets, tables and pictures of what was measured on one machine."""

    def picture(kind: str, title: str) -> list[str]:
        name = f"bench_{slug}_{kind}.png"
        return [f"![{title}](img/{name})"] if (images / name).is_file() and found else []

    def named(*prefixes: str) -> list[Data]:
        return [data for name, data in found.items() if name.startswith(prefixes)]

    steps, merges, targets = named("cohort_step"), named("merge", "stream_merge"), target_rows(found)
    parts = ["### What must be shown", table(TARGET_HEADER, targets)] if targets else []
    parts += ["### Cohort step", step_table(steps)] if steps else []
    parts += picture("speedups", PLOTS["speedups"]) + grids(found)
    parts += ["### Aggregation", step_table(merges)] if merges else []
    parts += [line for kind in ("roofline", "scaling") for line in picture(kind, PLOTS[kind])]
    for data in (data for data in named("explain") if "text" in data):
        parts += ["### Where a step's time and memory go", data["question"] + ".", parts_table(data)]
    parts += picture("parts", PLOTS["parts"])
    for data in (data for data in named("memory") if data.get("rows")):
        parts += ["### Memory", data["question"] + ".", memory_table(data)]
        parts += picture(data["name"], "speed against memory")
    if found.get("saved_activations", {}).get("rows"):
        saved = found["saved_activations"]
        parts += ["### Saved for backward", saved["question"] + ".", saved_table(saved)]
    demos = [data for data in named("demo") if data.get("finished")]
    return parts + ["### The demo", "`flora run quickstart seed=N`, on held-out questions.", demo_table(demos)] * bool(
        demos
    )


def body(machines: Machines, gpu: dict[str, Data] | None = None, folder: Path = RESULTS, images: Path = IMAGES) -> str:
    """Everything between the marks."""
    parts = side_by_side(machines)
    for slug, found in machines.items():
        parts += [f"## {label_of(found)}", *sections(found, slug, images), *absent(found, folder / slug)]
    parts += gpu_parts(gpu or {}, folder, images)
    if machines or gpu:
        parts += ["## How the rivals are set up", fairness(), "## Sources"]
    for slug, found in {**machines, "gpu": gpu or {}}.items():
        parts += ["\n".join(f"- {source(data, f'bench/results/{slug}')}" for data in found.values())] if found else []
    return "\n\n".join(parts)


def side_by_side(machines: Machines) -> list[str]:
    """The same comparisons on every processor that measured them with enough rounds."""
    names = dict.fromkeys((name, rival) for found in machines.values() for name, rival in published(found))
    rows = []
    for name, rival in names:
        cells = [_published_cell(found, name, rival) for found in machines.values()]
        rows.append([f"`{name}`", rival, *cells])
    shared = [row for row in rows if row.count("-") < len(machines) - 1]
    if len(machines) < 2 or not shared:
        return []
    heads = ["result", "speed-up over", *(label_of(found) for found in machines.values())]
    return ["## By processor", table(heads, shared)]


def published(found: dict[str, Data]) -> list[tuple[str, str]]:
    """Every (result, rival) that has the rounds of a published ratio."""
    pairs = [
        (name, rival, speedup) for name, data in found.items() for rival, speedup in data.get("speedups", {}).items()
    ]
    return [(name, rival) for name, rival, speedup in pairs if is_published(speedup)]


def _published_cell(found: dict[str, Data], name: str, rival: str) -> str:
    speedup = found.get(name, {}).get("speedups", {}).get(rival)
    return ratio(speedup, rival) if speedup is not None and is_published(speedup) else "-"


def gpu_parts(gpu: dict[str, Data], folder: Path, images: Path) -> list[str]:
    """The same for what was measured on a GPU, and the linears that ``bench.gpu.check`` timed."""
    linears, verdicts = gpu_linears(folder / "gpu"), verdict_rows(folder / "gpu")
    if not gpu and linears is None and not verdicts:
        return ["## On a GPU", "Nothing measured yet: `make bench-gpu` on a machine that has one."]
    parts = ["## On a GPU", *sections(gpu, "gpu", images), *absent(gpu, folder / "gpu")]
    parts += ["### Linears on every way to fuse, from CUDA graphs", linears] if linears else []
    return parts + [table(TARGET_HEADER, verdicts)] * bool(verdicts)


def absent(found: dict[str, Data], folder: Path) -> list[str]:
    """Rivals of one machine that did not take part and why, and what did not run to its end."""
    missing, outcomes = missing_rows(found), outcome_rows(folder)
    parts = []
    if missing:
        parts += ["### Rivals that did not take part", table(["rival", "reason", "where"], missing)]
    if outcomes:
        parts += ["### Not measured in the last run", table(["benchmark", "outcome", "reason"], outcomes)]
    return parts


def headlines(machines: Machines, gpu: dict[str, Data] | None = None) -> str:
    """The README's tables: wins and losses, each with its file; what must be shown on a GPU, where one was at hand."""
    text = cpu_headlines(machines)
    targets = [[*row[:3], f"`bench/results/gpu/{row[3]}.json`"] for row in target_rows(gpu or {})]
    return "\n\n".join([text, table(["on a GPU", *TARGET_HEADER[1:3], "source"], targets)]) if targets else text


def cpu_headlines(machines: Machines) -> str:
    """Each of the CPU's wins and losses: one column a processor, first what more than one of them has measured."""
    rows = [*speed_headlines(machines), *memory_headlines(machines), *demo_headlines(machines)]
    rows = [row for row in rows if row[1:-1].count("-") < len(machines)]
    if not rows:
        return "Nothing measured yet: `make bench`."
    # A stable sort: rows that as many processors have stay in the order of what matters.
    rows.sort(key=lambda row: row[1:-1].count("-"))
    return table(["SmolLM2-135M, two threads", *(label_of(found) for found in machines.values()), "file"], rows)


def speed_headlines(machines: Machines) -> list[list[str]]:
    """Speed-ups as medians of paired rounds with p20 and p80; none from fewer than ``LEAST_ROUNDS``."""
    grid = []
    for found in machines.values():
        for name, data in found.items():
            if name.startswith(("cohort_rivals", "federated_round")):
                question = f"{data['question'][0].lower()}{data['question'][1:]}"
                grid += [(name, rival, f"{question}, against {_named(rival)}") for rival in data.get("speedups", {})]
    rows = []
    for name, rival, what in dict.fromkeys([*HEADLINES, *grid, *MERGES]):
        cells = [_published_cell(found, name, rival) for found in machines.values()]
        rows.append([what, *cells, f"`{name}.json`"])
    return rows


def _named(rival: str) -> str:
    return "the frozen base alone" if rival == FROZEN else rival


def memory_headlines(machines: Machines) -> list[list[str]]:
    """Peak memory and what is kept for backward, as shares of PEFT's."""
    peaks, kept = [], []
    for found in machines.values():
        share = found.get("memory", {}).get("one_client_over_peft")
        peaks.append("-" if share is None else f"{share:.2f} of PEFT's")
        rows = {row["case"]: row["bytes_per_token"] for row in found.get("saved_activations", {}).get("rows", [])}
        ours, peft = (rows.get(f"{who}, dropout 0.1") for who in ("flora, ten clients", "PEFT, mean of ten clients"))
        kept.append(f"{ours / peft:.2f} of PEFT's" if ours and peft else "-")
    return [
        ["peak memory beyond the base, at one client's tokens", *peaks, "`memory.json`"],
        ["kept for backward per token, with dropout 0.1", *kept, "`saved_activations.json`"],
    ]


def demo_headlines(machines: Machines) -> list[list[str]]:
    """Exact answers and losses of the demo, by seed."""
    names = sorted({name for found in machines.values() for name in found if name.startswith("demo")})
    return [
        [f"the demo's exact answers, seed {name.removeprefix('demo_seed')}", *cells, f"`{name}.json`"]
        for name in names
        for cells in [[_demo_cell(found.get(name, {})) for found in machines.values()]]
    ]


def _demo_cell(data: Data) -> str:
    if not data.get("finished"):
        return "-"
    first, last = data["rows"][0], data["rows"][-1]
    exact, losses = ([row[key] for row in (first, last)] for key in ("exact_match", "loss"))
    minutes = data["seconds"] / 60
    return f"{exact[0]:.0%} to {exact[1]:.0%}, loss {losses[0]:.1f} to {losses[1]:.1f}, {minutes:.1f} min"


def write_between(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page.

    Raises:
        ValueError: If the page has no marks.
    """
    whole = page.read_text()
    if START not in whole or END not in whole:
        raise ValueError(f"{page} must have {START} and {END} around what is generated")
    before, _, rest = whole.partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n{text}\n{END}{after}")


def draw(found: dict[str, Data], slug: str, case: tuple[str, int], images: Path = IMAGES) -> None:
    """Every plot that one machine has results for; one that has none any more is taken away."""
    model, tokens = case
    everything = list(found.values())
    linears = [data for name, data in found.items() if name.startswith("linear_") and "speedups" in data]
    explained = [data for name, data in found.items() if name.startswith("explain") and "text" in data]
    rated = [data for data in linears if "rates" in data]
    drawn: dict[str, tuple[bool, Callable[[Path], None]]] = {
        "speedups": (
            any(plots.peft_of(data) for data in everything),
            lambda path: plots.plot_speedups(everything, path),
        ),
        "roofline": (bool(rated), lambda path: plots.plot_roofline(rated, path)),
        "scaling": (
            bool(plots.around(linears, model)),
            lambda path: plots.plot_scaling(plots.around(linears, model), tokens, path),
        ),
        "parts": (bool(explained), lambda path: plots.plot_parts(explained[-1], path)),
    }
    for name in (name for name in found if name.startswith("memory")):
        data = found[name]
        drawn[name] = len(data.get("rows", [])) > 1, lambda path, data=data: plots.plot_memory(data, path)
    images.mkdir(parents=True, exist_ok=True)
    for kind, (there, plot) in drawn.items():
        path = images / f"bench_{slug}_{kind}.png"
        plot(path) if there else path.unlink(missing_ok=True)


def publish(page: Path, readme: Path, images: Path, folder: Path = RESULTS) -> int:
    """Write both pages and the plots; return the number of results that they come from."""
    machines, gpu = load_machines(folder), load(folder / "gpu")
    for slug, found in machines.items():
        draw(found, slug, CPU_CASE, images)
    draw(gpu, "gpu", GPU_CASE, images)
    write_between(page, body(machines, gpu, folder, images))
    write_between(readme, headlines(machines, gpu))
    return len(gpu) + sum(map(len, machines.values()))


def main() -> None:
    count = publish(PAGE, README, IMAGES)
    print(f"wrote {PAGE.relative_to(ROOT)}, {README.name} and plots from {count} results")


if __name__ == "__main__":
    main()
