"""Attach, detach, explain: what a model is while a cohort is attached, and what is refused before anything trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import flora_core as flora
from flora_core.data.pack import lay_out
from flora_core.model.attachment import candidates
from flora_core.model.layer import MultiLoRALinear
from flora_core.ops.backends import resolve
from tests.support import models
from tests.support.attached import TARGETS, client, ids, llama
from tests.support.models import FAMILIES


@pytest.mark.parametrize("family", list(FAMILIES))
def test_attach_and_detach_leave_the_model_as_it_was(family: str):
    model = models.tiny(family, torch.float32)
    model.get_input_embeddings().weight.requires_grad_(False)
    modules, state = dict(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    training, logits = model.training, model(input_ids=ids()).logits
    cohort = flora.attach(model, models.clients(family), FAMILIES[family].targets)
    wrapped = [path for path, module in model.named_modules() if isinstance(module, MultiLoRALinear)]
    assert wrapped == list(cohort.layers)
    assert list(model.state_dict()) == list(state)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(input_ids=ids()).logits, logits), "outside a batch the base runs alone"
    flora.detach(model)
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert model.training == training
    flora.attach(model, [client()], FAMILIES[family].targets)


def test_targets():
    """By name, by suffix, by regex, all of them, the family's own; a client's list goes first."""

    def adapted(targets: Any, **adapter: Any) -> list[str]:
        model = llama()
        return [path.removeprefix("model.layers.") for path in flora.attach(model, [client(**adapter)], targets).layers]

    assert adapted(["q_proj"]) == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert adapted(["1.mlp.up_proj"]) == ["1.mlp.up_proj"]
    assert adapted(r".*\.0\.mlp\.(up|down)_proj") == ["0.mlp.up_proj", "0.mlp.down_proj"]
    assert len(adapted("all-linear")) == 14
    assert adapted(None) == [f"{layer}.self_attn.{name}" for layer in (0, 1) for name in TARGETS]
    assert adapted(["q_proj"], target_modules=["k_proj"]) == ["0.self_attn.k_proj", "1.self_attn.k_proj"]
    assert adapted(["q_proj"], rank_pattern={"layers.0.*": 0}) == ["1.self_attn.q_proj"]
    model = llama()
    cohort = flora.attach(model, [client("a"), client("b", target_modules=["o_proj"])], TARGETS)
    assert set(cohort.update("b").adapters) == {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}
    assert len(cohort.update("a").adapters) == 4


class Int8Linear(nn.Linear):
    """Like a quantised layer: a subclass whose weight is no floating-point matrix."""

    def __init__(self, plain: nn.Linear):
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight = nn.Parameter(plain.weight.detach().to(torch.int8), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def quantised() -> Any:
    model = llama()
    model.model.layers[1].self_attn.q_proj = Int8Linear(model.model.layers[1].self_attn.q_proj)
    return model


def tied() -> Any:
    model = llama()
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return model


REFUSED: dict[str, tuple[Any, Sequence[flora.ClientSpec], Any, str]] = {
    "no client": (llama, [], TARGETS, "clients must hold at least one ClientSpec, got none"),
    "one name twice": (llama, [client("a"), client("b"), client("a")], TARGETS, "unique, got twice: a"),
    "unknown target": (llama, [client()], ["query"], "no Linear .* matches 'query'; candidates: down_proj, gate_proj"),
    "unknown target of a client": (llama, [client(target_modules=["query"])], TARGETS, "matches 'query'"),
    "not a linear layer": (llama, [client()], ["embed_tokens"], r"embed_tokens is a Embedding\); candidates"),
    "output head": (llama, [client()], ["lm_head"], "'lm_head' is the output head"),
    "a pattern for a name": (llama, [client()], "*.q_proj", r"target_modules: '\*.q_proj' is not a regular expression"),
    "no targets": (llama, [client()], [], "no client adapts any module: no targets"),
    "nobody adapts": (llama, [client(rank=0), client("b", rank=0)], TARGETS, "no client adapts any module"),
    "rank above min(N, K)": (llama, [client(rank=9)], TARGETS, r"v_proj must be between 0 and min\(N, K\) = 8, got 9"),
    "quantised": (quantised, [client()], TARGETS, "layers.1.self_attn.q_proj is a .*Int8Linear with torch.int8"),
    "tied": (tied, [client()], TARGETS, "layers.0.self_attn.q_proj shares its weight with model.layers.1"),
    "no targets known": (lambda: models.tiny("bloom", torch.float32), [client()], ["q_proj"], "query_key_value"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_attach_refuses(case: str):
    build, clients, targets, words = REFUSED[case]
    model = build()
    modules, wanted = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        flora.attach(model, clients, targets)
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == wanted


WRONG_KIND: dict[str, tuple[Any, Any, Any, str]] = {
    "no transformers model": (
        nn.Linear(2, 2),
        [client()],
        TARGETS,
        "model must be a transformers .*, got Linear; load",
    ),
    "no model": ("llama", [client()], TARGETS, "model must be a transformers causal LM, got str"),
    "names for clients": (None, ["a"], TARGETS, r"clients must hold ClientSpec only, got 'a'; write ClientSpec\(name"),
    "a number for targets": (None, [client()], 4, "target_modules must be a list of names, .* got 4"),
}


@pytest.mark.parametrize("case", list(WRONG_KIND))
def test_attach_names_what_is_of_the_wrong_kind(case: str):
    model, clients, targets, words = WRONG_KIND[case]
    with pytest.raises(TypeError, match=words):
        flora.attach(model or llama(), clients, targets)


def test_a_refused_model_is_left_as_it_was_and_may_be_attached_otherwise():
    model = quantised()
    with pytest.raises(ValueError, match="Int8Linear"):
        flora.attach(model, [client()], TARGETS)
    flora.attach(model, [client()], ["v_proj"])


def test_one_cohort_at_a_time():
    model = llama()
    with pytest.raises(ValueError, match="no cohort attached"):
        flora.detach(model)
    with pytest.raises(ValueError, match="attach first"):
        flora.explain(model)
    flora.attach(model, [client()], TARGETS)
    with pytest.raises(ValueError, match="already has a cohort attached; call"):
        flora.attach(model, [client()], TARGETS)


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "tab\t", "\ud800", 7, None])
def test_a_client_s_name_is_text_of_one_line(name: Any):
    with pytest.raises(ValueError, match="a client's name must be text of one line, got"):
        flora.ClientSpec(name)


def test_a_client_s_adapter_is_an_adapter_config():
    with pytest.raises(TypeError, match=r"client 'a': adapter must be an AdapterConfig such as .* got {'rank': 8}"):
        flora.ClientSpec("a", adapter={"rank": 8})  # pyright: ignore[reportArgumentType]


def test_base_with_nan_weights_is_refused():
    model = llama()
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite; check its weights"):
        flora.attach(model, [client()], TARGETS)
    assert not any(isinstance(module, MultiLoRALinear) for module in model.modules())


class Routed(nn.Module):
    """Sends only the tokens above a threshold through its layer, as a mixture of experts does."""

    def __init__(self, mlp: nn.Module, threshold: float):
        super().__init__()
        self.expert, self.threshold = mlp, threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x[..., 0] > self.threshold
        return torch.zeros_like(x).index_put((chosen,), self.expert(x[chosen]))


def test_routed_experts_are_refused_by_name():
    model = llama()
    model.model.layers[1].mlp = Routed(model.model.layers[1].mlp, 0.0)
    with pytest.raises(
        ValueError, match=r"mlp.expert.\w+_proj got \d rows of input, .* leave it out of target_modules"
    ):
        flora.attach(model, [client()], [*TARGETS, "up_proj", "down_proj"])
    flora.attach(model, [client()], TARGETS)


def test_routing_that_shows_only_later_is_refused_at_run_time():
    model = llama()
    routed = model.model.layers[1].mlp = Routed(model.model.layers[1].mlp, -1e9)
    cohort = flora.attach(model, [client()], ["expert.up_proj"])
    routed.threshold = 0.0
    batch = lay_out([models.examples(0, [20])], packs=True)
    with (
        pytest.raises(ValueError, match=r"expert.up_proj got \d+ rows of input, the batch has 20 tokens"),
        cohort.batch(batch.tokens, sequences=batch.sequences),
    ):
        model(**batch.inputs)


class TokenBias(transformers.LlamaForCausalLM):
    """Logits depend on the tokens themselves: no function of the hidden states gives them."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        output: Any = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + nn.functional.one_hot(input_ids, models.VOCAB)
        return output


