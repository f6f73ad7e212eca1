"""Write a shard like another one, in which some tensors have a stack's product added, a block of rows at a time.

The header is copied, for names, dtypes, shapes and offsets stay: all files keep their layout to the byte.
Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from ..aggregate.inputs import Stack
from ..checks import require
from ..ops import stacked_merge_
from .plan import Target
from .shards import DTYPES, Entry, Shard, read_into
from .staging import PARTIAL

BLOCK_BYTES = 16 * 2**20
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
    with open(shard.path, "rb", buffering=0) as source, _open_kept(partial) as sink:
        done = _whole_tensors(shard, os.fstat(sink.fileno()).st_size)
        sink.truncate(done)
        sink.seek(done)
        advance(done)
        if not done:
            _copy(source, sink, 0, shard.header_bytes, advance)
        for entry in shard.entries:
            if entry.start < done or entry.stop == entry.start:
                continue
            if entry.name in targets:
                target = targets[entry.name]
                merge_tensor(target, stack(target.module), source, sink, advance)
            else:
                _copy(source, sink, entry.start, entry.stop, advance)
        require(
            os.fstat(sink.fileno()).st_size == shard.size == os.fstat(source.fileno()).st_size,
            f"{shard.path} changed while it was read; leave it alone and start again",
        )
        os.fsync(sink.fileno())
    os.replace(partial, path)
    return done


def _open_kept(path: Path) -> BinaryIO:
    """Open for writing what may be there already; not for appending, which the kernel's own copying refuses."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(handle, "r+b", buffering=0)  # pyright: ignore[reportReturnType]


def _whole_tensors(shard: Shard, size: int) -> int:
    """How much of a file's beginning is known to be good: up to the end of the last whole tensor."""
    ends = [shard.header_bytes, *(entry.stop for entry in shard.entries)]
    return max((end for end in ends if end <= size), default=0)


def blocks(entry: Entry, most: int) -> Iterator[tuple[slice, int, int]]:
    """Cut a matrix into blocks of rows of at most ``most`` bytes: the rows and their bytes in the file."""
    rows = entry.shape[0]
    row_bytes = (entry.stop - entry.start) // rows
    step = max(1, most // row_bytes)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        yield slice(first, last), entry.start + first * row_bytes, entry.start + last * row_bytes


def sides(target: Target, stack: Stack) -> Stack:
    """A stack whose product has the shape that is stored: the factors change places where that is K x N."""
    A_PK, B_PN, coef_P = stack
    return (B_PN, A_PK, coef_P) if target.transposed else stack


def merge_tensor(target: Target, stack: Stack, source: BinaryIO, sink: BinaryIO, advance: Advance) -> None:
    """Read a weight, add the stack's product, and append the result."""
    entry, dtype = target.entry, DTYPES[target.entry.dtype]
    columns, rows, coef_P = sides(target, stack)
    buffer = bytearray(max(stop - start for _, start, stop in blocks(entry, BLOCK_BYTES)))
    for part, start, stop in blocks(entry, BLOCK_BYTES):
        view = memoryview(buffer)[: stop - start]
        read_into(source, start, view)
        weight = torch.frombuffer(view, dtype=dtype).view(-1, entry.shape[1])
        if coef_P.numel():
            stacked_merge_(weight, columns, rows[:, part], coef_P)
        if dtype == torch.float16:
            require(
                bool(torch.isfinite(weight).all()),
                f"{entry.name} is not finite in float16 after the merge: the weight or the sum is beyond 65504;"
                " save the base in bfloat16 or float32 first",
            )
        _append(sink, view, advance)


def _append(sink: BinaryIO, view: memoryview, advance: Advance) -> None:
    before = sink.tell()
    while view:
        view = view[sink.write(view) :]
    _start_writing(sink, before)
    advance(sink.tell() - before)


def _copy(source: BinaryIO, sink: BinaryIO, start: int, stop: int, advance: Advance) -> None:
    """Append bytes of the source, inside the kernel where it can do that."""
    buffer = None
    while start < stop:
        size = min(stop - start, BLOCK_BYTES)
        count = 0 if buffer is not None else _copy_in_kernel(source, sink, start, size)
        if count:
            _start_writing(sink, sink.tell() - count)
            advance(count)
        else:
            buffer = bytearray(BLOCK_BYTES) if buffer is None else buffer
            read_into(source, start, memoryview(buffer)[:size])
            _append(sink, memoryview(buffer)[:size], advance)
            count = size
        start += count


def _copy_in_kernel(source: BinaryIO, sink: BinaryIO, start: int, size: int) -> int:
    """Bytes that the kernel copied; 0 where it cannot."""
    try:
        at = sink.tell()
        count = os.copy_file_range(source.fileno(), sink.fileno(), size, start, at)
        sink.seek(at + count)
        return count
    except (AttributeError, OSError):
        return 0


def _start_writing(sink: BinaryIO, start: int) -> None:
    """Ask the system to begin with the disk now, beside the next product, and not only when the file is whole."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(sink.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


__all__ = ["BLOCK_BYTES", "blocks", "merge_tensor", "sides", "write_shard"]
