"""Write a shard like another one, in which some tensors have a stack's product added, a block of rows at a time.

The header is copied, for names, dtypes, shapes and offsets stay: all files keep their layout to the byte. While a
product is added to a block, one thread reads the next and another writes the last, past the page cache where that is
possible: copying into the cache may take longer than the product.
Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..aggregation import Stack
from ..common import require
from ..ops import stacked_merge_
from .shards import DTYPES, Entry, Shard, read_into
from .staging import PARTIAL
from .targets import Target

# Three of them are in memory: read, being summed, and being written.
BLOCK_BYTES = 16 * 2**20
# Direct writes ask for offsets, sizes and addresses that are multiples of a disk's block.
PAGE = 4096
Advance = Callable[[int], None]


def write_shard(
    shard: Shard, path: Path, targets: Mapping[str, Target], stack: Callable[[str], Stack], advance: Advance
) -> int:
    """Write one shard, going on where an earlier attempt stopped; at most one tensor is written again.

    Args:
        shard: The shard of the base.
        path: Where it goes; ``path.partial`` until it is whole and on the disk.
        targets: Tensor name -> target, of any shard.
        stack: Module -> (A_PK, B_PN, coef_P) to add.
        advance: Called with numbers of bytes that are done, those found done first.
    Returns:
        Bytes that were found done.
    """
    if path.exists():
        advance(shard.size)
        return shard.size
    partial = path.with_name(path.name + PARTIAL)
    with open(shard.path, "rb", buffering=0) as source, _open_kept(partial) as file:
        done = _whole_tensors(shard, os.fstat(file.fileno()).st_size)
        advance(done)
        with ThreadPoolExecutor(2) as threads:
            sink, stacks = Sink(file, done, threads, advance), dict[str, Stack]()
            for block in _ahead(threads, _read(source, _spans(done, shard, targets))):
                if block.part is not None:
                    target, rows = block.part
                    if target.module not in stacks:
                        stacks.clear()
                        stacks[target.module] = sides(target, stack(target.module))
                    _add(block.data, target.entry, rows, stacks[target.module])
                sink.append(block)
            sink.finish()
        require(
            os.fstat(file.fileno()).st_size == shard.size == os.fstat(source.fileno()).st_size,
            f"{shard.path} changed while it was read; leave it alone and start again",
        )
        os.fsync(file.fileno())
    os.replace(partial, path)
    return done


def _open_kept(path: Path) -> BinaryIO:
    """Open for writing what may be there already."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(handle, "r+b", buffering=0)  # pyright: ignore[reportReturnType]


def _whole_tensors(shard: Shard, size: int) -> int:
    """How much of a file's beginning is known to be good: up to the end of the last whole tensor."""
    ends = [shard.header_bytes, *(entry.stop for entry in shard.entries)]
    return max((end for end in ends if end <= size), default=0)


# Blocks.


# Bytes start:stop of a file, and the rows of a target that they are.
Span = tuple[int, int, tuple[Target, slice] | None]


@dataclass(frozen=True)
class Block:
    """Bytes start:stop of a file, and the rows of a target that they are.

    ``memory`` begins with the page of the file that they begin in, of which others may have the first bytes.
    """

    start: int
    stop: int
    part: tuple[Target, slice] | None
    memory: memoryview

    @property
    def lead(self) -> int:
        """Bytes of the first page that are not theirs."""
        return self.start % PAGE

    @property
    def data(self) -> memoryview:
        """The bytes."""
        return self.memory[self.lead :]


