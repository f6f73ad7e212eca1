"""How a client trains: every field may differ from client to client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..common import check_choice, check_flag, check_number, require
from .other_names import RECIPE_KEYS, meant, refuses_other_names

SCHEDULES = ("constant", "linear", "cosine")
RECOMPUTABLE = ("norms", "activations")


@refuses_other_names(RECIPE_KEYS)
@dataclass(frozen=True)
class TrainConfig:
    """Settings of local training.

    Args:
        lr: Peak learning rate.
        betas, eps, weight_decay: AdamW's, as in ``torch.optim.AdamW``.
        schedule: constant, linear or cosine, as in transformers' schedulers.
        warmup_steps: Optimizer steps over which the rate rises from 0.
        schedule_scope: The schedule spans one ``round`` or the whole ``run``.
        local_epochs: Passes over the client's data per round.
        max_steps: At most so many optimizer steps per round; None for no limit.
        batch_size: Sequences per micro-batch.
        gradient_accumulation: Micro-batches per optimizer step. The loss is the mean over all labelled tokens of
            the step.
        max_length: Longer sequences are cut from the right, in tokens.
        clip_norm: Bound on the norm of the client's own gradient; None for none.
        loss_on: ``answer`` (and its end mark) or ``all`` tokens.
        template: Prompt template: auto, chat or prompt (see ``flora_core.data``).
        dtype: Autocast dtype, None or ``bfloat16``.
        gradient_checkpointing: Recompute each layer in the backward pass.
        recompute: What smaller is recomputed there: ``norms`` (worth it in 16 bits), ``activations`` (of gated MLPs),
            both or none. Like checkpointing it trades time for memory and changes no bit of the result.
        token_budget: At most so many tokens in flight, which also splits the cohort; None lets the planner choose.
        memory_budget_gb: Memory beyond the base for activations, gradients and optimizer state, in GB.
        seed: Seed of data order, initial adapters and dropout.
        deterministic: On CUDA, have the libraries use deterministic algorithms, so that a run repeats bit for bit; a
            CPU with one number of threads always does.
        cuda_graphs: Capture steps of repeated shapes on a GPU and replay them, which spares the time of their launches:
            auto where the cohort can be captured, True or False; ``explain`` and ``trainer.cuda_graphs`` say why.
        keep_optimizer: Carry the optimizer's state to the client's next round.
    Raises:
        ValueError or TypeError: If a value is out of range.
    Example:
        >>> config = flora.TrainConfig(lr=1e-2, schedule="linear", warmup_steps=2)
        >>> [round(config.learning_rate(step, total=6), 4) for step in range(6)]
        [0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025]
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    schedule_scope: str = "round"
    local_epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    max_length: int = 512
    clip_norm: float | None = None
    loss_on: str = "answer"
    template: str = "auto"
    dtype: str | None = None
    gradient_checkpointing: bool = False
    recompute: tuple[str, ...] = ()
    token_budget: int | None = None
    memory_budget_gb: float | None = None
    seed: int = 0
    keep_optimizer: bool = False
    deterministic: bool = True
    cuda_graphs: bool | str = "auto"

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, getattr(self, name), 0)
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        require(pair, f"betas must be two numbers such as (0.9, 0.999), got {self.betas!r}")
        for beta in self.betas:
            check_number("betas", beta, 0)
            require(beta < 1, f"betas must be below 1, got {self.betas}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, low in (("warmup_steps", 0), ("local_epochs", 1), ("batch_size", 1), ("gradient_accumulation", 1)):
            check_number(name, getattr(self, name), low, whole=True)
        for name, low in (("max_steps", 1), ("token_budget", 1)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low, whole=True)
        check_number("max_length", self.max_length, 2, whole=True)
        check_number("seed", self.seed, 0, whole=True)
        for name in ("gradient_checkpointing", "keep_optimizer", "deterministic"):
            check_flag(name, getattr(self, name))
        for name in ("clip_norm", "memory_budget_gb"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
                require(getattr(self, name) > 0, f"{name} must be above 0, or None for no limit, got 0")
        names = isinstance(self.recompute, (tuple, list))
        require(names, f"recompute must be a list of names, got {self.recompute!r}; write ['norms'] for one")
        for kind in self.recompute:
            check_choice("recompute", kind, RECOMPUTABLE)
        object.__setattr__(self, "recompute", tuple(self.recompute))
        choices = ("auto", True, False)
        require(self.cuda_graphs in choices, f"cuda_graphs must be 'auto', True or False, got {self.cuda_graphs!r}")
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("schedule_scope", self.schedule_scope, ("round", "run"))
        check_choice("loss_on", self.loss_on, ("answer", "all"))
        check_choice("template", self.template, ("auto", "chat", "prompt"))
        require(
            self.dtype in (None, "bfloat16"),
            f"dtype must be None or 'bfloat16', got {self.dtype!r}; float16 would need a loss scale per client",
        )

    def overridden(self, train: Mapping[str, Any] | TrainConfig | None) -> TrainConfig:
        """This configuration with a client's own fields laid over it."""
        if train is None:
            return self
        if isinstance(train, TrainConfig):
            return train
        if not isinstance(train, Mapping):
            raise TypeError(f"train must be a TrainConfig or a mapping of its fields to values, got {train!r:.80}")
        known = [field.name for field in fields(self)]
        for name in train:
            require(name in known, f"train: unknown field {name!r}; {meant(name, known)}")
        return replace(self, **dict(train))

    def learning_rate(self, step: int, total: int) -> float:
        """The rate at optimizer step ``step`` (from 0) of ``total``, as transformers' schedulers give it."""
        if step < self.warmup_steps:
            return self.lr * (step / max(1, self.warmup_steps))
        span = max(1, total - self.warmup_steps)
        if self.schedule == "linear":
            return self.lr * max(0.0, (total - step) / span)
        if self.schedule == "cosine":
            return self.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - self.warmup_steps) / span))))
        return self.lr
