"""Keep less for backward and compute it a second time there: whole layers, norms, gated activations.

A norm keeps its input widened to float32 beside the 16-bit input of what follows it; a gated MLP keeps act(gate) beside
gate, up and their product. Computed again they keep their inputs alone. Gradients are those without it, bit for bit.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import TrainConfig


@contextmanager
def keeping_less(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """List what a client's settings recompute: gradient checkpointing, ``recompute``, both or neither."""
    with recomputing(model, config.recompute), _checkpointed(model, config.gradient_checkpointing):
        yield


@contextmanager
def recomputing(model: nn.Module, kinds: Sequence[str]) -> Iterator[dict[str, int]]:
    """Compute norms or activations (``config.RECOMPUTABLE``) again in backward; yields how many modules of each do."""
    changed: list[nn.Module] = []
    counts = dict.fromkeys(kinds, 0)
    try:
        for module in model.modules():
            if "forward" in vars(module):
                continue  # another library's hook, which is not ours to replace
            if "norms" in kinds and _is_norm(module):
                forward, kind = _norm_forward, "norms"
            elif "activations" in kinds and _is_gated(module) and _computes_so(module):
                forward, kind = _gated_forward, "activations"
            else:
                continue
            module.forward = types.MethodType(forward, module)
            changed.append(module)
            counts[kind] += 1
        yield counts
    finally:
        for module in changed:
            del module.forward


def _is_norm(module: nn.Module) -> bool:
    # torch's own are one kernel and keep their input as it is.
    kind = type(module)
    return kind.__name__.endswith(("RMSNorm", "LayerNorm")) and not kind.__module__.startswith("torch.")


def _is_gated(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    weights = [getattr(part, "weight", None) for part in parts if isinstance(part, nn.Module)]
    # Some families hold their experts' stacked weights, or layers of another kind, under these names.
    fine = len(weights) == 3 and all(isinstance(weight, torch.Tensor) and weight.dim() == 2 for weight in weights)
    return fine and callable(getattr(module, "act_fn", None))


def _norm_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _again(types.MethodType(type(self).forward, self), *args, **kwargs)


def _gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate) * up

    return self.down_proj(_again(product, self.gate_proj(x), self.up_proj(x)))


def _again(function: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    # Nothing here is random, so no state of a generator need be kept.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@torch.no_grad()
def _computes_so(module: Any) -> bool:
    """Return whether a gated module is down(act(gate(x)) up(x)): some families do more in between."""
    weight = module.gate_proj.weight
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).to(weight.dtype).view(1, 2, -1)
    expected = module(x)
    return isinstance(expected, torch.Tensor) and torch.equal(_gated_forward(module, x), expected)


@contextmanager
def _checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing on, while every other layer stays in evaluation mode."""
    if not wanted:
        yield
        return
    before = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    # transformers 5.23 has new names for these and warns at the old ones.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    # The hook that makes embeddings ask for gradients would outlive this, and is not needed without re-entrance.
    model.disable_input_require_grads()
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    plain = [layer._gradient_checkpointing_func for layer in layers]
    try:
        for layer in layers:
            layer.training = True
            layer._gradient_checkpointing_func = _in_evaluation(layer)
        yield
    finally:
        for layer, function in zip(layers, plain, strict=True):
            layer.training, layer._gradient_checkpointing_func = False, function
        if not before:
            getattr(model, f"{kind}_checkpointing_disable")()


def _in_evaluation(layer: Any) -> Any:
    """A layer's way to checkpoint with the layer's own dropout off: transformers asks for layers in training mode."""
    checkpointing = layer._gradient_checkpointing_func

    def run(function: Any, *args: Any, **kwargs: Any) -> Any:
        def evaluated(*args: Any, **kwargs: Any) -> Any:
            layer.training = False
            try:
                return function(*args, **kwargs)
            finally:
                layer.training = True

        return checkpointing(evaluated, *args, **kwargs)

    return run
