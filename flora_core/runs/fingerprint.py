"""The configuration fingerprint that a resumed run must match."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..common import as_json, dotted, json_digest, require, version_of
from ..config import TrainConfig
from ..model import ClientSpec

ROUNDS = "federation.rounds"


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
    facts |= dotted("federation", federation) | dotted("train", asdict(train))
    for spec in clients:
        own = {"adapter": asdict(spec.adapter), "train": asdict(train.overridden(spec.train)) if spec.train else None}
        data = [(example.input_ids, example.labels) for example in spec.data]
        facts |= dotted(f"clients.{spec.name}", {**own, "data": json_digest(data)})
    return as_json(facts)


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
    """Facts that the last bits of a run depend on besides its configuration."""
    from ..version import __version__

    cuda = device.type == "cuda"
    return {
        "flora_core": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
