"""Files are whole or not there, whatever happens to the writer: killed, out of disk, interrupted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flora_core.common import cache, files
from flora_core.common.files import SaveError, atomic_dir, atomic_write_bytes, atomic_write_json, write_safetensors
from flora_core.merge.staging import Staging
from flora_core.ops import autotune
from flora_core.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_written_files_are_there_whole_and_nothing_else(tmp_path):
    atomic_write_bytes(tmp_path / "new" / "a", b"1")
    atomic_write_bytes(tmp_path / "new" / "a", b"22")
    atomic_write_json(tmp_path / "new" / "b.json", {"z": 1, "a": "ü"})
    assert contents(tmp_path / "new") == {"a": b"22", "b.json": '{\n  "a": "ü",\n  "z": 1\n}\n'.encode()}
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(tmp_path / "new" / "b.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "new" / "b.json").read_text()) == {"a": "ü", "z": 1}


def test_dir_appears_at_the_end_and_not_at_all_after_an_error(tmp_path):
    target = tmp_path / "deep" / "round"
    with atomic_dir(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
    assert contents(target) == {"sub/a": b"1"}

    def interrupted():
        with atomic_dir(tmp_path / "other") as folder:
            (folder / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def watch_renames(monkeypatch) -> tuple[list[str], set[str]]:
    """Files renamed before they are on the disk, and the folders whose renames a power cut could still undo."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("reads /proc")
    synced, due, faults = set(), set(), []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle) -> None:
        fsync(handle)
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        due.discard(os.readlink(f"/proc/self/fd/{handle}"))

    def watched_replace(old, new) -> None:
        faults.extend(str(path) for path in (Path(old), *Path(old).rglob("*")) if str(path) not in synced)
        due.add(str(Path(new).parent))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    return faults, due


def test_nothing_appears_before_it_is_on_the_disk(tmp_path, monkeypatch):
    early, due = watch_renames(monkeypatch)
    atomic_write_bytes(tmp_path / "file", b"1")
    with atomic_dir(tmp_path / "deep" / "round") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
    assert (early, due) == ([], set())


def test_dir_replaces_only_what_it_may(tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "a").write_text("old")
    (target / ".tmp-1-0-b").write_text("of a killed writer")
    with atomic_dir(target, replaceable={"a", "b"}) as folder:
        (folder / "b").write_text("new")
    assert contents(target) == {"b": b"new"}
    with pytest.raises(FileExistsError, match="already holds b: choose a new or an empty folder"), atomic_dir(target):
        pass
    with pytest.raises(FileExistsError, match="is a file, and a folder is to be saved"), atomic_dir(target / "b"):
        pass
    assert contents(tmp_path) == {"adapter/b": b"new"}


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EROFS, "the file system is read-only: choose another place"),
        (errno.EACCES, "no permission to write there"),
        (errno.EIO, "check the path and the disk"),
    ],
)
def test_failed_writes_say_what_to_do_and_leave_what_was_there(number, words, tmp_path, monkeypatch):
    atomic_write_bytes(tmp_path / "a", b"old")
    with atomic_dir(tmp_path / "d") as folder:
        (folder / "a").write_text("old")
    before = contents(tmp_path)

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SaveError, match=f"could not save .*a: .*{words}.*what was saved before is unchanged") as caught:
        atomic_write_bytes(tmp_path / "a", b"new")
    assert caught.value.errno == number
    with pytest.raises(SaveError, match=words), atomic_dir(tmp_path / "d", replaceable=["a"]) as folder:
        (folder / "a").write_text("new")
    assert contents(tmp_path) == before


def test_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    with atomic_dir(tmp_path / "d") as folder:
        (folder / "a").write_text("old")
    rename = Path.rename

    def fail_for_new(self, target):
        if not self.name.startswith(files._OLD) and Path(target).name == "d":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(SaveError, match="broken"), atomic_dir(tmp_path / "d", replaceable=["a"]) as folder:
        (folder / "a").write_text("new")
    assert contents(tmp_path) == {"d/a": b"old"}


def test_path_through_a_file_is_refused_with_its_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda p: atomic_write_bytes(p, b""), lambda p: atomic_dir(p).__enter__()):
        with pytest.raises(OSError, match=r"file/x.*: choose another place"):
            write(tmp_path / "file" / "x" / "y")


