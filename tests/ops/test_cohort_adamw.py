"""cohort_adamw_: every client's step is torch's AdamW with its own hyper-parameters.

Letters: C clients, H hyper-parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from flora_core import Segments, cohort_adamw_, testing
from flora_core.ops.api import HYPER_COLUMNS

LR, BETA1, BETA2, EPS, DECAY, STEP, CLIP = range(7)
STEPS = 6
# Client 1 has two ranges, client 2 three of which one is empty; the ranges interleave, as module by module in a bank.
LENGTHS, OWNER = (40, 7, 1, 33, 0, 25, 16), (0, 1, 2, 1, 2, 0, 2)


@pytest.fixture(params=testing.backends("cohort_adamw_"))
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass
class Flat:
    """Flat buffers, the gradients of several steps, and the hyper-parameters of three clients."""

    dtype: torch.dtype
    segments: Segments = field(default_factory=lambda: Segments.from_lengths(LENGTHS))
    owner: tuple[int, ...] = OWNER

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        total = self.segments.total
        self.param, *self.grads = (
            torch.randn(total, generator=random, dtype=torch.float64).to(self.dtype) for _ in range(STEPS + 1)
        )
        self.moments = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.hyper_CH = torch.tensor(
            [
                # lr, beta1, beta2, eps, weight decay, step, clip scale
                [3e-2, 0.9, 0.999, 1e-8, 0.0, 0, 1.0],
                [1e-1, 0.8, 0.95, 1e-3, 0.3, 0, 0.25],
                [5e-2, 0.0, 0.99, 1e-6, 0.1, 0, 1.0],
            ],
            dtype=torch.float64,
        )

    def run(self, backend: str = "reference", *, skip: int | None = None) -> list[torch.Tensor]:
        """The parameter after each step; client ``skip`` sits the second one out."""
        states = []
        for number, grad in enumerate(self.grads):
            hyper_CH = self.hyper_CH.clone()
            self.hyper_CH[:, STEP] += 1
            hyper_CH[:, STEP] += 1
            if skip is not None and number == 1:
                self.hyper_CH[skip, STEP] -= 1
                hyper_CH[skip, STEP] = 0
            cohort_adamw_(self.param, grad, *self.moments, self.segments, hyper_CH, owner=self.owner, backend=backend)
            states.append(self.param.clone())
        return states


def oracle(flat: Flat, dtype: torch.dtype = torch.float64, skip: int | None = None) -> list[torch.Tensor]:
    """The same by ``torch.optim.AdamW``, one optimizer per range."""
    ranges = [torch.nn.Parameter(flat.param[rows].to(dtype, copy=True)) for rows in flat.segments]
    optimizers = []
    for part, row in zip(ranges, flat.owner, strict=True):
        lr, beta1, beta2, eps, decay, _, _ = flat.hyper_CH[row].tolist()
        optimizers.append(torch.optim.AdamW([part], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay))
    states = []
    for number, grad in enumerate(flat.grads):
        for part, rows, row, optimizer in zip(ranges, flat.segments, flat.owner, optimizers, strict=True):
            if row == skip and number == 1:
                continue
            part.grad = grad[rows].to(dtype) * flat.hyper_CH[row, CLIP].item()
            optimizer.step()
        states.append(torch.cat([part.detach() for part in ranges]))
    return states


def test_columns_are_as_documented():
    assert HYPER_COLUMNS == ("lr", "beta1", "beta2", "eps", "weight_decay", "step", "clip_scale")


@pytest.mark.parametrize("skip", [None, 1])
def test_cohort_adamw_is_torch_adamw_in_float64(skip, backend):
    flat = Flat(torch.float64)
    wanted = oracle(flat, skip=skip)
    for got, right in zip(flat.run(backend, skip=skip), wanted, strict=True):
        assert ((got - right).abs() <= 1e-12 * right.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cohort_adamw_stays_within_the_budget(dtype, backend):
    flat = Flat(dtype)
    ref64, low = oracle(flat), oracle(flat, dtype)
    for out, right, rounded in zip(flat.run(backend), ref64, low, strict=True):
        testing.check_budget({"param": out}, {"param": right}, {"param": rounded}, {"param": flat.segments})


def test_moments_are_torch_adamw_s(backend):
    flat = Flat(torch.float64, Segments.from_lengths([30]), owner=(1,))
    part = torch.nn.Parameter(flat.param.clone())
    lr, beta1, beta2, eps, decay, _, clip = flat.hyper_CH[1].tolist()
    optimizer = torch.optim.AdamW([part], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    flat.run(backend)
    for grad in flat.grads:
        part.grad = grad * clip
        optimizer.step()
    for mine, name in zip(flat.moments, ("exp_avg", "exp_avg_sq"), strict=True):
        right = optimizer.state[part][name]
        assert ((mine - right).abs() <= 1e-12 * right.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("column", "wrong"), [(LR, 2.0), (BETA1, 0.5), (BETA2, 0.5), (EPS, 1.0), (DECAY, 0.0), (CLIP, 2.0), (STEP, 1)]
)
def test_planted_faults_are_caught(dtype, column, wrong):
    flat, faulty = Flat(dtype), Flat(dtype)
    ref64, low = oracle(flat)[-1], oracle(flat, dtype)[-1]
    faulty.hyper_CH[1, column] = wrong
    out = faulty.run()[-1]
    ratios = testing.budget_ratios({"p": out}, {"p": ref64}, {"p": low}, {"p": flat.segments})["p"]
    assert [ratio > 1 for ratio in ratios] == [owner == 1 for owner in OWNER]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_neighbour_s_hyper_and_a_lost_element_are_caught(dtype):
    flat, faulty = Flat(dtype), Flat(dtype)
    ref64, low = oracle(flat)[-1], oracle(flat, dtype)[-1]
    faulty.owner = (0, 1, 2, 2, 2, 0, 2)
    lost = Flat(dtype).run()[-1]
    last = flat.segments[3].stop - 1
    lost[last] = flat.param[last]
    for out in (faulty.run()[-1], lost):
        with pytest.raises(AssertionError, match="p of client 3"):
            testing.check_budget({"p": out}, {"p": ref64}, {"p": low}, {"p": flat.segments})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_0_leaves_a_client_s_ranges_bit_identical(dtype, backend):
    flat = Flat(dtype)
    flat.run(backend)
    flat.hyper_CH[:, STEP] = torch.tensor([7, 0, 7])
    before = [buffer.clone() for buffer in (flat.param, *flat.moments)]
    grad = flat.grads[0].clone()
    for rows, owner in zip(flat.segments, OWNER, strict=True):
        if owner == 1:
            grad[rows] = float("nan")
    cohort_adamw_(flat.param, grad, *flat.moments, flat.segments, flat.hyper_CH, owner=OWNER, backend=backend)
    for old, new in zip(before, (flat.param, *flat.moments), strict=True):
        for rows, owner in zip(flat.segments, OWNER, strict=True):
            assert torch.equal(old[rows], new[rows]) == (owner == 1 or rows.start == rows.stop)
        assert new.isfinite().all()


def test_a_client_s_step_does_not_depend_on_the_others(backend):
    whole = Flat(torch.float32)
    for buffer in whole.run(backend)[-1:]:
        for number, (rows, owner) in enumerate(zip(whole.segments, OWNER, strict=True)):
            alone = Flat(torch.float32)
            alone.param = alone.param[rows].clone()
            alone.grads = [grad[rows] for grad in alone.grads]
            alone.moments = torch.zeros_like(alone.param), torch.zeros_like(alone.param)
            alone.segments, alone.owner = Segments.from_lengths([LENGTHS[number]]), (owner,)
            assert torch.equal(alone.run(backend)[-1], buffer[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_are_exact(dtype, backend):
    """beta1 1/2, beta2 3/4, eps 0, first step: the update is lr times the gradient's sign."""
    param = torch.tensor([4.0, -3.0, 8.0, 1.0, 2.0], dtype=dtype)
    grad = torch.tensor([1.0, -2.0, 4.0, -1.0, 2.0], dtype=dtype)
    moments = torch.zeros_like(param), torch.zeros_like(param)
    hyper_CH = torch.tensor([[0.5, 0.5, 0.75, 0, 0.5, 1, 1], [0.25, 0.5, 0.75, 0, 0, 1, 0.5]], dtype=torch.float64)
    cohort_adamw_(param, grad, *moments, Segments.from_lengths([3, 2]), hyper_CH, backend=backend)
    assert param.tolist() == [3 - 0.5, -2.25 + 0.5, 6 - 0.5, 1 + 0.25, 2 - 0.25]
    assert moments[0].tolist() == [0.5, -1.0, 2.0, -0.25, 0.5]
    assert moments[1].tolist() == [0.25, 1.0, 4.0, 0.0625, 0.25]


