"""Expected results of the wrappers of csrc/cuda/ptx.cuh, written anew from the PTX manual (ISA 9.0) in plain Python.

Each probe runs one wrapper on a warp: int32 words in, int32 words out. The emulation is held against ``expected`` by
the tests, a GPU against the emulation by ``tests/support/cuda/gpu_check.py``.
"""

from __future__ import annotations

import math

import torch

from flora_core import testing

# The numbers of `enum Probe` in csrc/cuda/probes.cu.
NAMES = ("ldmatrix", "ldmatrix.trans", "mma bf16", "mma fp16", "copy", "groups", "shuffle", "numbers", "draws")
PROBES = {name: number for number, name in enumerate(NAMES)}
KINDS = {"mma bf16": torch.bfloat16, "mma fp16": torch.float16}
LANES = range(32)


def _halves(words: torch.Tensor) -> torch.Tensor:
    return words.view(torch.int16)


def _random(size: int, seed: int = 0) -> torch.Tensor:
    low = -(2**31)
    return torch.randint(low, -low, (size,), generator=torch.Generator().manual_seed(seed)).to(torch.int32)


def words_for(probe: str) -> torch.Tensor:
    """Words that tell right from wrong: no two alike, integers where sums must be exact, edges of number formats."""
    if probe in KINDS:
        random = torch.Generator().manual_seed(1)
        small = torch.randint(-8, 9, (32, 12), generator=random).to(KINDS[probe]).view(torch.int32)
        sums = torch.randint(-99, 100, (32, 4), generator=random).float().view(torch.int32)
        return torch.cat([small, sums], dim=1).flatten()
    if probe == "copy":
        return torch.cat([_random(128), torch.tensor([lane % 17 for lane in LANES], dtype=torch.int32)])
    if probe == "shuffle":
        return torch.cat([_random(32), torch.tensor([(5 * lane + 3) % 32 for lane in LANES], dtype=torch.int32)])
    if probe == "numbers":
        # No NaN comes out of these: no infinity stands beside another, no lower half is a NaN of fp16.
        edges = [0.0, 1.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 2**-14, 2**-15, 2**-24, 2**-25, 3 * 2**-25, 65504.0, 65519.9]
        edges += [65520.0, 3.39e38, 2**-133, 1e-40, math.inf, 7.0, -math.inf, 1 / 3, -2 / 3]
        return torch.tensor(edges + [3 ** (i - 4) / 7 for i in range(11)]).view(torch.int32)
    return _random({"ldmatrix": 128, "ldmatrix.trans": 128, "groups": 512, "draws": 160}[probe])


def _ldmatrix(words: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Register i of lane l holds row l / 4 of matrix i, elements 2 (l % 4) and the next; transposed, the columns."""
    matrices = _halves(words).view(4, 8, 8)
    if transposed:
        matrices = matrices.mT
    return matrices.reshape(4, 32, 2).transpose(0, 1).contiguous().view(torch.int32).flatten()


def _mma(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    words = words.view(32, 10)
    left, right = _halves(words[:, :6].contiguous()).view(dtype).double().view(32, 12).split([8, 4], dim=1)
    sums, A, B = words[:, 6:].contiguous().view(torch.float32).double(), torch.zeros(16, 16), torch.zeros(16, 8)
    C, result = torch.zeros(16, 8), torch.zeros(32, 4)
    for lane in LANES:
        group, t = lane // 4, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            A[row, 2 * t + (i & 1) + (8 if i >= 4 else 0)] = left[lane, i]
        for i in range(4):
            B[2 * t + (i & 1) + (8 if i >= 2 else 0), group] = right[lane, i]
            C[group + (8 if i >= 2 else 0), 2 * t + (i & 1)] = sums[lane, i]
    D = A @ B + C
    for lane in LANES:
        for i in range(4):
            result[lane, i] = D[lane // 4 + (8 if i >= 2 else 0), 2 * (lane % 4) + (i & 1)]
    return result.view(torch.int32).flatten()


def _turned(words: torch.Tensor) -> torch.Tensor:
    """How the probes of copies read back: another lane's words, so that a missing barrier shows."""
    return words.roll(-5)


def _numbers(words: torch.Tensor) -> torch.Tensor:
    value, low = words.view(torch.float32), _halves(words).view(32, 2)[:, 0].contiguous()
    rows = [
        value.bfloat16().view(torch.int16).int() & 0xFFFF,
        value.half().view(torch.int16).int() & 0xFFFF,
        low.view(torch.float16).float().view(torch.int32),
        low.int() << 16,
        # Of float64, rounded once: torch's own float32 root is one unit off on some processors.
        torch.where(value < 0, -value, value).double().sqrt().float().view(torch.int32),
        (value / value.roll(-1)).view(torch.int32),
    ]
    return torch.stack(rows, dim=1).flatten()


def _draws(words: torch.Tensor) -> torch.Tensor:
    rows = [[word % 2**32 for word in row] for row in words.view(32, 5).tolist()]
    drawn = [testing.philox4x32((group, row, 0, stream), (low, high)) for group, row, low, high, stream in rows]
    return torch.tensor(drawn, dtype=torch.int64).flatten().to(torch.int32)


def expected(probe: str, words: torch.Tensor) -> torch.Tensor:
    """The words that come out."""
    if probe.startswith("ldmatrix"):
        return _ldmatrix(words, probe.endswith("trans"))
    if probe in KINDS:
        return _mma(words, KINDS[probe])
    if probe == "copy":
        copied = words[:128].clone().view(torch.uint8).view(32, 16)
        for lane in LANES:
            copied[lane, int(words[128 + lane]) :] = 0
        return _turned(copied.flatten().view(torch.int32))
    if probe == "groups":
        return torch.cat([_turned(group) for group in words.view(4, 128)])
    if probe == "shuffle":
        return words[:32][words[32:].long()]
    return _numbers(words) if probe == "numbers" else _draws(words)
