"""The first Adam step of adapters of rank 64 and 4, compared: the figures of docs/quality.md on mixed step sizes.

python -m bench.studies.first_step

With B = 0 only B moves, by lr times the sign of its gradient G A^T s. To first order the loss falls by
lr s sum |G A^T|, which grows with s r. Letters: M rows, N and K sides of the weight, R one adapter's rank.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import torch
from torch import Tensor

WIDTH, ROWS, SEEDS, LR = 576, 512, 5, 1e-3
SCALES: dict[str, Callable[[int], float]] = {
    "alpha = 2r": lambda rank: 2.0,
    "alpha = 32": lambda rank: 32 / rank,
    "rsLoRA, alpha = 16": lambda rank: 16 / rank**0.5,
}
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient as drawn": lambda values: values,
    "singular values falling as 1/i": lambda values: values / torch.arange(1, len(values) + 1),
    "four singular values": lambda values: torch.where(torch.arange(len(values)) < 4, values, 0),
}


def first_step(rank: int, scale: float, spectrum: Callable[[Tensor], Tensor], seed: int) -> tuple[float, float]:
    """The decrease of the loss to first order, and the norm of the change of W."""
    random = torch.Generator().manual_seed(seed)
    x_MK, dy_MN = (torch.randn(ROWS, WIDTH, generator=random, dtype=torch.float64) for _ in range(2))
    U_NN, values_N, V_NK = torch.linalg.svd(dy_MN.T @ x_MK / ROWS)
    dW_NK = U_NN * spectrum(values_N) @ V_NK
    A_RK = (torch.rand(rank, WIDTH, generator=random, dtype=torch.float64) * 2 - 1) / WIDTH**0.5
    change_NK = -LR * scale * (scale * dW_NK @ A_RK.T).sign() @ A_RK
    return -(dW_NK * change_NK).sum().item(), change_NK.norm().item()


def main() -> None:
    for kind, spectrum in GRADIENTS.items():
        for name, scale in SCALES.items():
            steps = {rank: [first_step(rank, scale(rank), spectrum, seed) for seed in range(SEEDS)] for rank in (64, 4)}
            decrease, norm = (
                mean(step[part] for step in steps[64]) / mean(step[part] for step in steps[4]) for part in (0, 1)
            )
            print(f"{kind}; {name}: rank 64 over rank 4: decrease {decrease:.1f}, norm {norm:.1f}")


if __name__ == "__main__":
    main()
