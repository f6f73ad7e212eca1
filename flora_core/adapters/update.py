"""The messages between a client and the server: a client's update, and a round's result.

Letters: K in_features, N out_features, R one client's rank, P the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from .base import Base

Adapters = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class ClientUpdate:
    """One client's trained adapter.

    Args:
        client: The client's name.
        adapters: Module path in the base model -> (A_RK, B_RN). B is stored R x N, the transpose of PEFT's.
        scaling: Module path -> s; the module's update is ``s * B_RN.T @ A_RK``.
        weight: Share in the aggregation before normalising: the number of examples unless set otherwise.
        metrics: ``loss_first``, ``loss_last``, ``tokens``, ``examples``, ``seconds``, ...
        base: The name of the base model that it was trained on, where that is known.
        trained_on: The weights of that base, where they are known (``flora_core.adapters.base``).
    Example:
        >>> factors = {"q_proj": (torch.ones(2, 8), torch.zeros(2, 4))}
        >>> update = flora.ClientUpdate("clinic-a", factors, scaling={"q_proj": 2.0}, weight=100)
        >>> update.ranks, update.size_bytes
        ({'q_proj': 2}, 96)
    """

    client: str
    adapters: Adapters
    scaling: dict[str, float]
    weight: float = 1.0
    metrics: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    trained_on: Base | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> the client's rank there."""
        return {module: A_RK.shape[0] for module, (A_RK, _) in self.adapters.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of all factors, as they would travel."""
        return sum(t.numel() * t.element_size() for pair in self.adapters.values() for t in pair)


def packed(update: ClientUpdate) -> dict[str, Any]:
    """An update as nested dicts of tensors and JSON values."""
    adapters = {module: {"A": A_RK, "B": B_RN} for module, (A_RK, B_RN) in update.adapters.items()}
    base = update.trained_on
    trained_on = None if base is None else {"base": base.to_json(), "weights": dict(base.weights)}
    return {**{f.name: getattr(update, f.name) for f in fields(update)}, "adapters": adapters, "trained_on": trained_on}


def unpacked(state: Mapping[str, Any]) -> ClientUpdate:
    """Undo ``packed``."""
    adapters = {module: (pair["A"], pair["B"]) for module, pair in state["adapters"].items()}
    kept = state.get("trained_on")
    trained_on = None if kept is None else Base.from_json(kept["base"], kept["weights"])
    return ClientUpdate(**{**state, "adapters": adapters, "trained_on": trained_on})


def _fresh(client: str, **_: Any) -> Adapters | None:
    return None


@dataclass
class RoundResult:
    """The result of a strategy for a round's updates.

    Args:
        base_delta: Module path -> (A_PK, B_PN, coef_P): ``B_PN.T @ diag(coef_P) @ A_PK`` is to be added to the base.
        start: ``start(client, **hints)`` gives the adapter that the client starts the next round from, None for fresh.
        state: The strategy's state for the next round: tensors and JSON values, nested in dicts and lists.
        adapter: Module path -> (A_PK, B_PN, coef_P) of the global adapter that a strategy keeps beside the base.
        certificate: How far this is from the exact sum (``flora_core.aggregation.certificate``).
        forms: Module path -> how its part of ``base_delta`` travels, and the bytes
        (``flora_core.aggregation.downlink``). up, down: Client -> bytes that it sent and that the round's result costs
        it.
        seconds: Time of each step: ``aggregate``, ``certify``.
    Example:
        >>> result: flora.RoundResult = flora.aggregate(updates)
        >>> [change] = result.dense().values()
        >>> change.shape, result.bytes_up
        (torch.Size([16, 16]), 640)
    """

    base_delta: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    start: Callable[..., Adapters | None] = _fresh
    state: dict[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    certificate: Any = None
    forms: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    up: Mapping[str, int] = field(default_factory=dict)
    down: Mapping[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_up(self) -> int:
        """Bytes of all that was received."""
        return sum(self.up.values())

    @property
    def bytes_down(self) -> int:
        """Bytes of all that the round's clients are sent."""
        return sum(self.down.values())

    def next_adapter(self, client: str, **hints: Any) -> Adapters | None:
        """The adapter that a client starts the next round from; None means freshly initialised.

        Args:
            client: The client's name.
            hints: ``ranks`` and ``scaling`` (module path -> value), for a client that the round has not seen.
        """
        return self.start(client, **hints)

    def change(self) -> dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
        """Module path -> the stacks whose sum is the change of the global model: base and adapter."""
        parts: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        for stacks in (self.base_delta, self.adapter):
            for module, stack in stacks.items():
                parts.setdefault(module, []).append(stack)
        return parts

    def dense(self) -> dict[str, torch.Tensor]:
        """Change of the global model per module, float64 (N, K), relative to the base that the clients trained on."""
        return {m: torch.stack([_product(*stack) for stack in stacks]).sum(0) for m, stacks in self.change().items()}


def _product(A_PK: torch.Tensor, B_PN: torch.Tensor, coef_P: torch.Tensor) -> torch.Tensor:
    return (B_PN.double().T * coef_P.double()) @ A_PK.double()
