"""Rounding that is the same on every processor, for the references of an error budget.

Libraries round products and square roots as the processor's instructions, threads and blocks have it, so a budget whose
``low`` is such a product is wider on one machine than on another. Within ``plain_rounding`` a product is summed in one
order, each product and each sum rounded once (in float32 for 16-bit inputs, then once to their dtype), and a square
root is the nearest number. Kernels that sum in blocks or with fused multiply-add round less often, not more.

Letters: M rows, K the summed axis, N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def plain_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply ``(..., M, K)`` by ``(..., K, N)``, adding k = 0, 1, ... in this order.

    Returns:
        ``(..., M, N)`` in the dtype of ``left``; 16-bit numbers are added in float32 and rounded once.
    Example:
        >>> from flora_core.testing import plain_product
        >>> plain_product(torch.ones(2, 3), torch.ones(3, 1))
        tensor([[3.],
                [3.]])
    """
    wide = torch.promote_types(left.dtype, torch.float32)
    left, right, dtype = left.to(wide), right.to(wide), left.dtype
    total = left.new_zeros(*left.shape[:-1], right.shape[-1])
    for k in range(left.shape[-1]):
        total += left[..., k, None] * right[..., k, None, :]
    return total.to(dtype)


def _added(
    start: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    if beta != 1:
        raise NotImplementedError(f"plain rounding adds a product to what is there with beta=1, got beta={beta}")
    wide = torch.promote_types(left.dtype, torch.float32)
    return (start.to(wide) + alpha * plain_product(left.to(wide), right.to(wide))).to(left.dtype)


def _root(value: torch.Tensor) -> torch.Tensor:
    # 53 bits are more than twice 24 and two: rounded from float64 it is the nearest float32.
    return value.double().sqrt().to(value.dtype)


_PLAIN: dict[str, Callable[..., torch.Tensor]] = {
    "mm": plain_product,
    "bmm": plain_product,
    "addmm": _added,
    "baddbmm": _added,
    "sqrt": _root,
}


class _PlainRounding(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        plain = _PLAIN.get(name.removesuffix("_"))
        if plain is None or args[0].dtype == torch.float64:
            return func(*args, **kwargs)
        out = args[0] if name.endswith("_") else kwargs.pop("out", None)
        result = plain(*args, **kwargs)
        return result if out is None else out.copy_(result)


@contextmanager
def plain_rounding() -> Iterator[None]:
    """Within it, products and square roots round the same way on every processor; float64 stays as it is.

    Example:
        >>> from flora_core.testing import plain_product, plain_rounding
        >>> left, right = torch.randn(4, 64), torch.randn(64, 4)
        >>> with plain_rounding():
        ...     torch.equal(left @ right, plain_product(left, right))
        True
    """
    with _PlainRounding():
        yield