def run_writer(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code in a process of its own, with ``folder`` and ``files`` at hand."""
    header = "import os, resource, signal\nfrom pathlib import Path\nfrom flora_core import files\n"
    script = header + f"folder = Path({str(folder)!r})\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_write_that_the_system_cuts_short_changes_nothing(tmp_path):
    """A real failing write, in Python and in safetensors: the process may not write files above 4 KB."""
    atomic_write_bytes(tmp_path / "a", b"old")
    done = run_writer(
        """
        import torch

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

        def save_tensors():
            with files.atomic_dir(folder / "d") as inner:
                files.write_safetensors(inner / "w", {"x": torch.zeros(9000)})

        for write in (lambda: files.atomic_write_bytes(folder / "a", bytes(9000)), save_tensors):
            try:
                write()
            except OSError as error:
                print(type(error).__name__, error.errno, "larger than" in str(error))
        """,
        tmp_path,
    )
    assert done.stdout.splitlines() == [f"SaveError {errno.EFBIG} True"] * 2, done.stderr
    assert contents(tmp_path) == {"a": b"old"}


def test_what_killed_writers_leave_is_ignored_and_cleaned_by_the_next(tmp_path):
    done = run_writer(
        """
        with files.atomic_dir(folder / "d") as inner:
            (inner / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tmp-")
    atomic_write_bytes(tmp_path / "another", b"")
    assert left.exists(), "another target's leftovers may belong to a writer at work"
    with atomic_dir(tmp_path / "d") as folder:
        assert not left.exists()
        (folder / "a").write_text("whole")
        with contextlib.suppress(StopIteration), atomic_dir(tmp_path / "d"):
            assert folder.exists(), "a writer at work in this process must be left alone"
            raise StopIteration
    assert contents(tmp_path) == {"another": b"", "d/a": b"whole"}
    (tmp_path / f".tmp-{os.getppid()}-0-d").mkdir()
    with atomic_dir(tmp_path / "d", replaceable=["a"]):
        pass
    assert (tmp_path / f".tmp-{os.getppid()}-0-d").exists(), "a writer at work in a live process must be left alone"


def test_writer_killed_between_its_two_renames_loses_nothing(tmp_path):
    with atomic_dir(tmp_path / "d") as folder:
        (folder / "a").write_text("old")
    done = run_writer(
        """
        rename = Path.rename
        def once(self, target):
            rename(self, target)
            os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = once
        with files.atomic_dir(folder / "d", replaceable=["a"]) as inner:
            (inner / "a").write_text("new")
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "d").exists()
    with pytest.raises(RuntimeError, match="stop"), atomic_dir(tmp_path / "d", replaceable=["a"]):
        raise RuntimeError("stop")
    assert contents(tmp_path) == {"d/a": b"old"}


def test_safetensors_of_views_and_transposes(tmp_path):
    flat = torch.arange(12.0)
    tensors = {"a": flat[:6].view(2, 3).T, "b": flat[6:].requires_grad_(False), "empty": torch.zeros(0, 3)}
    write_safetensors(tmp_path / "w", tensors, {"format": "pt", "round": "3"})
    back = load_file(tmp_path / "w")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_safetensors_error_that_is_not_the_disk_s_is_passed_on(tmp_path, monkeypatch):
    import safetensors.torch

    def fail(*_, **__):
        raise safetensors.SafetensorError("bad header")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(safetensors.SafetensorError, match="bad header"):
        write_safetensors(tmp_path / "w", {})


def test_two_runs_cannot_share_a_folder(tmp_path):
    run, staging = tmp_path / "run", Staging(tmp_path / "merged")
    with RunFolder(run).locked(), pytest.raises(BlockingIOError) as refused, RunFolder(run).locked():
        pass
    assert f"another process (pid {os.getpid()}) works in {run}: wait until it ends, or choose another" in str(refused)
    with staging._locked(), pytest.raises(BlockingIOError, match=rf"\(pid {os.getpid()}\) is making .*merged: wait"):
        staging.clear()
    with RunFolder(run).locked(), staging._locked():
        assert (run / ".lock-holder").is_file()
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_names_a_file_system_that_has_no_locks(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(SaveError, match=r"run: No locks available; .* has no locks: choose a folder on a local disk"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "/home/x/.cache/flora"),
        ({"XDG_CACHE_HOME": "", "FLORA_CACHE": ""}, "/home/x/.cache/flora"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/flora"),
        ({"XDG_CACHE_HOME": "/x", "FLORA_CACHE": "~/own"}, "/home/x/own"),
    ],
    ids=["none", "empty", "xdg", "own"],
)
def test_everything_is_cached_in_one_folder(variables, folder, monkeypatch):
    for name in ("XDG_CACHE_HOME", "FLORA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/x", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(folder)
    assert autotune.Choices({"device": "cpu"}).path.parent == Path(folder)
