"""Read a merged checkpoint again and hold every byte of it against the base and the exact sum.

A stored weight y of the exact x = W + sum is certified if, element by element,

    |y - x| <= u |x| + (1 + u) s,    s = g (|W_nk| + ||c B_n|| ||A_k||),    g = (P + 4) v / (1 - (P + 4) v)

u: half the spacing of the stored dtype relative to its numbers (2^-8 for bfloat16, 2^-11 for float16, 2^-24 for
float32; half its smallest number near zero); v: that of the dtype that is summed in, float32 (float64 for float64).
The first term is the one rounding of the result, the second bounds any order of summing P products.
Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..aggregation import Deviation, Stack, total
from ..common import require
from .shards import DTYPES, INDEX, Checkpoint, Shard, read_into, read_shard
from .targets import Target
from .writer import Advance, blocks, sides

# In float64, and several of them at a time.
_BLOCK_BYTES = 2**18
RULE = "|stored - exact| <= u |exact| + (1 + u) g (|W| + ||c B|| ||A||), g = (P + 4) v / (1 - (P + 4) v)"


def certify_files(
    checkpoint: Checkpoint,
    folder: Path,
    targets: Mapping[str, Target],
    copies: Mapping[str, Path],
    stacks: Callable[[str], tuple[Stack, Stack]],
    advance: Advance,
) -> dict[str, Any]:
    """Compare a merged checkpoint with its base: copied bytes must be equal, merged weights within the bound.

    Args:
        checkpoint: The base.
        folder: The merged checkpoint.
        targets: Tensor name -> target.
        copies: Name -> place of every other file that was copied.
        stacks: Module -> the stack to be added, and the exact sum that the errors are measured against.
        advance: Called with numbers of bytes that were read.
    Returns:
        The bound, the error over all modules and of each: ``||(stored - W) - exact|| / ||exact||``, and the largest
        share of the bound that an element uses.
    Raises:
        ValueError: If a byte differs that should not, or a weight is beyond the bound.
    """
    deviations: dict[str, Deviation] = {}
    shares: dict[str, float] = {}
    for shard in checkpoint.shards:
        made = read_shard(folder / shard.path.name)
        same = [(e.name, e.dtype, e.shape, e.start) for e in made.entries] == [
            (e.name, e.dtype, e.shape, e.start) for e in shard.entries
        ]
        require(same, f"{made.path} has another header than {shard.path}; {_REMEDY}")
        _check_equal(shard, made.path, 0, shard.header_bytes, "its header", advance)
        for entry in shard.entries:
            if entry.name in targets:
                target = targets[entry.name]
                found = _check_target(target, made.path, *stacks(target.module), advance)
                deviations[target.module], shares[target.module] = found
            else:
                _check_equal(shard, made.path, entry.start, entry.stop, entry.name, advance)
    for name, path in copies.items():
        require(_same_file(path, folder / name), f"{folder / name} differs from {path}; {_REMEDY}")
    if checkpoint.index is not None:
        same = (folder / INDEX).is_file() and (folder / INDEX).read_bytes() == checkpoint.index
        require(same, f"{folder / INDEX} differs from the base's index; {_REMEDY}")
    return {
        "rule": RULE,
        "error": _json(total(deviations.values()).relative),
        "largest_share_of_bound": max(shares.values(), default=0.0),
        "error_by_module": {module: _json(one.relative) for module, one in deviations.items()},
        "share_of_bound_by_module": shares,
    }


_REMEDY = "base, adapters or result changed since, or the disk or memory is faulty: remove the result and merge again"


def _same_file(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check_equal(shard: Shard, made: Path, start: int, stop: int, what: str, advance: Advance) -> None:
    mine, theirs = bytearray(_BLOCK_BYTES), bytearray(_BLOCK_BYTES)
    with open(shard.path, "rb", buffering=0) as one, open(made, "rb", buffering=0) as other:
        while start < stop:
            size = min(stop - start, _BLOCK_BYTES)
            read_into(one, start, memoryview(mine)[:size])
            read_into(other, start, memoryview(theirs)[:size])
            equal = memoryview(mine)[:size] == memoryview(theirs)[:size]
            require(equal, f"{made}: {what} differs from {shard.path}, though no adapter changes it; {_REMEDY}")
            start += size
            advance(size)


def _check_target(
    target: Target, made: Path, applied: Stack, exact: Stack, advance: Advance
) -> tuple[Deviation, float]:
    """One merged weight: its error against the exact sum, and the largest share of the bound."""
    entry, dtype = target.entry, DTYPES[target.entry.dtype]
    sum_ = _Product(sides(target, applied))
    wanted = sum_ if exact is applied else _Product(sides(target, exact))
    deviations, share = [], 0.0
    with open(entry.path, "rb", buffering=0) as one, open(made, "rb", buffering=0) as other:
        for part, start, stop in blocks(entry, _BLOCK_BYTES):
            before, after = (_read(file, start, stop, dtype).view(-1, entry.shape[1]) for file in (one, other))
            change, added = after.sub_(before), sum_.rows(part)
            want = added if wanted is sum_ else wanted.rows(part)
            deviations.append(Deviation(float((change - want).norm()), float(want.norm())))
            bound = sum_.bound(part, before, added, dtype)
            share = max(share, _largest(change.sub_(added).abs_().div_(bound)))
            advance(stop - start)
    require(
        share <= 1,
        f"{made}: {entry.name} is off the exact sum by {share:.3g} times its rounding bound; {_REMEDY}",
    )
    return total(deviations), share


def _read(file: Any, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    buffer = bytearray(stop - start)
    read_into(file, start, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=dtype).to(torch.float64, copy=True)


class _Product:
    """A stack's product in float64, some rows at a time."""

    def __init__(self, stack: Stack):
        columns, rows, coef_P = (tensor.double() for tensor in stack)
        self.right_PK, self.left_NP = columns, (rows * coef_P[:, None]).T
        self.right_norms_K, self.left_norms_N = columns.norm(dim=0), self.left_NP.norm(dim=1)

    def rows(self, part: slice) -> torch.Tensor:
        """Some rows of the product."""
        return self.left_NP[part] @ self.right_PK

    def bound(self, part: slice, before: torch.Tensor, added: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """How far some rows of W + the product may be from what is stored of them."""
        info, sums = torch.finfo(dtype), torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        unit, terms = info.eps / 2, self.right_PK.shape[0] + 4
        growth = terms * sums.eps / 2 / (1 - terms * sums.eps / 2)
        # In float64 the oracle itself rounds as much again.
        growth *= 2 if dtype == torch.float64 else 1
        bound = (before + added).abs_().mul_(unit).add_(info.smallest_normal * info.eps / 2)
        slack = torch.addr(before.abs(), self.left_norms_N[part], self.right_norms_K)
        return bound.add_(slack, alpha=growth * (1 + unit))


def _largest(shares: torch.Tensor) -> float:
    """The maximum, infinite where anything is not a number."""
    largest = float(shares.max()) if shares.numel() else 0.0
    return math.inf if math.isnan(largest) else largest
