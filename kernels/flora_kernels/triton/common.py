"""Shared by the kernels: finding a tile's client, Philox dropout, tables on the device, tile configurations.

Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
Tables are int32 offsets (C + 1 entries) on the device; a kernel searches them itself, so nothing is read back and a
captured CUDA graph may be replayed with other tables of the same sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from ..reference import Dropout, Ranges

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_COUNTS = "chosen by counts"


@dataclass(frozen=True)
class Tile:
    """One way to cut an op: its ``constexpr`` sizes, how it is launched, and where it was measured."""

    dtypes: tuple[torch.dtype, ...]
    sizes: dict[str, int]
    num_warps: int = 4
    num_stages: int = 3
    measured_on: str = BY_COUNTS

    @property
    def options(self) -> dict[str, Any]:
        # AMD's 64 KB of shared memory hold no third stage.
        stages = self.num_stages if torch.version.hip is None else min(self.num_stages, 2)
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": stages}

    def __str__(self) -> str:
        sizes = " x ".join(str(size) for size in self.sizes.values())
        why = self.measured_on if self.measured_on == BY_COUNTS else f"measured on {self.measured_on}"
        return f"{sizes}, {self.num_warps} warps ({why})"


@functools.cache
def device_name() -> str | None:
    """The GPU that kernels run on; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def pick(tiles: Sequence[Tile], dtype: torch.dtype) -> Tile:
    """The configuration for a dtype: one that was measured on this device, else one by the counts, else the first.

    Never chosen by M or C: a client's bits must not depend on its cohort.
    """
    fit, here = [tile for tile in tiles if dtype in tile.dtypes], device_name()
    by_device = [tile for wanted in (here, BY_COUNTS) for tile in fit if tile.measured_on == wanted]
    return (by_device or fit)[0]


def are_aligned(*tensors: torch.Tensor) -> bool:
    """Return whether every row begins at a multiple of 16 bytes: compiled code then makes wide accesses."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(step == 1 or step % 16 == 0 for step in tensor.stride())
        for tensor in tensors
    )


# A kernel goes on by a tile's depth times a stride, both of 32 bits; no tile is deeper than 64.
_FAR = 2**31 // 64


def near(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, copied into rows where a step from tile to tile would be more than 32 bits hold.

    Raises:
        ValueError: If its rows themselves are too wide for that.
    """
    if max(tensor.stride()) < _FAR:
        return tensor
    if tensor.shape[-1] >= _FAR:
        raise ValueError(
            f"a matrix of shape {tuple(tensor.shape)} has rows too wide for the Triton kernels: they must have fewer "
            f"than {_FAR:,} columns; use backend='native' or 'reference'"
        )
    return tensor.contiguous()


