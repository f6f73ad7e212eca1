"""Public ops: LoRA linears over a packed cohort, the merge of a stack, and AdamW with settings per client.

    Y = X W^T + b + s_c drop(X) A_c^T B_c        for the rows of client c

An eager call goes straight to autograd and the kernels; under ``torch.compile`` it is one op of ``library``.
Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients,
H hyper-parameters. ``tokens`` partitions M and ``ranks`` partitions P.

Example:
    >>> flora.api.lora_linear is flora.ops.lora_linear
    True
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..common import Segments
from . import custom_ops, dispatch
from .autograd import LoraLinears, forward, without_autocast
from .dropout import dropout_threshold
from .types import HYPER_COLUMNS, LoraWeights, MergeItem


def lora_linear(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    A_PK: torch.Tensor,
    B_PN: torch.Tensor,
    tokens: Segments,
    ranks: Segments,
    scaling_C: Sequence[float] | torch.Tensor,
    *,
    dropout_C: Sequence[float] | torch.Tensor | None = None,
    dropout_seed_C: Sequence[int] | torch.Tensor | None = None,
    row_C: Sequence[int] | torch.Tensor | None = None,
    backend: str = "auto",
    fuse: str = "auto",
) -> torch.Tensor:
    """Apply a frozen linear layer and each token's own LoRA adapter.

    ``y[tokens[c]] = x W^T + b + s_c drop(x) A_c^T B_c``

    Args:
        x_MK: Packed activations, float32, bfloat16, float16 or float64.
        weight_NK: Frozen weight in the dtype of x_MK, any strides.
        bias_N: Frozen bias, or None.
        A_PK, B_PN: Stacked factors: fp32 masters (or the dtype of x_MK); computed in the dtype of x_MK.
        tokens: Segments over M; must cover 0..M.
        ranks: Segments over P; must cover 0..P.
        scaling_C: Scale of each client.
        dropout_C: Dropout probability of each client; needs ``dropout_seed_C``.
        dropout_seed_C: Philox key of each client, int64. See ``flora_kernels.reference.dropout_keep``.
        row_C: Index of each client's first token within its optimizer step; 0 unless given.
        backend: auto, reference, triton or native.
        fuse: How the base product and the branch are put together: separate, prewrite, kernel or augmented (see
            ``flora_core.ops.fusion``); auto takes the fastest, measured once per shape on a GPU, and separate on a CPU.
    Returns:
        y_MN in the dtype of x_MK; differentiable in x_MK, A_PK and B_PN, gradients of the factors in their dtype.
    Raises:
        ValueError: If a shape, a partition or a device does not fit; TypeError for a dtype.
    Deterministic: yes. Source: arXiv 2106.09685, eq. 3; mixed ranks by arXiv 2409.05976.
    Example:
        >>> tokens, ranks = flora.Segments.from_lengths([3, 2]), flora.Segments.from_lengths([2, 1])
        >>> x, weight, A, B = torch.ones(5, 8), torch.zeros(4, 8), torch.ones(3, 8), torch.ones(3, 4)
        >>> y = flora.lora_linear(x, weight, None, A, B, tokens, ranks, scaling_C=[1.0, 0.5])
        >>> y[:, 0]
        tensor([16., 16., 16.,  4.,  4.])
    """
    target = LoraWeights(weight_NK, bias_N, A_PK, B_PN, ranks, scaling_C, dropout_seed_C)
    return lora_linears(x_MK, [target], tokens, dropout_C=dropout_C, row_C=row_C, backend=backend, fuse=fuse)[0]


def lora_linears(
    x_MK: torch.Tensor,
    targets: Sequence[LoraWeights],
    tokens: Segments,
    *,
    dropout_C: Sequence[float] | torch.Tensor | None = None,
    dropout_seed_C: Sequence[Sequence[int]] | torch.Tensor | None = None,
    row_C: Sequence[int] | torch.Tensor | None = None,
    backend: str = "auto",
    fuse: str = "auto",
) -> list[torch.Tensor]:
    """Apply several LoRA targets that share their input (q, k, v; gate, up).

    Args:
        x_MK: Packed activations.
        targets: One ``LoraWeights`` per target.
        tokens: Segments over M; must cover 0..M.
        dropout_C: Dropout probability of each client, the same for every target.
        dropout_seed_C: Keys, one row of C per target; a target's own ``dropout_seed_C`` goes first.
        row_C: Index of each client's first token within its optimizer step; 0 unless given.
        backend: auto, reference, triton or native.
        fuse: How the base product and the branch are put together: separate, prewrite, kernel or augmented (see
            ``flora_core.ops.fusion``); auto takes the fastest, measured once per shape on a GPU, and separate on a CPU.
    Returns:
        One y_MN per target, as ``lora_linear`` gives it.
    Raises:
        ValueError: If a shape, a partition or a device does not fit; TypeError for a dtype.
    Deterministic: yes.
    Example:
        >>> tokens, ranks = flora.Segments.from_lengths([3, 2]), flora.Segments.from_lengths([2, 1])
        >>> A = torch.ones(3, 8)
        >>> q = flora.LoraWeights(torch.zeros(4, 8), None, A, torch.ones(3, 4), ranks, scaling_C=[1.0, 0.5])
        >>> v = flora.LoraWeights(torch.zeros(2, 8), None, A, torch.ones(3, 2), ranks, scaling_C=[1.0, 0.5])
        >>> [y.shape for y in flora.lora_linears(torch.ones(5, 8), [q, v], tokens)]
        [torch.Size([5, 4]), torch.Size([5, 2])]
    """
    if torch.compiler.is_compiling():
        return custom_ops.lora_linears(x_MK, targets, tokens, dropout_C, dropout_seed_C, row_C, backend, fuse)
    plan = dispatch.plan_linears(x_MK, targets, tokens, dropout_C, dropout_seed_C, row_C, backend, fuse)
    factors = [factor for target in targets for factor in (target.A, target.B)]
    with without_autocast(x_MK):
        if not torch.is_grad_enabled():
            return forward(plan, x_MK, factors)[0]
        return list(LoraLinears.apply(plan, x_MK, *factors))  # pyright: ignore[reportGeneralTypeIssues]


def stacked_merge_(
    weight_NK: torch.Tensor,
    A_PK: torch.Tensor,
    B_PN: torch.Tensor,
    coef_P: torch.Tensor,
    *,
    rounding: str = "nearest",
    low_bits_NK: torch.Tensor | None = None,
    seed: int | None = None,
    accumulate: str = "float32",
    backend: str = "auto",
) -> None:
    """Add a stack's product to a weight in place, rounded once: ``W += B^T diag(coef) A``.

    Args:
        weight_NK: Weight, float32, bfloat16, float16 or float64, any strides (a Conv1D passes its transpose).
        A_PK, B_PN, coef_P: The stack and one coefficient per rank row.
        rounding: ``nearest`` or, for bfloat16, ``stochastic`` (unbiased; needs ``seed``).
        low_bits_NK: int16 low bits of a bfloat16 weight: both together are an fp32 master, which is updated.
        seed: Key of the stochastic rounding.
        accumulate: ``float32`` for speed, or ``float64``: the result is then the exact sum rounded once, also where
            terms cancel.
        backend: reference, triton or native; auto takes native on a CPU, and on a GPU the faster of Triton's and the
            native kernels, measured once per shape and kept.
    Raises:
        ValueError: If a shape, a device or an option does not fit; nothing is changed then.
    Deterministic: yes. Source: arXiv 2409.05976, eq. 5.
    Example:
        >>> weight = torch.zeros(2, 2)
        >>> flora.stacked_merge_(weight, torch.eye(2), torch.eye(2), coef_P=torch.tensor([1.0, 0.5]))
        >>> weight
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    item = MergeItem(weight_NK, A_PK, B_PN, coef_P, low_bits_NK)
    stacked_merge_many_([item], rounding=rounding, seed=seed, accumulate=accumulate, backend=backend)


