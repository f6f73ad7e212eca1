"""Which way packed attention takes, and that the masked way keeps sequences apart.

Letters: H heads, M packed tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from flora_core.model import attention, attention_kernels
from flora_core.model.attention_kernels import block_mask, choose, flex, isolated
from flora_core.testing import budget_ratio, plain_rounding
from tests.support import models

LENGTHS = (9, 9, 1, 140, 17)  # one sequence crosses a block of 128
HERE: dict[str, str | None] = {"flash-attn": None, "varlen": None, "flex": None}
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def told(monkeypatch: pytest.MonkeyPatch, **lacking: str) -> None:
    reasons = {**HERE, **{name.replace("_", "-"): why for name, why in lacking.items()}}
    monkeypatch.setattr(attention_kernels, "missing", lambda: reasons)


def test_the_first_that_is_here_and_takes_the_tensors(monkeypatch: pytest.MonkeyPatch):
    told(monkeypatch)
    assert choose("cuda", torch.bfloat16, 128) == ("flash-attn", "the first that is here")
    assert choose("cuda", torch.float32, 128).name == "flex"
    assert choose("cuda", torch.bfloat16, 512) == ("flex", "not flash-attn: heads of 512; not varlen: heads of 512")
    assert choose("cuda", torch.float64, 128).name == "per sequence"
    small = choose("cuda", torch.float32, 12)
    assert small.name == "per sequence"
    assert small.why.endswith("not flex: heads of 12, it needs 16")
    assert choose("cuda", torch.float32, 16).name == "flex"
    told(monkeypatch, flash_attn="it is not installed")
    assert choose("cuda", torch.float16, 64) == ("varlen", "not flash-attn: it is not installed")
    told(monkeypatch, flash_attn="a", varlen="b", flex="c")
    assert choose("cuda", torch.float16, 64) == ("per sequence", "not flash-attn: a; not varlen: b; not flex: c")


def test_on_a_cpu_and_for_what_is_not_plain_every_sequence_is_alone(monkeypatch: pytest.MonkeyPatch):
    told(monkeypatch)
    assert choose("cpu", torch.bfloat16, 128).name == "per sequence"
    way = choose("cuda", torch.bfloat16, 128, ["softcap"])
    assert way == ("per sequence", "softcap: the model's own function, per sequence")
    assert attention.way_of(models.tiny("llama")).why.startswith("on cpu")


def test_what_is_missing_here_is_said():
    attention_kernels.missing.cache_clear()
    assert attention_kernels.missing().keys() == HERE.keys()
    assert "flash_attn" in (attention_kernels.missing()["flash-attn"] or "flash_attn")


def qkv(heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, sum(LENGTHS), 16, generator=random) for h in (heads, kv_heads, kv_heads)]


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Every sequence by itself, (M, H, D)."""
    parts = []
    for one in zip(*(t.split(LENGTHS, dim=2) for t in (q, k, v)), strict=True):
        index = torch.arange(one[0].shape[2])
        distance = index[:, None] - index[None, :]
        mask = (distance >= 0) & (distance < (window or len(index)))
        parts.append(F.scaled_dot_product_attention(*one, attn_mask=mask, enable_gqa=True))
    return torch.cat(parts, 2)[0].transpose(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6])
def test_flex_equals_every_sequence_alone(window: int | None):
    q, k, v = qkv()
    out = flex(q, k, v, LENGTHS, window, None, flex_attention)
    ref64 = alone(q.double(), k.double(), v.double(), window)
    with plain_rounding(), sdpa_kernel(SDPBackend.MATH):
        low = alone(q, k, v, window)
    assert budget_ratio(out, ref64, low) <= 1


@torch.no_grad()
def test_blocks_without_a_pair_are_skipped():
    """176 tokens are two blocks of 128; no sequence of the second looks into the first if the first ends with one."""
    assert block_mask((128, 48), None, CPU).kv_num_blocks.tolist() == [[[1, 1]]]
    assert block_mask((100, 76), None, CPU).kv_num_blocks.flatten().sum() > 1


