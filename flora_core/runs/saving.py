"""The dtype in which a run's model is saved, and what rounding to it costs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..common import require

# As ``FederationConfig.save_dtype`` names them.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def dtype_to_save(wanted: str, model: Any) -> torch.dtype | None:
    """Return the dtype in which a model is to be saved; None leaves every tensor as it is held.

    Args:
        wanted: auto, base or a name of ``DTYPES``.
        model: The base; ``base`` asks for the dtype in the configuration that it was loaded with.
    Raises:
        ValueError: If the dtype of the base cannot be found.
    """
    if wanted == "auto":
        return None
    dtype = DTYPES.get(wanted) or _checkpoint_dtype(model.config)
    return None if dtype == model.dtype else dtype


def _checkpoint_dtype(config: Any) -> torch.dtype:
    """Read again what the checkpoint says: loading puts the dtype that was asked for in its place."""
    source = getattr(config, "_name_or_path", "")
    remedy = "give save_dtype a dtype by name, such as bfloat16"
    require(bool(source), f"save_dtype='base' needs a model that was loaded from a checkpoint; {remedy}")
    try:
        found = type(config).from_pretrained(source).dtype
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"save_dtype='base': {source} cannot be read again ({reason}); {remedy}") from error
    dtype = getattr(torch, found, None) if isinstance(found, str) else found
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"save_dtype='base': the configuration of {source} names no dtype; {remedy}")
    return dtype


def converted(
    state: Mapping[str, torch.Tensor], model: Any, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], float]:
    """Convert the tensors that are held in the model's own dtype; shared ones stay shared.

    Tensors that the family keeps in float32 are left so, and so is what is held in another dtype.

    Returns:
        The state, and the rounding error: the norm of what was rounded off over that of the converted tensors.
    Raises:
        ValueError: If a number is too large for the dtype.
    """
    kept = _kept_in_float32(model)
    done: dict[tuple[Any, ...], torch.Tensor] = {}
    result, lost, whole = {}, 0.0, 0.0
    for name, tensor in state.items():
        if tensor.dtype != model.dtype or kept.search(name):
            result[name] = tensor
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in done:
            done[key] = tensor.detach().to(dtype)
            off, size = _norms(tensor.detach(), done[key])
            require(
                math.isfinite(off) or not bool(torch.isfinite(tensor).all()),
                f"{name} has numbers that {dtype} cannot hold: the run is saved; start it again with another "
                "save_dtype, and it writes its model anew",
            )
            lost, whole = math.hypot(lost, off), math.hypot(whole, size)
        result[name] = done[key]
    return result, lost / whole if whole else 0.0


def _norms(exact: torch.Tensor, rounded: torch.Tensor) -> tuple[float, float]:
    wide = torch.promote_types(exact.dtype, rounded.dtype)
    off = rounded.to(wide) - exact.to(wide)
    return tuple(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in (off, exact))  # pyright: ignore


def _kept_in_float32(model: Any) -> re.Pattern[str]:
    """Match the names of tensors that transformers keeps in float32 when it loads this family in 16 bits."""
    lists: Iterable[Any] = (
        getattr(model, name, None) or () for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    )
    names = sorted({str(name) for each in lists for name in each})
    return re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in names) or "(?!)")


def write_dtype(config_file: Path, before: torch.dtype, after: torch.dtype) -> None:
    """Have a saved configuration name the dtype that its tensors were converted to."""
    names = [str(dtype).removeprefix("torch.") for dtype in (before, after)]

    def renamed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: renamed(part, name) for name, part in value.items()}
        return names[1] if key in ("dtype", "torch_dtype") and value == names[0] else value

    config = renamed(json.loads(config_file.read_text("utf-8")))
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
