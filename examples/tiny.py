"""A random Llama of 40,000 parameters and made-up sequences, so that the examples run anywhere."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flora_core.data import Example


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def examples(count: int, seed: int, length: int = 12) -> list[Example]:
    """Sequences that count upwards, with loss on all but the first two tokens."""
    rows = [[(seed + i + t) % 128 for t in range(length)] for i in range(count)]
    return [Example(row, [-100, -100, *row[2:]], i) for i, row in enumerate(rows)]