@torch.no_grad()
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_flex_keeps_a_fault_in_its_sequence(which: int, value: float):
    (q, k, v), spoilt = qkv(), qkv()
    clean = flex(q, k, v, LENGTHS, None, None, flex_attention)
    spoilt[which][:, :, 12] = value
    q, k, v = spoilt
    out = flex(q, k, v, LENGTHS, None, None, flex_attention)
    for i, (rows, right) in enumerate(zip(out.split(LENGTHS), clean.split(LENGTHS), strict=True)):
        assert rows.isnan().all() if i == 1 else torch.equal(rows, right)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A masked product over everything, which leaks by itself: flex attention has no backward pass on a CPU."""
    owner = attention_kernels._owner(LENGTHS, CPU)
    mask = (owner[:, None] == owner[None, :]).tril()
    return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def gradients(attend: Any, value: float | None, where: str) -> tuple[torch.Tensor, ...]:
    leaves = [t.requires_grad_() for t in qkv(2, 2)]
    out_grad = torch.randn(1, 2, sum(LENGTHS), 16, generator=torch.Generator().manual_seed(1))
    inputs = list(leaves)
    if value is not None and where == "dy":
        out_grad[:, :, 12] = value
    elif value is not None:
        inputs[2] = torch.where(torch.arange(sum(LENGTHS))[:, None] == 12, value, leaves[2])
    return torch.autograd.grad(attend(*inputs), leaves, out_grad)


@pytest.mark.parametrize("where", ["v", "dy"])
def test_gradients_stay_apart(where: str):
    def guarded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return isolated(dense, q, k, v, attention_kernels._owner(LENGTHS, CPU), len(LENGTHS))

    clean = gradients(dense, None, where)
    assert all(map(torch.equal, gradients(guarded, None, where), clean))
    others = [i for i in range(len(LENGTHS)) if i != 1]
    for found, right in zip(gradients(guarded, float("nan"), where), clean, strict=True):
        parts, wanted = found.split(LENGTHS, dim=2), right.split(LENGTHS, dim=2)
        assert all(torch.equal(parts[i], wanted[i]) for i in others)
        assert not parts[1].isfinite().all()
    leaking = gradients(dense, float("nan"), where)
    assert any(found.split(LENGTHS, dim=2)[0].isnan().any() for found in leaking), "else the guard would prove nothing"


def test_the_variable_length_ways_are_asked_as_their_signatures_say(monkeypatch: pytest.MonkeyPatch):
    """Neither runs on a CPU: what they are given is checked against torch's own signature, and recorded."""
    import inspect

    signature, asked = inspect.signature(attention_kernels._varlen()), {}

    def varlen_attn(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        asked.update(signature.bind(query, *args, **options).arguments)
        return query

    varlen_attn.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(attention_kernels, "_varlen", lambda: varlen_attn)
    q, k, v = qkv()
    out = attention_kernels.varlen(q, k, v, LENGTHS, 6, 0.5)
    assert torch.equal(out, q[0].transpose(0, 1))
    assert asked["cu_seq_q"].tolist() == [0, 9, 18, 19, 159, 176]
    assert (asked["max_q"], asked["scale"], asked["window_size"], asked["enable_gqa"]) == (140, 0.5, (5, 0), True)


@pytest.mark.parametrize("nested", [False, True], ids=["per layer", "composite"])
def test_the_head_size_is_the_largest_of_the_language_model_s_layers(nested):
    from flora_core.model.attention import _head_size

    sizes: dict[str, Any] = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    if nested:
        text = {**sizes, "num_key_value_heads": 2, "head_dim": 24}
        vision = {**sizes, "hidden_size": 256, "image_size": 16, "patch_size": 4}
        vision.pop("vocab_size")
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        model: Any = transformers.Gemma3ForConditionalGeneration(config)
        assert _head_size(model) == 24
        return
    kinds = ["sliding_attention", "full_attention"]
    sizes |= dict(num_key_value_heads=2, head_dim=8, global_head_dim=16, sliding_window=8, layer_types=kinds)
    config = transformers.Gemma4TextConfig(**sizes, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8)
    assert _head_size(transformers.Gemma4ForCausalLM(config)) == 16
