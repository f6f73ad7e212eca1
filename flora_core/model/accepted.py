"""Which models and tokenizers the engine takes as they are, what to give it instead of others, and where things lie.

The engine runs a model's own layers, not the model's ``forward``: a wrapper around the model would be left out in
silence, so wrappers are refused with the object to give instead.
Letters: K in_features.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_MERGE = (
    "an adapter becomes part of the base: give the model that merge_and_unload() returns, or merge on disk with "
    "flora aggregate --base BASE --adapter ADAPTER --out DIR and load DIR"
)


def check_model(model: Any) -> None:
    """Refuse what is not a plain transformers causal LM.

    Raises:
        TypeError: For a wrapped, compiled or adapted model, an encoder and another object, with what to give instead.
    """
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"model must be the transformers model itself, got {kind} around it: give model.module; more than one GPU "
            "is used by processes that torchrun starts (docs/distributed.md)"
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model must be the transformers model itself, got {kind} from torch.compile, which the engine's own "
            "forward pass would not use: give the model before torch.compile (model._orig_mod)"
        )
    if is_peft_model(model):
        raise TypeError(f"model must be a model without adapters, got {kind} from PEFT; {_MERGE}")
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        hint = "load one with AutoModelForCausalLM.from_pretrained, or bring your own model to flora_core.ops"
        raise TypeError(f"model must be a transformers causal LM, got {type(model).__name__}; {hint}")
    _check_causal(model)
    adapted = next((path for path, part in model.named_modules() if _is_peft_layer(part)), None)
    if adapted is not None:
        raise TypeError(f"model must be a model without adapters, and {adapted} carries one of PEFT; {_MERGE}")


def _check_causal(model: nn.Module) -> None:
    """Refuse encoders: each of their tokens sees the tokens that it is trained to predict."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) in ENCODERS and getattr(config, "is_decoder", None) is False:
        raise TypeError(
            f"model must be a causal LM, got {type(model).__name__} with is_decoder=False in its config: an encoder, "
            "whose tokens attend to the tokens after them"
        )


def is_peft_model(model: Any) -> bool:
    """Tell whether a model is wrapped by PEFT, without importing PEFT."""
    return any(cls.__module__.startswith("peft.") and cls.__name__ == "PeftModel" for cls in type(model).__mro__)


def _is_peft_layer(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("peft.") and cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)


def to_evaluate(model: Any) -> Any:
    """Return the transformers model within wrappers that do not change its logits.

    Those of ``torch.compile``, ``DataParallel`` and PEFT's LoRA-like methods, which live in the model's layers; methods
    that change the prompt are left as they are, and refused later.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return to_evaluate(model.module)
    if hasattr(model, "_orig_mod"):
        return to_evaluate(model._orig_mod)
    if is_peft_model(model) and not model.active_peft_config.is_prompt_learning:
        return model.get_base_model()
    return model


def as_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer, loaded where it is given by folder or hub name; None stays None.

    Raises:
        TypeError: If it is neither, nor callable as transformers' tokenizers are.
        OSError, ValueError: If there is none of that name, or it needs code of its own.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        from transformers import AutoTokenizer

        name = os.fspath(tokenizer)
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            text = f"tokenizer {name!r} could not be loaded: {' '.join(str(error).split())[:300]}"
            hint = "give the folder or hub name of one, or the object that AutoTokenizer.from_pretrained returns"
            raise (OSError if isinstance(error, OSError) else ValueError)(f"{text}; {hint}") from error
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(
            f"tokenizer must be a transformers tokenizer, or the folder or hub name of one, got {tokenizer!r:.80}; "
            "None is for clients with encoded examples"
        )
    return tokenizer


def decoder_of(model: Any) -> tuple[str, nn.Module]:
    """Return the name and the module of the part of a model below its head.

    A few families' ``base_model_prefix`` names no attribute, where transformers takes the model for its own decoder.
    """
    children = dict(model.named_children())
    decoder = model.base_model if model.base_model is not model else model.get_decoder()
    if decoder is model:
        head = model.get_output_embeddings()
        bodies = [part for part in children.values() if part is not head and hasattr(part, "config")]
        decoder = bodies[0] if len(bodies) == 1 else model
    name = next((name for name, part in children.items() if part is decoder), str(model.base_model_prefix))
    return name, decoder


def sequence_limit(model: Any) -> int | None:
    """Return the longest sequence that a model's configuration allows; None where it names no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def embedding_rows(model: Any) -> int:
    """Return the number of tokens that a model has an embedding for."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Tell whether a module computes ``x W^T + b`` and nothing else: ``nn.Linear`` or a subclass that was seen to."""
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point() or module.weight.is_meta:
        return False
    weight: Any = module.weight
    x_2K = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).to(weight.dtype).view(2, -1)
    try:
        got, expected = module(x_2K), F.linear(x_2K, weight, module.bias)
    except Exception:  # whatever the forward of an unknown class raises, it is not a linear layer's
        return False
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    # A bias that is added after the product is rounded may differ in the last place.
    bound = 4 * torch.finfo(weight.dtype).eps * weight.shape[1] ** 0.5
    return bool((got - expected).abs().max() <= bound * expected.abs().max().clamp_min(1e-30))
