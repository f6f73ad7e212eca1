"""Merging on disk under kills, readers, full disks and little memory.

Merges that are killed or watched run in forks of one process that has imported everything and has no threads.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.common.files import SaveError
from flora_core.merge import staging, writer
from tests.common.test_files import watch_renames
from tests.support.checkpoints import files, save_adapters, save_checkpoint, weights

ROOT = Path(__file__).resolve().parents[2]
_FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile"}
_BLOCK = 1 << 14

linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


# In a fork.


def merge_once(request: dict[str, Any]) -> dict[str, Any]:
    """One merge; it kills itself before its operation number ``kill_at``: one on a name, or half of a write."""
    torch.set_num_threads(1)
    count = 0

    def step() -> bool:
        nonlocal count
        count += 1
        return count == request.get("kill_at")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_OPERATIONS and request["out"] in str(arguments[:2]).replace(".merging-", "") and step():
            os.kill(os.getpid(), signal.SIGKILL)

    def half(whole: Any) -> Any:
        def written(file: Any, view: memoryview) -> None:
            if step():
                whole(file, view[: len(view) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            whole(file, view)

        return written

    writer.BLOCK_BYTES = _BLOCK
    writer._write = half(writer._write)
    sys.addaudithook(watch)
    report = flora.merge_into_checkpoint(
        request["base"], dict.fromkeys(request["adapters"], 1), request["out"], strategy=request["strategy"]
    )
    return {"operations": count, "resumed": report.resumed_bytes}


def merge_in_little_memory(request: dict[str, Any]) -> dict[str, Any]:
    """One merge after which the process may have grown by ``limit`` bytes of memory of its own, and no more."""
    torch.set_num_threads(1)
    verify, small = request["verify"], dict.fromkeys(request["adapters"][:-1], 1)
    # What is made once: threads, caches, code.
    flora.merge_into_checkpoint(request["small"], small, request["out"] + "-small", verify=verify)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory()
    limit = before["VmData"] + request["limit"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    flora.merge_into_checkpoint(request["base"], dict.fromkeys(request["adapters"], 1), request["out"], verify=verify)
    return {"grown": memory()["VmHWM"] - before["VmRSS"]}


def memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}


def serve() -> None:
    """Fork for each request on standard input; kill the fork by the clock if asked; answer how it ended."""
    import flora_kernels.native  # noqa: F401

    assert flora.merge_into_checkpoint
    for line in sys.stdin:
        assert not os.path.isdir("/proc/self/task") or len(os.listdir("/proc/self/task")) == 1
        print(json.dumps(fork_and_wait(json.loads(line))), flush=True)


def fork_and_wait(request: dict[str, Any]) -> tuple[int, float, str]:
    """One fork: how it ended, its seconds and its answer."""
    began, (reading, writing) = time.monotonic(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        try:
            os.write(writing, json.dumps(globals()[request["do"]](request)).encode())
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(writing)
    ended = status = 0
    while not ended:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended and time.monotonic() - began > request.get("kill_after", 1e9):
            os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0)
        time.sleep(0.0005)
    with os.fdopen(reading) as pipe:
        return status, time.monotonic() - began, pipe.read()


# In pytest.


class Runner:
    """The process that forks."""

    def __init__(self, folder: Path):
        self.errors = folder / "errors.txt"
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __call__(self, do: str, **request: Any) -> tuple[int, float, dict[str, Any]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        status, seconds, text = json.loads(self.process.stdout.readline())
        return status, seconds, json.loads(text or "{}")


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    one = Runner(tmp_path_factory.mktemp("runner"))
    yield one
    one.process.communicate()


@pytest.mark.parametrize("strategy", ["flora", "flora_svd"])
def test_a_killed_merge_goes_on_and_ends_with_the_same_bytes(strategy, runner, tmp_path, scale):
    base, paths = save_checkpoint(tmp_path / "base", weights(width=4)), save_adapters(tmp_path, width=4)
    largest = max(tensor.nbytes for tensor in weights(width=4).values())
    fixed = {"base": str(base), "adapters": paths, "strategy": strategy}
    status, seconds, whole = runner("merge_once", out=str(tmp_path / "whole"), **fixed)
    assert status == 0, runner.errors.read_text()
    wanted, random = files(tmp_path / "whole"), Random(f"kills {strategy}")
    kills, number, done = 0, 0, 0
    while kills < scale(8, 100, "kills") or done:
        out = tmp_path / f"out{number}"
        kill = (
            {"kill_at": random.randint(1, whole["operations"])}
            if kills % 3
            else {"kill_after": seconds * random.random()}
        )
        # A merge may be killed several times, and must come to an end.
        status, _, answer = runner("merge_once", out=str(out), **fixed, **(kill if random.random() < 0.8 else {}))
        assert status in (0, signal.SIGKILL), runner.errors.read_text()
        model = tmp_path / f".merging-out{number}" / "model"
        staged = [*model.glob("*.safetensors"), *model.glob("*.safetensors.partial")]
        if out.exists():
            # Also after a kill: between its last step and its end.
            assert files(out) == wanted
        if status == 0:
            assert answer["resumed"] > done - largest - 1 or answer["resumed"] == 0 == done
            assert not list(tmp_path.glob(".merging-*"))
            number, done = number + 1, 0
        else:
            kills, done = kills + 1, sum(path.stat().st_size for path in staged)


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_BYTES", 1 << 10)
    base, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    adapters, out = dict.fromkeys(paths, 1), tmp_path / "out"
    flora.merge_into_checkpoint(base, adapters, tmp_path / "wanted")
    wanted, seen, stop = files(tmp_path / "wanted"), [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            if out.exists():
                seen.append(files(out) == wanted)

    steps = []
    reader = threading.Thread(target=read)
    reader.start()
    try:
        flora.merge_into_checkpoint(
            base, adapters, out, verify=False, progress=lambda *step: steps.append((out.exists(), *step))
        )
        end = time.monotonic() + 10
        while not seen and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        stop.set()
        reader.join()
    assert seen
    assert all(seen)
    assert len(steps) > 40
    assert not any(there for there, *_ in steps)
    assert [done for _, _, done, _ in steps] == sorted(done for _, _, done, _ in steps)
    assert steps[-1][2] == steps[-1][3] == sum(path.stat().st_size for path in out.glob("*.safetensors"))


def test_no_shard_and_no_model_appears_before_it_is_on_the_disk(tmp_path, monkeypatch):
    base, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    early, due = watch_renames(monkeypatch)
    flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "out")
    assert (early, due) == ([], set())


def test_other_inputs_start_anew_and_another_start_of_the_machine_trusts_no_partial_file(tmp_path, monkeypatch):
    base, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)

    def stop_late(what: str, done: int, whole: int) -> None:
        if done > 0.8 * whole:
            raise KeyboardInterrupt

    def resumed(adapters: list[str], progress: Any = None) -> int:
        return flora.merge_into_checkpoint(
            base, dict.fromkeys(adapters, 1), tmp_path / "out", progress=progress
        ).resumed_bytes

    sizes = sorted(path.stat().st_size for path in base.glob("*.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        resumed(paths, stop_late)
    with pytest.raises(KeyboardInterrupt):
        resumed(paths[:1], stop_late)  # removes what was made of other adapters
    monkeypatch.setattr(staging, "_boot", lambda: "another")
    found = resumed(paths[:1])
    assert 0 < found < sum(sizes)
    assert found in {sizes[0] + sizes[1], sizes[0] + sizes[2], sizes[1] + sizes[2]}
    flora.merge_into_checkpoint(base, {paths[0]: 1}, tmp_path / "wanted")
    assert files(tmp_path / "out") == files(tmp_path / "wanted")


def test_two_processes_do_not_make_one_output(tmp_path):
    base, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    merge = lambda **more: flora.merge_into_checkpoint(base, {paths[0]: 1}, tmp_path / "out", **more)  # noqa: E731
    refused = []

    def second(what: str, done: int, whole: int) -> None:
        if not refused:
            with pytest.raises(BlockingIOError, match=r"another process .* is making .*out: wait until it ends"):
                merge()
            refused.append(True)

    merge(progress=second)
    assert refused
    assert (tmp_path / "out").is_dir()


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    base, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    keep, count = writer._write, 0

    def full(file: Any, view: memoryview) -> None:
        nonlocal count
        count += 1
        if count == 4:
            keep(file, view[: len(view) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        keep(file, view)

    monkeypatch.setattr(writer, "_write", full)
    with pytest.raises(SaveError, match=r"the disk is full: free some space.*the same command goes on from there"):
        flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "out").resumed_bytes > 0
    flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "wanted")
    assert files(tmp_path / "out") == files(tmp_path / "wanted")


def test_numbers_that_begin_anywhere_in_a_file_and_disks_that_take_no_direct_writes(tmp_path, monkeypatch):
    """A header of odd length leaves every number between its places; blocks of some rows end within pages."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 3000)
    base, paths = save_checkpoint(tmp_path / "base", weights(width=2), shards=1), save_adapters(tmp_path, width=2)
    file = "model-00001-of-00001.safetensors"
    data = (base / file).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    wanted = None
    for spaces in (0, 1, 7):
        header = data[8:start] + b" " * spaces
        (base / file).write_bytes(len(header).to_bytes(8, "little") + header + data[start:])
        for direct in (True, False):
            if not direct:
                monkeypatch.setattr(writer, "_set_direct", lambda *_: False)
            out = tmp_path / f"out-{spaces}-{direct}"
            flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), out, verify=True)
            found = (out / file).read_bytes()
            assert found[: start + spaces] == (base / file).read_bytes()[: start + spaces]
            wanted = found[start:] if wanted is None else wanted
            assert found[start + spaces :] == wanted
        monkeypatch.undo()
        monkeypatch.setattr(writer, "BLOCK_BYTES", 3000)


