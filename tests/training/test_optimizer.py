"""CohortAdamW: one torch.optim.AdamW per client with its own clip_grad_norm_ and scheduler, in one call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

import flora_core as flora
from flora_core.adapters.bank import AdapterBank
from flora_core.adapters.update import Adapters
from flora_core.common.segments import Segments
from flora_core.testing import check_budget
from flora_core.training.optimizer import CohortAdamW

NAMES = ("a", "b", "none", "c")
SHAPES = {"q": (12, 8), "v": (5, 8)}  # (N, K)
RANKS = {"q": (3, 1, 0, 4), "v": (2, 5, 0, 0)}
STEPS = 8
# Clients sit out steps of their own, so that their step counts drift apart.
ACTIVE = [[c == 0 or step % (c + 2) != 0 for c in range(len(NAMES))] for step in range(STEPS)]
CONFIGS = (
    flora.TrainConfig(lr=1e-2),
    flora.TrainConfig(
        lr=3e-2, betas=(0.7, 0.9), eps=1e-5, weight_decay=0.3, clip_norm=1.0, schedule="linear", warmup_steps=2
    ),
    flora.TrainConfig(lr=1.0, clip_norm=0.1),
    flora.TrainConfig(lr=5e-3, weight_decay=0.1, clip_norm=5.0, schedule="cosine", warmup_steps=1),
)


def make_bank(dtype: torch.dtype = torch.float64) -> AdapterBank:
    scaling = {module: [1.0] * len(NAMES) for module in SHAPES}
    bank = AdapterBank(NAMES, RANKS, scaling, SHAPES, dtype)
    bank.param.copy_(torch.randn(bank.param.shape, generator=torch.Generator().manual_seed(0)))
    return bank


def make_optimizer(bank: AdapterBank, **how: Any) -> CohortAdamW:
    return CohortAdamW(bank, CONFIGS, STEPS, **how)


def gradients(bank: AdapterBank, step: int) -> torch.Tensor:
    """Of a size that clipping cuts in some steps and not in others; some elements are exactly zero."""
    random = torch.Generator().manual_seed(100 + step)
    grad = torch.randn(bank.param.shape, generator=random) * (torch.rand(bank.param.shape, generator=random) > 0.2)
    return (grad * 0.1 * 3**step).to(bank.param.dtype)


def of_client(bank: AdapterBank, flat: torch.Tensor, c: int) -> list[torch.Tensor]:
    """One client's factors in a buffer, module by module."""
    return [factor[bank.modules[m].ranks[c]] for m, pair in bank.views_of(flat).items() for factor in pair]


