"""A frozen linear layer with every client's adapter: each token goes through its own.

Letters: M packed tokens, K in_features, N out_features, C clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..adapters import BankModule
from ..common import Segments, require
from ..data import PackedBatch
from ..ops import LoraWeights, lora_linears
from .weights import weight_view


class Route:
    """State of the wrapped layers of one model: the ``batch`` that runs, or ``client`` for one client's adapter.

    ``groups`` names for each layer those that see the same input, in the order in which they run: the first computes
    for all of them and leaves the others' outputs in ``waiting``.
    """

    def __init__(self) -> None:
        self.batch: PackedBatch | None = None
        self.client: int | None = None
        self.groups: dict[str, tuple[MultiLoRALinear, ...]] = {}
        self.waiting: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._seen: list[tuple[MultiLoRALinear, torch.Tensor]] | None = None

    @contextmanager
    def finding_groups(self) -> Iterator[None]:
        """Watch which layers are handed the same tensor, one after another, and let them share it from now on."""
        self._seen = []
        try:
            yield
        finally:
            groups: list[list[tuple[MultiLoRALinear, torch.Tensor]]] = []
            for layer, x in self._seen:
                joins = groups and groups[-1][-1][1] is x and layer not in (other for other, _ in groups[-1])
                groups[-1].append((layer, x)) if joins else groups.append([(layer, x)])
            self._seen = None
            for group in groups:
                members = tuple(layer for layer, _ in group)
                self.groups.update({layer.path: members for layer in members})

    def saw(self, layer: MultiLoRALinear, x: torch.Tensor) -> None:
        """Note what a layer was handed, while groups are being found."""
        if self._seen is not None:
            self._seen.append((layer, x))

    def take(self, path: str, x: torch.Tensor) -> torch.Tensor | None:
        """Return the result that the group's first layer left for this one, if it was made of this very input."""
        source, version, y = self.waiting.pop(path, (None, 0, None))
        return y if source is x and version == _version(x) else None


def _version(x: torch.Tensor) -> int:
    """Counts what was written into a tensor, where that is counted."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class MultiLoRALinear(nn.Module):
    """A drop-in for a frozen ``nn.Linear`` or ``Conv1D`` that shares its parameters.

    Outside a batch and outside ``cohort.use`` it is the base layer alone. Adapters live in the bank, not here, so
    the model's parameters and state dict stay as they were.
    """

    def __init__(
        self,
        original: nn.Module,
        path: str,
        route: Route,
        entry: Callable[[], tuple[BankModule, Sequence[float]]],
        backend: str = "auto",
        fuse: str = "auto",
    ):
        super().__init__()
        self.weight: torch.Tensor = original.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.bias: torch.Tensor | None = original.bias  # pyright: ignore[reportAttributeAccessIssue]
        # Not a submodule: it would double every name in the state dict.
        object.__setattr__(self, "original", original)
        self.path, self.route, self.entry, self.backend, self.fuse = path, route, entry, backend, fuse
        self.training = original.training

    @property
    def weight_NK(self) -> torch.Tensor:
        """The weight as N x K, a view; Conv1D stores K x N."""
        return weight_view(self.original)

    @property
    def bias_N(self) -> torch.Tensor | None:
        """The bias of the layer below: where the base is sharded, it is there that it is gathered."""
        return self.original.bias  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    @property
    def out_features(self) -> int:
        return self.weight_NK.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight_NK.shape[1]

    def extra_repr(self) -> str:
        return f"{self.path}, in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = self.route.batch
        if batch is not None:
            return self._batch(x, batch)
        if self.route.client is not None:
            rows = x.numel() // x.shape[-1]
            lengths = [0] * len(self.entry()[1])
            lengths[self.route.client] = rows
            (y_MN,) = _apply([self], x, PackedBatch(Segments.from_lengths(lengths)))
            return y_MN.view(*x.shape[:-1], -1)
        return self.original(x)  # pyright: ignore[reportCallIssue]

    def _batch(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        expected = batch.num_rows
        require(
            rows == expected,
            f"{self.path} got {rows} rows of input, the batch has {expected} tokens: it does not see the packed tokens "
            "in order (routed experts, pooled or vision inputs); leave it out of target_modules",
        )
        if not batch.adapters:
            self.route.saw(self, x)
            return self.original(x)  # pyright: ignore[reportCallIssue]
        waiting = self.route.take(self.path, x)
        if waiting is not None:
            return waiting
        group = self.route.groups.get(self.path, (self,))
        if group[0] is not self:
            group = (self,)
        packed = x if batch.real_index is None else x.reshape(rows, -1).index_select(0, batch.real_index)
        outputs = _apply(group, packed, batch)
        if batch.real_index is not None:
            outputs = [y.new_zeros(rows, y.shape[1]).index_copy(0, batch.real_index, y) for y in outputs]
        outputs = [y.view(*x.shape[:-1], -1) for y in outputs]
        self.route.waiting = {layer.path: (x, _version(x), y) for layer, y in zip(group[1:], outputs[1:], strict=True)}
        return outputs[0]


def _apply(layers: Sequence[MultiLoRALinear], x: torch.Tensor, batch: PackedBatch) -> list[torch.Tensor]:
    """Layers that share their input, over rows that are all real tokens: y_MN of each."""
    x_MK = x.reshape(-1, x.shape[-1])
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    x_MK = x_MK if dtype is None else x_MK.to(dtype)
    targets = []
    for layer in layers:
        entry, _ = layer.entry()
        entry = entry.padded if batch.padding else entry
        weight, bias = layer.weight_NK, layer.bias_N
        if dtype is not None:
            weight, bias = weight.to(dtype), bias if bias is None else bias.to(dtype)
        seed_C = None if batch.keys is None else batch.keys[layer.path]
        targets.append(LoraWeights(weight, bias, entry.A_PK, entry.B_PN, entry.ranks, entry.scaling_C, seed_C))
    own_C = layers[0].entry()[1] if batch.dropout_C is None else batch.dropout_C
    dropout_C = None if batch.keys is None else own_C
    options: dict[str, Any] = dict(backend=layers[0].backend, fuse=layers[0].fuse)
    tokens: Any = batch.tokens  # the kernels take either kind
    with torch.autocast(device, enabled=False):
        return lora_linears(x_MK, targets, tokens, dropout_C=dropout_C, row_C=batch.row_C, **options)
