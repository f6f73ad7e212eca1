"""Causal-LM loss per client, without ever holding M x vocabulary logits.

Letters: M labelled tokens, H hidden size, V vocabulary, C clients.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..common import DeviceSegments, Segments
from .accepted import decoder_of

# Logits held at a time: 2**24 numbers, 64 MiB in float32.
CHUNK_LOGITS = 1 << 24


class Head:
    """From the decoder's last hidden states to logits, in one of two ways.

    ``linear``: logits are hidden @ W^T + b, the gradient is written out. ``model``: the model's own code after the
    decoder (softcaps, scales) runs on chunks, with the decoder replaced by a stand-in.
    """

    def __init__(self, model: nn.Module, kind: str):
        self.kind = kind
        self.output: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        self._shadow = _shadow(model)
        self._buffer = torch.empty(0)

    def logits(self, hidden_MH: torch.Tensor) -> torch.Tensor:
        """Logits (M, V) in at least float32."""
        if self.kind == "linear":
            z_MV = F.linear(hidden_MH, self.output.weight, getattr(self.output, "bias", None))
        else:
            self._shadow[1].hidden = hidden_MH[None]
            z_MV = self._shadow[0](input_ids=torch.zeros(1, len(hidden_MH), dtype=torch.long, device=hidden_MH.device))
            z_MV = z_MV.logits[0]
        return z_MV if z_MV.dtype == torch.float64 else z_MV.float()

    def chunk_logits(self, hidden_mH: torch.Tensor) -> torch.Tensor:
        """Logits of one chunk, in memory that the next chunk takes over where the product can be written into it."""
        weight, bias = self.output.weight, getattr(self.output, "bias", None)
        plain = self.kind == "linear" and hidden_mH.dtype == weight.dtype in (torch.float32, torch.float64)
        if not plain or torch.is_autocast_enabled(hidden_mH.device.type):
            return self.logits(hidden_mH)
        size = len(hidden_mH) * len(weight)
        if self._buffer.numel() < size or self._buffer.dtype != weight.dtype or self._buffer.device != weight.device:
            # Fresh memory costs a page fault for every 4 KB: about a tenth of the product on a CPU.
            self._buffer = weight.new_empty(size)
        z_mV = torch.mm(hidden_mH, weight.T, out=self._buffer[:size].view(len(hidden_mH), -1))
        return z_mV if bias is None else z_mV.add_(bias)


class _Output:
    """Output of any family's decoder: hidden states; any other field (router logits, ...) is None."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _Decoded(nn.Module):
    """Stands in for the decoder and returns given hidden states."""

    hidden: torch.Tensor

    @property
    def decoder(self) -> _Decoded:
        return self

    def forward(self, *_, **__) -> _Output:
        return _Output(self.hidden)


def _shadow(model: nn.Module) -> tuple[nn.Module, _Decoded]:
    """A shallow copy of the model that shares its head and whose decoder is a stand-in."""
    shadow, stub = copy.copy(model), _Decoded()
    shadow._modules = dict(model._modules)
    shadow._modules[decoder_of(model)[0]] = stub
    return shadow, stub


