"""Load the base model and the tokenizer that a recipe names, without questions on the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from .demo_model import NAME as DEMO_MODEL
from .demo_model import demo_model_dir

T = TypeVar("T")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_folder(model: str) -> str:
    """Return what transformers loads: the demo model's folder, an existing folder, or a hub name as it stands.

    Raises:
        FileNotFoundError: If there is no such folder, and the text cannot be a hub name either.
        ValueError: If the folder holds an adapter.
    """
    if model == DEMO_MODEL:
        return str(demo_model_dir())
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_base(folder)
        return str(folder)
    if _HUB_NAME.fullmatch(model):
        return model
    raise FileNotFoundError(
        f"model {model} is not a folder (relative paths start at {Path.cwd()}); "
        f"give the folder of a transformers causal LM, a hub name (owner/name), or {DEMO_MODEL}"
    )


def _check_base(folder: Path) -> None:
    """Refuse a folder with an adapter: transformers would load the adapter's own base, and perhaps another one."""
    if not (folder / "adapter_config.json").is_file():
        return
    if (folder / "config.json").is_file():
        raise ValueError(
            f"model {folder} holds both a model and an adapter (adapter_config.json), so that it is not clear what is "
            "meant: move the adapter's files into a folder of their own"
        )
    raise ValueError(
        f"model {folder} holds an adapter, not a model. To go on from it, merge it into its base first: "
        f"flora aggregate --base BASE --adapter {folder} --out DIR, then use model=DIR"
    )


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer; ``trust_remote_code`` as in ``load_model``."""
    from transformers import AutoTokenizer

    return _explained(
        folder, lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code), "tokenizer"
    )


def load_model(folder: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Load a causal LM onto a device, without bars.

    Args:
        folder: What ``model_folder`` gives.
        device, dtype: Where its weights go, and how they are held.
        trust_remote_code: Whether Python code that lies beside the weights may run.
    Raises:
        ValueError: If it is no causal LM, or needs code of its own that may not run.
        OSError: If it cannot be read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = dict(dtype=dtype, trust_remote_code=trust_remote_code)
    model: Any = _explained(folder, lambda: AutoModelForCausalLM.from_pretrained(folder, **options), "model")
    return model.to(device)


def _explained(folder: str, load: Callable[[], T], what: str) -> T:
    """Load, and explain in the recipe's terms what transformers refuses in its own."""
    try:
        return load()
    except ValueError as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise ValueError(
                f"the {what} in {folder} comes with Python code of its own, which would run on this machine: read it, "
                "then allow it with trust_remote_code=true in the recipe"
            ) from error
        kind = re.match(r"Unrecognized configuration class .*?(\w+)Config'>", text)
        if kind is not None:
            raise ValueError(
                f"model {folder} is of the family {kind[1]}, which transformers has no causal language model for "
                "(AutoModelForCausalLM); encoders and encoder-decoder models cannot be trained here"
            ) from error
        raise


__all__ = ["load_model", "load_tokenizer", "model_folder"]
