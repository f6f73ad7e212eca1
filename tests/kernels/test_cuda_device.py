"""The CUDA backend on GPUs that a test describes: what does not fit is refused, and each status is a call's own.

The emulated kernels run over ``csrc/emulator/runtime.h``, which stands in for CUDA's runtime.
Letters: M packed tokens, K in_features, R one client's rank, P sum of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from flora_core import Segments, testing
from flora_core.testing import LINEAR_SHAPES, MERGE_SHAPES, make_linear, make_merge
from flora_kernels.reference import MergeItem
from tests.support.cuda import emulated
from tests.support.cuda.abi import Exec
from tests.support.cuda.emulated import EmulationError, Library, fresh_emulated, host_compiler

# Bytes of shared memory that a block may have: sm_90 and sm_100; sm_80; sm_86, sm_89 and sm_120.
HOPPER, AMPERE, SMALL = 232448, 166912, 101376
LEFT_BEHIND = 719

Describe = Callable[..., Library]


@pytest.fixture
def machine() -> Iterator[Describe]:
    """Describe the machine that the emulated library finds."""
    if host_compiler() is None:
        pytest.skip("needs g++ or clang++ to build the kernels for the host")
    library = fresh_emulated()

    def describe(
        devices: int = 1, current: int = 0, shared_bytes: int = HOPPER, last_error: int = 0, major: int = 9
    ) -> Library:
        library._c.flora_shim_machine(devices, current, major, shared_bytes, last_error)
        return library

    yield describe
    describe()


@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_linears_run_with_the_shared_memory_of_every_gpu(dtype: torch.dtype, masters: bool, machine: Describe):
    library = machine(shared_bytes=SMALL)
    inputs = make_linear(replace(LINEAR_SHAPES[0], dtype=dtype), base=False, dropout=True, masters=masters)
    with library.as_backend("emulated") as backend:
        testing.check_linear(inputs, testing.run_linear(inputs, backend))


@pytest.mark.parametrize("accumulate", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merges_run_with_the_shared_memory_of_every_gpu(
    factor: torch.dtype, accumulate: torch.dtype, machine: Describe
):
    library = machine(shared_bytes=SMALL)
    for dtype in (torch.bfloat16, torch.float32):
        one = make_merge(replace(MERGE_SHAPES[0], dtype=dtype))
        weight = one.weight.clone()
        library.merge_many_([MergeItem(weight, one.A.to(factor), one.B.to(factor), one.coef)], accumulate=accumulate)
        assert not torch.equal(weight, one.weight)


def test_a_kernel_that_does_not_fit_is_refused_with_both_numbers(machine: Describe):
    library = machine(shared_bytes=40000)
    inputs = make_linear(replace(LINEAR_SHAPES[0], dtype=torch.bfloat16), masters=True)
    refused = "needs 89088 bytes of shared memory a block, and GPU 0 gives 40000; narrower factors need less"
    with pytest.raises(EmulationError, match=f"flora_shrink: the kernel for these dtypes {refused}"):
        library.shrink(inputs.x, inputs.A.float(), inputs.tokens, inputs.ranks)
    one = make_merge(MERGE_SHAPES[0])
    before = one.weight.clone()
    with pytest.raises(EmulationError, match=r"flora_merge: .* needs \d+ bytes .* and GPU 0 gives 40000"):
        library.merge_(one.weight, one.A, one.B, one.coef)
    assert torch.equal(one.weight, before)


def test_an_error_that_was_left_behind_is_neither_reported_nor_cleared(machine: Describe):
    library = machine(last_error=LEFT_BEHIND)
    inputs = make_linear(LINEAR_SHAPES[0])
    s = library.shrink(inputs.x, inputs.A, inputs.tokens, inputs.ranks)
    assert s.isfinite().all()
    assert library._c.flora_shim_last_error() == LEFT_BEHIND


def test_a_launch_that_fails_leaves_no_error_for_others(machine: Describe):
    library = machine()
    inputs = make_linear(LINEAR_SHAPES[0])
    # A table of offsets that lies: the kernel reads past the end of x.
    tokens = Segments([len(inputs.x) + 64, 0, 0])
    with pytest.raises(EmulationError, match="flora_shrink could not be launched: "):
        library.shrink(inputs.x, inputs.A, tokens, inputs.ranks)
    assert library._c.flora_shim_last_error() == 0


def adamw(library: Library) -> torch.Tensor:
    buffers = [torch.ones(8) for _ in range(4)]
    hyper_CH = torch.tensor([[3e-2, 0.9, 0.999, 1e-8, 0.1, 5, 1]], dtype=torch.float64)
    param, grad, mean, square = buffers
    library.cohort_adamw_(param, grad, mean, square, Segments([8]), hyper_CH, [0])
    return buffers[0]


def test_a_call_runs_on_its_own_gpu_and_leaves_the_current_one(machine: Describe):
    library = machine(devices=2, current=1)
    assert not torch.equal(adamw(library), torch.ones(8))
    assert library._c.flora_shim_current() == 1


def test_a_gpu_that_is_not_there_is_an_error(machine: Describe, monkeypatch: pytest.MonkeyPatch):
    class Elsewhere(Exec):
        def __init__(self, size: int, device: int, _: int, stream: int | None):
            super().__init__(size, device, 3, stream)  # pyright: ignore[reportCallIssue]

    library = machine(devices=2)
    monkeypatch.setattr(emulated, "Exec", Elsewhere)
    with pytest.raises(EmulationError, match="GPU 3 cannot be made the current one: invalid device ordinal"):
        adamw(library)
    inputs = make_linear(LINEAR_SHAPES[0])
    with pytest.raises(EmulationError, match="GPU 3 cannot be asked for its shared memory: invalid device ordinal"):
        library.shrink(inputs.x, inputs.A, inputs.tokens, inputs.ranks)
    assert library._c.flora_shim_last_error() == 0


def test_available_names_what_is_missing(machine: Describe):
    for description, status, reason in (
        (dict(), 0, ""),
        (dict(devices=0), 5, "no GPU can be used here: no CUDA-capable device is detected"),
        (dict(major=7), 5, "GPU 0 has compute capability 7.x; the kernels need 8.0"),
    ):
        library = machine(**description)
        assert library._c.flora_check_available() == status
        assert not reason or library._c.flora_check_error().decode() == reason


def test_a_grid_that_cuda_does_not_launch_is_refused(machine: Describe):
    library, one = machine(), torch.zeros(1, 1)
    ranks = 65536 * 64
    with pytest.raises(EmulationError, match="flora_shrink: these sizes need a grid of 2 x 65536 blocks, and CUDA"):
        library.shrink(one, one.expand(ranks, 1), [slice(0, 1)], [slice(0, ranks)])
    rows, columns = 2**20, 2**29
    with pytest.raises(EmulationError, match="flora_expand: these sizes need a grid of 68723671040 x 1 blocks"):
        library.expand_(one.expand(rows, columns), one[0, :0], one.expand(1, columns), [slice(0, rows)], [slice(0, 1)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_client_without_tokens_gets_zeros_whatever_its_scaling(dtype: torch.dtype, machine: Describe):
    library, tokens, ranks = machine(), Segments([5, 0]), Segments([2, 3])
    x, dy, s = torch.ones(5, 8, dtype=dtype), torch.ones(5, 16, dtype=dtype), torch.ones(10, dtype=dtype)
    dA, dB = library.wgrad(s, x, s, dy, tokens, ranks, [2.0, float("nan")], dtype)
    assert torch.equal(dA[2:], torch.zeros(3, 8, dtype=dtype))
    assert torch.equal(dB[2:], torch.zeros(3, 16, dtype=dtype))
    assert torch.equal(dB[:2], torch.full((2, 16), 10.0, dtype=dtype))