def rank_block(ranks: Ranges) -> int:
    """Columns of rank that a tile holds; it cuts the output alone, so no sum depends on it."""
    return 16 if max((bank.stop - bank.start for bank in ranks), default=0) <= 16 else 64


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one; nothing for a CPU tensor."""
    return torch.cuda.device_of(tensor)


# Captured CUDA graphs refer to these tables by address: they must outlive what the cache below lets go.
_captured: list[torch.Tensor] = []


@functools.lru_cache(maxsize=4096)
def _copied(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def table(values: Sequence[Any] | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers as a contiguous device tensor; a copy of host numbers is kept and used again."""
    if isinstance(values, torch.Tensor):
        return values.to(device, dtype, non_blocking=True).contiguous()
    found = _copied(tuple(values), dtype, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(found)
    return found


def offsets(ranges: Ranges, device: torch.device) -> torch.Tensor:
    """The ranges' offsets as an int32 device table."""
    if hasattr(ranges, "offsets_on"):
        return ranges.offsets_on(device)  # pyright: ignore[reportAttributeAccessIssue]
    return table((0, *(part.stop for part in ranges)), torch.int32, device)


def total(ranges: Ranges) -> int:
    """The length of the axis that the ranges cut."""
    if hasattr(ranges, "total"):
        return ranges.total  # pyright: ignore[reportAttributeAccessIssue]
    return ranges[len(ranges) - 1].stop if len(ranges) else 0


def lengths_known(ranges: Ranges) -> bool:
    """Return whether the host knows the ranges; if not, launchers take what is enough for any."""
    return getattr(ranges, "lengths", ()) is not None


def highest(ranks: Ranges) -> int:
    """The highest rank."""
    return max((bank.stop - bank.start for bank in ranks), default=0)


def s_numel(tokens: Ranges, ranks: Ranges) -> int:
    """Elements of the ragged S, or the most that there can be."""
    if not lengths_known(tokens):
        return total(tokens) * highest(ranks)
    return sum((m.stop - m.start) * (p.stop - p.start) for m, p in zip(tokens, ranks, strict=True))


@dataclass(frozen=True)
class Clients:
    """The tables of one launch, and the ``constexpr`` that goes with them."""

    tokens: torch.Tensor
    ranks: Any
    scaling: Any
    q: torch.Tensor | None
    seed: Any
    row: torch.Tensor | None
    count: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def pointers(self) -> tuple[Any, ...]:
        return self.tokens, self.ranks, self.scaling, self.q, self.seed, self.row, self.count


def clients(
    tokens: Ranges,
    ranks: Ranges,
    scaling_C: Sequence[float] | torch.Tensor | None,
    dropout: Dropout | None,
    device: torch.device,
) -> Clients:
    """Put what describes the clients on the device."""
    count = len(tokens)
    kinds = (torch.int32, torch.int64, torch.int32)
    draws = [None] * 3 if dropout is None else [table(v, d, device) for v, d in zip(dropout, kinds, strict=True)]
    scaling = None if scaling_C is None else table(scaling_C, torch.float32, device)
    options = dict(
        CLIENTS=triton.next_power_of_2(max(count, 1)), SCALED=scaling is not None, DROPOUT=dropout is not None
    )
    return Clients(offsets(tokens, device), offsets(ranks, device), scaling, *draws, count, options)


def clients_of_targets(
    tokens: Ranges,
    ranks: Sequence[Ranges],
    scaling: Sequence[Sequence[float] | torch.Tensor | None],
    dropout: Sequence[Dropout | None],
    device: torch.device,
) -> Clients:
    """``clients`` for targets that share their tokens: tuples where each has tables of its own.

    Who drops how much, and from which row on, is the same for all of them; the keys are not.
    """
    parts = [clients(tokens, *target, device) for target in zip(ranks, scaling, dropout, strict=True)]
    first = parts[0]
    tables = [tuple(getattr(part, name) for part in parts) for name in ("ranks", "scaling", "seed")]
    ranks_T, scaling_T, seed_T = (None if table[0] is None else table for table in tables)
    options = {**first.options, "TARGETS": len(parts)}
    return Clients(first.tokens, ranks_T, scaling_T, first.q, seed_T, first.row, first.count, options)


@triton.jit
def find_tile(
    tokens_ptr, ranks_ptr, num_clients, tile, BLOCK: tl.constexpr, CLIENTS: tl.constexpr, AT_LEAST: tl.constexpr
):
    """The client that a tile of BLOCK rows belongs to; every client has whole tiles of its own, at least AT_LEAST.

    Returns the client, its first row, its end, the tile's first row, its first bank row, its rank, the start of its S
    and the workspace rows of the clients before it. A tile past the last one gets rank 0.
    """
    ids = tl.arange(0, CLIENTS)
    real = ids < num_clients
    starts = tl.load(tokens_ptr + ids, mask=real, other=0)
    stops = tl.load(tokens_ptr + ids + 1, mask=real, other=0)
    banks = tl.load(ranks_ptr + ids, mask=real, other=0)
    ranks = tl.load(ranks_ptr + ids + 1, mask=real, other=0) - banks
    tiles = tl.where(real, tl.maximum(tl.cdiv(stops - starts, BLOCK), AT_LEAST), 0)
    before = real & (tl.cumsum(tiles, 0) <= tile)
    client = tl.sum(before.to(tl.int32), 0)
    mine = ids == client
    first = tl.sum(tl.where(mine, starts, 0), 0)
    stop = tl.sum(tl.where(mine, stops, 0), 0)
    bank = tl.sum(tl.where(mine, banks, 0), 0)
    rank = tl.sum(tl.where(mine, ranks, 0), 0)
    row = first + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * BLOCK
    sizes = (stops - starts).to(tl.int64) * ranks
    s_start = tl.sum(tl.where(before, sizes, 0), 0)
    split = tl.where(before & (tiles > 1), tiles, 0).to(tl.int64) * ranks
    return client, first, stop, row, bank, rank, s_start, tl.sum(split, 0)


@triton.jit
def find_tile_of_targets(
    tokens_ptr, ranks_ptrs, num_clients, tile, TARGETS: tl.constexpr, BLOCK: tl.constexpr, CLIENTS: tl.constexpr
):
    """``find_tile`` for targets that share their tokens.

    Returns the client, its first row, its end and the tile's first row; for each target the first bank row, the rank
    and the start of S; and the highest rank.
    """
    banks, ranks, starts, highest = (), (), (), 0
    for t in tl.static_range(TARGETS):
        client, first, stop, row, bank, rank, s_start, _ = find_tile(
            tokens_ptr, ranks_ptrs[t], num_clients, tile, BLOCK, CLIENTS, 0
        )
        banks += (bank,)
        ranks += (rank,)
        starts += (s_start,)
        highest = tl.maximum(highest, rank)
    return client, first, stop, row, banks, ranks, starts, highest


@triton.jit
def last_at_or_before(table_ptr, count, value, STRIDE: tl.constexpr):
    """The last of ``count`` ascending entries that is not above a value; the first entry never is."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high + 1) // 2
        here = tl.load(table_ptr + middle * STRIDE) <= value
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle - 1)
    return low


@triton.jit
def draws_of(row_M, column, seed, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STREAM: tl.constexpr):
    """16-bit draws (BLOCK_M, BLOCK_N) of these counter rows and the columns from ``column``, a multiple of 8.

    Key (seed low, seed high), counter (column // 8, row, 0, STREAM); eight draws a counter, low half first.
    """
    zero = tl.zeros([BLOCK_M, BLOCK_N // 8], dtype=tl.uint32)
    group_MG = zero + (column // 8 + tl.arange(0, BLOCK_N // 8)).to(tl.uint32)[None, :]
    counter_MG = zero + row_M.to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, group_MG, counter_MG, zero, zero + STREAM, 7)
    # Draw j = 4 b2 + 2 b1 + b0 is half b0 of word 2 b2 + b1; each join appends one bit of j, the highest first.
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(low, high), [BLOCK_M, BLOCK_N])


@triton.jit
def scale_up(q):
    """1 / (1 - q / 65536), rounded once."""
    return tl.div_rn(65536.0, (65536 - q).to(tl.float32))


__all__ = [
    "BY_COUNTS",
    "FLOAT_DTYPES",
    "Clients",
    "Tile",
    "are_aligned",
    "clients",
    "clients_of_targets",
    "device_name",
    "draws_of",
    "find_tile",
    "find_tile_of_targets",
    "highest",
    "last_at_or_before",
    "lengths_known",
    "near",
    "offsets",
    "on_device",
    "pick",
    "rank_block",
    "s_numel",
    "scale_up",
    "table",
    "total",
]
