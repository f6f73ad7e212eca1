"""Training steps of static shape, which a GPU captures once as a CUDA graph and replays.

A pass is filled up with padding rows to one of a few sizes. All that differs from one pass to the next lies
in one device table: tokens, targets, offsets of clients and sequences, dropout's keys and counters. A step's settings
lie in the optimizer's. Whether a client's step is taken is decided on the device. Everything but the capture runs on a
CPU as well, where ``Eager`` calls what ``Graphs`` replays.
Letters: M rows of a pass, L labels, S sequences, C clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..common import DeviceSegments, Segments, to_device
from ..config import TrainConfig
from ..data import IGNORE, Example, PackedBatch, lay_out
from ..distributed import sharded
from ..model import Cohort, attention, client_losses, labelled_hidden
from ..ops import dropout_threshold, resolve
from .cuda_graphs import Executor
from .optimizer import CohortAdamW

MOST_SHAPES = 128
Examples = Sequence[Sequence[Example]]


class Shape(NamedTuple):
    """Sizes of a pass, each from a short list, so that they come again."""

    rows: int
    labels: int
    sequences: int


def shape_of(rows: int, labels: int, sequences: int, longest: int) -> Shape:
    """The sizes for a pass of so many rows, labels and sequences, with at least one padding row."""
    full = round_up(rows + 1, 16)
    # What is filled up is cut into sequences no longer than others.
    return Shape(full, round_up(max(labels, 1), 4), round_up(sequences - (-(full - rows) // longest), 1))


def round_up(count: int, sizes: int) -> int:
    """The next of so many sizes an octave, at least 16."""
    step = max(16 // sizes, 1, (1 << (count - 1).bit_length()) // 2 // sizes)
    return max(16, -(-count // step) * step)


def why_not(cohort: Cohort, config: TrainConfig) -> str | None:
    """Why steps are not captured as CUDA graphs; None where they are."""
    parameter = cohort.bank.param
    if config.cuda_graphs is False:
        return "cuda_graphs=False"
    if parameter.device.type != "cuda":
        return f"training on {parameter.device.type}"
    if sharded(cohort.model) is not None:
        return "the base is sharded: layers are gathered within a step"
    if not cohort.packs:
        return f"sequences are padded ({cohort.packing_reason})"
    if config.gradient_checkpointing:
        return "gradient checkpointing reads the state of random generators"
    if not _on_device(cohort):
        return f"backend {cohort.backend!r} reads the clients' lengths on the host"
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    way, why = attention.way_of(cohort.model, dtype)
    return None if way in _STATIC_WAYS else f"attention runs {way}, which reads lengths on the host ({why})"


_STATIC_WAYS = ("flash-attn", "varlen")


def _on_device(cohort: Cohort) -> bool:
    """Return whether the kernels find the clients' rows on the device alone."""
    layer = next(iter(cohort.layers.values()))
    return resolve(cohort.backend, "shrink", layer.weight)[0].__name__.endswith("triton")


def num_labels(example: Example) -> int:
    """Labels with a token before them."""
    return sum(label != IGNORE for label in example.labels[1:])


def _lengths(examples: Sequence[Example]) -> list[int]:
    return [len(example.input_ids) for example in examples]


