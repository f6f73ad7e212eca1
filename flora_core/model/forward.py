"""How to run a causal LM so that it gives its own logits: packed or padded, its head by hand or by its own code.

Found by trying on a few tokens, because families transform logits after the head (softcaps, scales) and mix tokens
in ways that no configuration tells. Letters: M positions with a label, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..common import require
from ..data import IGNORE, Example, PackedBatch, lay_out
from . import attention
from .accepted import decoder_of
from .loss import Head

_PROBE_LENGTHS = (5, 3, 4)


@dataclass(frozen=True)
class Way:
    """A way of running a model that was seen to give the model's own logits.

    Args:
        head: From hidden states to logits.
        packs: Whether sequences may be packed into one row; if not, they are padded.
        reason: Why they may not.
        failed: Whether the reason is an error that nothing known of the model explains.
    """

    head: Head
    packs: bool
    reason: str
    failed: bool = False


def alone(model: nn.Module, batch: PackedBatch) -> AbstractContextManager[Any]:
    """The context of a forward pass of the model as it stands, without a cohort's tokens."""
    return nullcontext() if batch.sequences is None else attention.packed(model, batch.sequences)


def labelled_hidden(model: Any, batch: PackedBatch) -> torch.Tensor:
    """Last hidden states (M, H) at the positions that have a target."""
    hidden = decoder_of(model)[1](**batch.inputs, use_cache=False).last_hidden_state
    return hidden.reshape(batch.num_rows, -1).index_select(0, batch.label_index)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation, and back to what each was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def find_way(model: Any, context: Callable[[Any, PackedBatch], AbstractContextManager[Any]] = alone) -> Way:
    """Find a way of running the model that gives its own logits; ``context(model, batch)`` is around each pass.

    Raises:
        ValueError: If the model's logits are not finite, or no way gives them.
    """
    weight = model.get_input_embeddings().weight
    ids = [[(7919 * i + 13 * n) % weight.shape[0] for i in range(n)] for n in _PROBE_LENGTHS]
    with evaluation_mode(model):
        rows = (torch.tensor([row], device=weight.device) for row in ids)
        own = torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])
        require(bool(torch.isfinite(own).all()), "the base model's logits are not finite; check its weights")
        reason, failed, tried = attention.unsupported(model) or "", False, []
        for packs in [False] if reason else [True, False]:
            for kind in ("linear", "model"):
                head, why, error = _try(model, packs, kind, ids, own, context)
                if head is not None:
                    return Way(head, packs, reason, failed)
                tried.append(f"{'packed' if packs else 'padded'}, {kind} head: {why}")
                failed = failed or (packs and error)
            reason = reason or tried[-1]
    raise ValueError(f"our loss would not be this model's own ({'; '.join(tried)}); the model is not supported")


def _try(
    model: Any, packs: bool, kind: str, ids: Sequence[Sequence[int]], own: torch.Tensor, context: Callable[..., Any]
) -> tuple[Head | None, str, bool]:
    """The head if this way gives the model's logits, else None, why not, and whether an unknown error is the reason."""
    # A label everywhere but at a sequence's first token keeps every position that has a successor.
    examples = [Example(list(row), [IGNORE, *row[1:]], 0) for row in ids]
    last = [sum(_PROBE_LENGTHS[: i + 1]) - 1 for i in range(len(_PROBE_LENGTHS))]
    expected = own[[i for i in range(len(own)) if i not in last]]
    try:
        head, batch = Head(model, kind), lay_out([examples], packs, own.device)
        with context(model, batch):
            hidden = labelled_hidden(model, batch)
        # Sequences alone and together round differently; wrong logits differ by far more.
        if not _close(head.logits(hidden), expected, math.sqrt(torch.finfo(hidden.dtype).eps)):
            return None, "logits differ from the model's", False
    except ConnectionError:  # another process is gone: that says nothing of the model
        raise
    except attention.UnpackableError as error:
        return None, str(error), False
    except Exception as error:  # whatever an unknown model raises is the reason to refuse this way
        return None, f"{type(error).__name__}: {error}", True
    if kind == "linear" and _bends(model, head, hidden):
        return None, "the model transforms logits after the product", False
    return head, "", False


def _close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    return (got - want).abs().max().item() <= tolerance * want.abs().max().item()


def _bends(model: Any, linear: Head, hidden: torch.Tensor) -> bool:
    """Return whether the model's own head departs from the product.

    A softcap hides where logits are small, a scale near 1 in the rounding of 16 bits: so the same hidden states go
    through both, as they are and loud, and only the rounding of one product is allowed.
    """
    loud = hidden * (100 / linear.logits(hidden).abs().max().clamp_min(1e-6)).to(hidden.dtype)
    try:
        own = Head(model, "model")
        pairs = [(linear.logits(states), own.logits(states)) for states in (hidden, loud)]
    except Exception:  # no stand-in for this family's decoder: the comparison with the model's logits has to do
        return False
    return not all(_close(got, want, 4 * torch.finfo(hidden.dtype).eps) for got, want in pairs)
