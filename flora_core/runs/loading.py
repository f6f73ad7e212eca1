"""Load the base model and the tokenizer that a recipe names, without questions on the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..common import read_header
from ..model import check_model
from .demo_model import NAME as DEMO_MODEL
from .demo_model import demo_model_dir

T = TypeVar("T")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Any one of them is what a tokenizer is read from; families with Python code of their own name other files.
_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "*.spm", "*.bpe", "tokenization_*.py")


def model_folder(model: str) -> str:
    """Return what transformers loads: the demo model's folder, an existing folder, or a hub name as it stands.

    Raises:
        FileNotFoundError: If there is no such folder, and the text cannot be a hub name either.
        ValueError: If the folder holds an adapter or no model, or the path is a file's.
    """
    if model == DEMO_MODEL:
        return str(demo_model_dir())
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_base(folder)
        return str(folder)
    if folder.is_file():
        raise ValueError(
            f"model {folder} is a file, and a model is a folder in transformers' format (config.json, weights in "
            f"safetensors, tokenizer); {_of_file(folder)}"
        )
    if _HUB_NAME.fullmatch(model):
        return model
    raise FileNotFoundError(
        f"model {model} is not a folder (relative paths start at {Path.cwd()}); "
        f"give the folder of a transformers causal LM, a hub name (owner/name), or {DEMO_MODEL}"
    )


def _of_file(file: Path) -> str:
    """Return what to do about a file that is given as the model."""
    if file.suffix == ".gguf":
        return "a GGUF file is quantised for inference: give the folder of the model that it was made from"
    return f"give its folder, {file.parent}" if (file.parent / "config.json").is_file() else "give such a folder"


def _check_base(folder: Path) -> None:
    """Refuse a folder without a model, or with an adapter, for which transformers would load a base of its choice."""
    is_model = (folder / "config.json").is_file()
    if not (folder / "adapter_config.json").is_file():
        if not is_model:
            raise ValueError(
                f"model {folder} has no config.json, so it is not the folder of a transformers model; give the folder "
                "that save_pretrained wrote"
            )
        return
    if is_model:
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

    if Path(folder).is_dir() and not any(list(Path(folder).glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ValueError(
            f"model {folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); save one there with "
            "tokenizer.save_pretrained, or copy its files from the model that it belongs to"
        )
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
        ValueError: If it is no causal LM, lacks weights, holds a damaged file, or needs code of its own that may not
            run.
        TypeError: If it is an encoder, whose tokens attend to the tokens after them.
        OSError: If it cannot be read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = dict(dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True)
    loaded: Any = _explained(folder, lambda: AutoModelForCausalLM.from_pretrained(folder, **options), "model")
    model, info = loaded
    check_model(model)
    _check_complete(folder, info["missing_keys"])
    return model.to(device)


def _check_complete(folder: str, missing: Collection[str]) -> None:
    """Refuse a checkpoint that lacks weights: transformers fills them with random numbers and goes on."""
    if missing:
        names = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"model {folder} lacks {len(missing)} weight{'s' * (len(missing) != 1)} of a causal language model "
            f"({names}), which would be random numbers; give a checkpoint that was saved with its language-model head"
        )


def _explained(folder: str, load: Callable[[], T], what: str) -> T:
    """Load, and explain in the recipe's terms what transformers refuses in its own."""
    try:
        return load()
    except ValueError as error:
        explanation = _explanation(folder, what, " ".join(str(error).split()))
        if explanation is None:
            raise
        raise ValueError(explanation) from error
    except OSError as error:
        if folder in str(error):
            raise
        raise OSError(f"the {what} in {folder} cannot be read: {error}") from error
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files end in whatever the parser of their format raises
        _check_weights(folder)
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the {what} in {folder} cannot be read ({type(error).__name__}: {text}): a file may be damaged; copy it "
            "or download it anew"
        ) from error


def _explanation(folder: str, what: str, text: str) -> str | None:
    """Return the cause, in the recipe's terms, of an error text of transformers; None for other texts."""
    if "trust_remote_code" in text:
        return (
            f"the {what} in {folder} comes with Python code of its own, which would run on this machine: read it, "
            "then allow it with trust_remote_code=true in the recipe"
        )
    family = re.match(r"Unrecognized configuration class .*?(\w+)Config'>", text)
    if family is not None:
        return (
            f"model {folder} is of the family {family[1]}, which transformers has no causal language model for "
            "(AutoModelForCausalLM); encoders and encoder-decoder models cannot be trained here"
        )
    unknown = re.search(r"has model type `([^`]*)` but Transformers does not recognize", text)
    if unknown is not None:
        from transformers import __version__

        return (
            f"model {folder} is of the type {unknown[1]!r} (model_type in config.json), which transformers "
            f"{__version__} does not have; correct it, or upgrade with pip install --upgrade transformers"
        )
    if "Should have a `model_type` key" in text:
        return f"{folder}/config.json has no model_type that transformers knows, so it is not the config of a model"
    if "instantiate the backend tokenizer" in text:
        return (
            f"the tokenizer in {folder} cannot be built: its files are incomplete, or it needs a library: "
            "pip install sentencepiece tiktoken"
        )
    return None


def _check_weights(folder: str) -> None:
    """Name the safetensors file of a folder that is truncated or damaged, where one is."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            read_header(path)
        except ValueError as error:
            raise ValueError(f"model {folder} is damaged: {error}; copy or download that file anew") from error
