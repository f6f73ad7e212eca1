"""Write adapters and rounds into a model's weights, in place.

Letters: K in_features, N out_features, R one client's rank, P the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..adapters import ClientUpdate, check_base
from ..aggregation import Deviation, Stack, check_adapters, sample_rows, total, write_deviation
from ..common import check_choice, listed, require
from ..config import ROUNDINGS
from ..model import target_weights
from ..ops import MergeItem, stacked_merge_many_


def merge_adapter_(
    model: torch.nn.Module,
    update: ClientUpdate,
    *,
    rounding: str = "nearest",
    seed: int | None = None,
    any_base: bool = False,
) -> Deviation:
    """Add a client's adapter to a model's weights in place: ``W += s B_RN.T @ A_RK`` for each of its modules.

    The sum is made in float64 and rounded once to the weight's dtype.

    Args:
        model: A model whose modules have the paths of the update; targets are ``nn.Linear`` or GPT-2's ``Conv1D``.
        update: The adapter; its weight in an aggregation plays no part.
        rounding: ``nearest`` or, for bfloat16 weights, ``stochastic`` (needs ``seed``).
        seed: Key of the stochastic rounding.
        any_base: Whether weights will do that ``update.trained_on`` does not know, as after another adapter's merge.
    Returns:
        What the write missed, over all modules: ``.relative`` is large where 16-bit weights swallow a small update.
    Raises:
        ValueError: If a module is unknown, tied, quantised or of another shape, or the adapter was trained on another
            base; nothing is changed then.
    Deterministic: yes.
    Example:
        >>> weight = model.model.layers[0].self_attn.q_proj.weight
        >>> before = weight.detach().clone()
        >>> missed = flora.merge_adapter_(model, updates[0])
        >>> missed.relative < 1e-6, torch.equal(weight, before)
        (True, False)
    """
    check_adapters(update)
    check_choice("rounding", rounding, ("nearest", "stochastic"))
    weights = target_weights(model, [module for module, rank in update.ranks.items() if rank])
    if update.trained_on is not None and not any_base:
        advice = "; any_base=True merges it all the same"
        known = update.trained_on.of(weights)
        check_base(known, weights.__getitem__, f"the adapter of {update.client!r}", "the model", advice)
    stacks = {module: adapter_stack(update, module, weight.device) for module, weight in weights.items()}
    return total(apply_base_delta_(weights, stacks, rounding=rounding, seed=seed).values())


def adapter_stack(update: ClientUpdate, module: str, device: torch.device) -> Stack:
    """One module's adapter as what is to be added to its weight."""
    A_RK, B_RN = (factor.to(device) for factor in update.adapters[module])
    return A_RK, B_RN, A_RK.new_full((A_RK.shape[0],), update.scaling[module], dtype=torch.float64)


def apply_base_delta_(
    weights: Mapping[str, torch.Tensor],
    base_delta: Mapping[str, Stack],
    *,
    low_bits: Mapping[str, torch.Tensor] | None = None,
    rounding: str = "low_bits",
    seed: int | None = None,
    check_rows: int | Mapping[str, torch.Tensor] | None = 64,
    accumulate: str = "float64",
    backend: str = "auto",
) -> dict[str, Deviation]:
    """Add a round to the weights in place: ``W += B_PN.T @ diag(coef_P) @ A_PK``, summed and rounded once.

    With ``accumulate="float64"`` every element is the exact sum rounded once to fp32 (to the weight's own dtype
    without low bits): within 1 ulp of the larger of its values before and after.

    Args:
        weights: Module -> weight (N, K), any strides; for a Conv1D the transpose of its parameter.
        base_delta: Module -> (A_PK, B_PN, coef_P), as in ``RoundResult``.
        low_bits: Module -> int16 (N, K) of a bfloat16 weight, changed in place; see ``new_low_bits``.
        rounding: ``low_bits`` (bfloat16 weights keep an exact fp32 master in ``low_bits``, others need none),
            ``nearest``, or ``stochastic`` for bfloat16 weights.
        seed: Key of the stochastic rounding.
        check_rows: Rows of each weight whose change is compared with the exact one; None for all, at the cost of
            a copy of the weights; 0 for none; or which, by module.
        accumulate: ``float64``, or ``float32`` for speed.
        backend: Whose kernels write: auto (see ``stacked_merge_``), reference, triton or native.
    Returns:
        Module -> how far the change of the checked rows is from the exact one.
    Raises:
        ValueError: If a module is not among the weights, a shape does not fit, or low bits are missing or cannot
            be kept; nothing is changed then.
    Deterministic: yes.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    unknown = [module for module in base_delta if module not in weights]
    require(not unknown, f"base_delta has modules without a weight: {', '.join(unknown)}; known: {listed(weights)}")
    lows = {module: _low_bits(module, weights[module], low_bits or {}, rounding) for module in base_delta}
    items = [MergeItem(weights[module], *base_delta[module], lows[module]) for module in base_delta]
    rows = {
        m: check_rows[m]
        if isinstance(check_rows, Mapping)
        else sample_rows(weights[m].shape[0], check_rows, weights[m].device)
        for m in base_delta
    }
    before = {m: _master_rows(weights[m], lows[m], rows[m]) for m in base_delta}
    once = "nearest" if rounding == "low_bits" else rounding
    stacked_merge_many_(items, rounding=once, seed=seed, accumulate=accumulate, backend=backend)
    return {
        m: write_deviation(before[m], _master_rows(weights[m], lows[m], rows[m]), base_delta[m], rows[m])
        for m in base_delta
    }


def new_low_bits(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make the low bits of untouched weights: int16 zeros for each bfloat16 weight, nothing for the others."""
    return {
        module: torch.zeros(weight.shape, dtype=torch.int16, device=weight.device)
        for module, weight in weights.items()
        if weight.dtype == torch.bfloat16
    }


def _low_bits(
    module: str, weight: torch.Tensor, low_bits: Mapping[str, torch.Tensor], rounding: str
) -> torch.Tensor | None:
    if rounding != "low_bits" or weight.dtype in (torch.float32, torch.float64):
        return None
    require(
        weight.dtype == torch.bfloat16,
        f"module {module!r} is {weight.dtype}, which has no low bits; load the model in bfloat16 or float32, or choose"
        " rounding='nearest'",
    )
    require(
        module in low_bits,
        f"module {module!r} is bfloat16, so rounding='low_bits' needs its low_bits; make them with new_low_bits",
    )
    return low_bits[module]


def _master_rows(weight: torch.Tensor, low_bits: torch.Tensor | None, rows_S: torch.Tensor) -> torch.Tensor:
    from flora_kernels.reference import join_master

    return weight[rows_S] if low_bits is None else join_master(weight[rows_S], low_bits[rows_S])