def by_torch(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Each client's parameters and moments after all steps."""
    bank, results = make_bank(dtype), []
    for c, config in enumerate(CONFIGS):
        weights = [torch.nn.Parameter(factor.clone()) for factor in of_client(bank, bank.param, c)]
        optimizer = torch.optim.AdamW(weights, config.lr, config.betas, config.eps, config.weight_decay, foreach=False)
        name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        schedule = transformers.get_scheduler(name, optimizer, config.warmup_steps, STEPS)
        for step in [step for step in range(STEPS) if ACTIVE[step][c]]:
            for weight, grad in zip(weights, of_client(bank, gradients(bank, step), c), strict=True):
                weight.grad = grad.clone()
            torch.nn.utils.clip_grad_norm_(weights, config.clip_norm or math.inf)
            optimizer.step()
            schedule.step()
        state = {key: [optimizer.state[w][key] for w in weights] for key in ("exp_avg", "exp_avg_sq")}
        results.append({key: flat(list_) for key, list_ in {"param": weights, **state}.items()})
    return results


def flat(tensors: list[Any]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_equals_torch_adamw_per_client(dtype: torch.dtype):
    bank = make_bank(dtype)
    optimizer = make_optimizer(bank)
    for step in range(STEPS):
        optimizer.grad.copy_(gradients(bank, step))
        optimizer.step(ACTIVE[step])
    buffers = {"param": bank.param, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
    exact, low = by_torch(torch.float64), by_torch(dtype)
    for c in range(len(NAMES)):
        out = {key: flat(of_client(bank, buffer, c)) for key, buffer in buffers.items()}
        check_budget(
            out, exact[c], low[c], {key: Segments.from_lengths([tensor.numel()]) for key, tensor in out.items()}
        )
    assert optimizer.steps == [sum(column) for column in zip(*ACTIVE, strict=True)]
    assert len(set(optimizer.steps)) > 2


def test_clipping_bites_now_and_then():
    """Else the test above would not test it."""
    bank = make_bank()
    optimizer = make_optimizer(bank)
    norms = []
    for step in range(STEPS):
        optimizer.grad.copy_(gradients(bank, step))
        norms.append(optimizer.grad_norms())
    for c in (1, 3):
        assert norms[0][c] < (CONFIGS[c].clip_norm or 0) < norms[-1][c]
    for c in range(len(NAMES)):
        expected = torch.cat([factor.reshape(-1) for factor in of_client(bank, gradients(bank, STEPS - 1), c)]).norm()
        assert norms[-1][c] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 9], ids=lambda n: f"warmup{n}")
def test_learning_rates_are_transformers(schedule: str, warmup: int):
    """To the bit, at every step, beyond the planned end too, and for a warm-up longer than the training."""
    config = flora.TrainConfig(lr=0.7, schedule=schedule, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, warmup, 7)
    for step in range(10):
        assert config.learning_rate(step, 7) == theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


def test_a_schedule_over_several_rounds():
    """``first_steps`` says where in its schedule a client starts."""
    bank = make_bank()
    optimizer = CohortAdamW(bank, flora.TrainConfig(lr=1.0, schedule="linear"), total_steps=[10] * 4, first_steps=6)
    assert optimizer.learning_rates() == pytest.approx([0.4] * 4)
    optimizer.step([True, False, True, True])
    assert optimizer.learning_rates() == pytest.approx([0.3, 0.4, 0.3, 0.3])


def test_inactive_clients_keep_every_bit():
    """Whatever their gradients hold, their factors, moments and step counts stay."""
    bank = make_bank(torch.float32)
    optimizer = make_optimizer(bank)
    optimizer.grad.copy_(gradients(bank, 0))
    optimizer.step()
    buffers = (bank.param, optimizer.exp_avg, optimizer.exp_avg_sq)
    before = [buffer.clone() for buffer in buffers]
    optimizer.grad.copy_(gradients(bank, 1))
    for factor in of_client(bank, optimizer.grad, 1):
        factor.fill_(float("nan"))
    optimizer.step([True, False, True, False])
    for buffer, old in zip(buffers, before, strict=True):
        for c, moved in enumerate([True, False, False, False]):
            pairs = zip(of_client(bank, buffer, c), of_client(bank, old, c), strict=True)
            assert all(torch.equal(new, was) for new, was in pairs) != moved
    assert optimizer.steps == [2, 1, 2, 1]


def test_a_client_steps_as_if_alone():
    """Its bits do not depend on the others' gradients or on whether they step."""
    results = []
    for others in (1.0, float("inf")):
        bank = make_bank(torch.float32)
        optimizer = make_optimizer(bank)
        for step in range(3):
            optimizer.grad.copy_(gradients(bank, step))
            for c in (0, 3):
                for factor in of_client(bank, optimizer.grad, c):
                    factor.mul_(others)
            optimizer.step([others == 1, True, True, others == 1])
        results.append(flat(of_client(bank, bank.param, 1)))
    assert torch.equal(*results)


def test_a_bad_gradient_shows_in_its_own_norm_and_is_cleared():
    bank = make_bank()
    optimizer = make_optimizer(bank)
    optimizer.grad.copy_(gradients(bank, 0))
    healthy = optimizer.grad_norms()
    of_client(bank, optimizer.grad, 3)[0][1, 1] = float("nan")
    norms = optimizer.grad_norms()
    assert math.isnan(norms[3])
    assert norms[:3] == healthy[:3]
    assert norms[2] == 0, "a client without parameters"
    optimizer.zero_grad()
    assert not optimizer.grad.any()


def test_state_round_trip():
    """Taken off and put into another bank, alone and in other company, a client goes on as if never interrupted."""
    bank = make_bank(torch.float32)
    optimizer = make_optimizer(bank)
    for step in range(2):
        optimizer.grad.copy_(gradients(bank, step))
        optimizer.step()
    state = {
        key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in optimizer.state("b").items()
    }
    adapters: Adapters = {m: (A.clone(), B.clone()) for m, (A, B) in bank.adapters("b").items()}
    optimizer.grad.copy_(gradients(bank, 2))
    optimizer.step()

    other = bank.subset(["c", "b"])
    other.load("b", adapters)
    resumed = CohortAdamW(other, [CONFIGS[3], CONFIGS[1]], STEPS)
    resumed.load_state("b", state)
    for factor, grad in zip(of_client(other, resumed.grad, 1), of_client(bank, gradients(bank, 2), 1), strict=True):
        factor.copy_(grad)
    assert resumed.steps == [0, 2]
    resumed.step([False, True])
    for module, pair in bank.adapters("b").items():
        assert all(map(torch.equal, pair, other.adapters("b")[module]))
    assert torch.equal(optimizer.state("b")["exp_avg_sq"], resumed.state("b")["exp_avg_sq"])
    assert resumed.state("b")["step"] == 3
    optimizer.load_state("none", optimizer.state("none"))  # it adapts nothing


def test_gradients_accumulate_into_the_flat_buffer():
    """The factors are leaves whose gradients are views of ``grad``, until they are released."""
    bank = make_bank()
    optimizer = make_optimizer(bank)
    entry = bank.modules["q"]
    for _ in range(2):
        (entry.A_PK.sum() + 3 * entry.B_PN.sum()).backward()
    dA_PK, dB_PN = bank.views_of(optimizer.grad)["q"]
    assert (dA_PK == 2).all()
    assert (dB_PN == 6).all()
    optimizer.release()
    assert not entry.A_PK.requires_grad
    assert entry.B_PN.grad is None


def test_errors():
    bank = make_bank()
    with pytest.raises(ValueError, match=r"configs must have one entry per client \(4\), got 3"):
        CohortAdamW(bank, CONFIGS[:3])
    with pytest.raises(ValueError, match="total_steps must have one entry per client"):
        CohortAdamW(bank, CONFIGS, [1, 2])
    optimizer = make_optimizer(bank)
    with pytest.raises(
        ValueError, match=r"client 'a': the optimizer state must have 86 elements .* keep_optimizer=False"
    ):
        optimizer.load_state("a", optimizer.state("b"))
    with pytest.raises(ValueError, match="client must be one of a, b, none, c, got 'd'"):
        optimizer.state("d")
