"""PEFT LoRA adapters in and out: ``adapter_config.json`` and ``adapter_model.safetensors``, nothing else.

Everything that an adapter carries is either loaded exactly or refused by name; nothing is dropped in silence.
Facts are those of peft 0.21's own source (``utils/save_and_load.py``); ``peft_config`` has those of the config.

Letters: K in_features, N out_features, R one client's rank, P the sum of ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..common import (
    FLOAT_DTYPES,
    atomic_dir,
    atomic_write_json,
    listed,
    open_plain,
    parse_json,
    read_header,
    require,
    write_safetensors,
)
from ..config import match_pattern
from .base import Base, values_of
from .peft_config import CONFIG, base_of, is_target, make_config, read_config, scaling_of
from .peft_keys import Keys, sort_keys
from .update import Adapters, ClientUpdate, RoundResult

WEIGHTS = "adapter_model.safetensors"
# Values of the weights that the adapter was trained on.
RECORD = "flora_base.safetensors"


def load_peft_adapter(
    path: str | os.PathLike[str],
    *,
    client: str | None = None,
    weight: float = 1.0,
    partial: bool = False,
    trusted: bool = True,
    max_bytes: int | None = None,
) -> ClientUpdate:
    """Load a PEFT LoRA adapter as a client's update.

    ``s = alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``; r and alpha by module from ``rank_pattern`` and
    ``alpha_pattern``, of which the first match of ``(.*\\.)?key$`` wins. Names in the spellings of torch.compile, FSDP,
    DistributedDataParallel, activation checkpointing and raw state dicts are read as well (``peft_keys``). The base's
    weight of an adapted module beside its factors (``lm_head.base_layer.weight``, which peft saves with an adapted
    head) changes nothing: 256 values of it go into ``trained_on``, so that another base is refused by
    ``merge_adapter_``. ``flora aggregate``, which has the base, compares all of them.

    Args:
        path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        client: The client's name; that of the folder unless given.
        weight: Its weight in an aggregation.
        partial: Leave out a module of which only one of both factors is there, instead of refusing the adapter.
        trusted: False for a remote client's files: links are not followed, the file is read rather than mapped
            (truncating a mapped file ends the process), and patterns may name modules but hold no regular
            expressions, of which some never end.
        max_bytes: Refuse larger weights before they are read.
    Returns:
        The update; factors in the dtype of the file, on the CPU.
    Raises:
        FileNotFoundError: If a file is missing; a pickled ``adapter_model.bin`` is not read.
        ValueError: If config and tensors disagree, a file is damaged, or the adapter has a feature that this engine
            does not have.
    Example:
        >>> flora.save_peft_adapter(updates[0], "clinic-a")
        >>> update = flora.load_peft_adapter("clinic-a", weight=100)
        >>> update.client, update.ranks
        ('clinic-a', {'model.layers.0.self_attn.q_proj': 2})
    """
    folder = Path(path)
    config = read_config(folder, trusted)
    tensors = _read_safetensors(weights_path(folder), trusted, max_bytes)
    keys = sort_keys(folder / WEIGHTS, tensors)
    pairs = pair_factors(folder, config, keys, tensors, partial=partial)
    copies = _copies_of_base(keys, pairs) if trusted else {}
    refuse_other_tensors(folder, [key for key in keys.rest if key not in copies.values()])
    adapters: Adapters = {}
    scaling: dict[str, float] = {}
    for module, (A_RK, B_NR) in pairs.items():
        # Clones: the file's own memory is mapped, and is gone when the file is truncated.
        adapters[module] = (A_RK.clone(), B_NR.T.clone(memory_format=torch.contiguous_format))
        scaling[module] = scaling_of(config, module, A_RK.shape[0])
    # A remote client's record of its base is not a fact.
    base = base_of(config, folder) if trusted else None
    trained_on = _record_of(folder, base, pairs, {m: tensors[key] for m, key in copies.items()}) if trusted else None
    name = client or folder.resolve().name
    return ClientUpdate(name, adapters, scaling, weight, base=base, trained_on=trained_on)


def _copies_of_base(keys: Keys, modules: Collection[str]) -> dict[str, str]:
    """Adapted module -> name in the file of the base's weight that peft saved beside its factors."""
    found = {name.removesuffix(".base_layer.weight"): key for key, name in keys.rest.items() if "base_layer" in name}
    return {module: key for module, key in found.items() if module in modules}


def _record_of(folder: Path, name: str | None, pairs: Adapters, copies: Mapping[str, torch.Tensor]) -> Base | None:
    """Read the record of an adapter's base, and add values of the base's weights that lie beside its factors.

    Raises:
        ValueError: If a copy is not a weight of its module's shape, or the record is damaged.
    """
    for module, copy in copies.items():
        A_RK, B_NR = pairs[module]
        shape = (B_NR.shape[0], A_RK.shape[1])
        require(
            copy.shape == shape and copy.dtype in FLOAT_DTYPES,
            f"{folder / WEIGHTS}: the base's weight of {module!r} must be floating-point of shape {shape} like its"
            f" factors, got {tuple(copy.shape)} of {copy.dtype}; save the adapter again, with"
            " save_embedding_layers=False",
        )
    record = read_base(folder)
    if record is None:
        return Base(name, 0, values_of(copies.items())) if copies else None
    return replace(record, weights={**values_of(copies.items()), **record.weights})


