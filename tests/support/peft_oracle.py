"""A PEFT user's training loop: the oracle that a cohort is held against, and what of the cohort is held against it.

The oracle knows nothing of cohorts: one client, padded batches, ``get_peft_model``, ``torch.optim.AdamW``,
``clip_grad_norm_`` and transformers' schedulers. Only its dropout is ours: a mask from a Philox in NumPy.
Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import flora_core as flora
from flora_core.adapters.update import Adapters
from flora_core.data.pack import epoch_order
from flora_core.data.template import IGNORE, Example
from flora_core.training.optimizer import CohortAdamW


def philox(group: np.ndarray, row: np.ndarray, key: int, rounds: int = 7) -> list[np.ndarray]:
    """Philox4x32 over counters (group, row, 0, 0), as Salmon et al. (SC 2011) print it."""
    low, thirty_two = np.uint64(2**32 - 1), np.uint64(32)
    c = [group.astype(np.uint64), row.astype(np.uint64), np.zeros_like(row, np.uint64), np.zeros_like(row, np.uint64)]
    k0, k1 = key % 2**32, key >> 32
    for _ in range(rounds):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> thirty_two) ^ c[1] ^ np.uint64(k0), p1 & low, (p0 >> thirty_two) ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def keep_mask(rows: np.ndarray, columns: int, q: int, key: int) -> torch.Tensor:
    """Bool (rows, columns): which inputs of the adapter dropout keeps, eight draws of 16 bits per counter."""
    groups = np.arange((columns + 7) // 8)
    grid_row, grid_group = np.meshgrid(rows, groups, indexing="ij")
    words = philox(grid_group, grid_row, key)
    draws = np.stack([word >> np.uint64(shift) & np.uint64(0xFFFF) for word in words for shift in (0, 16)], axis=-1)
    return torch.from_numpy(draws.reshape(len(rows), -1)[:, :columns] >= np.uint64(q))


def dropout_key(seed: int, client: str, step: int, module: str, round: int = 0) -> int:
    """The 63-bit key that the engine derives for one client, optimizer step and module."""
    parts = (seed, "dropout", round, client, step, module)
    text = "\x1f".join(f"{type(part).__name__}:{len(str(part))}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class MaskDropout(nn.Module):
    """Stands where PEFT has ``nn.Dropout``: the mask of one client, step and module; rows are the real tokens."""

    def __init__(self, probability: float, key: Callable[[int], int]):
        super().__init__()
        self.q, self.key = round(65536 * probability), key
        self.step, self.first_row, self.attention_mask = 0, 0, torch.ones(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        real = self.attention_mask.reshape(-1).bool()
        rows = self.first_row + np.arange(int(real.sum()))
        keep = torch.ones(len(real), x.shape[-1], dtype=torch.bool)
        keep[real] = keep_mask(rows, x.shape[-1], self.q, self.key(self.step))
        return torch.where(keep.view(x.shape), x * (65536 / (65536 - self.q)), 0)


def peft_model(model: Any, spec: flora.ClientSpec, targets: Any, adapters: Adapters, seed: int = 0) -> Any:
    """A copy of a base model with one client's adapter, as PEFT makes it."""
    adapter = spec.adapter
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        rank_pattern=dict(adapter.rank_pattern or {}),
        alpha_pattern=dict(adapter.alpha_pattern or {}),
        target_modules=adapter.target_modules if adapter.target_modules is not None else list(targets),  # pyright: ignore
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft's own call
        peft: Any = get_peft_model(copy.deepcopy(model), config)
    layers = lora_layers(peft)
    assert set(layers) == set(adapters)
    for path, layer in layers.items():
        A_RK, B_RN = adapters[path]
        layer.lora_A["default"].weight.data.copy_(A_RK)
        layer.lora_B["default"].weight.data.copy_(B_RN.T)
        if adapter.dropout:
            key = lambda step, path=path: dropout_key(seed, spec.name, step, path)  # noqa: E731
            layer.lora_dropout["default"] = MaskDropout(adapter.dropout, key)
    return peft


def lora_layers(peft: Any) -> dict[str, Any]:
    """Path in the base model -> PEFT's layer."""
    prefix = "base_model.model."
    return {path.removeprefix(prefix): module for path, module in peft.named_modules() if isinstance(module, LoraLayer)}


