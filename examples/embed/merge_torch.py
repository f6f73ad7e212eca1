"""Merge all linears of a model from torch in place, without the engine: only the kernels."""

import torch

from flora_kernels import native

layers = [torch.nn.Linear(96, 64).bfloat16(), torch.nn.Linear(64, 32).bfloat16()]
items, change = [], []
with torch.no_grad():
    for layer in layers:
        A, B = torch.randn(16, layer.in_features), torch.randn(16, layer.out_features) / 16
        coef = torch.full((16,), 0.5)
        low_bits = torch.zeros(layer.weight.shape, dtype=torch.int16)  # W and these are an fp32 master
        items.append((layer.weight, A, B, coef, low_bits))
        change.append(layer.weight.double() + B.double().T @ (coef.double()[:, None] * A.double()))
    native.merge_many_(items, accumulate="float64")
    for (weight, *_), wanted in zip(items, change):
        print(tuple(weight.shape), "merged:", bool((weight.double() - wanted).abs().max() < 0.02))