class Tempered(transformers.LlamaForCausalLM):
    """Logits are scaled after the head."""

    temperature = 3.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().forward(*args, **kwargs)
        output.logits = output.logits / self.temperature
        return output


def test_logits_that_no_head_gives_are_refused():
    model = llama()
    model.__class__ = TokenBias
    with pytest.raises(ValueError, match=r"our loss would not be this model's own .*logits differ.* not supported"):
        flora.attach(model, [client()], TARGETS)
    assert not any(isinstance(module, MultiLoRALinear) for module in model.modules())


def test_which_head_gives_the_logits():
    """A cap of 30 that does not show in logits below 1, a scale near 1 in 16 bits: found all the same."""
    capped = models.tiny("gemma2", torch.float32, final_logit_softcapping=30.0)
    capped.lm_head.weight.data.mul_(0.1)
    assert capped(input_ids=ids()).logits.abs().max() < 0.9
    tempered, nearly = llama(), models.tiny("llama", torch.bfloat16)
    for model, temperature in ((tempered, 3.0), (nearly, 1.05)):
        model.__class__, model.temperature = Tempered, temperature
    plain = models.tiny("llama", torch.bfloat16)
    for model, kind in (
        (llama(), "linear"),
        (plain, "linear"),
        (capped, "model"),
        (tempered, "model"),
        (nearly, "model"),
    ):
        cohort = flora.attach(model, [client()], TARGETS)
        assert (cohort.packs, cohort.head.kind) == (True, kind)
        words = "the model's own head in chunks" if kind == "model" else "gradient written out"
        assert words in str(flora.explain(model))


