"""A server without a model: aggregate adapters of different ranks that arrived as PEFT folders."""

import tempfile
from pathlib import Path

import torch

import flora_core as flora

with tempfile.TemporaryDirectory() as folder:
    # Three clients send PEFT adapters of ranks 8, 4 and 2 for one 64 x 32 layer.
    for name, rank in (("a", 8), ("b", 4), ("c", 2)):
        factors = {"model.layers.0.self_attn.q_proj": (torch.randn(rank, 32), torch.randn(rank, 64))}
        update = flora.ClientUpdate(name, factors, {"model.layers.0.self_attn.q_proj": 2.0})
        flora.save_peft_adapter(update, Path(folder) / name)

    updates = [flora.load_peft_adapter(Path(folder) / name) for name in ("a", "b", "c")]

for update, examples in zip(updates, (100, 50, 10)):
    update.weight = examples
result = flora.aggregate(updates, strategy="flora")
for module, delta_NK in result.dense().items():
    stacked = result.base_delta[module][0].shape[0]
    print(f"{module}: stack of rank {stacked}, change of norm {delta_NK.norm():.3f}")
print(f"{result.bytes_up} bytes up, {result.bytes_down} bytes down")
