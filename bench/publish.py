"""Write docs/benchmarks.md, the README's numbers and docs/img/bench_*.png from bench/results, none typed by hand.

python -m bench.publish
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import plots
from bench.protocol import RESULTS, ROOT
from bench.rivals import FROZEN, Rival
from bench.tables import (
    SPEED_HEADER,
    TARGET_HEADER,
    Data,
    cases_rows,
    load,
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
# What the pictures of each machine are called, and the case that its scaling is around: model, tokens of each client.
CPU, GPU = ("bench", "SmolLM2-135M", 128), ("bench_gpu", "Llama-7B", 819)


def source(data: Data, folder: str = "bench/results") -> str:
    """Which file the numbers come from, and where it was measured."""
    env, load = data["environment"], data["environment"]["load"]
    others = load.get("other_cores")
    busy = "not known" if others is None else f"{others:.2f} cores"
    dirty = " with local changes" if env["changed_files"] else ""
    gpu = ", ".join(str(env[key]) for key in ("gpu", "driver_version", "clocks.sm") if key in env)
    return (
        f"`{folder}/{data['name']}.json`, `{data['command']}`; commit {env['commit'][:10]}{dirty}, "
        f"{gpu or env['processor']}, {env['threads']} threads, torch {env['versions']['torch']}, "
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
            f"{row['tokens_per_s'] / peft['tokens_per_s']:.2f}" if peft else "-",
        ]
        for row in data["rows"]
    ]
    heads = ["peak beyond the base", "a token in flight", "of PEFT's peak", "tokens/s", "of PEFT's"]
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
    """What the demo reached with each seed, and its time."""
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
    """The linears that ``bench.gpu_check`` timed: forward and backward together, in frozen linears."""
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
    from bench import linears, rounds, steps, test_data_loading, test_decoder_layer, test_optimizer

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


def sections(found: dict[str, Data], machine: tuple[str, str, int], images: Path) -> list[str]:
    """Targets, tables and pictures of what was measured on one machine."""

    def picture(kind: str, title: str) -> list[str]:
        name = f"{machine[0]}_{kind}.png"
        return [f"![{title}](img/{name})"] * ((images / name).is_file() and bool(found))

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


def body(
    found: dict[str, Data], gpu: dict[str, Data] | None = None, folder: Path = RESULTS, images: Path = IMAGES
) -> str:
    """Everything between the marks."""
    parts = sections(found, CPU, images)
    parts += gpu_parts(gpu or {}, folder, images)
    parts += absent({**found, **(gpu or {})}, folder)
    if found or gpu:
        parts += ["### How the rivals are set up", fairness()]
        parts += ["### Sources", "\n".join(f"- {source(data)}" for data in found.values())]
        parts += ["\n".join(f"- {source(data, 'bench/results/gpu')}" for data in (gpu or {}).values())] * bool(gpu)
    return "\n\n".join(parts)


def gpu_parts(gpu: dict[str, Data], folder: Path, images: Path) -> list[str]:
    """The same for what was measured on a GPU, and the linears that ``bench.gpu_check`` timed."""
    linears, verdicts = gpu_linears(folder / "gpu"), verdict_rows(folder / "gpu")
    if not gpu and linears is None and not verdicts:
        return ["## On a GPU", "Nothing measured yet: `make bench-gpu` on a machine that has one."]
    parts = ["## On a GPU", *sections(gpu, GPU, images)]
    parts += ["### Linears on every way to fuse, from CUDA graphs", linears] if linears else []
    return parts + [table(TARGET_HEADER, verdicts)] * bool(verdicts)


def absent(found: dict[str, Data], folder: Path = RESULTS) -> list[str]:
    """Who did not take part and why, and what did not run to its end."""
    missing, outcomes = missing_rows(found), [*outcome_rows(folder), *outcome_rows(folder / "gpu")]
    parts = []
    if missing:
        parts += ["### Rivals that did not take part", table(["rival", "reason", "where"], missing)]
    if outcomes:
        parts += ["### Not measured in the last run", table(["benchmark", "outcome", "reason"], outcomes)]
    return parts


def headlines(found: dict[str, Data], gpu: dict[str, Data] | None = None) -> str:
    """The README's tables: wins and losses, each with its file; what must be shown on a GPU, where one was at hand."""
    text = cpu_headlines(found)
    targets = [[*row[:3], f"`bench/results/gpu/{row[3]}.json`"] for row in target_rows(gpu or {})]
    return "\n\n".join([text, table(["on a GPU", *TARGET_HEADER[1:3], "source"], targets)]) if targets else text


