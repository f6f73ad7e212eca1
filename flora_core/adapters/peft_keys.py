"""Names of an adapter's tensors: the spellings that wrappers and raw state dicts leave, as module paths of the base.

    [wrapper.]* base_model.model. MODULE .lora_A [.ADAPTER] .weight      what PEFT writes has no wrapper and no ADAPTER

torch.compile adds ``_orig_mod``, FSDP ``_fsdp_wrapped_module``, activation checkpointing ``_checkpoint_wrapped_module``
at any depth; DistributedDataParallel and DeepSpeed add ``module`` in front. A state dict of a PeftModel keeps the name
of the adapter and the weights of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..common import listed, require

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"}
_OUTERMOST = {"module", "_module"}
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


@dataclass(frozen=True)
class Keys:
    """An adapter's tensors sorted by what they are.

    Args:
        factors: Module path -> {"A" or "B": name in the file}.
        rest: Tensors that are not LoRA factors: name in the file -> name without wrappers.
    """

    factors: Mapping[str, Mapping[str, str]]
    rest: Mapping[str, str]


def plain_name(key: str) -> str:
    """Remove wrappers and everything up to the last ``base_model.model.`` from a tensor's name.

    Example: ``_orig_mod.base_model.model.model.norm.weight`` is ``model.norm.weight``.
    """
    parts = _without_outermost([part for part in key.split(".") if part not in _WRAPPERS])
    starts = [i + 2 for i in range(len(parts) - 1) if parts[i : i + 2] == ["base_model", "model"]]
    return ".".join(_without_outermost(parts[starts[-1] :] if starts else parts))


def _without_outermost(parts: list[str]) -> list[str]:
    while len(parts) > 1 and parts[0] in _OUTERMOST:
        parts = parts[1:]
    return parts


def sort_keys(where: object, keys: Iterable[str]) -> Keys:
    """Sort the names of an adapter's tensors.

    Args:
        where: The file, for messages.
        keys: The names in the file.
    Raises:
        ValueError: If two names are one factor, or the file holds more than one adapter.
    """
    factors: dict[str, dict[str, str]] = {}
    rest: dict[str, str] = {}
    adapters: dict[str, str] = {}
    for key in keys:
        name = plain_name(key)
        match = _FACTOR.fullmatch(name)
        if match is None:
            rest[key] = name
            continue
        adapters.setdefault(match["adapter"] or "", key)
        pair = factors.setdefault(match["module"], {})
        other = pair.setdefault(match["factor"], key)
        require(
            other == key or len(adapters) > 1,
            f"{where}: {other!r} and {key!r} are both lora_{match['factor']} of {match['module']!r}; keep one of them",
        )
    require(
        len(adapters) <= 1,
        f"{where} holds {len(adapters)} adapters: {listed(f'{name!r} ({key})' for name, key in adapters.items())};"
        " save each alone (save_pretrained(..., selected_adapters=[NAME]))",
    )
    return Keys(factors, rest)
