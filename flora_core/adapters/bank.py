"""The bank: all clients' adapters in one flat buffer, already stacked per module.

Letters: K in_features, N out_features, R one client's rank, P sum of ranks, C clients. For every module the
buffer holds A_PK, then B_PN; client c owns the same rows ``ranks[c]`` of both, so FLoRA's stack is the bank as it
stands.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..common import Segments, require, seeds
from .update import Adapters


@dataclass
class BankModule:
    """One module's stack: A_PK and B_PN are leaf views of the bank's flat buffer."""

    A_PK: torch.Tensor
    B_PN: torch.Tensor
    ranks: Segments
    scaling_C: Sequence[float] | torch.Tensor

    @functools.cached_property
    def padded(self) -> BankModule:
        """The same stack with one more client of rank 0, whose rows pad a batch."""
        scaling_C = torch.tensor([*self.scaling_C, 0.0], dtype=self.A_PK.dtype, device=self.A_PK.device)
        return BankModule(self.A_PK, self.B_PN, Segments.from_lengths([*self.ranks.lengths, 0]), scaling_C)


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU in pages that the system claims when they are first written, which torch.zeros does at once.

    A client that has not trained so costs the memory of its A alone.
    """
    if device.type != "cpu" or not count or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(count, dtype=dtype, device=device)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)