def test_explain():
    model = models.tiny("bloom", torch.float32)
    flora.attach(model, [client("a", rank=2), client("b", rank=0), client("c", rank=5)], ["query_key_value"])
    told = flora.explain(model)
    assert [row["module"] for row in told.rows] == [f"transformer.h.{i}.self_attention.query_key_value" for i in (0, 1)]
    assert (told.rows[0]["op"], told.rows[0]["shape"], told.rows[0]["ranks"]) == (
        "lora_linear",
        "48x16 float32",
        "2,0,5",
    )
    kernels, reason = resolve("auto", "shrink")
    assert told.rows[0]["fuse"] == "separate (nothing is measured on a CPU)"
    assert told.rows[0]["backend"] == kernels.__name__.rsplit(".", 1)[-1]
    assert f"backend: {reason}" in told.notes
    assert "padded (the model does not go through transformers' attention interface)" in str(told)
    assert "triton: no GPU here" in str(told) or told.rows[0]["backend"] != "reference"


def test_explain_names_who_shares_an_input_and_what_is_fixed():
    model = llama()
    flora.attach(model, [client("a")], ["q_proj", "v_proj", "o_proj"], backend="reference", fuse="prewrite")
    rows = {row["module"].removeprefix("model.layers.0.self_attn."): row for row in flora.explain(model).rows}
    assert rows["q_proj"]["op"] == "lora_linears with v_proj"
    assert rows["o_proj"]["op"] == "lora_linear"
    assert {rows[name]["fuse"] for name in ("q_proj", "o_proj")} == {"prewrite (fixed)"}
    assert rows["q_proj"]["kernel"] == "torch, client by client"
    assert rows["q_proj"]["tiles"] == "none"


def test_candidates_leave_the_head_out():
    leaves = {path.rsplit(".", 1)[-1] for path in candidates(llama())}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
