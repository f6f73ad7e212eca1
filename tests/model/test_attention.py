"""Packed attention: every sequence as if it were alone, whatever the family does in between.

Letters: H heads, M packed tokens, D head size, L one sequence's length.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import flora_core as flora
from flora_core.data.pack import lay_out
from flora_core.model import attention
from flora_core.model.forward import find_way
from flora_core.testing import budget_ratio
from tests.support import models
from tests.support.models import WINDOW, exact64

# Equal lengths side by side run as one batch; all but one are longer than the window.
LENGTHS = (9, 9, 1, 13, 9)


def hidden_states(model: Any, lengths: tuple[int, ...], poisoned: int | None = None) -> tuple[torch.Tensor, list[Any]]:
    """Hidden states of packed sequences, and of each alone; one sequence may have NaN embeddings."""
    rows = models.examples(3, lengths)
    batch = lay_out([rows], packs=True)
    embedded = model.get_input_embeddings()(batch.inputs["input_ids"])
    if poisoned is not None:
        embedded[:, sum(lengths[:poisoned]) : sum(lengths[: poisoned + 1])] = float("nan")
    with attention.packed(model, lengths):
        packed = model.base_model(
            inputs_embeds=embedded, position_ids=batch.inputs["position_ids"], use_cache=False
        ).last_hidden_state[0]
    alone = [model.base_model(input_ids=torch.tensor([row.input_ids]), use_cache=False) for row in rows]
    return packed, [output.last_hidden_state[0] for output in alone]


def phimoe() -> Any:
    """Its sliding window is in the mask alone: the attention function is not told."""
    config = transformers.PhimoeConfig(
        vocab_size=models.VOCAB,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        sliding_window=WINDOW,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return models.randomised(model).double()


FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "cohere", "phimoe")


def build(family: str) -> Any:
    return (phimoe() if family == "phimoe" else models.tiny(family)).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate_sequences(family: str):
    model = build(family)
    with exact64():
        packed, alone = hidden_states(model, LENGTHS)
    for rows, expected in zip(packed.split(LENGTHS), alone, strict=True):
        assert budget_ratio(rows, expected, expected) <= 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_the_window_and_the_caps_matter_here(family: str):
    """Else the tests above would prove nothing."""
    fields: list[dict[str, Any]] = [{"sliding_window": 64}]
    if family == "gemma2":
        fields += [{"attn_logit_softcapping": None}]
    expected, _ = hidden_states(models.tiny(family).eval(), LENGTHS)
    for changed in fields:
        other, _ = hidden_states(models.tiny(family, **changed).eval(), LENGTHS)
        assert (other - expected).abs().max() > 1e-3 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_crosses_sequences(family: str):
    """NaN in one sequence, in the middle of a run of equal lengths, changes no bit of the others.

    A mixture's router sends NaN to other experts: their products have other numbers of rows, and libraries round a
    row's sums by how many rows stand beside it. A leak would still be NaN.
    """
    model = build(family)
    packed, _ = hidden_states(model, LENGTHS)
    poisoned, _ = hidden_states(model, LENGTHS, poisoned=1)
    for i, (rows, sick) in enumerate(zip(packed.split(LENGTHS), poisoned.split(LENGTHS), strict=True)):
        if i == 1:
            assert sick.isnan().all()
        elif family == "phimoe":
            assert budget_ratio(sick, rows, rows) <= 1
        else:
            assert torch.equal(rows, sick)


def test_no_work_across_sequences(monkeypatch: pytest.MonkeyPatch):
    """The products are those of the single sequences: never a square of the packed length."""
    shapes = []
    product = torch.nn.functional.scaled_dot_product_attention

    def recorded(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append((q.shape[0], q.shape[2], k.shape[2]))
        return product(q, k, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    model = models.tiny("llama").eval()
    batch = lay_out([models.examples(3, LENGTHS)], packs=True)
    with torch.no_grad(), attention.packed(model, LENGTHS):
        model.base_model(**batch.inputs, use_cache=False)
    assert shapes == 2 * [(2, 9, 9), (1, 1, 1), (1, 13, 13), (1, 9, 9)]


def test_the_models_own_attention_comes_back():
    model = models.tiny("gemma2").eval()
    ids = torch.tensor([models.examples(0, [9])[0].input_ids])
    before, name = model(input_ids=ids).logits, model.config._attn_implementation

    def interrupted() -> None:
        with attention.packed(model, [9]):
            assert model.config._attn_implementation == attention.NAME
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        interrupted()
    assert model.config._attn_implementation == name
    assert torch.equal(model(input_ids=ids).logits, before)


def test_what_cannot_be_packed_is_padded_and_says_why():
    way = find_way(models.tiny("bloom", torch.float32))
    assert not way.packs
    assert way.reason == "the model does not go through transformers' attention interface"
    model = models.tiny("llama", torch.float32)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert "layers of type chunked_attention mix tokens" in (attention.unsupported(model) or "")
    model.config.layer_types, model.config.is_causal = None, False
    assert attention.unsupported(model) == "attention is not causal"


class OwnMask(transformers.LlamaModel):
    """Makes a mask that a packed batch knows nothing of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        kwargs["attention_mask"] = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        return super().forward(*args, **kwargs)


