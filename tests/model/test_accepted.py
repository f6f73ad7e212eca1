"""Models and tokenizers that the engine takes, and what it asks for instead of others."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import flora_core as flora
from flora_core.model.accepted import decoder_of, is_linear, sequence_limit
from flora_core.model.recompute import recomputing
from tests.support import models
from tests.support.attached import TARGETS, client, llama
from tests.support.federations import TRAIN, make_clients, make_federation, make_model, make_records, make_tokenizer


def adapted(model: Any) -> Any:
    """A PEFT model whose adapter changes the logits."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses names that transformers is leaving
        return get_peft_model(model, config)


def injected(model: Any) -> Any:
    """The transformers model inside a PEFT model, whose layers PEFT has replaced."""
    return adapted(model).get_base_model()


WRAPPED = {
    "torch.compile": (torch.compile, r"give the model before torch\.compile \(model\._orig_mod\)"),
    "DataParallel": (nn.DataParallel, r"got torch\.nn\..*DataParallel around it: give model\.module"),
    "PeftModel": (adapted, r"from PEFT; .*merge_and_unload\(\).*flora aggregate --base"),
    "PEFT's layers": (injected, r"layers\.0\.self_attn\.q_proj carries one of PEFT; .*flora aggregate --base"),
    "no model": (lambda model: model.config, r"must be a transformers causal LM, got LlamaConfig; load one"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_refuses_a_wrapped_model_and_names_what_to_give(kind: str):
    wrap, words = WRAPPED[kind]
    with pytest.raises(TypeError, match=words):
        flora.attach(wrap(llama()), [client()], TARGETS)
    with pytest.raises(TypeError, match=words):
        make_federation(model=wrap(make_model()))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, adapted], ids=lambda wrap: wrap.__name__)
def test_evaluates_within_wrappers_that_change_no_logits(wrap: Any):
    records = make_records("a", 4)
    model = wrap(make_model().eval())
    inner = getattr(model, "_orig_mod", getattr(model, "module", model))
    inner = inner.get_base_model() if wrap is adapted else inner
    plain = flora.evaluate(inner, make_tokenizer(), records)
    assert flora.evaluate(model, make_tokenizer(), records) == plain
    if wrap is adapted:
        assert plain["loss"] != flora.evaluate(make_model().eval(), make_tokenizer(), records)["loss"]


def test_takes_a_tokenizer_by_the_name_of_its_folder(tmp_path: Path):
    make_tokenizer().save_pretrained(tmp_path)
    records = make_records("a", 4)
    model = make_model().eval()
    expected = flora.evaluate(model, make_tokenizer(), records)
    assert flora.evaluate(model, str(tmp_path), records) == expected
    assert flora.evaluate(model, tmp_path, records) == expected
    cohort = flora.attach(model, make_clients(), ["q_proj"])
    assert callable(flora.CohortTrainer(cohort, flora.TrainConfig(**TRAIN), str(tmp_path)).tokenizer)
    assert callable(make_federation(tokenizer=tmp_path).tokenizer)


def test_names_a_tokenizer_that_is_not_there_or_none(tmp_path: Path):
    with pytest.raises(OSError, match=r"tokenizer .*nowhere' could not be loaded: .*AutoTokenizer\.from_pretrained"):
        make_federation(tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(TypeError, match=r"tokenizer must be a transformers tokenizer, or the folder .*got 7"):
        make_federation(tokenizer=7)


class Renamed(nn.Linear):
    """A linear layer of another class, written as a product of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Rounded(nn.Linear):
    """A layer that rounds its weights first, as training for quantisation does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, (self.weight * 8).round() / 8, self.bias)


class Routed(nn.Linear):
    """A layer that needs more than its input."""

    def forward(self, input: torch.Tensor, expert: int) -> torch.Tensor:  # pyright: ignore
        return super().forward(input) * expert


def replace_targets(model: Any, kind: type[nn.Linear]) -> Any:
    """The model with its q_proj layers as another class with the same weights."""
    for layer in model.model.layers:
        old = layer.self_attn.q_proj
        new = kind(old.in_features, old.out_features, old.bias is not None, dtype=old.weight.dtype)
        new.load_state_dict(old.state_dict())
        layer.self_attn.q_proj = new
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_knows_linear_layers_of_other_classes_by_what_they_compute(dtype: torch.dtype):
    for bias in (True, False):
        assert is_linear(Renamed(24, 16, bias, dtype=dtype))
        assert not is_linear(Rounded(24, 16, bias, dtype=dtype))
        assert not is_linear(Routed(24, 16, bias, dtype=dtype))