def cpu_headlines(found: dict[str, Data]) -> str:
    """Each of the CPU's wins and losses."""
    rows = []

    def add(name: str, rival: str, what: str) -> None:
        data = found.get(name, {})
        if rival in data.get("speedups", {}):
            rows.append([what, ratio(data["speedups"][rival]["times"], rival), f"`bench/results/{name}.json`"])

    add("cohort_step_batch1", "peft", "training step of ten clients, one sequence of 128 tokens each, against PEFT")
    add("cohort_step_batch4", "peft", "the same with four sequences each")
    add("cohort_step_dolly", "peft", "the same with four Dolly records each, which PEFT pads")
    for name, data in found.items():
        if name.startswith(("cohort_rivals", "federated_round")):
            for rival in data.get("speedups", {}):
                words = "the frozen base" if rival == FROZEN else rival
                add(name, rival, f"{data['question'][0].lower()}{data['question'][1:]}, against {words}")
    add("merge_float32", "peft", "adding ten clients' updates to all linears, against PEFT's cat and merge")
    add("merge_float32", "addmm per layer", "the same against `addmm_` by hand")
    memory = found.get("memory", {})
    if "one_client_over_peft" in memory:
        share = f"{memory['one_client_over_peft']:.2f} of PEFT's"
        rows.append(["peak memory beyond the base, at one client's tokens", share, "`bench/results/memory.json`"])
    saved = {row["case"]: row["bytes_per_token"] for row in found.get("saved_activations", {}).get("rows", [])}
    ours, peft = (saved.get(f"{who}, dropout 0.1") for who in ("flora, ten clients", "PEFT, mean of ten clients"))
    if ours and peft:
        text, file = f"{ours / peft:.2f} of PEFT's", "`bench/results/saved_activations.json`"
        rows.append(["kept for backward per token, with dropout 0.1", text, file])
    for name, data in found.items():
        if name.startswith("demo") and data.get("finished"):
            first, last = data["rows"][0], data["rows"][-1]
            exact, losses = ([row[key] for row in (first, last)] for key in ("exact_match", "loss"))
            text = f"{exact[0]:.0%} to {exact[1]:.0%}, loss {losses[0]:.1f} to {losses[1]:.1f}"
            what = (
                f"the demo's exact answers with seed {data['settings']['seed']}, in {data['seconds'] / 60:.1f} minutes"
            )
            rows.append([what, text, f"`bench/results/{name}.json`"])
    if not rows:
        return "Nothing measured yet: `make bench`."
    return table(["SmolLM2-135M on two CPU cores", "we are", "source (the command stands in it)"], rows)


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


def draw(found: dict[str, Data], machine: tuple[str, str, int] = CPU, images: Path = IMAGES) -> None:
    """Every plot that there are results for; one that has none any more is taken away."""
    prefix, model, tokens = machine
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
        path = images / f"{prefix}_{kind}.png"
        plot(path) if there else path.unlink(missing_ok=True)


def publish(page: Path, readme: Path, images: Path, folder: Path = RESULTS) -> dict[str, Any]:
    """Write both pages and the plots; the results that they come from."""
    found, gpu = load(folder), load(folder / "gpu")
    draw(found, CPU, images)
    draw(gpu, GPU, images)
    write_between(page, body(found, gpu, folder, images))
    write_between(readme, headlines(found, gpu))
    return {**found, **gpu}


def main() -> None:
    found = publish(PAGE, README, IMAGES)
    print(f"wrote {PAGE.relative_to(ROOT)}, {README.name} and plots from {len(found)} results")


if __name__ == "__main__":
    main()
