"""AdamW over a whole bank in one call, every client with its own settings.

Letters: C clients, H hyper-parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..adapters import AdapterBank
from ..common import require, to_device
from ..config import TrainConfig
from ..ops import HYPER_COLUMNS, cohort_adamw_


class CohortAdamW:
    """AdamW over the flat buffer of a bank: per-client rate, schedule, decay, step count and clipping.

    Args:
        bank: The adapters to train. Its factors become leaves whose gradients are views of ``grad``.
        configs: One ``TrainConfig`` per client, or one for all.
        total_steps: Optimizer steps of each client's schedule, for decay.
        first_steps: Where in its schedule each client starts.
        backend: auto, reference, triton or native.
        trainable: The factors that are trained; the other gets no gradient, no moments and no weight decay.
    Deterministic: yes. Equal to one ``torch.optim.AdamW`` per client, with ``clip_grad_norm_`` before it.
    Example:
        >>> cohort = flora.attach(model, clients, ["q_proj"])
        >>> optimizer = flora.CohortAdamW(cohort.bank, flora.TrainConfig(lr=1e-2))
        >>> tokens, positions = torch.arange(4, 13)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
        >>> with cohort.batch([4, 3, 2]):
        ...     model(tokens, position_ids=positions).logits.sum().backward()
        >>> optimizer.step()
        >>> optimizer.steps
        [1, 1, 1]
    """

    def __init__(
        self,
        bank: AdapterBank,
        configs: Sequence[TrainConfig] | TrainConfig,
        total_steps: Sequence[int] | int = 1,
        first_steps: Sequence[int] | int = 0,
        backend: str = "auto",
        trainable: Sequence[str] = ("A", "B"),
    ):
        count = len(bank.names)
        known = set(trainable) <= {"A", "B"} and len(trainable) > 0
        require(known, f"trainable must name 'A', 'B' or both, got {tuple(trainable)!r}")
        self.bank, self.backend, self.trainable = bank, backend, tuple(trainable)
        self.configs = [configs] * count if isinstance(configs, TrainConfig) else list(configs)
        self.total_steps = [total_steps] * count if isinstance(total_steps, int) else list(total_steps)
        self.first_steps = [first_steps] * count if isinstance(first_steps, int) else list(first_steps)
        for name, values in (
            ("configs", self.configs),
            ("total_steps", self.total_steps),
            ("first_steps", self.first_steps),
        ):
            require(len(values) == count, f"{name} must have one entry per client ({count}), got {len(values)}")
        self.steps = [0] * count
        self.grad, self.exp_avg, self.exp_avg_sq = (torch.zeros_like(bank.param) for _ in range(3))
        # Frozen ranges belong to one more row of hyper-parameters, whose step 0 leaves them untouched.
        frozen = [set("AB"[i // count % 2]).isdisjoint(trainable) for i in range(len(bank.owner))]
        # Settings live on the device: a captured step reads what is put there before each replay.
        self._hyper_CH = torch.zeros(
            count + any(frozen), len(HYPER_COLUMNS), dtype=torch.float64, device=bank.param.device
        )
        self._segments = bank.segments
        self._owner = tuple(count if still else c for c, still in zip(bank.owner, frozen, strict=True))
        for path, (dA_PK, dB_PN) in bank.views_of(self.grad).items():
            entry = bank.modules[path]
            for name, factor, grad in (("A", entry.A_PK, dA_PK), ("B", entry.B_PN, dB_PN)):
                if name in trainable:
                    factor.requires_grad_(True).grad = grad

    def zero_grad(self) -> None:
        """Clear every client's gradient, a NaN included."""
        self.grad.zero_()

    def release(self) -> None:
        """Let go of the gradients: the factors are plain tensors again."""
        for entry in self.bank.modules.values():
            for factor in (entry.A_PK, entry.B_PN):
                factor.grad = None
                factor.requires_grad_(False)

    def _of_client(self, flat: torch.Tensor) -> list[list[torch.Tensor]]:
        parts: list[list[torch.Tensor]] = [[] for _ in self.bank.names]
        for part, owner in zip(flat.split(list(self._segments.lengths)), self.bank.owner, strict=True):
            if part.numel():
                parts[owner].append(part)
        return parts

    def grad_norms(self) -> list[float]:
        """The norm of each client's own gradient; NaN or inf stays with the client that has it."""
        return self._norms().tolist()

    def _norms(self) -> torch.Tensor:
        none = self.grad.new_zeros(())
        return torch.stack(
            [torch.nn.utils.get_total_norm(parts) if parts else none for parts in self._of_client(self.grad)]
        )

    def learning_rates(self) -> list[float]:
        """The rate that each client's next step will use."""
        schedule = zip(self.configs, self.first_steps, self.steps, self.total_steps, strict=True)
        return [config.learning_rate(first + step, total) for config, first, step, total in schedule]

    def step(self, active: Sequence[bool] | None = None, norms: Sequence[float] | None = None) -> None:
        """Step the active clients; the others keep factors, moments and step count bit for bit.

        Args:
            active: One flag per client; all of them unless given.
            norms: What ``grad_norms()`` gave, if it was already asked.
        """
        active = [True] * len(self.steps) if active is None else list(active)
        clipping = any(config.clip_norm is not None for config in self.configs)
        if norms is None:
            norms = self.grad_norms() if clipping else [0.0] * len(self.steps)
        self.prepare(active)
        self._launch(torch.tensor(norms, dtype=torch.float64, device=self._hyper_CH.device))
        self.advance(active)

    def prepare(self, active: Sequence[bool]) -> None:
        """Put the next step's settings on the device; a step of 0 is for clients that do not take it."""
        rates, hyper = self.learning_rates(), []
        for c, config in enumerate(self.configs):
            step, bound = (self.steps[c] + 1) * active[c], config.clip_norm or math.inf
            hyper.append([rates[c], *config.betas, config.eps, config.weight_decay, step, bound])
        if hyper:
            to_device(torch.tensor(hyper, dtype=torch.float64), self._hyper_CH[: len(hyper)])

    def step_if_finite(self, loss_C: torch.Tensor) -> torch.Tensor:
        """Take the prepared step where loss and gradient are finite, decided on the device: no number is read back.

        Returns:
            Losses and norms, (2, C), float64. The caller reads them, then calls ``advance``.
        """
        norms_C = self._norms().double()
        self._launch(norms_C, loss_C.isfinite() & norms_C.isfinite())
        return torch.stack([loss_C.double(), norms_C])

    def advance(self, active: Sequence[bool]) -> None:
        """Count the step of those who took it."""
        self.steps = [step + bool(took) for step, took in zip(self.steps, active, strict=True)]

    def _launch(self, norms_C: torch.Tensor, takes_C: torch.Tensor | None = None) -> None:
        hyper_CH = self._hyper_CH.clone()
        step_C, bound_C = hyper_CH[: len(norms_C), 5], hyper_CH[: len(norms_C), 6]
        scale_C = (bound_C / (norms_C + 1e-6)).clamp(max=1.0)
        bound_C.copy_(torch.where(bound_C.isinf(), 1.0, scale_C))
        if takes_C is not None:
            step_C.copy_(torch.where(takes_C, step_C, 0.0))
        cohort_adamw_(
            self.bank.param,
            self.grad,
            self.exp_avg,
            self.exp_avg_sq,
            self._segments,
            hyper_CH,
            owner=self._owner,
            backend=self.backend,
        )

    def state(self, client: str) -> dict[str, Any]:
        """A client's moments and step count: ``{"step": int, "exp_avg": (E), "exp_avg_sq": (E)}``."""
        c = self.bank.index(client)
        # The empty tensor is for a client that adapts nothing.
        parts = ([flat.new_empty(0), *self._of_client(flat)[c]] for flat in (self.exp_avg, self.exp_avg_sq))
        average, square = map(torch.cat, parts)
        return {"step": self.steps[c], "exp_avg": average, "exp_avg_sq": square}

    def load_state(self, client: str, state: dict[str, Any]) -> None:
        """Continue from what ``state`` gave.

        Raises:
            ValueError: If the client's adapter has another size now.
        """
        c = self.bank.index(client)
        size = sum(part.numel() for part in self._of_client(self.exp_avg)[c])
        require(
            state["exp_avg"].numel() == size == state["exp_avg_sq"].numel(),
            f"client {client!r}: the optimizer state must have {size} elements to match the adapter, "
            f"got {state['exp_avg'].numel()}; start it afresh with keep_optimizer=False",
        )
        self.steps[c] = int(state["step"])
        for flat, name in ((self.exp_avg, "exp_avg"), (self.exp_avg_sq, "exp_avg_sq")):
            parts = self._of_client(flat)[c]
            for part, value in zip(parts, state[name].split([part.numel() for part in parts]), strict=True):
                part.copy_(value)