def test_trains_linear_layers_of_another_class_as_linear_layers():
    losses = []
    for kind in (nn.Linear, Renamed):
        model = replace_targets(make_model(torch.float64), kind)
        cohort = flora.attach(model, make_clients(), ["q_proj"])
        trainer = flora.CohortTrainer(cohort, flora.TrainConfig(**TRAIN), make_tokenizer())
        trainer.run()
        losses.append([client.losses for client in trainer.clients.values()])
        flora.detach(model)
        assert type(model.model.layers[0].self_attn.q_proj) is kind
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"is a .*Rounded .*does not compute x W\^T \+ b: .*leave the layer out"):
        flora.attach(replace_targets(make_model(), Rounded), make_clients(), ["q_proj"])


def test_falcon_trains_with_its_own_linear_class():
    sizes: dict[str, Any] = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.AutoModelForCausalLM.from_config(transformers.FalconConfig(**sizes)).eval()
    assert type(model.transformer.h[0].self_attention.query_key_value) is not nn.Linear
    cohort = flora.attach(model, [client()], ["query_key_value"])
    assert len(cohort.layers) == 2


def test_finds_the_decoder_of_a_model_whose_prefix_names_no_attribute():
    class Misnamed(transformers.LlamaForCausalLM):
        base_model_prefix = "language_model"

        def get_decoder(self):
            return self

    plain = make_model().eval()
    model: Any = Misnamed(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    assert model.base_model is model
    assert decoder_of(model) == ("model", model.model)
    assert decoder_of(plain) == ("model", plain.model)
    records = make_records("a", 4)
    assert flora.evaluate(model, make_tokenizer(), records) == flora.evaluate(plain, make_tokenizer(), records)


def test_a_configuration_may_name_no_longest_sequence():
    model = make_model()
    assert sequence_limit(model) == 64
    for none in (-1, 0):
        model.config.max_position_embeddings = none
        assert sequence_limit(model) is None
    cohort = flora.attach(model, make_clients(), ["q_proj"])
    flora.CohortTrainer(cohort, flora.TrainConfig(**TRAIN), make_tokenizer())


def test_refuses_targets_that_no_token_reaches():
    model = make_model()
    model.vision = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"client 'a': text tokens reach none of its 1 targets \(vision\.q_proj"):
        flora.attach(model, make_clients(), r"vision\.q_proj")
    flora.attach(model, make_clients(), ["q_proj"])


def test_recomputes_no_module_that_only_shares_the_names_of_a_gated_one():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = nn.Parameter(torch.zeros(2, 3, 4))
            self.up_proj = self.down_proj = self.gate_proj
            self.act_fn = torch.relu

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = self.up_proj = self.down_proj = nn.Sequential(nn.Linear(4, 4))
            self.act_fn = torch.relu

    model = models.tiny("llama", torch.float32)
    model.experts = nn.ModuleList([Stacked(), Wrapped()])
    with recomputing(model, ["activations"]) as counts:
        assert counts == {"activations": 2}, "the two layers' own"


def train(model: Any) -> None:
    """Train with a cohort that stays attached."""
    cohort = flora.attach(model, make_clients(), ["q_proj", "v_proj"])
    flora.CohortTrainer(cohort, flora.TrainConfig(**TRAIN), make_tokenizer()).run()


def train_and_detach(model: Any) -> None:
    """Train with a cohort that is taken off again."""
    train(model)
    flora.detach(model)


def evaluate_twice(model: Any) -> None:
    """Evaluate, with the path through the model remembered."""
    first = flora.evaluate(model, make_tokenizer(), make_records("a", 3))
    assert flora.evaluate(model, make_tokenizer(), make_records("a", 3)) == first


def run_federation(model: Any) -> None:
    """A whole run."""
    make_federation(model=model, rounds=1).run()


def is_freed(use: Any, collect: bool) -> bool:
    """Return whether a model is freed once its user has used it and let it go."""
    model = make_model()
    gone = weakref.ref(model)
    use(model)
    del model
    if collect:
        gc.collect()
    return gone() is None


def test_frees_a_model_that_its_user_let_go_with_a_cohort_attached():
    assert is_freed(train, collect=True)


@pytest.mark.parametrize("use", [train_and_detach, evaluate_twice, run_federation], ids=lambda use: use.__name__)
def test_frees_a_model_at_once_that_its_user_let_go(use: Any):
    """Without the garbage collector, which may come ten models later."""
    gc.collect()
    gc.disable()
    try:
        assert is_freed(use, collect=False)
    finally:
        gc.enable()
