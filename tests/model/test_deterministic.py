"""Deterministic libraries: strict around attention's backward, and nowhere beside it.

No GPU is needed: what a backward finds switched on is recorded, and the switches are torch's own.
Letters: H heads, M packed tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flora_core.model import attention, attention_kernels
from flora_core.model.deterministic import deterministic_libraries, strict_backward
from tests.support import fake_graphs

GPU = torch.device("cuda")
LENGTHS = (9, 5)
varlen_attn: Any = fake_graphs.varlen_attn


class Recorder(torch.autograd.Function):
    """The identity, whose backward notes its name and whether the mode is strict."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, seen: list[tuple[str, bool]]) -> torch.Tensor:
        ctx.name, ctx.seen = name, seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        strict = not torch.is_deterministic_algorithms_warn_only_enabled()
        ctx.seen.append((ctx.name, strict and torch.are_deterministic_algorithms_enabled()))
        return grad, None, None


def record(x: torch.Tensor, name: str, seen: list[tuple[str, bool]]) -> torch.Tensor:
    return Recorder.apply(x, name, seen)  # pyright: ignore[reportReturnType]


def run(wanted: bool) -> list[tuple[str, bool]]:
    seen: list[tuple[str, bool]] = []
    with deterministic_libraries(GPU, wanted):
        before = record(torch.ones(3, requires_grad=True), "before", seen)
        # The attention of a library is rarely one node: views come before and after.
        inside = record(record(before.view(3, 1), "first", seen) * 2, "second", seen).view(3)
        after = record(strict_backward(inside, [before]), "after", seen)
        after.sum().backward()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == wanted
    assert not torch.are_deterministic_algorithms_enabled()
    return seen


def test_the_strict_mode_is_on_between_inputs_and_output_alone():
    assert run(True) == [("after", False), ("second", True), ("first", True), ("before", False)]


def test_nothing_is_switched_where_the_run_does_not_ask_for_it():
    assert not any(strict for _, strict in run(False))


def test_an_error_in_the_strict_part_leaves_no_mode_behind():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no deterministic algorithm")

    x = torch.ones(3, requires_grad=True)

    def fail() -> None:
        with deterministic_libraries(GPU):
            out: Any = Failing.apply(x * 1)
            strict_backward(out, [x]).sum().backward()

    with pytest.raises(RuntimeError, match="no deterministic algorithm"):
        fail()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def qkv(heads: int = 4, fewer: int = 2) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = (torch.randn(1, h, sum(LENGTHS), 16, generator=random) for h in (heads, fewer, fewer))
    return [tensor.requires_grad_() for tensor in tensors]


def test_attention_runs_its_backward_strictly(monkeypatch: pytest.MonkeyPatch):
    """Both the variable-length kernel and the products of single sequences; what is around them is left alone."""
    seen: list[tuple[str, bool]] = []

    def attend(query: torch.Tensor, *args: Any, scale: Any = None, window_size: Any = (-1, -1)) -> torch.Tensor:
        return record(varlen_attn(query, *args, scale=scale, window_size=window_size, enable_gqa=True), "varlen", seen)

    def product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        return record(plain(q, k, v, **options), "product", seen)

    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention_kernels, "_varlen", lambda: attend)
    q, k, v = qkv()
    with deterministic_libraries(GPU):
        projected: list[Any] = [record(t, "projection", seen) for t in (q, k, v)]
        out = attention_kernels.varlen(projected[0], projected[1], projected[2], LENGTHS, None, None)
        seen.clear()  # a trial of fewer heads has its own backward
        record(out, "rest", seen).sum().backward()
        assert seen == [("rest", False), ("varlen", True), *[("projection", False)] * 3]
        seen.clear()
        monkeypatch.setattr(attention.F, "scaled_dot_product_attention", product)
        projected = [record(t, "projection", seen) for t in (q, k, v)]
        attention._plain(projected[0], projected[1], projected[2], None, 14, None).sum().backward()
        assert seen == [("product", True), *[("projection", False)] * 3]


def test_fewer_heads_are_passed_on_only_where_they_give_the_same_results():
    """A function without ``enable_gqa`` may take them, refuse them, or take them for something else."""

    def takes(*args: Any, scale: Any, window_size: Any) -> torch.Tensor:
        return varlen_attn(*args, scale=scale, window_size=window_size, enable_gqa=True)

    def refuses(*args: Any, scale: Any, window_size: Any) -> torch.Tensor:
        return varlen_attn(*args, scale=scale, window_size=window_size)

    def mistakes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any):
        tiled = (t.repeat(1, query.shape[1] // t.shape[1], 1) for t in (key, value))
        return varlen_attn(query, *tiled, *args, **options)

    cpu, sizes = torch.device("cpu"), (4, 2, 16)
    assert attention_kernels._takes_fewer_heads(takes, cpu, torch.float32, sizes)
    assert not attention_kernels._takes_fewer_heads(refuses, cpu, torch.float32, sizes)
    assert not attention_kernels._takes_fewer_heads(mistakes, cpu, torch.float32, sizes)


@pytest.mark.parametrize("native", [True, False])
def test_grouped_heads_give_the_same_output_either_way(native: bool, monkeypatch: pytest.MonkeyPatch):
    shapes = []

    def attend(query: torch.Tensor, key: torch.Tensor, *args: Any, scale: Any = None, window_size: Any = (-1, -1)):
        shapes.append(key.shape[1])
        return varlen_attn(query, key, *args, scale=scale, window_size=window_size, enable_gqa=native)

    q, k, v = qkv()
    expected = varlen_attn(
        *(t[0].transpose(0, 1) for t in (q, k, v)),
        *(torch.tensor([0, 9, 14], dtype=torch.int32),) * 2,
        *(9, 9),
        window_size=(-1, 0),
        enable_gqa=True,
    )
    monkeypatch.setattr(attention_kernels, "_varlen", lambda: attend)
    torch.testing.assert_close(attention_kernels.varlen(q, k, v, LENGTHS, None, None), expected)
    assert shapes[-1] == (2 if native else 4)