class StaticPass:
    """One pass forward and backward over buffers of fixed sizes: ``fill`` them, then ``run``; ``loss_C`` has losses."""

    def __init__(self, cohort: Cohort, shape: Shape, longest: int, autocast: Callable[[], Any]):
        self.cohort, self.shape, self.longest, self.autocast = cohort, shape, longest, autocast
        device, clients = cohort.bank.param.device, len(cohort.active.names) + 1
        drops = [cohort.spec(name).adapter.dropout for name in cohort.active.names]
        self.drops = any(drops)
        # Rows of keys begin at multiples of 16 bytes: kernels are compiled for such addresses.
        keys = len(cohort.layers) * (clients + clients % 2)
        sizes = {"keys": keys * self.drops, "inputs": shape.rows, "positions": shape.rows}
        sizes |= {"labels": shape.labels, "targets": shape.labels, "sequences": shape.sequences + 1}
        sizes |= {"tokens": clients + 1, "labelled": clients + 1, "rows": clients, "counts": clients}
        self.table = torch.zeros(sum(sizes.values()), dtype=torch.int64, device=device)
        self.part = dict(zip(sizes, self.table.split(list(sizes.values())), strict=True))
        self.thresholds = torch.tensor([*map(dropout_threshold, drops), 0], dtype=torch.int32, device=device)
        self.loss_C = cohort.bank.param.new_zeros(clients - 1)
        # What the host has to know where kernels or attention cannot do without: never under a captured graph.
        self.host_tokens: Segments | None = None
        self.host_sequences: Sequence[int] | None = None
        self.device_tokens = _on_device(cohort)

    def fill(
        self,
        examples: Examples,
        counts: Sequence[int],
        rows: Sequence[int],
        keys: Mapping[str, Sequence[int]] | None,
    ) -> None:
        """Put a pass into the table: every client's examples, its labels in the step, its first row, dropout's keys."""
        _, L, S = self.shape
        filled = [*examples, self._nobody(examples)]
        batch, tokens = lay_out(filled, packs=True), Segments(sum(_lengths(part)) for part in filled)
        labelled = [sum(map(num_labels, part)) for part in examples]
        sequences = [length for part in filled for length in _lengths(part)]
        values = {
            "keys": self._keys(keys) if self.drops and keys is not None else [],
            "inputs": batch.inputs["input_ids"][0],
            "positions": batch.inputs["position_ids"][0],
            "labels": torch.cat([batch.label_index, self._padding_rows(tokens.offsets[-2], L - sum(labelled))]),
            "targets": torch.nn.functional.pad(batch.target_M, (0, L - sum(labelled))),
            "sequences": Segments([*sequences, *[0] * (S - len(sequences))]).offsets,
            "tokens": tokens.offsets,
            "labelled": Segments([*labelled, L - sum(labelled)]).offsets,
            "rows": [*rows, 0],
            "counts": [*counts, 0],
        }
        to_device(torch.cat([torch.as_tensor(values[name]).long() for name in self.part]), self.table)
        self.host_tokens = None if self.device_tokens else tokens
        way = attention.way_of(self.cohort.model, self._dtype()).name
        self.host_sequences = None if way in _STATIC_WAYS else sequences

    def _dtype(self) -> torch.dtype | None:
        with self.autocast():
            device = self.table.device.type
            return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def _nobody(self, examples: Examples) -> list[Example]:
        """Sequences without labels that fill a pass up."""
        missing = self.shape.rows - sum(sum(_lengths(part)) for part in examples)
        lengths = [min(self.longest, missing - at) for at in range(0, missing, self.longest)]
        return [Example([0] * length, [IGNORE] * length, -1) for length in lengths]

    def _padding_rows(self, first: int, count: int) -> torch.Tensor:
        """Rows for the labels that fill a pass up; a weight of 0 keeps their loss out.

        They are the padding's own, each as often as the others: a deterministic backward sums the gradients of one
        row one after another.
        """
        return first + torch.arange(count) % (self.shape.rows - first)

    def _keys(self, keys: Mapping[str, Sequence[int]]) -> list[int]:
        fill = [0] * (1 + (len(self.thresholds) % 2))
        return [key for path in self.cohort.layers for key in (*keys[path], *fill)]

    def run(self) -> None:
        """Add every client's gradient to its buffer; nothing but the table differs between calls."""
        part, (M, L, _) = self.part, self.shape
        keys = part["keys"].view(len(self.cohort.layers), -1)[:, : len(self.thresholds)] if self.drops else None
        batch = PackedBatch(
            self.host_tokens or DeviceSegments(part["tokens"].int(), M),
            {"input_ids": part["inputs"][None], "position_ids": part["positions"][None]},
            part["labels"],
            part["targets"],
            self.host_sequences or DeviceSegments(part["sequences"].int(), M, self.longest),
            keys=None if keys is None else dict(zip(self.cohort.layers, keys.unbind(), strict=True)),
            row_C=part["rows"].int(),
            dropout_C=self.thresholds,
            padding=True,
        )
        weight_C = torch.where(part["counts"] > 0, 1 / part["counts"].double(), 0.0)
        with self.cohort.running(batch), self.autocast():
            hidden_MH = labelled_hidden(self.cohort.model, batch)
            labelled = DeviceSegments(part["labelled"].int(), L)
            loss_C = client_losses(self.cohort.head, hidden_MH, batch.target_M, labelled, weight_C)
            loss_C.sum().backward()
        self.loss_C.copy_(loss_C.detach()[:-1])


class StaticSteps:
    """Passes and optimizer steps of one cohort in static shapes, by an executor."""

    def __init__(
        self, cohort: Cohort, optimizer: CohortAdamW, executor: Executor, longest: int, autocast: Callable[[], Any]
    ):
        self.cohort, self.optimizer, self.executor = cohort, optimizer, executor
        self.longest, self.autocast = longest, autocast
        self.passes: dict[Shape, StaticPass] = {}
        # The bank's dtype is float32 or float64, and so is a loss.
        self.loss_C = cohort.bank.param.new_zeros(len(optimizer.steps))
        self.result = torch.zeros(2, len(optimizer.steps), dtype=torch.float64, device=self.loss_C.device)

    def forward_backward(
        self, groups: Sequence[Examples], counts: Sequence[int], keys: Mapping[str, Sequence[int]] | None
    ) -> tuple[torch.Tensor, list[int]]:
        """Add the gradients of all passes of a step (see ``StaticPass.fill``); losses and tokens per client."""
        tokens, losses = [0] * len(counts), torch.zeros_like(self.loss_C)
        for examples in groups:
            static = self._pass(examples)
            static.fill(examples, counts, tokens, keys)
            kept = self.passes.get(static.shape) is static
            self.executor.run(static.shape if kept else None, static.run)
            losses += static.loss_C
            tokens = [done + sum(_lengths(part)) for done, part in zip(tokens, examples, strict=True)]
        return losses, tokens

    def _pass(self, examples: Examples) -> StaticPass:
        """The pass of these examples' shape."""
        flat = [example for part in examples for example in part]
        shape = shape_of(sum(_lengths(flat)), sum(map(num_labels, flat)), len(flat), self.longest)
        static = self.passes.get(shape) or StaticPass(self.cohort, shape, self.longest, self.autocast)
        if len(self.passes) < MOST_SHAPES:
            self.passes[shape] = static
        return static

    def step(self, loss_C: torch.Tensor, active: Sequence[bool]) -> tuple[list[float], list[float]]:
        """Step the active clients whose loss and gradient are finite; every client's loss and norm."""
        self.optimizer.prepare(active)
        self.loss_C.copy_(loss_C)
        self.executor.run("step", self._step)
        losses, norms = self.result.tolist()
        return losses, norms

    def _step(self) -> None:
        self.result.copy_(self.optimizer.step_if_finite(self.loss_C))
