"""Checkpoints and adapters on disk for the tests of streaming: written by hand, so that no model library is needed.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flora_core.adapters.peft import save_peft_adapter
from flora_core.adapters.update import ClientUpdate

HIDDEN, MIDDLE, VOCAB = 32, 48, 64
SHAPES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (MIDDLE, HIDDEN), "mlp.down_proj": (HIDDEN, MIDDLE)}
CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}


def weights(
    layers: int = 3, dtype: torch.dtype = torch.bfloat16, seed: int = 0, width: int = 1
) -> dict[str, torch.Tensor]:
    """A Llama-shaped model's tensors, ``width`` times as wide as the smallest."""
    random = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * 0.1).to(dtype)

    tensors = {"model.embed_tokens.weight": make(VOCAB * width, HIDDEN * width)}
    for layer in range(layers):
        for name, (N, K) in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = make(N * width, K * width)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = make(HIDDEN * width)
    return tensors | {"model.norm.weight": make(HIDDEN * width), "lm_head.weight": make(VOCAB * width, HIDDEN * width)}


def save_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 3, config: Mapping[str, Any] = CONFIG
) -> Path:
    """Write a checkpoint of some shards (0: one file without an index) with a config and tokenizer files."""
    folder.mkdir(parents=True)
    names = list(tensors)
    if not shards:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt", "made by": "a test"})
    else:
        size, weight_map = -(-len(names) // shards), {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            mine = {name: tensors[name] for name in names[i * size : (i + 1) * size]}
            save_file(mine, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(mine, file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("# The base")
    (folder / "extra").mkdir()
    (folder / "extra" / "template.jinja").write_text("{{ x }}")
    return folder


def save_adapters(
    folder: Path,
    ranks: Sequence[int] = (4, 1, 7),
    *,
    layers: int = 3,
    modules: Sequence[str] = tuple(SHAPES),
    width: int = 1,
    scaling: float = 0.75,
    dtype: torch.dtype = torch.float32,
    prefix: str = "model.",
) -> list[str]:
    """Write an adapter of every rank; the paths."""
    paths = []
    for i, rank in enumerate(ranks):
        random = torch.Generator().manual_seed(100 + i)
        adapters = {}
        for layer in range(layers):
            for name in modules:
                N, K = SHAPES[name]
                pair = (torch.randn(rank, size * width, generator=random).to(dtype) * 0.1 for size in (K, N))
                adapters[f"{prefix}layers.{layer}.{name}"] = tuple(pair)
        path = folder / f"client-{i}"
        save_peft_adapter(ClientUpdate(path.name, adapters, dict.fromkeys(adapters, scaling * (i + 1))), path)
        paths.append(str(path))
    return paths


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
