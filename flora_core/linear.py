"""A frozen linear layer with every client's adapter: each token goes through its own.

Letters: M packed tokens, K in_features, N out_features, C clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .bank import BankModule
from .checks import require
from .ops import lora_linear
from .segments import Segments


@dataclass(frozen=True)
class Layout:
    """Whose tokens a forward pass holds, and where they lie.

    Args:
        tokens: Segments over the real tokens, one per client of the bank.
        seeds: Module path -> dropout key of each client; None switches dropout off.
        row_C: Index of each client's first token within its optimizer step.
        real_index: Flat positions of the real tokens in a padded batch; None where nothing is padded.
        positions: Rows of the whole input, padding included.
        adapters: False runs the base alone (used to probe a model).
    """

    tokens: Segments
    seeds: Mapping[str, Sequence[int]] | None = None
    row_C: Sequence[int] | None = None
    real_index: torch.Tensor | None = None
    positions: int | None = None
    adapters: bool = True


class Route:
    """What the wrapped layers of one model do now: ``layout`` for a batch, ``client`` for one client's adapter."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.client: int | None = None


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
    ):
        super().__init__()
        self.weight: torch.Tensor = original.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.bias: torch.Tensor | None = original.bias  # pyright: ignore[reportAttributeAccessIssue]
        # Not a submodule: it would double every name in the state dict.
        object.__setattr__(self, "original", original)
        self.path, self.route, self.entry, self.backend = path, route, entry, backend
        self.training = original.training

    @property
    def weight_NK(self) -> torch.Tensor:
        """The weight as N x K, a view; Conv1D stores K x N."""
        return weight_view(self.original)

    @property
    def out_features(self) -> int:
        return self.weight_NK.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight_NK.shape[1]

    def extra_repr(self) -> str:
        return f"{self.path}, in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layout = self.route.layout
        if layout is not None:
            return self._batch(x, layout)
        if self.route.client is not None:
            rows = x.numel() // x.shape[-1]
            lengths = [0] * len(self.entry()[1])
            lengths[self.route.client] = rows
            return self._rows(x, Layout(Segments.from_lengths(lengths)))
        return self.original(x)  # pyright: ignore[reportCallIssue]

    def _batch(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        expected = layout.tokens.total if layout.positions is None else layout.positions
        require(
            rows == expected,
            f"{self.path} got {rows} rows of input, the batch has {expected} tokens: it does not see the packed tokens "
            "in order (routed experts, pooled or vision inputs); leave it out of target_modules",
        )
        if not layout.adapters:
            return self.original(x)  # pyright: ignore[reportCallIssue]
        if layout.real_index is None:
            return self._rows(x, layout)
        packed = x.reshape(rows, -1).index_select(0, layout.real_index)
        y_MN = self._rows(packed, layout)
        out = y_MN.new_zeros(rows, y_MN.shape[1]).index_copy(0, layout.real_index, y_MN)
        return out.view(*x.shape[:-1], -1)

    def _rows(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        entry, dropout_C = self.entry()
        weight, bias = self.weight_NK, self.bias
        device = x.device.type
        x_MK = x.reshape(-1, x.shape[-1])
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_MK, weight, bias = x_MK.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            y_MN = lora_linear(
                x_MK,
                weight,
                bias,
                entry.A_PK,
                entry.B_PN,
                layout.tokens,
                entry.ranks,
                entry.scaling_C,
                dropout_C=dropout_C if layout.seeds is not None else None,
                dropout_seed_C=None if layout.seeds is None else layout.seeds[self.path],
                row_C=layout.row_C,
                backend=self.backend,
            )
        return y_MN.view(*x.shape[:-1], -1)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D, which stores its weight K x N."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_view(module: Any) -> torch.Tensor:
    """The detached weight of a Linear or Conv1D as N x K; writing to it changes the module."""
    weight = module.weight.detach()
    return weight.T if is_conv1d(module) else weight


__all__ = ["Layout", "MultiLoRALinear", "Route", "is_conv1d", "weight_view"]
