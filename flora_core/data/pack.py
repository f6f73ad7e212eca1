"""Batches of several clients' sequences: packed into one row without padding, or padded to the longest.

Labels come out shifted: ``labels[t]`` is the target of position t, the next token of the same sequence,
so no sequence predicts its neighbour's first token. Letters: M packed tokens, S sequences, L the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from ..common import check_number, generator
from .template import IGNORE, Example


@dataclass(frozen=True)
class Layout:
    """Where whose tokens lie: clients in order, each client's sequences in order.

    Attributes:
        tokens: Real tokens of each client; a client may have none.
        lengths: Real tokens of each sequence.
        sequence_client: Index of the client that owns each sequence.
    """

    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    sequence_client: tuple[int, ...]


@dataclass(frozen=True)
class Packed(Layout):
    """Sequences end to end in one row: input_ids, position_ids and shifted labels, each int64 [1, M]."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Padded(Layout):
    """Sequences below each other: input_ids, attention_mask and shifted labels, each int64 [S, L].

    ``real_index`` holds the flat indices of the real tokens in row-major order, int64 [M].
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    real_index: Tensor


def pack(examples_by_client: Sequence[Sequence[Example]]) -> Packed:
    """Lay the clients' sequences end to end in one row; position ids restart at 0 in each sequence."""
    sequences, layout = _flatten(examples_by_client)
    return Packed(
        *layout,
        input_ids=_row(example.input_ids for example in sequences),
        position_ids=_row(range(length) for length in layout[1]),
        labels=_row(_shifted(example) for example in sequences),
    )


def pad(examples_by_client: Sequence[Sequence[Example]], pad_id: int) -> Padded:
    """Lay the clients' sequences below each other, padded on the right with ``pad_id``."""
    check_number("pad_id", pad_id, 0, whole=True)
    sequences, layout = _flatten(examples_by_client)
    longest = max(layout[1], default=0)

    def table(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        flat = chain.from_iterable([*row, *[fill] * (longest - len(row))] for row in rows)
        return torch.tensor(list(flat), dtype=torch.int64).view(len(rows), longest)

    attention_mask = table([[1] * length for length in layout[1]], 0)
    return Padded(
        *layout,
        input_ids=table([example.input_ids for example in sequences], pad_id),
        attention_mask=attention_mask,
        labels=table([_shifted(example) for example in sequences], IGNORE),
        real_index=attention_mask.flatten().nonzero().flatten(),
    )


def micro_batches(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Cut examples into consecutive batches; the last may be smaller."""
    check_number("batch_size", batch_size, 1, whole=True)
    return [list(examples[at : at + batch_size]) for at in range(0, len(examples), batch_size)]


def epoch_order(num_examples: int, seed: int, client: str, round: int, epoch: int) -> list[int]:
    """Shuffle a client's examples for one epoch; depends on nothing but the arguments."""
    random = generator(seed, "order", client, round, epoch)
    return torch.randperm(num_examples, generator=random).tolist()


def _flatten(
    examples_by_client: Sequence[Sequence[Example]],
) -> tuple[list[Example], tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """List all sequences in order, with the fields of their ``Layout``."""
    tokens = tuple(sum(len(example.input_ids) for example in examples) for examples in examples_by_client)
    owned = [(client, example) for client, examples in enumerate(examples_by_client) for example in examples]
    sequences = [example for _, example in owned]
    return sequences, (tokens, tuple(len(e.input_ids) for e in sequences), tuple(client for client, _ in owned))


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
