"""The caller's workspace: as many bytes as the query tells, all of them needed for nothing else, and few of them."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from tests.support.cuda import abi

native = pytest.importorskip("flora_kernels.native", exc_type=ImportError)
ISAS = {name: code for name, code in native._ISAS.items() if 0 < code <= native._native.cpu_isa()}
PATTERN, ROOM = 0xA5, 4096
# Ranks and tokens beside every edge, an empty client and one without rank.
TOKENS, RANKS = (0, 37, 37, 150, 151), (0, 5, 9, 9, 40)
SIZES = dict(M=151, K=133, N=70, P=40, flat=37 * 5 + 1 * 31)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(native.prefix() / "lib/libflora_kernels.so"))
    loaded.flora_last_error.restype = ctypes.c_char_p
    return loaded


def clients(kept: list[Any]) -> abi.Clients:
    kept += [(ctypes.c_int32 * 5)(*table) for table in (TOKENS, RANKS)]
    kept += [(ctypes.c_int32 * 4)(9000, 0, 100, 65536), (ctypes.c_int64 * 4)(1, 2, 3, 4)]
    tokens, ranks, q, seed = map(ctypes.addressof, kept[-4:])
    return abi.Clients(4, tokens, ranks, None, q, seed, None, 0, 0)


def arguments(op: str, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    """A sound call's struct, and what it points to."""
    kept: list[Any] = []

    def matrix(rows: str, columns: str) -> abi.Matrix:
        kept.append(torch.randn(SIZES[rows], SIZES[columns]).to(dtype))
        return abi.matrix(kept[-1])

    def vector(size: str) -> abi.Vector:
        kept.append(torch.randn(SIZES[size]).to(dtype))
        return abi.vector(kept[-1])

    if op == "merge_many":
        size = ctypes.sizeof(abi.Item)
        fields = matrix("N", "K"), matrix("P", "K"), matrix("P", "N"), vector("P")
        return abi.Item(size, *fields), kept
    if op == "shrink":
        fields = matrix("M", "K"), matrix("P", "K"), vector("flat")
        return abi.ShrinkArgs(ctypes.sizeof(abi.ShrinkArgs), *fields, clients(kept)), kept
    if op == "expand":
        fields = matrix("M", "N"), vector("flat"), matrix("P", "N")
        return abi.ExpandArgs(ctypes.sizeof(abi.ExpandArgs), *fields, clients(kept)), kept
    fields = vector("flat"), matrix("M", "K"), vector("flat"), matrix("M", "N"), matrix("P", "K"), matrix("P", "N")
    return abi.WgradArgs(ctypes.sizeof(abi.WgradArgs), *fields, clients(kept)), kept


def rest(op: str, struct: Any, accumulate: int = 1) -> tuple[Any, ...]:
    """Arguments after exec in a call."""
    if op != "merge_many":
        return (ctypes.byref(struct),)
    options = abi.Options(ctypes.sizeof(abi.Options), 0, accumulate)
    return ctypes.byref(struct), ctypes.c_int64(1), ctypes.byref(options)


def need_of(library: ctypes.CDLL, op: str, setup: abi.Exec, following: tuple[Any, ...]) -> int:
    need = ctypes.c_size_t()
    status = getattr(library, f"flora_{op}_workspace")(ctypes.byref(setup), *following, ctypes.byref(need))
    assert status == 0, library.flora_last_error()
    return need.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("op", ["merge_many", "shrink", "expand", "wgrad"])
def test_nothing_beside_the_workspace_is_touched(op, dtype, library):
    """Canaries on both sides of exactly as many bytes as the query tells; a byte less is refused."""
    for isa in ISAS.values():
        for threads in (1, 2, 3):
            struct, kept = arguments(op, dtype)
            setup = abi.Exec(ctypes.sizeof(abi.Exec), num_threads=threads, isa=isa)
            need = need_of(library, op, setup, rest(op, struct))
            assert need % 256 == 0
            room = torch.full((need + 2 * ROOM + 256,), PATTERN, dtype=torch.uint8)
            start = -(-(room.data_ptr() + ROOM) // 256) * 256
            setup.workspace, setup.workspace_bytes = start, need
            before = start - room.data_ptr()
            assert getattr(library, f"flora_{op}")(ctypes.byref(setup), *rest(op, struct)) == 0
            outside = torch.cat([room[:before], room[before + need :]])
            assert outside.eq(PATTERN).all(), f"isa {isa}, {threads} threads"
            assert not need or not room[before : before + need].eq(PATTERN).all(), "it is there to be used"
            setup.workspace_bytes = need - 1
            assert getattr(library, f"flora_{op}")(ctypes.byref(setup), *rest(op, struct)) == (3 if need else 0)
            assert kept


def distant(index: int, rows: int, columns: int, dtype: int) -> abi.Matrix:
    """A matrix that is not there: a query reads no element."""
    return abi.Matrix((index + 1) << 44, rows, columns, columns, 1, dtype, 0)


@pytest.mark.parametrize("accumulate", [1, 4], ids=["fp32-sums", "fp64-sums"])
@pytest.mark.parametrize("p", [1, 160, 4096])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (32000, 4096), (4096, 14336), (256, 2048)])
def test_a_merge_needs_less_than_16_megabytes(n, k, p, accumulate, library):
    """Beyond its arrays, for every dtype of W, on two threads, by the library's own word; Python allocates no more."""
    for isa in ISAS.values():
        setup = abi.Exec(ctypes.sizeof(abi.Exec), num_threads=2, isa=isa)
        for dtype in (1, 2, 3, 4):
            factors = distant(1, p, k, 1), distant(2, p, n, 1), abi.Vector(4 << 44, p, 1, 1, 0)
            item = abi.Item(ctypes.sizeof(abi.Item), distant(0, n, k, dtype), *factors)
            assert need_of(library, "merge_many", setup, rest("merge_many", item, accumulate)) < 16 << 20