def blocks(entry: Entry, most: int) -> Iterator[tuple[slice, int, int]]:
    """Cut a matrix into blocks of rows of at most ``most`` bytes: the rows and their bytes in the file."""
    rows = entry.shape[0]
    row_bytes = (entry.stop - entry.start) // rows
    step = max(1, most // row_bytes)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        yield slice(first, last), entry.start + first * row_bytes, entry.start + last * row_bytes


def _spans(done: int, shard: Shard, targets: Mapping[str, Target]) -> Iterator[Span]:
    """The parts to write from ``done`` on, the end of a tensor."""
    copied = done
    for entry in shard.entries:
        if entry.name in targets and done <= entry.start < entry.stop:
            yield from _copied(copied, entry.start)
            for rows, start, stop in blocks(entry, BLOCK_BYTES):
                yield start, stop, (targets[entry.name], rows)
            copied = entry.stop
    yield from _copied(copied, shard.size)


def _copied(start: int, stop: int) -> Iterator[Span]:
    for first in range(start, stop, BLOCK_BYTES):
        yield first, min(stop, first + BLOCK_BYTES), None


def _read(source: BinaryIO, spans: Iterable[Span]) -> Iterator[Block]:
    """Read a file's blocks, into three pieces of memory in turn."""
    memories = [memoryview(b"")] * 3
    for i, (start, stop, part) in enumerate(spans):
        size = start % PAGE + stop - start
        if len(memories[i % 3]) < size:
            memories[i % 3] = _memory(size)
        block = Block(start, stop, part, memories[i % 3][:size])
        read_into(source, start, block.data)
        yield block


def _memory(size: int) -> memoryview:
    """Memory that begins at a page."""
    raw = bytearray(size + PAGE)
    skip = -torch.frombuffer(raw, dtype=torch.uint8).data_ptr() % PAGE
    return memoryview(raw)[skip : skip + size]


def _ahead(threads: ThreadPoolExecutor, made: Iterator[Block]) -> Iterator[Block]:
    """The same blocks, each made by a thread while the one before it is in use."""
    pending = threads.submit(next, made, None)
    while (block := pending.result()) is not None:
        pending = threads.submit(next, made, None)
        yield block


# The product.


def sides(target: Target, stack: Stack) -> Stack:
    """A stack whose product has the shape that is stored: the factors change places where that is K x N."""
    A_PK, B_PN, coef_P = stack
    return (B_PN, A_PK, coef_P) if target.transposed else stack


def _add(view: memoryview, entry: Entry, part: slice, stack: Stack) -> None:
    """Add the stack's product to some rows of a weight."""
    (columns, rows, coef_P), dtype = stack, DTYPES[entry.dtype]
    data = torch.frombuffer(view, dtype=torch.uint8)
    # A header of odd length puts numbers between their places in memory.
    there = data.clone() if entry.start % dtype.itemsize else data
    weight = there.view(dtype).view(-1, entry.shape[1])
    if coef_P.numel():
        stacked_merge_(weight, columns, rows[:, part], coef_P)
    if dtype == torch.float16:
        require(
            bool(torch.isfinite(weight).all()),
            f"{entry.name} is not finite in float16 after the merge: the weight or the sum is beyond 65504;"
            " save the base in bfloat16 or float32 first",
        )
    if there is not data:
        data.copy_(there)


# The file.


class Sink:
    """A file that grows block by block, in pages: what is left of a page waits for the next block.

    Args:
        file: Open for reading and writing.
        done: How much of it is good; the rest is cut off.
        threads: Who writes.
        advance: Called with numbers of bytes that are written.
    """

    def __init__(self, file: BinaryIO, done: int, threads: ThreadPoolExecutor, advance: Advance):
        self.file, self.threads, self.advance = file, threads, advance
        self.pending: tuple[Future[None], int] | None = None
        file.truncate(done)
        file.seek(done - done % PAGE)
        self.rest = file.read(done % PAGE)
        file.seek(done - done % PAGE)
        _set_direct(file, True)

    def append(self, block: Block) -> None:
        """Have a block written when the one before it is."""
        self.wait()
        block.memory[: block.lead] = self.rest
        whole = len(block.memory) // PAGE * PAGE
        self.rest = bytes(block.memory[whole:])
        self.pending = self.threads.submit(_write, self.file, block.memory[:whole]), block.stop - block.start

    def wait(self) -> None:
        """Wait until all is written that was given."""
        if self.pending is not None:
            (future, size), self.pending = self.pending, None
            future.result()
            self.advance(size)

    def finish(self) -> None:
        """Write the last page's beginning."""
        self.wait()
        _set_direct(self.file, False)
        _write(self.file, memoryview(self.rest))


def _write(file: BinaryIO, view: memoryview) -> None:
    start = file.tell()
    while view:
        try:
            view = view[file.write(view) :]
        except OSError as error:
            # Another size of blocks, or a full disk that took a part of a page.
            if error.errno != errno.EINVAL or not _set_direct(file, False):
                raise
    if hasattr(os, "posix_fadvise"):
        # Where it went into the page cache: begin with the disk now, and not only when the file is whole.
        os.posix_fadvise(file.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


def _set_direct(file: BinaryIO, direct: bool) -> bool:
    """Write past the page cache or not; whether that was to be changed, and could be."""
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if bool(flags & os.O_DIRECT) != direct:
            fcntl.fcntl(file, fcntl.F_SETFL, flags ^ os.O_DIRECT)
            return True
    return False