def read_base(folder: Path) -> Base | None:
    """Read the record of the base that an adapter was trained on; None where its folder has none.

    Raises:
        ValueError: If the record is damaged.
    """
    from safetensors import safe_open

    path = folder / RECORD
    if not path.exists():
        return None
    tensors = _read_safetensors(path, trusted=True, max_bytes=None)
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("base", "")
    kept = {module: tensor.clone() for module, tensor in tensors.items()}
    return Base.from_json(parse_json(path, text.encode()), kept, str(path))


def weights_path(folder: Path) -> Path:
    """The file of an adapter's factors.

    Raises:
        FileNotFoundError: If it is not there; a pickled ``adapter_model.bin`` is not read.
    """
    path = folder / WEIGHTS
    if not path.exists():
        if (folder / "adapter_model.bin").is_file():
            raise FileNotFoundError(
                f"{folder} holds adapter_model.bin, a pickle, which could run code and is not read; load it with peft"
                " where you trust it and save it with save_pretrained(..., safe_serialization=True)"
            )
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}; give the folder that peft saved")
    return path


def refuse_other_tensors(folder: Path, keys: Collection[str]) -> None:
    """Refuse tensors that are not LoRA factors, with what they are and what to do.

    Raises:
        ValueError: If there is one.
    """
    require(not keys, f"{folder / WEIGHTS} holds tensors that are not plain LoRA factors: {_explain(list(keys))}")