def stacked_merge_many_(
    items: Sequence[MergeItem],
    *,
    rounding: str = "nearest",
    seed: int | None = None,
    accumulate: str = "float32",
    backend: str = "auto",
) -> None:
    """Merge many weights, checked all together before the first is changed.

    Args:
        items: One ``MergeItem`` per weight.
        rounding, accumulate, backend: As in ``stacked_merge_``.
        seed: Key of the stochastic rounding; item i uses ``seed + i``.
    Raises:
        ValueError: If a shape, a device or an option does not fit; nothing is changed then. TypeError for a dtype.
    Deterministic: yes. Source: arXiv 2409.05976, eq. 5.
    Example:
        >>> weights = torch.zeros(2, 2), torch.ones(2, 2)
        >>> stack = torch.eye(2), torch.eye(2), torch.tensor([1.0, 0.5])
        >>> flora.stacked_merge_many_([flora.MergeItem(weight, *stack) for weight in weights])
        >>> [weight.diagonal().tolist() for weight in weights]
        [[1.0, 0.5], [2.0, 1.5]]
    """
    run = custom_ops.stacked_merge_many_ if torch.compiler.is_compiling() else dispatch.merge
    run(items, rounding, seed, accumulate, backend)


def cohort_adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    segments: Segments,
    hyper_CH: torch.Tensor,
    *,
    owner: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """Take one AdamW step over flat buffers, each client with its own hyper-parameters, in place.

    Args:
        param, grad, exp_avg, exp_avg_sq: Contiguous 1-D buffers of one length and dtype (float32 or float64).
        segments: Ranges over the buffers, one per client, or several with ``owner``.
        hyper_CH: (C, 7): lr, beta1, beta2, eps, weight decay, step (1 for the first; 0 leaves the client's ranges
            untouched), scale on the gradient from clipping.
        owner: The row of hyper_CH of each range; range i takes row i unless given.
        backend: auto, reference, triton or native.
    Raises:
        ValueError: If lengths do not fit or a buffer is not contiguous.
    Deterministic: yes. Source: arXiv 1711.05101, as ``torch.optim.AdamW`` computes it.
    Example:
        >>> param, grad, exp_avg, exp_avg_sq = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
        >>> first, waits = [0.1, 0.9, 0.999, 1e-8, 0, 1, 1], [0.1, 0.9, 0.999, 1e-8, 0, 0, 1]
        >>> segments = flora.Segments.from_lengths([2, 1])
        >>> flora.cohort_adamw_(param, grad, exp_avg, exp_avg_sq, segments, torch.tensor([first, waits]))
        >>> param
        tensor([0.9000, 0.9000, 1.0000])
    """
    run = custom_ops.cohort_adamw_ if torch.compiler.is_compiling() else dispatch.adamw
    run((param, grad, exp_avg, exp_avg_sq), segments, hyper_CH, owner, backend)


__all__: list[str] = [
    "HYPER_COLUMNS",
    "LoraWeights",
    "MergeItem",
    "cohort_adamw_",
    "dropout_threshold",
    "lora_linear",
    "lora_linears",
    "stacked_merge_",
    "stacked_merge_many_",
]