def test_a_disk_that_takes_no_more_direct_writes_gets_the_rest_by_others(tmp_path, monkeypatch):
    """The rest of a page after a part of it was taken is no whole page, which direct writes refuse."""
    base, paths = save_checkpoint(tmp_path / "base", weights(width=4)), save_adapters(tmp_path, width=4)
    flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "wanted")
    keep = writer._write

    def crooked(file: Any, view: memoryview) -> None:
        if len(view) > 1000:
            direct = writer._set_direct(file, False)
            keep(file, view[:1000])
            writer._set_direct(file, direct)
        keep(file, view[1000:] if len(view) > 1000 else view)

    monkeypatch.setattr(writer, "_write", crooked)
    flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "wanted")


def test_a_base_that_shrinks_is_noticed(tmp_path):
    base, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)

    def cut(what: str, done: int, whole: int) -> None:
        os.truncate(base / "model-00003-of-00003.safetensors", 5000)

    with pytest.raises(ValueError, match=r"00003.safetensors.* (became shorter|changed) while it was read"):
        flora.merge_into_checkpoint(base, dict.fromkeys(paths, 1), tmp_path / "out", progress=cut)
    assert not (tmp_path / "out").exists()


@linux
@pytest.mark.parametrize("verify", [False, True], ids=["merge", "merge and verify"])
def test_memory_is_bounded_by_blocks_and_one_module_and_not_by_the_model(verify, runner, tmp_path, scale):
    """The process may ask for 24 MB at most, whatever the checkpoint: RLIMIT_DATA counts private writable memory."""
    layers, limit = scale(10, 60, "layers"), 24_000_000
    big, small = weights(layers, width=24), weights(1, width=24)
    size = sum(tensor.nbytes for tensor in big.values())
    base = save_checkpoint(tmp_path / "base", big, shards=1)
    paths = save_adapters(tmp_path, (16, 4, 12), layers=1, width=24)
    (whole,) = save_adapters(tmp_path / "whole", (8,), layers=layers, width=24)
    one = save_checkpoint(tmp_path / "one", small, shards=2)
    del big, small
    assert size > 2 * limit
    request = {"base": str(base), "adapters": [*paths, whole], "out": str(tmp_path / "out"), "verify": verify}
    paths_small = {"small": str(one), "limit": limit}
    status, _, found = runner("merge_in_little_memory", **request, **paths_small)
    assert status == 0, runner.errors.read_text()
    assert found["grown"] < limit
    print(f"{size / 1e6:.0f} MB merged while the process grew by {found['grown'] / 1e6:.1f} MB")


