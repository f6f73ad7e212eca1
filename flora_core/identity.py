"""What makes a run the run that it is, so that it is resumed as the same one or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .checks import require
from .cohort import ClientSpec
from .config import TrainConfig

ROUNDS = "federation.rounds"
# Values of each tensor that count. Another base differs nearly everywhere; reading all of a large one takes minutes.
_SAMPLED = 16384


def identity(
    clients: Sequence[ClientSpec], train: TrainConfig, federation: Mapping[str, Any], others: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the result of a run depends on, by dotted name, as JSON values.

    Args:
        clients: With encoded data; their order counts too, for it is that of every sum.
        train: The settings of all clients.
        federation: Fields of the federation's configuration.
        others: Strategy, targets, digests of model and evaluation data, ...
    """
    facts: dict[str, Any] = {"clients": [spec.name for spec in clients], **others}
    facts |= _dotted("federation", federation) | _dotted("train", asdict(train))
    for spec in clients:
        own = {"adapter": asdict(spec.adapter), "train": asdict(train.overridden(spec.train)) if spec.train else None}
        data = [(example.input_ids, example.labels) for example in spec.data]
        facts |= _dotted(f"clients.{spec.name}", {**own, "data": json_digest(data)})
    return _as_json(facts)


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the fields that are not what they were, with both values where they are short."""
    now = _as_json(now)
    changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return [_difference(name, was.get(name), now.get(name)) for name in changed]


def check_rounds(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Tell whether a run is given more rounds than it had, and check that those already done would be the same.

    Raises:
        ValueError: If there are fewer, or what was done depends on how many there are.
    """
    before, after = was.get(ROUNDS), now.get(ROUNDS)
    if before is None or after is None or before == after:
        return False
    require(
        after > before,
        f"federation.rounds was {before}, is {after}: rounds are added to a run, not taken away; give {before} or "
        "more, or choose another out",
    )
    scopes = (name for name, value in was.items() if name.endswith("train.schedule_scope") and value == "run")
    sections = (name.rpartition(".")[0] for name in scopes)
    spanning = next((name for name in sections if was.get(f"{name}.schedule") != "constant"), None)
    why = f"{spanning}.schedule_scope is 'run', so that the learning rates of the rounds done depend on it"
    if spanning is None:
        why = "privacy.epsilon bounds the whole run, and the noise of the rounds done was chosen for their number"
    require(
        spanning is None and was.get("federation.privacy.epsilon") is None,
        f"federation.rounds was {before}, is {after}: {why}. Choose another out for a run of {after} rounds",
    )
    return True


def environment(device: torch.device) -> dict[str, Any]:
    """What the last bits of a run depend on besides its identity."""
    from . import __version__

    cuda = device.type == "cuda"
    return {
        "flora_core": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def tensor_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A sha256 over names, shapes, dtypes and 16384 evenly spaced values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, math.ceil(flat.numel() / _SAMPLED))].cpu().contiguous()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """A sha256 of a value as JSON; what JSON does not know counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _dotted(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    return {name: leaf for key, part in value.items() for name, leaf in _dotted(f"{prefix}.{key}", part).items()}


def _as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(facts, default=str))


def _difference(name: str, was: Any, now: Any) -> str:
    texts = [json.dumps(value) for value in (was, now)]
    return f"{name} differs" if max(map(len, texts)) > 60 else f"{name} was {texts[0]}, is {texts[1]}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