def factors(peft: Any, of: Callable[[nn.Parameter], Any] = lambda weight: weight.detach()) -> Adapters:
    """Something of every weight, by module: (for A as R x K, for B as R x N)."""
    pairs = {path: (layer.lora_A["default"], layer.lora_B["default"]) for path, layer in lora_layers(peft).items()}
    return {path: (of(A.weight).clone(), of(B.weight).T.clone()) for path, (A, B) in pairs.items()}


@dataclass
class Trained:
    """Result of a client's training; gradients are those of step 1, moments those after the last."""

    losses: list[float]
    grads: Adapters
    adapters: Adapters
    exp_avg: Adapters
    exp_avg_sq: Adapters
    norms: list[float]


def peft_train(
    model: Any,
    spec: flora.ClientSpec,
    config: flora.TrainConfig,
    targets: Any,
    adapters: Adapters,
    autocast: Any = None,
    max_steps: int | None = None,
) -> Trained:
    """Train one client as a PEFT user would: its own copy of the model, padded micro-batches, torch's AdamW.

    ``max_steps`` stops early and leaves the schedule as it is.
    """
    config = config.overridden(spec.train)
    peft = peft_model(model, spec, targets, adapters, config.seed).train()
    weights = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    batches = step_batches(spec, config)
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    schedule = transformers.get_scheduler(name, optimizer, config.warmup_steps, len(batches))
    losses, norms, grads = [], [], {}
    for step, batch in enumerate(batches[:max_steps]):
        optimizer.zero_grad(set_to_none=False)
        losses.append(_accumulate(peft, batch, config.batch_size, step, autocast))
        grads = grads or factors(peft, lambda weight: weight.grad)
        norms.append(float(nn.utils.clip_grad_norm_(weights, config.clip_norm or math.inf)))
        optimizer.step()
        schedule.step()
    average, square = (
        factors(peft, lambda w, name=name: optimizer.state[w][name]) for name in ("exp_avg", "exp_avg_sq")
    )
    return Trained(losses, grads, factors(peft), average, square, norms)


def step_batches(spec: flora.ClientSpec, config: flora.TrainConfig) -> list[list[Example]]:
    """The examples of each optimizer step: the epochs' order, cut into steps, cut off at ``max_steps``."""
    size, steps = config.batch_size * config.gradient_accumulation, []
    for epoch in range(config.local_epochs):
        order = epoch_order(len(spec.data), config.seed, spec.name, 0, epoch)
        rows = [spec.data[i] for i in order]
        steps += [rows[at : at + size] for at in range(0, len(rows), size)]
    return steps[: config.max_steps]


def _accumulate(peft: Any, batch: Sequence[Example], batch_size: int, step: int, autocast: Any) -> float:
    """Backward of every micro-batch; the loss is the mean over the labelled tokens of the whole step."""
    count = sum(label != IGNORE for example in batch for label in example.labels[1:])
    masks = [module for module in peft.modules() if isinstance(module, MaskDropout)]
    total = 0.0
    for mask in masks:
        mask.step, mask.first_row = step, 0
    for at in range(0, len(batch), batch_size):
        ids, labels, attention_mask = padded(batch[at : at + batch_size])
        for mask in masks:
            mask.attention_mask = attention_mask
        with autocast or nullcontext():
            logits = peft(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        flat, target = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
        loss = nn.functional.cross_entropy(flat, target, ignore_index=IGNORE, reduction="sum")
        (loss / count).backward()
        total += loss.item() / count
        for mask in masks:
            mask.first_row += int(attention_mask.sum())
    return total


def padded(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, labels and attention_mask, padded on the right."""

    def table(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)

    ids = [example.input_ids for example in batch]
    return table(ids, 0), table([e.labels for e in batch], IGNORE), table([[1] * len(row) for row in ids], 0)


@contextmanager
def first_gradients(found: dict[str, Adapters]) -> Iterator[None]:
    """Keep every client's gradient of its first optimizer step."""
    step = CohortAdamW.step

    def recorded(self: CohortAdamW, *args: Any) -> None:
        for c, name in enumerate(self.bank.names):
            own = {module: entry.ranks[c] for module, entry in self.bank.modules.items() if entry.ranks.lengths[c]}
            views = self.bank.views_of(self.grad)
            pairs = {module: [grad[rows].clone() for grad in views[module]] for module, rows in own.items()}
            found.setdefault(name, {module: (dA_RK, dB_RN) for module, (dA_RK, dB_RN) in pairs.items()})
        step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CohortAdamW, "step", recorded)
        yield
