"""One batch of sequences as a model takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import IGNORE, Example, pack, pad
from .accepted import decoder_of


@dataclass(frozen=True)
class Batch:
    """Sequences laid out for one forward pass.

    Args:
        inputs: Keyword arguments of the decoder.
        tokens: Real tokens of each client.
        sequences: Lengths of the packed sequences; None where they are padded.
        real_index: Flat positions of the real tokens where sequences are padded; None where packed.
        positions: All positions, padding included.
        label_index: Flat positions that have a target.
        target_M: Their targets.
    """

    inputs: dict[str, torch.Tensor]
    tokens: tuple[int, ...]
    sequences: tuple[int, ...] | None
    real_index: torch.Tensor | None
    positions: int
    label_index: torch.Tensor
    target_M: torch.Tensor


def lay_out(
    sequences: Sequence[Sequence[Example]], packs: bool, device: torch.device | str = "cpu", pad_id: int = 0
) -> Batch:
    """Pack the clients' sequences into one row, or pad them to the longest; everything ends on ``device``."""
    if packs:
        layout = pack(sequences)
        inputs, real_index = {"input_ids": layout.input_ids, "position_ids": layout.position_ids}, None
    else:
        layout = pad(sequences, pad_id)
        inputs = {"input_ids": layout.input_ids, "attention_mask": layout.attention_mask}
        real_index = layout.real_index.to(device)
    labels = layout.labels.reshape(-1)
    index = (labels != IGNORE).nonzero()[:, 0]
    return Batch(
        {name: tensor.to(device) for name, tensor in inputs.items()},
        layout.tokens,
        layout.lengths if packs else None,
        real_index,
        labels.numel(),
        index.to(device),
        labels[index].to(device),
    )


def labelled_hidden(model: Any, batch: Batch) -> torch.Tensor:
    """Last hidden states (M, H) at the positions that have a target."""
    hidden = decoder_of(model)[1](**batch.inputs, use_cache=False).last_hidden_state
    return hidden.reshape(batch.positions, -1).index_select(0, batch.label_index)