if __name__ == "__main__":
    serve()


def test_a_stopped_merge_with_scale_tokenizer_and_made_index_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_BYTES", 1 << 10)
    base, paths = save_checkpoint(tmp_path / "base", weights()), save_adapters(tmp_path)
    (base / "model.safetensors.index.json").unlink()
    table = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}
    (Path(paths[0]) / "tokenizer.json").write_text(json.dumps(table))
    options: dict[str, Any] = {"scale": -0.5, "tokenizer": "adapter"}
    adapters = dict.fromkeys(paths, 1)

    def stop_late(what: str, done: int, whole: int) -> None:
        if done > 0.7 * whole:
            raise KeyboardInterrupt

    flora.merge_into_checkpoint(base, adapters, tmp_path / "wanted", **options)
    with pytest.raises(KeyboardInterrupt):
        flora.merge_into_checkpoint(base, adapters, tmp_path / "out", progress=stop_late, **options)
    assert not (tmp_path / "out").exists()
    report = flora.merge_into_checkpoint(base, adapters, tmp_path / "out", **options)
    assert report.resumed_bytes > 0
    assert files(tmp_path / "out") == files(tmp_path / "wanted")
    assert flora.merge_into_checkpoint(base, adapters, tmp_path / "out", verify=True, **options).certificate
    for name, words in (("tokenizer.json", "differs from"), ("model.safetensors.index.json", "the base's index")):
        good = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(good + b" ")
        with pytest.raises(ValueError, match=words):
            flora.merge_into_checkpoint(base, adapters, tmp_path / "out", verify=True, **options)
        (tmp_path / "out" / name).write_bytes(good)
