"""A cohort: clients with their adapters on one resident model, and how each row of a batch finds its client's.

Letters: C clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..adapters import AdapterBank, Adapters, BankModule, ClientUpdate
from ..common import DeviceSegments, Segments, require, seeds
from ..data import PackedBatch
from . import attention
from .client import ClientSpec
from .layer import MultiLoRALinear, Route
from .loss import Head


class Cohort:
    """Clients attached to one model: the bank of their adapters and the wrapped layers. Made by ``attach``.

    Attributes:
        model: The model, its base frozen.
        clients: The clients' ``ClientSpec``, in order; ``names`` has their names.
        bank: Their adapters, float32 (float64 for a float64 base), on the device of the base.
        layers: Path of each target -> the layer that wraps it.
        packs: Whether batches are packed without padding; ``packing_reason`` says why not, ``packing_failed`` whether
            that is an error that nothing known of the model explains.
    Example:
        >>> cohort: flora.Cohort = flora.attach(model, clients, ["q_proj", "v_proj"])
        >>> with cohort.use("a") as adapted:
        ...     logits = adapted(torch.tensor([[2, 5, 7]])).logits
        >>> cohort.names, logits.shape
        (('a', 'b', 'c'), torch.Size([1, 3, 28]))
    """

    def __init__(
        self, model: nn.Module, clients: Sequence[ClientSpec], bank: AdapterBank, backend: str, fuse: str = "auto"
    ):
        self.model: Any = model
        self.clients, self.bank, self.backend, self.fuse = tuple(clients), bank, backend, fuse
        self.active = bank
        self.route = Route()
        self.layers: dict[str, MultiLoRALinear] = {}
        self.head: Head
        self.packs, self.packing_reason, self.packing_failed = True, "", False
        self.frozen: list[tuple[nn.Parameter, bool]] = []
        self._batches = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The clients' names, in order."""
        return self.bank.names

    def spec(self, client: str) -> ClientSpec:
        """A client's specification by name."""
        return self.clients[self.bank.index(client)]

    def entry(self, path: str) -> tuple[BankModule, tuple[float, ...]]:
        """A target's factors in the active bank, and each client's dropout."""
        return self.active.modules[path], tuple(self.spec(name).adapter.dropout for name in self.active.names)

    def parameters(self) -> list[torch.Tensor]:
        """The stacked factors, leaves that autograd trains: for your own optimizer."""
        factors = [t for entry in self.active.modules.values() for t in (entry.A_PK, entry.B_PN)]
        return [factor.requires_grad_(True) for factor in factors]

    @contextmanager
    def use(self, client: str) -> Iterator[nn.Module]:
        """Run the model with one client's adapter: evaluation, generation. Dropout is off."""
        with self._routed(client=self.active.index(client)):
            yield self.model

    @contextmanager
    def training(self, clients: Sequence[str]) -> Iterator[AdapterBank]:
        """Make a working bank of some clients the active one; what it holds at the end is kept."""
        working = self.bank.subset(clients)
        self.active = working
        try:
            yield working
        finally:
            self.active = self.bank
            if working is not self.bank:
                for client in clients:
                    self.bank.load(client, working.adapters(client))

    @contextmanager
    def batch(
        self,
        tokens: Segments | DeviceSegments | Sequence[int],
        *,
        sequences: Sequence[int] | DeviceSegments | None = None,
        real_index: torch.Tensor | None = None,
        positions: int | None = None,
        row_C: Sequence[int] | None = None,
        dropout_step: int | None = None,
        seed: int = 0,
        round: int = 0,
        seed_C: Sequence[int] | None = None,
        adapters: bool = True,
    ) -> Iterator[nn.Module]:
        """Run forward and backward of one batch whose rows belong to the clients in order.

        Args:
            tokens: Tokens of each client, zeros allowed: client c owns the next ``tokens[c]`` rows of the
                flattened input.
            sequences: Lengths of packed sequences in one row of input: attention then stays within each. Left
                out, the model's own attention runs, for batches whose sequences are rows.
            real_index: Flat positions of the real tokens of a padded batch; the others get no adapter.
            positions: All positions of a padded batch.
            row_C: Index of each client's first token within its optimizer step (for dropout).
            dropout_step: The optimizer step, which dropout masks depend on. Left out, dropout is on while the model
                is in training mode, and batches are counted.
            seed, round: What the masks depend on besides client, step and module; ``seed_C`` per client.
            adapters: False runs the base alone.
        Raises:
            ValueError: If there is not one entry for each client.
        """
        segments = tokens if isinstance(tokens, (Segments, DeviceSegments)) else Segments.from_lengths(tokens)
        names = self.active.names
        require(
            len(segments) == len(names),
            f"tokens must have one entry per client ({len(names)}: {', '.join(names)}), got {len(segments)}",
        )
        keys = self.dropout_keys(dropout_step, seed_C or [seed] * len(names), round)
        with self.running(
            PackedBatch(
                segments,
                sequences=sequences,
                real_index=real_index,
                rows=positions,
                keys=keys,
                row_C=row_C,
                adapters=adapters,
            )
        ):
            yield self.model

    @contextmanager
    def running(self, batch: PackedBatch) -> Iterator[None]:
        """Run the model's forward and backward passes of a batch, attention within each packed sequence."""
        inner = nullcontext() if batch.sequences is None else attention.packed(self.model, batch.sequences)
        with self._routed(batch=batch), inner:
            yield

    def dropout_seeds(self, step: int | None, seed_C: Sequence[int], round: int) -> dict[str, Any] | None:
        """Module -> dropout key of each client at an optimizer step; None where nothing is dropped."""
        names = self.active.names
        dropping = any(self.spec(name).adapter.dropout for name in names)
        if not dropping or (step is None and not self.model.training):
            return None
        if step is None:
            step = self._batches
            self._batches += 1
        return {
            path: [seeds.dropout_seed(seed, name, step, path, round) for seed, name in zip(seed_C, names, strict=True)]
            for path in self.layers
        }

    def dropout_keys(self, step: int | None, seed_C: Sequence[int], round: int) -> dict[str, Any] | None:
        """``dropout_seeds``, on the device of a GPU."""
        keys, device = self.dropout_seeds(step, seed_C, round), self.bank.param.device
        return keys if keys is None or device.type != "cuda" else keys_on_device(keys, device)

    @contextmanager
    def _routed(self, batch: PackedBatch | None = None, client: int | None = None) -> Iterator[None]:
        before = self.route.batch, self.route.client
        self.route.batch, self.route.client = batch, client
        try:
            yield
        finally:
            self.route.batch, self.route.client = before
            self.route.waiting.clear()

    def load(self, client: str, adapters: Adapters) -> None:
        """Start a client from given factors (A_RK, B_RN per module)."""
        self.bank.load(client, adapters)

    def update(self, client: str, **metrics: Any) -> ClientUpdate:
        """A copy of a client's adapter as it stands."""
        adapters = {path: (A.clone(), B.clone()) for path, (A, B) in self.bank.adapters(client).items()}
        weight = float(metrics.get("examples", 1.0))
        return ClientUpdate(client, adapters, self.bank.scaling(client), weight, metrics)


def keys_on_device(keys: Mapping[str, Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Module -> each client's key, int64, in one copy to the device for all modules.

    Every row begins at a multiple of 16 bytes: kernels are compiled for such addresses, and a row between two of them
    would have each kernel compiled a second time.
    """
    count = len(next(iter(keys.values()), ()))
    table = torch.tensor([[*row, *[0] * (count % 2)] for row in keys.values()], dtype=torch.int64).to(device)
    return {path: row[:count] for path, row in zip(keys, table, strict=True)}
