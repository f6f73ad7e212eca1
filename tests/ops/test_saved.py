"""Bytes that one Llama layer keeps for backward in bf16: a cohort against PEFT with bf16 adapters and PEFT as it comes.

Bytes per token and hidden unit do not depend on the size, so the layer has Llama-7B's proportions at an eighth of its
width, with an eighth of rank 16; only what is kept once per token (norms, attention) weighs a little more.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.model.recompute import keeping_less, recomputing
from flora_core.testing import saved_bytes
from tests.support import models

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

HIDDEN, TOKENS, RANK, DROPOUT = 512, 24, 2, 0.1
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def one_layer() -> Any:
    """A Llama of one layer: heads of 128, an inner width of 11008 / 4096."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 11008 // 4096,
        num_hidden_layers=1,
        num_attention_heads=HIDDEN // 128,
        num_key_value_heads=HIDDEN // 128,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).bfloat16().requires_grad_(False)


def with_peft(model: Any, adapters_in_fp32: bool) -> Any:
    config = peft.LoraConfig(r=RANK, lora_alpha=4, lora_dropout=DROPOUT, target_modules=LINEARS, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft 0.21 still asks transformers for a name that is deprecated there.
        warnings.simplefilter("ignore", FutureWarning)
        found = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=adapters_in_fp32)
    return found.base_model.model.train()


def with_cohort(model: Any, **options: Any) -> flora.Cohort:
    model = copy.deepcopy(model)
    clients = [flora.ClientSpec(name, adapter=flora.AdapterConfig(RANK, 4, dropout=DROPOUT)) for name in "ab"]
    cohort = flora.attach(model, clients, LINEARS, **options)
    cohort.parameters()
    return cohort


def batch(cohort: flora.Cohort) -> Any:
    half = TOKENS // 2
    return cohort.batch([half, half], sequences=[half, half], dropout_step=0)


def fixed(model: Any) -> list[torch.Tensor]:
    """Tensors that are there anyway: the weights and the adapters."""
    return [*model.parameters(), *(layer.entry()[0].A_PK for layer in model.modules() if hasattr(layer, "entry"))]


def per_unit(size: float) -> float:
    return size / TOKENS / HIDDEN


def x_for_layers() -> dict[str, torch.Tensor]:
    """One input for q, k, v, one for gate, up, and those of o and down."""
    random = torch.Generator().manual_seed(0)
    widths = {"qkv": HIDDEN, "o": HIDDEN, "gate up": HIDDEN, "down": HIDDEN * 11008 // 4096}
    made = {name: torch.randn(1, TOKENS, width, generator=random).bfloat16() for name, width in widths.items()}
    return {name: x.requires_grad_() for name, x in made.items()}


def of_linears(model: Any, context: Any = None) -> float:
    """Bytes that the seven linears keep by themselves."""
    layer, inputs = model.model.layers[0], x_for_layers()
    names = {"qkv": LINEARS[:3], "o": LINEARS[3:4], "gate up": LINEARS[4:6], "down": LINEARS[6:]}
    modules = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}

    def run() -> list[torch.Tensor]:
        return [modules[name](x) for group, x in inputs.items() for name in names[group]]

    return per_unit(saved_bytes(run, fixed=fixed(model), context=context))


def of_layer(model: Any, context: Any = None, **rest: Any) -> float:
    """Bytes that the decoder keeps between embedding and last norm."""
    embedded = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    positions = torch.arange(TOKENS)[None] if context is None else torch.arange(TOKENS // 2).repeat(2)[None]
    layer, rotary = model.model.layers[0], model.model.rotary_emb

    def run() -> torch.Tensor:
        return layer(embedded, position_embeddings=rotary(embedded, positions), position_ids=positions, **rest)

    return per_unit(saved_bytes(run, fixed=fixed(model), context=context))


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[float, float]]:
    """(linears alone, whole layer) of each contender."""
    base = one_layer()
    found = {"frozen": (of_linears(base), of_layer(base))}
    for name, wide in (("PEFT bf16", False), ("PEFT", True)):
        model = with_peft(base, wide)
        found[name] = of_linears(model), of_layer(model)
    cohort = with_cohort(base)
    found["cohort"] = of_linears(cohort.model, batch(cohort)), of_layer(cohort.model, batch(cohort))
    return found


