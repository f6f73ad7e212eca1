"""Write a round into a base that is sharded over ranks: each writes the rows that it has, with the bits of the whole.

Letters: K in_features, N out_features, P sum of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..aggregation import Deviation, Stack, sample_rows, total
from ..distributed import ShardedBase
from .in_place import apply_base_delta_


def apply_to_parts_(
    base: ShardedBase,
    parts: Mapping[str, torch.Tensor],
    base_delta: Mapping[str, Stack],
    *,
    low_bits: Mapping[str, torch.Tensor] | None = None,
    rounding: str = "low_bits",
    seed: int | None = None,
    check_rows: int | None = 64,
) -> dict[str, Deviation]:
    """``apply_base_delta_`` over all processes: ``W += B_PN.T @ diag(coef_P) @ A_PK``, summed in float64, rounded once.

    Args:
        base: Whose weights.
        parts: Module -> this process's rows of the weight.
        base_delta: Module -> (A_PK, B_PN, coef_P), whole and the same on all processes.
        low_bits: Module -> this process's rows of the low bits.
        rounding, seed: As there; the draws of ``stochastic`` are those of the whole weight.
        check_rows: Rows of each whole weight, evenly spaced, whose change is compared with the exact one.
    Returns:
        Module -> how far the checked rows of all processes are from the exact change; the same on all processes.
    Deterministic: yes.
    """
    looked = {m: _looked_at(base, m, check_rows, parts[m].device) for m in base_delta}
    found = dict.fromkeys(base_delta, Deviation(0.0, 0.0))
    # Of a small weight some processes may have no row.
    here = {m: stack for m, stack in base_delta.items() if len(parts[m])}
    if rounding == "stochastic":
        for place, (module, stack) in enumerate(base_delta.items()):
            if module in here:
                found |= _rounded_as_whole(base, module, parts[module], stack, looked[module], (seed or 0) + place)
    elif here:
        mine = {m: (A_PK, B_PN[:, base.rows(m)], coef_P) for m, (A_PK, B_PN, coef_P) in here.items()}
        rows = {m: looked[m] for m in here}
        found |= apply_base_delta_(parts, mine, low_bits=low_bits, rounding=rounding, check_rows=rows)
    told = base.world.exchange([{m: [one.difference, one.exact] for m, one in found.items()}])
    return {m: total(Deviation(*of_rank[m]) for (of_rank,) in told) for m in base_delta}


def _looked_at(base: ShardedBase, module: str, check_rows: int | None, device: torch.device) -> torch.Tensor:
    """Which of this process's rows are checked, counted from its first."""
    rows, chosen = base.rows(module), sample_rows(base.shape(module)[0], check_rows, device)
    return chosen[(chosen >= rows.start) & (chosen < rows.stop)] - rows.start


def _rounded_as_whole(
    base: ShardedBase, module: str, part: torch.Tensor, stack: Stack, looked: torch.Tensor, seed: int
) -> dict[str, Deviation]:
    """Merge into a weight of whole size around this process's rows: the draws are counted by its rows."""
    rows = base.rows(module)
    whole_NK = part.new_zeros(base.shape(module))
    whole_NK[rows] = part
    checked = {module: looked + rows.start}
    found = apply_base_delta_({module: whole_NK}, {module: stack}, rounding="stochastic", seed=seed, check_rows=checked)
    part.copy_(whole_NK[rows])
    return found