class AdapterBank:
    """Flat, stacked storage of the adapters of C clients.

    Args:
        names: Client names, in order.
        ranks: Module path -> ranks of the C clients.
        scaling: Module path -> scales of the C clients.
        shapes: Module path -> (N, K).
        dtype: float32, or float64 for a float64 base.
        device: Where the base lives.
    Raises:
        ValueError: If names repeat, entries are missing, or a rank is below 0 or above min(N, K).
    Example:
        >>> ranks, scaling, shapes = {"q_proj": [2, 1]}, {"q_proj": [1.0, 2.0]}, {"q_proj": (4, 8)}
        >>> bank = flora.AdapterBank(["a", "b"], ranks, scaling, shapes)
        >>> bank.modules["q_proj"].A_PK.shape, bank.adapters("b")["q_proj"][0].shape
        (torch.Size([3, 8]), torch.Size([1, 8]))
    """

    def __init__(
        self,
        names: Sequence[str],
        ranks: Mapping[str, Sequence[int]],
        scaling: Mapping[str, Sequence[float]],
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.names = tuple(names)
        self.shapes = dict(shapes)
        clients = len(set(self.names))
        require(clients == len(self.names), f"clients must have different names, got {', '.join(self.names)}")
        for name, given in (("ranks", ranks), ("scaling", scaling)):
            missing = ", ".join(sorted(set(self.shapes) - set(given))[:3])
            require(not missing, f"{name} must have an entry for each module of shapes, got none for {missing}")
        for module, (n, k) in self.shapes.items():
            require(
                len(ranks[module]) == len(scaling[module]) == clients,
                f"{module} must have a rank and a scale for each of the {clients} clients, "
                f"got {len(ranks[module])} and {len(scaling[module])}",
            )
            for name, rank in zip(self.names, ranks[module], strict=True):
                require(
                    0 <= rank <= min(n, k),
                    f"client {name!r}: the rank in {module} must be between 0 and min(N, K) = {min(n, k)}, got {rank}",
                )
        segments = {module: Segments.from_lengths(ranks[module]) for module in self.shapes}
        total = sum(segments[module].total * (n + k) for module, (n, k) in self.shapes.items())
        self.param = _zeros(total, dtype, torch.device(device))
        self.modules = {
            module: BankModule(A_PK, B_PN, segments[module], tuple(scaling[module]))
            for module, (A_PK, B_PN) in self._views(self.param, segments).items()
        }

    def _views(self, flat: torch.Tensor, ranks: Mapping[str, Segments]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        views, start = {}, 0
        for module, (n, k) in self.shapes.items():
            p = ranks[module].total
            a, b = flat[start : start + p * k], flat[start + p * k : start + p * (k + n)]
            views[module] = (a.view(p, k), b.view(p, n))
            start += p * (k + n)
        return views

    def views_of(self, flat: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module -> (A_PK, B_PN) shaped views of another buffer with the bank's layout, such as its gradient."""
        return self._views(flat, {module: entry.ranks for module, entry in self.modules.items()})

    @property
    def segments(self) -> Segments:
        """The flat buffer cut into one range per (module, factor, client), in storage order."""
        lengths: list[int] = []
        for module, (n, k) in self.shapes.items():
            ranks = self.modules[module].ranks.lengths
            lengths += [rank * width for width in (k, n) for rank in ranks]
        return Segments.from_lengths(lengths)

    @property
    def owner(self) -> tuple[int, ...]:
        """The client of each range of ``segments``."""
        return tuple(range(len(self.names))) * (2 * len(self.shapes))

    def index(self, client: str) -> int:
        """Position of a client by name."""
        require(client in self.names, f"client must be one of {', '.join(self.names)}, got {client!r}")
        return self.names.index(client)

    def adapters(self, client: str, flat: torch.Tensor | None = None) -> Adapters:
        """Views of one client's factors, module by module; modules where its rank is 0 are left out.

        ``flat`` is another buffer with the bank's layout to look at instead, such as its gradient.
        """
        c = self.index(client)
        stacks = {m: (one.A_PK, one.B_PN) for m, one in self.modules.items()} if flat is None else self.views_of(flat)
        own = {m: one.ranks[c] for m, one in self.modules.items() if one.ranks.lengths[c]}
        return {m: (stacks[m][0].detach()[rows], stacks[m][1].detach()[rows]) for m, rows in own.items()}

    def scaling(self, client: str) -> dict[str, float]:
        """Module -> s of one client, for the modules of ``adapters``."""
        c = self.index(client)
        return {module: float(entry.scaling_C[c]) for module, entry in self.modules.items() if entry.ranks.lengths[c]}

    def reset(self, client: str, seed: int, *, new: bool = False) -> None:
        """Start a client afresh as PEFT does: A uniform in +-1/sqrt(K) (Kaiming, a = sqrt(5)), B zero.

        ``new`` says that the bank was just made: B is zero then, and a CPU claims no memory for it until it trains.
        """
        for module, (A_RK, B_RN) in self.adapters(client).items():
            bound = 1 / math.sqrt(A_RK.shape[1])
            random = seeds.generator(seed, "init", client, module)
            A_RK.copy_(torch.empty(A_RK.shape).uniform_(-bound, bound, generator=random))
            if not new:
                B_RN.zero_()

    def load(self, client: str, adapters: Adapters) -> None:
        """Copy a client's factors in; every module and shape must be as the bank has it.

        Raises:
            ValueError: If modules or shapes differ; nothing is changed then.
        """
        mine = self.adapters(client)
        require(
            set(mine) == set(adapters),
            f"client {client!r}: the adapter must have the modules that its config names; missing: "
            f"{sorted(set(mine) - set(adapters)) or 'none'}, unknown: {sorted(set(adapters) - set(mine)) or 'none'}",
        )
        for module, pair in mine.items():
            for name, old, new in zip("AB", pair, adapters[module], strict=True):
                require(
                    old.shape == new.shape,
                    f"client {client!r}: {name} of {module} must be {tuple(old.shape)} (rank first), "
                    f"got {tuple(new.shape)}",
                )
        for module, pair in mine.items():
            for old, new in zip(pair, adapters[module], strict=True):
                old.copy_(new)

    def subset(self, clients: Sequence[str]) -> AdapterBank:
        """A bank of some clients with copies of their factors; the bank itself when they are all of them in order."""
        if tuple(clients) == self.names:
            return self
        index = [self.index(client) for client in clients]
        bank = AdapterBank(
            clients,
            {module: [entry.ranks.lengths[c] for c in index] for module, entry in self.modules.items()},
            {module: [float(entry.scaling_C[c]) for c in index] for module, entry in self.modules.items()},
            self.shapes,
            self.param.dtype,
            self.param.device,
        )
        for client in clients:
            bank.load(client, self.adapters(client))
        return bank
