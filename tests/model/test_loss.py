"""Per-client loss: against cross entropy in float64 over all logits at once, which the engine never holds.

Letters: M labelled tokens, H hidden size, V vocabulary, C clients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flora_core.common.segments import Segments
from flora_core.model import loss as loss_module
from flora_core.model.loss import Head, client_losses
from flora_core.testing import budget_ratio, plain_rounding
from tests.support import models

# Several clients, one without a labelled token in this pass, one with a single one.
TOKENS = Segments.from_lengths([7, 0, 1, 12])
WEIGHTS = (1 / 7, 0.0, 1 / 3, 1 / 20)
KINDS = {"llama": "linear", "bias": "linear", "gemma2": "model", "cohere": "model"}


def build(family: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Head]:
    """A model and its head; ``bias`` is a head with a bias."""
    model = models.tiny("llama" if family == "bias" else family, dtype)
    if family == "bias":
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, models.VOCAB).to(dtype))
    return model.requires_grad_(False), Head(model, KINDS[family])


def inputs(dtype: torch.dtype = torch.float64, tokens: Segments = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden_MH = torch.randn(tokens.total, 16, generator=random).to(dtype)
    return hidden_MH.requires_grad_(), torch.randint(models.VOCAB, (tokens.total,), generator=random)


def oracle(
    family: str, hidden_MH: torch.Tensor, target_M: torch.Tensor, up_C: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss per client from all logits at once, written per family, and the gradient of the hidden states."""
    model, _ = build(family, torch.float32)
    weight, bias = model.lm_head.weight.to(dtype), model.lm_head.bias
    hidden_MH = hidden_MH.detach().to(dtype).requires_grad_()
    z_MV = hidden_MH @ weight.T + (0 if bias is None else bias.to(dtype))
    if family == "cohere":
        z_MV = z_MV * 0.4
    if family == "gemma2":
        z_MV = 3.0 * torch.tanh(z_MV / 3.0)
    wide_MV = z_MV if dtype == torch.float64 else z_MV.float()
    loss_M = -torch.log_softmax(wide_MV, 1)[torch.arange(len(target_M)), target_M]
    loss_C = torch.stack([loss_M[rows].sum() * w for rows, w in zip(TOKENS, WEIGHTS, strict=True)])
    return loss_C.detach().to(dtype), torch.autograd.grad(loss_C, hidden_MH, up_C.to(loss_C.dtype))[0]


