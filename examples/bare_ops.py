"""The operations alone, for your own framework: mixed ranks in one call, gradients, merge."""

import torch

from flora_core import Segments, lora_linear, stacked_merge_

x_MK = torch.randn(10, 32, requires_grad=True)
weight_NK = torch.randn(48, 32)
tokens = Segments.from_lengths([6, 0, 4])  # client 1 has no tokens in this batch
ranks = Segments.from_lengths([8, 4, 2])
A_PK = torch.randn(ranks.total, 32, requires_grad=True)
B_PN = torch.randn(ranks.total, 48, requires_grad=True)

y_MN = lora_linear(x_MK, weight_NK, None, A_PK, B_PN, tokens, ranks, scaling_C=[2.0, 2.0, 1.0])
y_MN.square().mean().backward()
print("rows of client 2 saw only its adapter:", A_PK.grad is not None and bool((A_PK.grad[ranks[1]] == 0).all()))

# The server's side: one product with inner size P, in place.
coef_P = torch.cat([torch.full((8,), 0.5 * 2.0), torch.full((4,), 0.3 * 2.0), torch.full((2,), 0.2 * 1.0)])
before = weight_NK.clone()
stacked_merge_(weight_NK, A_PK.detach(), B_PN.detach(), coef_P)
print(f"the merge moved the weight by {(weight_NK - before).norm():.3f}")
