"""Merging adapters into a checkpoint on disk, against loading, merging and saving with PEFT, and against copying.

Each way runs in a process of its own, whose peak memory is measured and whose imports are not timed; all wait until
their bytes are on the disk; what they read was written just before and may lie in memory. The checkpoint has half the
layers of TinyLlama-1.1B in bfloat16, random. FLORA_BENCH_STREAM names a folder that keeps it for the next time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.protocol import ROOT, Check, Result, Timing

HIDDEN, MIDDLE, HEADS, KEYS, LAYERS, VOCAB = 2048, 5632, 32, 4, 11, 32000
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
MERGED = sum(RANKS)


def config(layers: int, vocabulary: int) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


def make(folder: Path, layers: int, vocabulary: int) -> None:
    """Write the base and ten adapters, tensors of one shape alike: their values do not matter for the time."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from flora_core.peft_io import save_peft_adapter
    from flora_core.update import ClientUpdate

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(layers, vocabulary), dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    random = torch.Generator().manual_seed(0)
    values = {shape: (torch.randn(shape, generator=random) * 0.02).bfloat16() for shape in set(shapes.values())}
    folder.mkdir(parents=True)
    names, weight_map = list(shapes), {}
    count = max(1, round(layers / 5))
    for i in range(count):
        mine = names[i * len(names) // count : (i + 1) * len(names) // count]
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: values[shapes[name]].clone() for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model.config.save_pretrained(folder)
    for i, rank in enumerate(RANKS):
        pairs = {}
        for name, shape in shapes.items():
            if name.split(".")[-2] in TARGETS:
                A, B = (torch.randn(rank, size, generator=random) for size in (shape[1], shape[0]))
                pairs[name.removesuffix(".weight")] = (A * 0.01, B * 0.01)
        update = ClientUpdate(f"client-{i}", pairs, dict.fromkeys(pairs, 2.0))
        save_peft_adapter(update, folder.parent / f"client-{i}")


def by_flora(folder: Path, out: Path) -> None:
    import flora_core as flora

    flora.merge_into_checkpoint(folder / "base", {folder / f"client-{i}": 1.0 for i in range(len(RANKS))}, out)


def by_peft(folder: Path, out: Path) -> None:
    """Load, add_weighted_adapter("cat"), merge_and_unload, save_pretrained."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(model, folder / "client-0", adapter_name="0")
    for i in range(1, len(RANKS)):
        model.load_adapter(folder / f"client-{i}", adapter_name=str(i))
    names = [str(i) for i in range(len(RANKS))]
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "all", combination_type="cat")
    model.set_adapter("all")
    model.merge_and_unload().save_pretrained(out, max_shard_size="500MB")


def by_copying(folder: Path, out: Path) -> None:
    """The shards copied by the system: what no merge can be faster than."""
    out.mkdir()
    for path in sorted((folder / "base").glob("*.safetensors")):
        shutil.copyfile(path, out / path.name)


WAYS = {"flora": by_flora, "peft: load, merge, save": by_peft, "copy the shards": by_copying}


def child(way: str, folder: str, out: str, threads: str) -> None:
    """In a process of its own: one merge, from imports done to bytes on the disk."""
    torch.set_num_threads(int(threads))
    if way == "flora":
        import flora_core.streaming  # noqa: F401
        import flora_kernels.native  # noqa: F401
    elif way != "copy the shards":
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401
    started = peak_bytes()
    began, cpu = time.perf_counter(), time.process_time()
    WAYS[way](Path(folder), Path(out))
    for path in Path(out).iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds, busy = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu_s": busy, "started_bytes": started, "peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """The most memory that this process has had; getrusage would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(way: str, folder: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    words = [sys.executable, "-W", "ignore", "-m", "bench.test_stream_merge", way, str(folder), str(out)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*words, str(torch.get_num_threads())], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{way} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def sampled_check(folder: Path, out: Path) -> Check:
    """Some rows of some weights of every kind against float64; a result rounded once uses at most 1 of its budget."""
    from safetensors import safe_open

    from flora_core.testing import budget_ratio

    with open(folder / "base" / "model.safetensors.index.json") as file:
        homes = json.load(file)["weight_map"]
    worst, rows = 0.0, slice(100, 164)
    for kind in TARGETS:
        name = next(name for name in homes if name.endswith(f"{kind}.weight"))
        with safe_open(folder / "base" / homes[name], "pt") as one, safe_open(out / homes[name], "pt") as other:
            exact, found = one.get_slice(name)[rows].double(), other.get_slice(name)[rows]
        for i in range(len(RANKS)):
            with safe_open(folder / f"client-{i}" / "adapter_model.safetensors", "pt") as file:
                key = f"base_model.model.{name.removesuffix('.weight')}"
                A, B = (file.get_tensor(f"{key}.lora_{factor}.weight").double() for factor in "AB")
            exact += 2.0 / len(RANKS) * B[rows] @ A
        worst = max(worst, budget_ratio(found, exact, exact.bfloat16()), key=lambda ratio: (ratio != ratio, ratio))
    return Check(worst, "64 rows of one weight of every kind against float64")


def test_bench_stream_merge(benchmark: Any, scale: Any, tmp_path: Path):
    pytest.importorskip("peft")
    layers, vocabulary = scale.depth(LAYERS), VOCAB if scale.full else 1000
    folder = Path(os.environ.get("FLORA_BENCH_STREAM", tmp_path))
    if not (folder / "base" / "config.json").exists():
        make(folder / "base", layers, vocabulary)
    size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    settings = {"layers": layers, "vocabulary": vocabulary, "bytes": size, "ranks": RANKS, "targets": TARGETS}
    result = Result(
        "stream_merge",
        f"Merging ten adapters (P = {MERGED}, all linears) into a bfloat16 checkpoint on disk",
        settings,
        scale.folder,
    )
    times, peaks, checks = {way: Timing() for way in WAYS}, {}, []

    def turn() -> None:
        for way in WAYS:
            found = run(way, folder, folder / "out")
            times[way].wall_s.append(found["seconds"])
            times[way].cpu_s.append(found["cpu_s"])
            peaks[way] = {key: found[key] for key in ("started_bytes", "peak_bytes")}
            result.timings(times)
            if way == "flora":
                checks.append(sampled_check(folder, folder / "out"))
        shutil.rmtree(folder / "out")

    # A copy to warm up: memory that a virtual machine has never used is given to it page by page, and slowly.
    run("copy the shards", folder, folder / "out")
    benchmark.pedantic(turn, rounds=1, iterations=1, warmup_rounds=0)
    rates = {way: size / timing.wall_s[0] / 1e6 for way, timing in times.items()}
    details = {"mb_per_s": rates, "memory": peaks}
    rivals: dict[str, float | None] = {"peft: load, merge, save": 1.0, "copy the shards": 0.5}
    print("\n" + result.conclude(Check(checks[0].ratio, checks[0].how, details), "flora", rivals))
    for way in WAYS:
        print(f"{way}: {rates[way]:.0f} MB/s, peak memory {peaks[way]['peak_bytes'] / 1e6:.0f} MB")
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}


if __name__ == "__main__":
    child(*sys.argv[1:])
