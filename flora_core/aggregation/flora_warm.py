"""FLoRA without the cold start: the sum stays exact, and what was learnt also shapes the next round's adapters.

Letters: K in_features, N out_features, P the sum of ranks, R a rank, F the rank of the shared part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..adapters import ClientUpdate, RoundResult
from ..common import check_choice, check_number, require
from .global_adapter import AdapterStrategy, Pair, as_stack, dtype_name, extended, on_the_wire, without
from .strategy import register
from .svd import Svd, as_fresh, leading_svd
from .terms import round_terms, stack_of

Floor = Mapping[str, int]


@register
class FloraWarm(AdapterStrategy):
    """Add the sum to the base but for a part that all clients carry alike; start A along its directions (exact).

    Let every client of a round train on ``W + s_k B_k A_k``, and let the global model be ``W + C``, where C is the
    *shared part*, of rank F. In a module with singular triplets ``T = sum_k p_k s_k B_k A_k = U S V``:

        C' = the first F triplets of T, rounded to what travels
        W' = W + (T - C')                        T as the clients' stack, C' as F rows with coefficient -1
        client k starts from A = [A_C; D; fresh], B = [B_C / s_k; 0; 0]

    where A_C, B_C are C' split into two factors, D the next right-singular directions of T, as long as fresh rows, up
    to rank r_k, and fresh rows what a new adapter has.

    *Exact*: W' + C' = W + T whatever C' is, so a fast, approximate decomposition does. *Everybody starts at the global
    model*: client k computes with ``W' + s_k (B_C / s_k) A_C + s_k 0 D = W' + C'``. It holds bit for bit where F = 0
    (then B = 0), and where s_k is a power of two; else up to one rounding of B_C / s_k. *No client trains*: every
    client sends back C', so T = C' (shares add up to 1) and W' = W. These need that every client carries C: F is at
    most the smallest rank that any client has in the module, and 0 where some client does not adapt it.

    Options: ``start="directions"`` sets F = 0 (all of T goes into the base). ``floor`` bounds F, one number or module
    -> number; unless given, a federation takes the smallest rank of all its clients, ``aggregate`` that of the round.
    Compare arXiv 2603.08014, which keeps triplets at one common rank.
    """

    name = "flora_warm"
    paper = "flora-core's own, exact as FLoRA, arXiv 2409.05976"
    exact = True

    def check_options(self, *, start: str = "shared", floor: Floor | int | None = None) -> None:
        """Check both options."""
        check_choice("start", start, ("shared", "directions"))
        bounds = floor if isinstance(floor, Mapping) else {"": 0 if floor is None else floor}
        for module, value in bounds.items():
            check_number(f"floor of {module}" if module else "floor", value, 0, whole=True)

    def population_options(self, ranks: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """The smallest rank of all clients, module by module."""
        modules = dict.fromkeys(module for own in ranks.values() for module in own)
        return {"floor": {module: min(own.get(module, 0) for own in ranks.values()) for module in modules}}

    def aggregate(
        self,
        updates: Sequence[ClientUpdate],
        state: Mapping[str, Any],
        *,
        start: str = "shared",
        floor: Floor | int | None = None,
    ) -> RoundResult:
        """Split each module's sum into what goes into the base and what all clients carry."""
        self._check_carried(updates, state)
        everybody = {update.client: update.ranks for update in updates}
        bound: Floor | int = self.population_options(everybody)["floor"] if floor is None else floor
        new = {"adapter": dict(state.get("adapter", {})), "directions": dict(state.get("directions", {}))}
        new_state: dict[str, Any] = {**state, **new, "dtype": dict(state.get("dtype", {}))}
        new_state["rounds"] = state.get("rounds", 0) + 1
        base_delta = {}
        for module, terms in round_terms(updates).items():
            most = bound.get(module, 0) if isinstance(bound, Mapping) else bound
            ranks = [term.A_RK.shape[0] for term in terms]
            most = 0 if start == "directions" else min(most, *ranks)
            stack = stack_of(terms)
            svd = leading_svd(stack, max(ranks))
            pair = on_the_wire(dict(zip("AB", as_fresh(svd.cut(most)), strict=True)), terms)
            base_delta[module] = without(stack, as_stack(**pair)) if most else stack
            new["adapter"][module] = pair
            new["directions"][module] = _directions(svd, most, new["directions"].get(module))
            new_state["dtype"][module] = dtype_name(terms)
        return self.result(updates, new_state, base_delta)

    def fit(
        self, state: Mapping[str, Any], pair: Pair, rank: int, client: str, module: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The shared part, then directions, then fresh rows."""
        carried, D = pair["A"].shape[0], state["directions"][module]
        require(
            rank >= carried,
            f"client {client!r}, module {module!r}: strategy {self.name!r} has a shared part of rank {carried}, more "
            f"than this client's rank {rank}; aggregate with floor={rank}, or start='directions'",
        )
        D = D[: rank - carried]
        A_RK, B_RN = torch.cat([pair["A"], D]), torch.cat([pair["B"], pair["B"].new_zeros(len(D), pair["B"].shape[1])])
        return extended(A_RK, B_RN, rank, self.name, client, module, str(state["rounds"]))

    def adapter_bytes(self, state: Mapping[str, Any], update: ClientUpdate, trained: Sequence[str]) -> int:
        """The shared part and the client's directions."""
        size = super().adapter_bytes(state, update, trained)
        for module, rank in update.ranks.items():
            if module in state["adapter"]:
                D = state["directions"][module][: max(0, rank - len(state["adapter"][module]["A"]))]
                size += D.numel() * getattr(torch, state["dtype"][module]).itemsize
        return size

    def _check_carried(self, updates: Sequence[ClientUpdate], state: Mapping[str, Any]) -> None:
        """Every client must have started with the whole shared part, or the sum lacks its share of that."""
        for module, pair in state.get("adapter", {}).items():
            carried = pair["A"].shape[0]
            for update in updates:
                rank = update.ranks.get(module, 0)
                require(
                    rank >= carried,
                    f"client {update.client!r}, module {module!r}: rank {rank} cannot carry the shared part of rank "
                    f"{carried}; give floor= the smallest rank of all clients (0 where one lacks the module), or "
                    "start='directions'",
                )


def _directions(svd: Svd, most: int, old: torch.Tensor | None) -> torch.Tensor:
    """Right-singular directions after the shared part; those of the round before if the sum has none."""
    A_RK, _ = as_fresh(Svd(svd.U_RN[most:], svd.S_R[most:], svd.V_RK[most:]))
    return old if old is not None and not len(A_RK) else A_RK
