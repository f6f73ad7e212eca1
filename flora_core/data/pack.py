"""Batches of several clients' sequences: packed into one row without padding, or padded to the longest.

A batch is one object from here to the ops. Targets are shifted: that of a position is the next token of the same
sequence, so no sequence predicts its neighbour's first token. Letters: M packed tokens, S sequences, L the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..common import DeviceSegments, Segments, check_number, generator
from .template import IGNORE, Example


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class PackedBatch:
    """Clients' sequences laid out for one pass of a model: clients in order, each client's sequences in order.

    Attributes:
        tokens: Segments over the real tokens, one per client; a client may have none.
        inputs: Keyword arguments of the decoder, int64: ``input_ids`` and ``position_ids`` [1, M] where sequences lie
            end to end, ``input_ids`` and ``attention_mask`` [S, L] where they are padded.
        label_index: Flat positions that have a target.
        target_M: Their targets.
        sequences: Lengths of packed sequences, within each of which attention stays; None where they are rows.
        real_index: Flat positions of the real tokens where sequences are padded; None where nothing is padded.
        rows: Positions of the whole input, padding included; None for the real tokens alone.
        keys: Module -> dropout key of each client; None switches dropout off.
        row_C: Index of each client's first token within its optimizer step.
        dropout_C: As ``lora_linears`` takes it; None for the clients' own.
        adapters: False runs the base alone.
        padding: The last segment of tokens is padding: rows that fill the batch up.
    """

    tokens: Segments | DeviceSegments
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    label_index: Tensor = field(default_factory=_nothing)
    target_M: Tensor = field(default_factory=_nothing)
    sequences: Sequence[int] | DeviceSegments | None = None
    real_index: Tensor | None = None
    rows: int | None = None
    keys: Mapping[str, Sequence[int] | Tensor] | None = None
    row_C: Sequence[int] | Tensor | None = None
    dropout_C: Tensor | None = None
    adapters: bool = True
    padding: bool = False

    @property
    def num_rows(self) -> int:
        """Positions of the whole input."""
        return self.tokens.total if self.rows is None else self.rows


def lay_out(
    examples_by_client: Sequence[Sequence[Example]],
    packs: bool,
    device: torch.device | str = "cpu",
    pad_id: int = 0,
) -> PackedBatch:
    """Lay the clients' sequences end to end (``pack``) or below each other (``pad``), on a device."""
    return pack(examples_by_client, device) if packs else pad(examples_by_client, pad_id, device)


def pack(examples_by_client: Sequence[Sequence[Example]], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay the clients' sequences end to end in one row; position ids restart at 0 in each sequence."""
    sequences = list(chain.from_iterable(examples_by_client))
    lengths = tuple(len(example.input_ids) for example in sequences)
    inputs = {
        "input_ids": _row(example.input_ids for example in sequences),
        "position_ids": _row(range(length) for length in lengths),
    }
    return _batch(examples_by_client, inputs, _row(map(_shifted, sequences)), device, sequences=lengths)


def pad(
    examples_by_client: Sequence[Sequence[Example]], pad_id: int, device: torch.device | str = "cpu"
) -> PackedBatch:
    """Lay the clients' sequences below each other, padded on the right with ``pad_id``."""
    check_number("pad_id", pad_id, 0, whole=True)
    sequences = list(chain.from_iterable(examples_by_client))
    longest = max((len(example.input_ids) for example in sequences), default=0)

    def table(rows: Iterable[Sequence[int]], fill: int) -> Tensor:
        flat = chain.from_iterable([*row, *[fill] * (longest - len(row))] for row in rows)
        return torch.tensor(list(flat), dtype=torch.int64).view(len(sequences), longest)

    mask = table(([1] * len(example.input_ids) for example in sequences), 0)
    inputs = {"input_ids": table((example.input_ids for example in sequences), pad_id), "attention_mask": mask}
    real_index = mask.flatten().nonzero().flatten().to(device)
    return _batch(examples_by_client, inputs, table(map(_shifted, sequences), IGNORE), device, real_index=real_index)


def _batch(
    examples_by_client: Sequence[Sequence[Example]],
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    device: torch.device | str,
    **layout: Any,
) -> PackedBatch:
    labels_M = labels.flatten()
    index = (labels_M != IGNORE).nonzero().flatten()
    return PackedBatch(
        Segments(sum(len(example.input_ids) for example in examples) for examples in examples_by_client),
        {name: tensor.to(device) for name, tensor in inputs.items()},
        index.to(device),
        labels_M[index].to(device),
        rows=labels_M.numel(),
        **layout,
    )


def micro_batches(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Cut examples into consecutive batches; the last may be smaller."""
    check_number("batch_size", batch_size, 1, whole=True)
    return [list(examples[at : at + batch_size]) for at in range(0, len(examples), batch_size)]


def epoch_order(num_examples: int, seed: int, client: str, round: int, epoch: int) -> list[int]:
    """Shuffle a client's examples for one epoch; depends on nothing but the arguments."""
    random = generator(seed, "order", client, round, epoch)
    return torch.randperm(num_examples, generator=random).tolist()


def _shifted(example: Example) -> list[int]:
    """Move labels to the position that predicts them; the last position predicts nothing."""
    return [*example.labels[1:], IGNORE]


def _row(parts: Iterable[Iterable[int]]) -> Tensor:
    """Join lists of ints into an int64 tensor [1, M]."""
    return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64).unsqueeze(0)


T = TypeVar("T")


def passes(items: Sequence[tuple[T, int]], budget: int, *, padded: bool = False) -> list[list[T]]:
    """Cut (item, tokens) pairs into consecutive passes of about equal size within the budget.

    ``padded`` counts every item at the length of the longest in its pass. An item longer than the budget goes alone.
    """
    total = sum(tokens for _, tokens in items)
    even = -(-total // max(1, -(-total // budget)))
    limit = budget if padded else min(budget, even + max((tokens for _, tokens in items), default=0) // 2)
    cut: list[list[T]] = []
    count, filled, longest = 0, 0, 0
    for item, tokens in items:
        size = (count + 1) * max(longest, tokens) if padded else filled + tokens
        if not cut or (count and size > limit):
            cut.append([])
            count, filled, longest = 0, 0, 0
        cut[-1].append(item)
        count, filled, longest = count + 1, filled + tokens, max(longest, tokens)
    return cut