def test_a_mask_of_the_models_own_is_not_ignored():
    model = models.tiny("llama", torch.float32)
    model.model.__class__ = OwnMask
    with pytest.raises(ValueError, match="makes an attention mask of its own"), attention.packed(model, [3, 4]):
        model.base_model(input_ids=torch.ones(1, 7, dtype=torch.long))


def test_attach_notices_a_family_that_packing_would_change():
    """Attention across tokens that no configuration names shows in a few tokens' logits: batches are padded then."""
    model = models.tiny("llama", torch.float32)
    plain = type(model.model.layers[0].self_attn).forward

    def peeks(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mean = hidden_states.cumsum(1) / torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return plain(self, hidden_states + mean, *args, **kwargs)

    model.model.layers[0].self_attn.forward = peeks.__get__(model.model.layers[0].self_attn)
    cohort = flora.attach(model, [flora.ClientSpec("a")], ["v_proj"])
    assert not cohort.packs
    assert "logits differ from the model's" in cohort.packing_reason


def test_an_error_that_packing_meets_is_a_warning_of_the_run(monkeypatch: pytest.MonkeyPatch):
    """Padding costs time and memory, so that it is not only ``explain`` that says why."""

    def fails(*args: Any) -> torch.Tensor:
        raise NotImplementedError("the embedding dimension must be at least 16")

    monkeypatch.setattr(attention, "_plain", fails)
    clients = [flora.ClientSpec("a", models.examples(0, (5, 4)))]
    cohort = flora.attach(models.tiny("llama", torch.float32), clients, ["v_proj"])
    assert not cohort.packs
    events: list[dict[str, Any]] = []
    flora.CohortTrainer(cohort, flora.TrainConfig(max_steps=1), callbacks=[events.append]).run()
    (warning,) = [event["message"] for event in events if event["event"] == "warning"]
    assert warning.startswith("batches are padded, not packed, which costs time and memory (packed, model head: ")
    assert "NotImplementedError: the embedding dimension must be at least 16" in warning


def test_a_model_that_is_known_not_to_pack_is_no_warning():
    clients = [flora.ClientSpec("a", models.examples(0, (5, 4)))]
    cohort = flora.attach(models.tiny("bloom", torch.float32), clients, ["query_key_value"])
    assert not cohort.packs
    events: list[dict[str, Any]] = []
    flora.CohortTrainer(cohort, flora.TrainConfig(max_steps=1), callbacks=[events.append]).run()
    assert not [event for event in events if event["event"] == "warning"]