@pytest.mark.parametrize(("rival", "linears", "layer"), [("PEFT bf16", 0.45, 0.63), ("PEFT", 0.28, 0.42)])
def test_a_cohort_keeps_less_than(rival: str, linears: float, layer: float, measured: dict[str, tuple[float, float]]):
    mine, theirs = measured["cohort"], measured[rival]
    assert mine[0] / theirs[0] <= linears, measured
    assert mine[1] / theirs[1] <= layer, measured


def test_x_is_kept_once_per_group_and_s(measured: dict[str, tuple[float, float]]):
    """2 bytes for each input of a group, and S of seven targets."""
    expected = 2 * (3 + 11008 // 16 * 16 / 4096) + 2 * 7 * RANK / HIDDEN
    assert measured["cohort"][0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "bf16", "default"),
    [
        ({"recompute": ["norms"]}, 0.57, 0.38),
        ({"recompute": ["activations"]}, 0.55, 0.37),
        ({"recompute": ["norms", "activations"]}, 0.50, 0.33),
        ({"gradient_checkpointing": True}, 0.04, 0.03),
    ],
    ids=str,
)
def test_what_is_computed_again_is_not_kept(
    settings: dict[str, Any], bf16: float, default: float, measured: dict[str, tuple[float, float]]
):
    """Each option by itself; the bounds are shares of what PEFT keeps of the whole layer."""
    cohort = with_cohort(one_layer())
    with keeping_less(cohort.model, flora.TrainConfig(**settings)):
        kept = of_layer(cohort.model, batch(cohort))
    print(settings, kept, kept / measured["PEFT bf16"][1], kept / measured["PEFT"][1])
    assert kept <= bf16 * measured["PEFT bf16"][1]
    assert kept <= default * measured["PEFT"][1]


@pytest.mark.parametrize("kinds", [["norms"], ["activations"], ["norms", "activations"]], ids=str)
def test_gradients_are_the_same_bits(kinds: list[str]):
    """In training, dropout, two clients and gradient checkpointing included; nothing is left in the model."""

    def train(**settings: Any) -> list[flora.ClientUpdate]:
        cohort = with_cohort(one_layer())
        for c, spec in enumerate(cohort.clients):
            adapters = models.random_adapters(cohort.update(spec.name).adapters, c)
            cohort.load(spec.name, adapters)
            object.__setattr__(spec, "data", models.examples(c, [7, 5, 9], vocab=32))
        config = flora.TrainConfig(lr=1e-2, batch_size=2, **settings)
        updates = flora.CohortTrainer(cohort, config).run()
        assert not any("forward" in vars(module) for module in cohort.model.modules())
        return updates

    plain = train()
    for settings in ({"recompute": kinds}, {"recompute": kinds, "gradient_checkpointing": True}):
        for one, other in zip(plain, train(**settings), strict=True):
            for path, pair in one.adapters.items():
                assert all(map(torch.equal, pair, other.adapters[path])), path


def test_every_norm_and_every_gated_mlp_is_found():
    with recomputing(one_layer(), ["norms", "activations"]) as counts:
        assert counts == {"norms": 3, "activations": 1}


def test_a_norm_of_torch_and_an_mlp_that_does_more_are_left_alone():
    model = one_layer()
    mlp = model.model.layers[0].mlp
    mlp.__class__ = type("Doubled", (type(mlp),), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)})  # pyright: ignore
    model.model.norm = torch.nn.LayerNorm(HIDDEN)
    with recomputing(model, ["norms", "activations"]) as counts:
        assert counts == {"norms": 2, "activations": 0}


def test_unknown_kinds_are_refused():
    with pytest.raises(
        ValueError, match="recompute must be one of norms, activations, got 'norm'; did you mean 'norms'"
    ):
        flora.TrainConfig(recompute=["norm"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="recompute must be a list of names, got 'norms'"):
        flora.TrainConfig(recompute="norms")  # pyright: ignore[reportArgumentType]
