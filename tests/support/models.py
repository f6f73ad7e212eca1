"""Tiny random models of every family, data for them, and a cohort in which every client differs.

Letters: R one client's rank, K in_features, N out_features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import flora_core as flora
from flora_core.adapters.update import Adapters
from flora_core.data.template import IGNORE, Example

VOCAB = 61
WINDOW = 4

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, and what its clients adapt: the cohort's targets and one client's own."""

    config: str
    fields: dict[str, Any]
    targets: tuple[str, ...]
    others: tuple[str, ...]
    pattern: str
    conv1d: bool = False


_LLAMA_LIKE: dict[str, Any] = dict(
    targets=("q_proj", "v_proj"), others=("o_proj", "v_proj", "down_proj"), pattern="layers.1.self_attn.v_proj"
)
FAMILIES = {
    "llama": Family("LlamaConfig", _COMMON, **_LLAMA_LIKE),
    "gpt2": Family(
        "GPT2Config",
        dict(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1)
        | dict(eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        targets=("c_attn",),
        others=("attn.c_proj", "c_fc", "mlp.c_proj"),
        pattern="h.1.attn.c_attn",
        conv1d=True,
    ),
    # The second layer looks back over fewer tokens than the sequences have.
    "qwen2": Family(
        "Qwen2Config",
        _COMMON | dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        **_LLAMA_LIKE,
    ),
    # The caps are low enough to bend these models' logits.
    "gemma2": Family(
        "Gemma2Config",
        _COMMON
        | dict(head_dim=4, query_pre_attn_scalar=4, sliding_window=WINDOW)
        | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        **_LLAMA_LIKE,
    ),
    "cohere": Family("CohereConfig", _COMMON | dict(logit_scale=0.4, use_qk_norm=True), **_LLAMA_LIKE),
    # Not behind transformers' attention interface: its batches are padded.
    "bloom": Family(
        "BloomConfig",
        dict(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        | dict(hidden_dropout=0.0, attention_dropout=0.0),
        targets=("query_key_value",),
        others=("dense_h_to_4h", "self_attention.dense"),
        pattern="h.1.self_attention.query_key_value",
    ),
}

# Not trained here: its experts are routed.
MIXTRAL = Family("MixtralConfig", _COMMON | dict(num_local_experts=4, sliding_window=WINDOW), **_LLAMA_LIKE)


def tiny(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any) -> Any:
    """A random model of a family; float32 and float64 have the same values."""
    spec = MIXTRAL if family == "mixtral" else FAMILIES[family]
    config = getattr(transformers, spec.config)(**spec.fields | fields)
    return randomised(transformers.AutoModelForCausalLM.from_config(config), seed).to(dtype)


def randomised(model: Any, seed: int = 0) -> Any:
    """Far from the usual tiny start, so that attention, norms and biases all matter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model


def examples(seed: int, lengths: Sequence[int], vocab: int = VOCAB) -> list[Example]:
    """Random sequences of these lengths; about a third of each is a prompt without loss."""
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocab, (length,), generator=random).tolist() for length in lengths]
    return [Example(row, [IGNORE] * (len(row) // 3) + row[len(row) // 3 :], i) for i, row in enumerate(rows)]


def random_adapters(adapters: Adapters, seed: int) -> Adapters:
    """Factors of the same shapes, neither of them zero."""
    random = torch.Generator().manual_seed(seed)

    def like(factor: torch.Tensor) -> torch.Tensor:
        return (torch.randn(factor.shape, generator=random) * 0.12).to(factor.dtype)

    return {module: (like(A_RK), like(B_RN)) for module, (A_RK, B_RN) in adapters.items()}


@contextmanager
def exact64() -> Iterator[None]:
    """Where transformers' own code goes down to float32 (norms, softmax, rotary), keep float64.

    Only calls out of transformers are touched: what the engine does is left as it is.
    """

    def widened(function: Callable[..., Any], wide: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not sys._getframe(1).f_globals.get("__name__", "").startswith("transformers."):
                return function(*args, **kwargs)
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
            return wide(*args, **kwargs)

        return call

    patch, tensor, functional = pytest.MonkeyPatch(), torch.Tensor, nn.functional
    patch.setattr(tensor, "float", widened(tensor.float, tensor.double))
    patch.setattr(tensor, "to", widened(tensor.to, tensor.to))
    patch.setattr(functional, "softmax", widened(functional.softmax, functional.softmax))
    try:
        yield
    finally:
        patch.undo()


def clients(family: str = "llama") -> list[flora.ClientSpec]:
    """A mixed cohort: every setting of adapter and training differs somewhere, and so do the data."""
    spec = FAMILIES[family]

    def client(name: str, data: int, lengths: Sequence[int], adapter: dict[str, Any], **train: Any) -> flora.ClientSpec:
        return flora.ClientSpec(name, examples(data, lengths), flora.AdapterConfig(**adapter), train)

    return [
        client("plain", 1, [11, 9, 7, 5, 10, 6, 8, 11, 3, 9], dict(rank=4, alpha=8), lr=1e-2, batch_size=2),
        client(
            "rslora",
            2,
            [6, 13, 5, 8, 4, 7, 6, 12, 5, 9],
            dict(rank=3, alpha=6, use_rslora=True, dropout=0.1),
            lr=2e-2,
            schedule="linear",
            warmup_steps=2,
            weight_decay=0.1,
            clip_norm=3.3,
            batch_size=1,
            gradient_accumulation=2,
        ),
        client(
            "pattern",
            3,
            [9, 2, 12, 7, 7, 10, 8],
            dict(rank=2, alpha=3, dropout=0.3, rank_pattern={spec.pattern: 5}, alpha_pattern={spec.pattern: 7.5}),
            lr=5e-3,
            schedule="cosine",
            warmup_steps=1,
            clip_norm=0.9,
            batch_size=3,
            local_epochs=2,
            max_steps=5,
            betas=(0.8, 0.95),
            seed=5,
        ),
        client(
            "others",
            4,
            [5, 4, 6, 3, 5, 6, 4],
            dict(rank=1, alpha=2, target_modules=spec.others),
            lr=3e-2,
            schedule="cosine",
            weight_decay=0.01,
            batch_size=1,
            seed=11,
        ),
        # Drops out of the cohort before the others are done; its last step holds fewer sequences.
        client(
            "early",
            5,
            [8, 8, 3, 14, 5],
            dict(rank=7, alpha=7, dropout=0.1, target_modules=[*spec.targets, *spec.others]),
            warmup_steps=1,
            batch_size=2,
            eps=1e-6,
        ),
    ]