class _ChunkedLoss(torch.autograd.Function):
    """Loss per row and its gradient in one pass over chunks; backward only scales the gradient by client."""

    @staticmethod
    def forward(ctx, hidden_MH: torch.Tensor, target_M: torch.Tensor, head: Head, tokens: Segments, weight_C):
        wide = torch.float64 if hidden_MH.dtype == torch.float64 else torch.float32
        loss_M = torch.empty(len(hidden_MH), dtype=wide, device=hidden_MH.device)
        needs_grad = ctx.needs_input_grad[0]
        grad_MH = torch.empty_like(hidden_MH) if needs_grad else None
        chunk = max(1, CHUNK_LOGITS // max(1, head.output.weight.shape[0]))
        row_loss = _linear_rows if head.kind == "linear" else _model_rows
        for start in range(0, len(hidden_MH), chunk):
            rows = slice(start, start + chunk)
            loss_M[rows], grad = row_loss(head, hidden_MH[rows], target_M[rows], needs_grad)
            if grad_MH is not None and grad is not None:
                grad_MH[rows] = grad
        ctx.save_for_backward(*([] if grad_MH is None else [grad_MH]))
        ctx.tokens, ctx.weight_C = tokens, weight_C
        if isinstance(tokens, DeviceSegments):
            mine_CM = _owner(tokens) == torch.arange(len(tokens), device=loss_M.device)[:, None]
            # By selection: 0 * NaN would carry one client's loss to another.
            return torch.where(mine_CM, loss_M, 0).sum(1) * weight_C.to(wide)
        return torch.stack([loss_M[rows].sum() * weight_C[c] for c, rows in enumerate(tokens)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_C: torch.Tensor):
        (grad_MH,) = ctx.saved_tensors
        if isinstance(ctx.tokens, DeviceSegments):
            scale_M1 = (grad_C * ctx.weight_C.to(grad_C.dtype))[_owner(ctx.tokens)].to(grad_MH.dtype)[:, None]
            return torch.where(scale_M1 == 0, 0, grad_MH * scale_M1), None, None, None, None
        scaled = torch.empty_like(grad_MH)
        for c, rows in enumerate(ctx.tokens):
            torch.mul(grad_MH[rows], (grad_C[c] * ctx.weight_C[c]).to(grad_MH.dtype), out=scaled[rows])
        return scaled, None, None, None, None


def _owner(tokens: DeviceSegments) -> torch.Tensor:
    """The segment of each row."""
    rows = torch.arange(tokens.total, dtype=torch.int32, device=tokens.offsets.device)
    return torch.bucketize(rows, tokens.offsets[1:], right=True)


def _linear_rows(head: Head, hidden: torch.Tensor, target: torch.Tensor, needs_grad: bool):
    z_mV = head.chunk_logits(hidden)
    # One buffer from the logits to their gradient.
    on_cpu, target_m1 = z_mV.device.type == "cpu", target[:, None]
    share_mV = (torch.softmax if on_cpu else torch.log_softmax)(z_mV, dim=1, out=z_mV)
    share_m = share_mV.gather(1, target_m1)[:, 0]
    loss_m = _surprise(share_m, head, hidden, target) if on_cpu else -share_m
    if not needs_grad:
        return loss_m, None
    grad_mV = share_mV if on_cpu else share_mV.exp_()
    grad_mV.scatter_add_(1, target_m1, grad_mV.new_full(target_m1.shape, -1))
    weight = head.output.weight
    return loss_m, grad_mV.to(weight.dtype) @ weight


def _surprise(p_m: torch.Tensor, head: Head, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log p of the targets.

    On a CPU a pass over the logits costs what it moves. softmax makes one, for it does a row while that is in cache,
    where log_softmax makes three and exp one more. But what is too unlikely for p's dtype needs its logits once more.
    """
    loss_m = -p_m.log()
    lost = (p_m < torch.finfo(p_m.dtype).tiny).nonzero()[:, 0]
    if len(lost):
        loss_m[lost] = F.cross_entropy(head.logits(hidden[lost]), target[lost], reduction="none")
    return loss_m


def _model_rows(head: Head, hidden: torch.Tensor, target: torch.Tensor, needs_grad: bool):
    with torch.set_grad_enabled(needs_grad):
        hidden = hidden.detach().requires_grad_(needs_grad)
        loss_m = F.cross_entropy(head.logits(hidden), target, reduction="none")
        grad = torch.autograd.grad(loss_m.sum(), hidden)[0] if needs_grad else None
    return loss_m.detach(), grad


def client_losses(
    head: Head,
    hidden_MH: torch.Tensor,
    target_M: torch.Tensor,
    tokens: Segments | DeviceSegments,
    weight_C: Sequence[float] | torch.Tensor,
) -> torch.Tensor:
    """Cross entropy per client: ``weight_c * sum of -log softmax(logits)[target]`` over the client's rows.

    Args:
        head: The model's head.
        hidden_MH: Last hidden states at the labelled positions, clients in order.
        target_M: The tokens to predict there, int64.
        tokens: Segments over M, one per client, some perhaps empty.
        weight_C: One over the number of labelled tokens of the client's optimizer step; a tensor with DeviceSegments.
    Returns:
        loss_C in float32 (float64 for a float64 model), differentiable in hidden_MH. Peak memory beyond the hidden
        states: 2**24 logits. A client's NaN stays in its own entry and rows.
    """
    return _ChunkedLoss.apply(hidden_MH, target_M, head, tokens, weight_C)  # pyright: ignore