@pytest.mark.parametrize("family", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("chunk", [1 << 24, 5 * models.VOCAB, 1], ids=["whole", "chunks of 5", "one by one"])
def test_client_losses(family: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch):
    """Losses and gradients of every client, for a random gradient from above."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
    _, head = build(family, dtype)
    hidden_MH, target_M = inputs(dtype)
    up_C = torch.tensor([0.7, 1.3, -2.0, 0.4])
    loss_C = client_losses(head, hidden_MH, target_M, TOKENS, WEIGHTS)
    assert loss_C.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (grad_MH,) = torch.autograd.grad(loss_C, hidden_MH, up_C.to(loss_C.dtype))
    exact = oracle(family, hidden_MH, target_M, up_C, torch.float64)
    with plain_rounding():
        low = oracle(family, hidden_MH, target_M, up_C, dtype)
    for c, rows in enumerate(TOKENS):
        assert budget_ratio(loss_C[c].detach(), exact[0][c], low[0][c]) <= 1
        assert budget_ratio(grad_MH[rows], exact[1][rows], low[1][rows]) <= 1
    assert loss_C[1] == 0, "a client without a labelled token"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_targets_too_unlikely_for_a_probability(dtype: torch.dtype):
    """Logits hundreds apart: p of a target is 0 in float32, its loss is not infinite."""
    _, head = build("llama", dtype)
    hidden_MH, target_M = inputs(dtype)
    hidden_MH = (3000 * hidden_MH.detach()).requires_grad_()
    up_C = torch.ones(4)
    loss_C = client_losses(head, hidden_MH, target_M, TOKENS, WEIGHTS)
    (grad_MH,) = torch.autograd.grad(loss_C, hidden_MH, up_C.to(loss_C.dtype))
    exact = oracle("llama", hidden_MH, target_M, up_C, torch.float64)
    with plain_rounding():
        low = oracle("llama", hidden_MH, target_M, up_C, dtype)
    assert exact[0].max() > 800
    for c, rows in enumerate(TOKENS):
        assert budget_ratio(loss_C[c].detach(), exact[0][c], low[0][c]) <= 1
        assert budget_ratio(grad_MH[rows], exact[1][rows], low[1][rows]) <= 1


@pytest.mark.parametrize("family", list(KINDS))
def test_nobody_has_a_label(family: str):
    _, head = build(family)
    hidden_MH, target_M = inputs(tokens=Segments.from_lengths([0, 0]))
    loss_C = client_losses(head, hidden_MH, target_M, Segments.from_lengths([0, 0]), (0.0, 0.0))
    loss_C.sum().backward()
    assert loss_C.tolist() == [0, 0]
    assert hidden_MH.grad is not None
    assert hidden_MH.grad.shape == (0, 16)


@pytest.mark.parametrize("family", list(KINDS))
def test_without_gradients(family: str):
    """Evaluation computes the same losses and no gradient."""
    _, head = build(family)
    hidden_MH, target_M = inputs()
    loss_C = client_losses(head, hidden_MH, target_M, TOKENS, WEIGHTS)
    with torch.no_grad():
        again_C = client_losses(head, hidden_MH, target_M, TOKENS, WEIGHTS)
    assert not again_C.requires_grad
    assert torch.equal(loss_C.detach(), again_C)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation inside gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        sizes = [tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_never_holds_all_logits(family: str, monkeypatch: pytest.MonkeyPatch):
    """With 300 labelled tokens and chunks of 90, no operation gives more than a chunk's logits."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 90 * models.VOCAB)
    tokens = Segments.from_lengths([100, 200])
    _, head = build(family)
    hidden_MH, target_M = inputs(tokens=tokens)
    with Largest() as largest:
        client_losses(head, hidden_MH, target_M, tokens, (1 / 100, 1 / 200)).sum().backward()
    assert largest.numbers == 90 * models.VOCAB > hidden_MH.numel()


@pytest.mark.parametrize("family", list(KINDS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_bad_row_stays_with_its_client(family: str, value: float):
    """Other clients' losses and gradients keep every bit, in the same chunk too."""
    _, head = build(family)
    hidden_MH, target_M = inputs()
    sick_MH = hidden_MH.detach().clone()
    sick_MH[TOKENS[2].start] = value
    results = []
    for x_MH in (hidden_MH.detach(), sick_MH):
        x_MH.requires_grad_()
        loss_C = client_losses(head, x_MH, target_M, TOKENS, WEIGHTS)
        loss_C.sum().backward()
        results.append((loss_C.detach(), x_MH.grad))
    (loss_C, grad_MH), (sick_C, sick_grad_MH) = results
    assert grad_MH is not None
    assert sick_grad_MH is not None
    assert not sick_C[2].isfinite()
    for c in (0, 1, 3):
        assert sick_C[c] == loss_C[c]
        assert torch.equal(sick_grad_MH[TOKENS[c]], grad_MH[TOKENS[c]])


def test_the_heads_own_gradient():
    """gradcheck of both heads, softcap included."""
    for family in KINDS:
        _, head = build(family)
        hidden_MH, target_M = inputs(tokens=Segments.from_lengths([2, 3]))

        def losses(x_MH: torch.Tensor, head: Head = head, target_M: torch.Tensor = target_M) -> torch.Tensor:
            return client_losses(head, x_MH, target_M, Segments.from_lengths([2, 3]), (0.5, 1 / 3))

        assert torch.autograd.gradcheck(losses, (hidden_MH,))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "bloom", "mixtral"])
def test_model_head_is_the_models_code(family: str):
    """Its logits are the model's own bits, and the model is not touched by asking.

    GPT-2 asks its decoder's output for cross attentions, Mixtral for router logits.
    """
    model = models.tiny(family, torch.float32).eval()
    ids = torch.tensor([models.examples(0, [9])[0].input_ids])
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    decoder = model.base_model
    assert torch.equal(Head(model, "model").logits(hidden), output.logits[0])
    assert model.base_model is decoder
