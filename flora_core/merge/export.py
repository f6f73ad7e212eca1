"""One PEFT adapter instead of a merged base: the stack of all adapters, or what a strategy makes of it.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters import RoundResult, save_stacked_adapter
from ..aggregation import Stack, wire_dtype
from ..common import check_choice, require
from .bases import check_bases
from .checkpoint import Progress, check_places
from .findings import adapter_facts, find_notes
from .shards import open_checkpoint
from .sources import Adapter, Sum, open_adapters
from .targets import match_targets

LAYOUTS = ("peft", "vllm")
# What vLLM serves; it ignores rank_pattern and alpha_pattern, so one rank must do for all modules.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportReport:
    """The adapter that was written.

    Args:
        out: The adapter.
        ranks: Module -> rank.
        size_bytes: Its bytes.
        aggregation_error: Relative distance of what the strategy made from the exact sum.
        adapters, scale, notes: As in ``MergeReport``.
    """

    out: Path
    ranks: Mapping[str, int]
    size_bytes: int
    aggregation_error: float
    adapters: tuple[Mapping[str, Any], ...]
    scale: float
    notes: tuple[str, ...]


def export_adapter(
    base_dir: str | os.PathLike[str],
    adapters: Mapping[Any, float],
    out_dir: str | os.PathLike[str],
    *,
    strategy: str = "flora",
    options: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    partial: bool = False,
    layout: str = "peft",
    mixed_dtypes: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Make one PEFT adapter whose product is the weighted sum of many: base + it is the merged model.

    ``flora`` stacks (rank P per module), ``flora_svd`` recompresses: fewer rows for the same product at ``tau=1``,
    fewer still below. Weights and scalings are folded into B, so the scale is 1; factors are float32 at least.

    Args:
        base_dir: The checkpoint that the adapters were trained on; of its shards only the headers are read.
        adapters: Folder of a PEFT LoRA adapter -> its weight, relative to the others.
        out_dir: A new folder, or one that holds an adapter and nothing else, which is replaced.
        strategy: A name from the table of strategies.
        options: The strategy's own options.
        scale: Factor of the weighted sum, folded into B like the weights.
        partial: As in ``merge_into_checkpoint``.
        layout: ``peft`` (r = alpha = P of each module, with patterns where it differs) or ``vllm``, for readers that
            ignore patterns (vLLM, llama.cpp): all modules are padded with zero rows to one rank that vLLM serves,
            r = alpha = that rank.
        mixed_dtypes: As in ``merge_into_checkpoint``.
        progress: Called with ``export``, modules done and modules in all.
    Raises:
        ValueError: As ``merge_into_checkpoint``, and if a module's rank is more than vLLM serves.
        SaveError: If writing fails; what was there is unchanged.
    Deterministic: yes.
    Example:
        >>> model.save_pretrained("base")
        >>> for update in updates:
        ...     flora.save_peft_adapter(update, update.client)
        >>> report = flora.export_adapter("base", {"a": 1.0, "b": 3.0}, "adapter")
        >>> flora.load_peft_adapter("adapter").ranks
        {'model.layers.0.self_attn.q_proj': 5}
    """
    check_choice("layout", layout, LAYOUTS)
    base, out = Path(base_dir), Path(out_dir)
    check_places(base, adapters, out)
    checkpoint, opened = open_checkpoint(base), open_adapters(adapters, partial=partial)
    sums = Sum(opened, strategy, options or {}, scale)
    # A quantised base is as good as any: nothing is written into it.
    plan = match_targets(checkpoint, opened, mixed_dtypes=mixed_dtypes, partial=partial, into=False)
    known = check_bases(base, opened, plan.plain)
    sums.check()
    stacks = {}
    for count, module in enumerate(sums.modules):
        applied, _ = sums.stacks(module)
        if applied[0].shape[0]:
            stacks[module] = _wide(applied)
        (progress or (lambda *_: None))("export", count + 1, len(sums.modules))
    if layout == "vllm":
        advice = (
            "recompress with strategy='flora_svd' and a tau below 1, give fewer adapters, or merge them into the base"
        )
        stacks = of_one_rank(stacks, advice)
    save_stacked_adapter(
        RoundResult(stacks),
        out,
        # Of a later round the adapters name no base that can be loaded; this one was found to be theirs.
        base_model=str(base.resolve()) if known and known.round else _base_name(opened, base),
        fan_in_fan_out=any(target.transposed for target in plan.targets.values()),
        trained_on=known,
    )
    size = sum(path.stat().st_size for path in out.iterdir())
    ranks = {module: stack[0].shape[0] for module, stack in stacks.items()}
    notes = find_notes(checkpoint, sums, plan.fits)
    if len(set(ranks.values())) > 1:
        notes.append(
            "ranks differ by module, so that rank_pattern and alpha_pattern are needed: readers that ignore them (vLLM,"
            " llama.cpp) would scale modules wrongly; write those layout='vllm' (--as-adapter vllm), one rank for all"
        )
    facts = tuple(adapter_facts(sums, plan.fits))
    return ExportReport(out, ranks, size, sums.aggregation_error, facts, sums.scale, tuple(notes))


def _wide(stack: Stack) -> Stack:
    A_PK, B_PN, coef_P = stack
    dtype = wire_dtype(A_PK, B_PN)
    return A_PK.to(dtype), B_PN.to(dtype), coef_P


def of_one_rank(stacks: Mapping[str, Stack], advice: str) -> dict[str, Stack]:
    """Pad stacks with zero rows to the smallest rank that vLLM serves and that holds all of them.

    Raises:
        ValueError: If one has more rows than vLLM serves; with the advice.
    """
    largest = max((stack[0].shape[0] for stack in stacks.values()), default=0)
    rank = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    module = next((m for m, stack in stacks.items() if stack[0].shape[0] == largest), None)
    require(
        rank is not None,
        f"module {module!r} needs rank {largest}, and vLLM serves at most {VLLM_RANKS[-1]}: {advice}",
    )
    return {m: _padded(stack, rank or 0) for m, stack in stacks.items()}


def _padded(stack: Stack, rank: int) -> Stack:
    A_PK, B_PN, coef_P = stack
    more = rank - A_PK.shape[0]
    A, B = (torch.cat([factor, factor.new_zeros(more, factor.shape[1])]) for factor in (A_PK, B_PN))
    return A, B, torch.cat([coef_P, coef_P.new_ones(more)])


def _base_name(adapters: list[Adapter], base: Path) -> str:
    """The base that the adapters name, if they agree; else this folder, which their shapes fit."""
    names = {adapter.base for adapter in adapters}
    only = names.pop() if len(names) == 1 else None
    return only or str(base.resolve())
