"""``adapter_config.json`` of a PEFT LoRA adapter: its fields, their meaning for a module, and a new one.

Every field that would change the meaning of A and B is refused by name; nothing is dropped in silence.
Facts are those of peft 0.21's own source (``tuners/lora``).

Letters: R one client's rank.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common import listed, open_plain, parse_json, require
from ..config import match_pattern, matches_target

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES, _LARGEST = 4_000_000, sys.float_info.max
_PLAIN_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\\-)+\$?")

# Fields that say how an adapter was made or who made it, and leave the meaning of A and B as it is.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_ga_config", "loftq_config",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "init_lora_weights",
}  # fmt: skip
# Fields that would change the meaning, refused unless they have the default; what to do about each.
_REFUSED: dict[str, tuple[Any, str]] = {
    "bias": ("none", "train with bias='none'"),
    "use_dora": (False, "train without DoRA"),
    "lora_bias": (False, "train with lora_bias=False"),
    "ensure_weight_tying": (False, "train with ensure_weight_tying=False"),
    "modules_to_save": (None, "train without modules_to_save"),
    "trainable_token_indices": (None, "train without trained embeddings"),
    "layer_replication": (None, "train without layer_replication"),
    "target_parameters": (None, "target nn.Linear modules with target_modules"),
}
# Initialisations that leave the base weight as it is; A and B then mean what they say.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


def read_config(folder: Path, trusted: bool = True) -> dict[str, Any]:
    """Read an adapter's config, refuse what this engine does not have, and fill in r, alpha and their patterns.

    Raises:
        FileNotFoundError: If the folder holds none.
        ValueError: If it is damaged, or says what this engine does not have; the field is named.
    """
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no PEFT adapter: {_instead(folder, trusted)}")
    with open_plain(path, MAX_CONFIG_BYTES, links=trusted) as file:
        config = parse_json(path, file.read(MAX_CONFIG_BYTES + 1))
    kind = config.get("peft_type")
    require(kind == "LORA", f"{path}: peft_type must be 'LORA', got {kind!r}; other methods are not supported")
    base = config.get("base_model_name_or_path")
    named = base is None or isinstance(base, str)
    require(named, f"{path}: base_model_name_or_path must be a name or a folder, got {str(base)[:60]}")
    _check_features(path, config)
    for default, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        config[default] = config.get(default, 8)
        config[pattern] = config.get(pattern) or {}
        require(isinstance(config[pattern], dict), f"{path}: {pattern} must map modules to numbers")
        for value in (config[default], *config[pattern].values()):
            require(_is_number(value), f"{path}: {default} and {pattern} must hold numbers, got {repr(value)[:60]}")
    _check_patterns(path, config, trusted)
    return config


def _instead(folder: Path, trusted: bool) -> str:
    """Why a folder holds no adapter, and the folders below it that do: named adapters, checkpoints, clients."""
    if not os.path.isdir(folder):
        return "there is no such folder; give the folder that peft saved"
    below = [path.parent for level in ("*", "*/*") for path in folder.glob(f"{level}/{CONFIG}")] if trusted else []
    if not below:
        return f"{CONFIG} is missing; give the folder that peft saved"
    # Short names first: checkpoint-90 before checkpoint-100.
    names = sorted((str(path.relative_to(folder)) for path in below), key=lambda name: (len(name), name))
    return f"{CONFIG} is missing, and its subfolders {listed(map(repr, names))} hold one: give one of these"


def base_of(config: Mapping[str, Any], folder: Path) -> str | None:
    """The base that a config names; None where it names none.

    A relative path of a folder that exists, from the working folder as peft reads it or from the adapter's own, is
    made absolute: it would name another folder, or none, from any other place.
    """
    name = config.get("base_model_name_or_path") or None
    if name is None or Path(name).is_absolute():
        return name
    places = (start / name for start in (Path.cwd(), folder, folder.resolve().parent))
    return next((str(place.resolve()) for place in places if os.path.isdir(place)), name)


def _is_number(value: Any) -> bool:
    # Within float64: JSON's whole numbers have no end.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _check_patterns(path: Path, config: Mapping[str, Any], trusted: bool) -> None:
    """Check the fields that name modules: texts or patterns, and no regular expressions of a remote client."""
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(field)
        names = value if isinstance(value, list) else []
        fine = value is None or (isinstance(value, (str, list)) and all(isinstance(name, str) for name in names))
        require(fine, f"{path}: {field} must be a list of names or a pattern, got {str(value)[:60]}")
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    fine = layers is None or all(type(number) is int for number in numbers)
    require(fine, f"{path}: layers_to_transform must hold whole numbers, got {str(layers)[:60]}")
    patterns = [*config["rank_pattern"], *config["alpha_pattern"]]
    patterns += [config[f] for f in ("target_modules", "exclude_modules") if isinstance(config.get(f), str)]
    found = config.get("layers_pattern") or []
    patterns += [found] if isinstance(found, str) else found
    for pattern in patterns:
        plain = trusted or pattern == "all-linear" or _PLAIN_PATTERN.fullmatch(pattern) is not None
        require(
            plain, f"{path}: {pattern[:60]!r} is a regular expression; an update from outside must name its modules"
        )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{path}: {pattern[:60]!r} is not a regular expression ({error})") from None


def _check_features(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse every field that would change what A and B mean."""
    for field, (default, remedy) in _REFUSED.items():
        value = config.get(field, default)
        require(value == default or value in ([], {}), f"{path}: {field}={value!r} is not supported; {remedy}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_CONVERTIBLE_INITS):
        raise ValueError(
            f"{path}: init_lora_weights={init!r} changed the base weights, so the adapter does not fit the original"
            " model; convert it with peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    require(
        init is None or init in _PLAIN_INITS,
        f"{path}: init_lora_weights={init!r} is not supported; use one of {', '.join(map(str, _PLAIN_INITS))}",
    )
    for field, value in config.items():
        # This engine's own notes: which base a run's adapter was trained on.
        ours = field == "flora" or field.startswith("flora_")
        if ours or field in _HARMLESS or field in _READ or field in _REFUSED:
            continue
        # None, False and empty are the defaults of every optional feature that PEFT has grown so far.
        require(
            value is None or value is False or value in ([], {}, ""),
            f"{path}: unknown field {field}={value!r}, which may change what the adapter means: train without it,"
            " or delete it from the file if that is its default in your version of peft",
        )


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """True where peft would adapt this module (``check_target_module_exists``); unset targets depend on the model."""
    wanted, excluded, layers = (config.get(f) for f in ("target_modules", "exclude_modules", "layers_to_transform"))
    if excluded and matches_target(excluded, module):
        return False
    if wanted is None or isinstance(wanted, str) or module in wanted or layers in (None, []):
        return wanted is None or matches_target(wanted, module)
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    keys = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    index = next((int(match[1]) for key in keys if (match := re.match(key, module))), None)
    return matches_target(wanted, module) and index in ([layers] if isinstance(layers, int) else layers)


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """``alpha / r`` of a module, or ``alpha / sqrt(r)`` with ``use_rslora``."""
    alpha = match_pattern(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def make_config(
    ranks: Mapping[str, int], scaling: Mapping[str, float], base_model: str | None, fan_in_fan_out: bool
) -> dict[str, Any]:
    """A config for modules of these ranks and scalings, from which peft computes the scalings back bit for bit."""
    rslora, alphas = _alphas(ranks, scaling)
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(module): r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(module): a for module, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _exactly(module: str) -> str:
    """A pattern key for this module and no other: PEFT reads keys as regular expressions over path endings."""
    return "^" + re.escape(module)


def _alphas(ranks: Mapping[str, int], scaling: Mapping[str, float]) -> tuple[bool, dict[str, float]]:
    """Find alphas that give the scalings back bit for bit: whole numbers, plain or rsLoRA, before fractions."""
    for rslora in (False, True):
        alphas = {m: round(scaling[m] * (math.sqrt(r) if rslora else r)) for m, r in ranks.items()}
        if all(alphas[m] / (math.sqrt(r) if rslora else r) == scaling[m] for m, r in ranks.items()):
            return rslora, dict(alphas)
    return False, {module: _fraction(scaling[module], rank) for module, rank in ranks.items()}


def _fraction(scaling: float, rank: int) -> float:
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / rank == scaling), alpha)