def pair_factors(
    folder: Path, config: Mapping[str, Any], keys: Keys, tensors: Mapping[str, torch.Tensor], *, partial: bool = False
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pair an adapter's factors: module -> (lora_A [R, K], lora_B [N, R]), checked against its config.

    Only shapes and dtypes are read, so meta tensors will do.

    Args:
        folder: The adapter's folder, for messages.
        config: Its config.
        keys: Its tensors' names, sorted.
        tensors: Its tensors by their names in the file.
        partial: Leave out a module of which one factor is missing.
    Raises:
        ValueError: If a factor is missing, or a shape, dtype or rank is wrong.
    """
    path = folder / WEIGHTS
    single = [module for module, pair in keys.factors.items() if len(pair) != 2]
    require(
        partial or not single,
        f"{path}: lora_A and lora_B must come together, got one alone for {listed(single, 3)}; save the adapter again,"
        " or leave these modules out with partial=True (--partial)",
    )
    pairs = {m: (tensors[pair["A"]], tensors[pair["B"]]) for m, pair in keys.factors.items() if len(pair) == 2}
    require(bool(pairs), f"{path} holds no LoRA factors; the adapter is empty")
    for module, (A_RK, B_NR) in pairs.items():
        _check_module(folder, config, module, A_RK, B_NR)
    return pairs


def _read_safetensors(path: Path, trusted: bool, max_bytes: int | None) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    read_header(path, max_bytes=max_bytes, links=trusted)
    try:
        if trusted:
            return load_file(path)
        with open_plain(path, max_bytes, links=False) as file:
            return load(file.read(-1 if max_bytes is None else max_bytes))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); save or copy it again") from error


def _explain(keys: list[str]) -> str:
    """Name a few tensors and, for the kinds that PEFT writes, what they are and what to do."""
    known = {
        "lora_magnitude_vector": "DoRA: train with use_dora=False",
        "lora_embedding_": "an adapted embedding: train without it",
        "base_layer": "weights of the base: save with save_embedding_layers=False",
        "embed_tokens": "trained embeddings: save with save_embedding_layers=False",
        "lm_head": "trained embeddings: save with save_embedding_layers=False",
        "bias": "biases: train with bias='none' and lora_bias=False",
    }
    # One reason for each tensor: a copy of the head's weight is no trained embedding.
    found = {next((reason for part, reason in known.items() if part in key), "") for key in keys}
    reasons = [reason for reason in dict.fromkeys(known.values()) if reason in found]
    return ", ".join(keys[:3]) + (f" ({'; '.join(reasons)})" if reasons else "; train without them")


def _check_module(folder: Path, config: Mapping[str, Any], module: str, A_RK: torch.Tensor, B_NR: torch.Tensor) -> None:
    where = f"{folder}: module {module!r}"
    shapes = f"{tuple(A_RK.shape)} and {tuple(B_NR.shape)}"
    fits = A_RK.dim() == B_NR.dim() == 2 and A_RK.shape[0] == B_NR.shape[1] > 0
    require(fits, f"{where}: lora_A must be (r, in) and lora_B (out, r) with one r above 0, got {shapes}")
    for tensor in (A_RK, B_NR):
        require(tensor.dtype in FLOAT_DTYPES, f"{where}: factors must be floating-point, got {tensor.dtype}")
    rank = match_pattern(config["rank_pattern"], module, config["r"])
    require(
        rank == A_RK.shape[0],
        f"{where}: the config says rank {rank} (r or rank_pattern), the tensors have rank {A_RK.shape[0]};"
        " config and weights are not of one adapter (or peft, which sorts the keys of rank_pattern when it saves,"
        " changed which one matches first: order them alphabetically before training)",
    )
    require(
        is_target(config, module),
        f"{where} is not what target_modules, exclude_modules and layers_to_transform name: peft would ignore its"
        " tensors; config and weights are not of one adapter",
    )


def save_peft_adapter(
    update: ClientUpdate,
    path: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Save a client's update as a PEFT LoRA adapter, whole or not at all.

    Modules of rank 0 are left out: PEFT has no such thing, and they change nothing. The client's name and weight are
    not part of an adapter. rsLoRA scalings are written as ``use_rslora`` where that makes every alpha a whole number.
    ``update.trained_on`` goes into ``flora_base.safetensors``, which ``load_peft_adapter`` reads and PEFT ignores.

    Args:
        update: The update to save; factors keep their dtype.
        path: A new folder, or one that holds an adapter and nothing else, which is replaced.
        base_model: Written as ``base_model_name_or_path``: a folder or a name that transformers loads. Unless given,
            ``update.base``; without either PEFT can load the adapter onto a model, and not by its config alone.
        fan_in_fan_out: True for a model of Conv1D (GPT-2); peft corrects a wrong value with a warning.
    Raises:
        ValueError: If no module has a rank above 0.
        FileExistsError: If the folder holds anything else.
        SaveError: If writing fails; what was there is unchanged.
    Example:
        >>> import os
        >>> flora.save_peft_adapter(updates[0], "clinic-a", base_model="org/base")
        >>> sorted(os.listdir("clinic-a"))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    pairs = {module: pair for module, pair in update.adapters.items() if pair[0].shape[0] > 0}
    require(bool(pairs), f"client {update.client!r} adapts no module with a rank above 0; there is nothing to save")
    ranks = {module: A_RK.shape[0] for module, (A_RK, _) in pairs.items()}
    config = make_config(ranks, update.scaling, base_model or update.base, fan_in_fan_out)
    _save(path, pairs, config, update.trained_on)


def save_stacked_adapter(
    result: RoundResult,
    path: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    fan_in_fan_out: bool = False,
    trained_on: Base | None = None,
) -> None:
    """Save a round's ``base_delta`` as one legal PEFT adapter of rank P, so that base + adapter is the new model.

    ``r = alpha = P`` per module (``rank_pattern`` and ``alpha_pattern`` where P differs), so the scale is 1: client
    weights and scalings are folded into B.

    Args:
        result: A round of ``flora`` or another strategy that changes the base.
        path: A new folder, or one that holds an adapter and nothing else, which is replaced.
        base_model: Written as ``base_model_name_or_path``.
        fan_in_fan_out: True for a model of Conv1D (GPT-2).
        trained_on: The weights of the base that it belongs to, where they are known.
    Raises:
        ValueError: If the round does not change the base.
        FileExistsError: If the folder holds anything else.
        SaveError: If writing fails; what was there is unchanged.
    """
    stacks = {module: stack for module, stack in result.base_delta.items() if stack[0].shape[0] > 0}
    require(
        bool(stacks),
        "base_delta is empty, so there is no stacked adapter to save; save the clients' next_adapter instead",
    )
    pairs = {m: (A, (B.double() * coef.double()[:, None]).to(B)) for m, (A, B, coef) in stacks.items()}
    ranks = {module: A_PK.shape[0] for module, (A_PK, _) in pairs.items()}
    _save(path, pairs, make_config(ranks, dict.fromkeys(ranks, 1.0), base_model, fan_in_fan_out), trained_on)


def _save(
    path: str | os.PathLike[str], pairs: Adapters, config: Mapping[str, Any], trained_on: Base | None = None
) -> None:
    tensors = {}
    for module, (A_RK, B_RN) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A_RK
        tensors[f"base_model.model.{module}.lora_B.weight"] = B_RN.T
    with atomic_dir(path, replaceable=(CONFIG, WEIGHTS, RECORD)) as folder:
        write_safetensors(folder / WEIGHTS, tensors)
        if trained_on is not None:
            # One entry: safetensors writes several in any order, and a resumed run writes the same bytes.
            metadata = {"base": json.dumps(trained_on.to_json())}
            write_safetensors(folder / RECORD, trained_on.of(pairs).weights, metadata)
        atomic_write_json(folder / CONFIG, config)