def test_ranges_take_rows_in_order_without_an_owner(backend):
    flat, other = (Flat(torch.float64, Segments.from_lengths([5, 0, 9]), owner=(0, 1, 2)) for _ in range(2))
    flat.hyper_CH[:, STEP] = other.hyper_CH[:, STEP] = 1
    cohort_adamw_(flat.param, flat.grads[0], *flat.moments, flat.segments, flat.hyper_CH, backend=backend)
    cohort_adamw_(
        *(other.param, other.grads[0], *other.moments, other.segments, other.hyper_CH), owner=(0, 1, 2), backend=backend
    )
    assert torch.equal(flat.param, other.param)


@pytest.mark.parametrize(("one", "other"), [("param", "grad"), ("param", "exp_avg"), ("exp_avg", "exp_avg_sq")])
def test_buffers_that_share_memory_are_refused(one, other, backend):
    buffer, segments = torch.ones(9), Segments.from_lengths([2, 4])
    buffers = {name: torch.ones(6) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    param, grad, exp_avg, exp_avg_sq = {**buffers, one: buffer[:6], other: buffer[3:]}.values()
    with pytest.raises(ValueError, match=f"{one} is written and must share no memory with {other}; pass its clone"):
        cohort_adamw_(param, grad, exp_avg, exp_avg_sq, segments, torch.ones(2, 7), backend=backend)
    assert (buffer == 1).all()
