"""Merging adapters into a checkpoint on disk, against loading, merging and saving with PEFT, copying, and the product.

Each way runs in a process of its own, whose peak memory is measured and whose imports are not timed; all wait until
their bytes are on the disk; what they read was written just before and may lie in memory. The checkpoints are random
bfloat16: half the layers of TinyLlama-1.1B, and all of a Llama 7B (13 GB, and 13 GB for the result), of which only
copying and the product are rivals, and for which our process may have 2 GB of memory of its own.
The product's limit is counted: 2 N K P for each weight, at the rate of a large fp32 product of torch in this run.
FLORA_BENCH_STREAM names a folder that keeps the checkpoints for the next time.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from bench.harness.protocol import ROOT, Check, Result, Timing
from bench.harness.rates import rates


@dataclass(frozen=True)
class Size:
    """A Llama's sizes."""

    hidden: int
    middle: int
    heads: int
    keys: int
    layers: int
    vocabulary: int


TINY, SEVEN = Size(2048, 5632, 32, 4, 11, 32000), Size(4096, 11008, 32, 32, 32, 32000)
MEMORY_BYTES = 2 * 10**9
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
MERGED = sum(RANKS)


def make(folder: Path, size: Size) -> None:
    """Write the base and ten adapters: every tensor is a piece of one row of random numbers, begun somewhere."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from flora_core.adapters.peft import save_peft_adapter
    from flora_core.adapters.update import ClientUpdate

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.middle,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.keys,
        vocab_size=size.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    random, most = torch.Generator().manual_seed(0), max(map(math.prod, shapes.values()))
    pool = (torch.randn(most + 2**20, generator=random) * 0.02).bfloat16()

    def piece(shape: tuple[int, ...]) -> torch.Tensor:
        first, count = int(torch.randint(2**20, (), generator=random)), math.prod(shape)
        return pool[first : first + count].view(shape).clone()

    folder.mkdir(parents=True)
    names, weight_map = list(shapes), {}
    count = max(1, round(sum(map(math.prod, shapes.values())) / 3e8))
    for i in range(count):
        mine = names[i * len(names) // count : (i + 1) * len(names) // count]
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: piece(shapes[name]) for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for i, rank in enumerate(RANKS):
        pairs = {}
        for name, shape in shapes.items():
            if name.split(".")[-2] in TARGETS:
                A, B = (torch.randn(rank, size, generator=random) for size in (shape[1], shape[0]))
                pairs[name.removesuffix(".weight")] = (A * 0.01, B * 0.01)
        update = ClientUpdate(f"client-{i}", pairs, dict.fromkeys(pairs, 2.0))
        save_peft_adapter(update, folder.parent / f"client-{i}")
    model.config.save_pretrained(folder)


def product_flop(size: Size) -> int:
    """2 N K P for each weight that is merged into."""
    keys = size.hidden // size.heads * size.keys
    weights = 2 * size.hidden * (size.hidden + keys) + 3 * size.hidden * size.middle
    return 2 * MERGED * size.layers * weights


def by_flora(folder: Path, out: Path) -> None:
    import flora_core as flora

    flora.merge_into_checkpoint(folder / "base", {folder / f"client-{i}": 1.0 for i in range(len(RANKS))}, out)


def by_verifying(folder: Path, out: Path) -> None:
    """Read base and result again and certify every byte."""
    import flora_core as flora

    adapters = {folder / f"client-{i}": 1.0 for i in range(len(RANKS))}
    report = flora.merge_into_checkpoint(folder / "base", adapters, out, verify=True)
    if report.certificate is None or report.resumed_bytes != report.size_bytes:
        raise AssertionError("the result was made anew, where it was to be verified")


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


OURS, PEFT, COPY, PRODUCT = "flora", "peft: load, merge, save", "copy the shards", "the product alone, counted"
WAYS = {OURS: by_flora, PEFT: by_peft, COPY: by_copying, "verify": by_verifying}


def child(way: str, folder: str, out: str, threads: str, memory_bytes: str) -> None:
    """In a process of its own: one merge, from imports done to bytes on the disk, with so much memory (0: all)."""
    torch.set_num_threads(int(threads))
    if int(memory_bytes):
        # Private memory that can be written: not code, and not the page cache.
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes), int(memory_bytes)))
    if way in (OURS, "verify"):
        import flora_core.merge  # noqa: F401
        import flora_kernels.native  # noqa: F401
    elif way == PEFT:
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


def run(way: str, folder: Path, out: Path, memory_bytes: int = 0) -> dict[str, Any]:
    if way != "verify":
        shutil.rmtree(out, ignore_errors=True)
    os.sync()
    words = [sys.executable, "-W", "ignore", "-m", "bench.suites.test_stream_merge", way, str(folder), str(out)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*words, str(torch.get_num_threads()), str(memory_bytes)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        raise RuntimeError(f"{way} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def sampled_check(folder: Path, out: Path) -> Check:
    """A whole weight of every kind against float64; a result rounded once uses at most 1 of its budget."""
    from safetensors import safe_open

    from flora_core.testing import budget_ratio

    with open(folder / "base" / "model.safetensors.index.json") as file:
        homes = json.load(file)["weight_map"]
    worst, random = 0.0, Random("sampled")
    for kind in TARGETS:
        name = random.choice([name for name in homes if name.endswith(f"{kind}.weight")])
        stack = []
        for i in range(len(RANKS)):
            with safe_open(folder / f"client-{i}" / "adapter_model.safetensors", "pt") as file:
                key = f"base_model.model.{name.removesuffix('.weight')}"
                stack.append([file.get_tensor(f"{key}.lora_{factor}.weight").double() for factor in "AB"])
        A, B = torch.cat([A for A, _ in stack]), torch.cat([B for _, B in stack], 1)
        with safe_open(folder / "base" / homes[name], "pt") as one, safe_open(out / homes[name], "pt") as other:
            before, after = one.get_slice(name), other.get_slice(name)
            for first in range(0, B.shape[0], 512):
                rows = slice(first, first + 512)
                exact = before[rows].double().addmm_(B[rows], A, alpha=2.0 / len(RANKS))
                ratio = budget_ratio(after[rows], exact, exact.bfloat16())
                worst = max(worst, ratio, key=lambda ratio: (ratio != ratio, ratio))
    return Check(worst, "a whole weight of every kind, of some layer, against float64")


def compare(benchmark: Any, result: Result, folder: Path, size: Size, ways: Sequence[str], rounds: int, memory: int):
    """Time the ways in turn; the target is the slower of half the speed of copying and 0.7 of the product's limit."""
    size_bytes = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    flop, rate = product_flop(size), rates(torch.device("cpu"))["matrix_flops_per_s"]
    times, peaks = {way: Timing() for way in (*ways, PRODUCT)}, {}

    def turn() -> None:
        for way in ways:
            found = run(way, folder, folder / "out", memory if way == OURS else 0)
            times[way].wall_s.append(found["seconds"])
            times[way].cpu_s.append(found["cpu_s"])
            peaks[way] = {key: found[key] for key in ("started_bytes", "peak_bytes")}
            if way == OURS and "check" not in result.data:
                # Before any time is written; a red check ends the run.
                result.checked(sampled_check(folder, folder / "out"))
        times[PRODUCT].wall_s.append(flop / rate)
        times[PRODUCT].cpu_s.append(torch.get_num_threads() * flop / rate)
        result.timings(times)

    benchmark.pedantic(turn, rounds=rounds, iterations=1, warmup_rounds=0)
    medians = {way: timing.summary()["median_s"] for way, timing in times.items()}
    shares = {COPY: 0.5, PRODUCT: 0.7}
    slower = max(shares, key=lambda way: medians[way] / shares[way])
    mb_per_s = {way: size_bytes / median / 1e6 for way, median in medians.items()}
    details = {"bytes": size_bytes, "flop": flop, "flops_per_s": rate, "mb_per_s": mb_per_s, "memory": peaks}
    rivals = {way: 1.0 if way == PEFT else shares[way] if way == slower else None for way in times if way != OURS}
    result.save(check=result.data["check"] | details)
    print("\n" + result.conclude(OURS, rivals))
    for way in ways:
        print(f"{way}: {medians[way]:.2f} s, {mb_per_s[way]:.0f} MB/s, peak {peaks[way]['peak_bytes'] / 1e6:.0f} MB")
    print(f"{PRODUCT}: {medians[PRODUCT]:.2f} s ({flop / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s)")
    benchmark.extra_info |= {"speedups": result.data["speedups"], "json": result.path.name}


def prepare(tmp_path: Path, name: str, size: Size) -> Path:
    folder = Path(os.environ.get("FLORA_BENCH_STREAM", tmp_path)) / name
    # The last file that is made.
    if not (folder / "base" / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder / "base", size)
    return folder


def test_bench_stream_merge(benchmark: Any, scale: Any, tmp_path: Path):
    pytest.importorskip("peft")
    size = replace(TINY, layers=scale.depth(TINY.layers), vocabulary=TINY.vocabulary if scale.full else 1000)
    result = Result(
        "stream_merge",
        f"Merging ten adapters (P = {MERGED}, all linears) into a bfloat16 checkpoint on disk, 1.2 GB",
        {**asdict(size), "ranks": RANKS, "targets": TARGETS},
        scale.folder,
    )
    folder = prepare(tmp_path, "tiny", size)
    with result.reported():
        # A copy to warm up: memory that a virtual machine has never used is given to it page by page, and slowly.
        run(COPY, folder, folder / "out")
        compare(benchmark, result, folder, size, (OURS, PEFT, COPY), 3 if scale.full else 1, 0)
    shutil.rmtree(folder / "out")


def test_bench_stream_merge_7b(benchmark: Any, scale: Any, tmp_path: Path):
    if not scale.full or shutil.disk_usage(tmp_path).free < 32e9:
        pytest.skip("needs 32 GB of disk, and is no smoke test")
    result = Result(
        "stream_merge_7b",
        f"Merging them into a Llama 7B on disk, 13 GB, by a process of {MEMORY_BYTES / 1e9:.0f} GB at most",
        {**asdict(SEVEN), "ranks": RANKS, "targets": TARGETS, "memory_bytes": MEMORY_BYTES},
        scale.folder,
    )
    folder = prepare(tmp_path, "7b", SEVEN)
    with result.reported():
        compare(benchmark, result, folder, SEVEN, (COPY, OURS), 1, MEMORY_BYTES)
    peak = result.data["check"]["memory"][OURS]["peak_bytes"]
    assert peak < MEMORY_BYTES, f"the process had {peak / 1e9:.2f} GB"
    verified = run("verify", folder, folder / "out", MEMORY_BYTES)
    assert verified["peak_bytes"] < MEMORY_BYTES
    result.save(verified=verified)
    print(f"verified in {verified['seconds']:.0f} s, peak {verified['peak_bytes'] / 1e6:.0f} MB")
    shutil.rmtree(folder / "out")


if __name__ == "__main__":
    child(*sys.argv[1:])
