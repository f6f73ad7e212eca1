"""CohortTrainer around the arithmetic: data order, rounds, events, metrics, and what it leaves behind."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers

import flora_core as flora
from flora_core.data.template import IGNORE, Example
from flora_core.training.optimizer import CohortAdamW
from tests.support import models

TARGETS = ["q_proj", "v_proj"]
CONFIG = flora.TrainConfig(lr=1e-2, batch_size=2, seed=3)


def client(name: str = "a", data: Any = (9, 7, 5, 11, 6), train: Any = None, **adapter: Any) -> flora.ClientSpec:
    """``data``: lengths of random sequences, or the data themselves."""
    lengths = isinstance(data, tuple)
    rows = models.examples(sum(map(ord, name)), data) if lengths else data
    return flora.ClientSpec(name, rows, flora.AdapterConfig(**{"rank": 2, **adapter}), train)


def attach(*clients: flora.ClientSpec, family: str = "llama") -> flora.Cohort:
    cohort = flora.attach(models.tiny(family, torch.float32), clients, models.FAMILIES[family].targets)
    for i, name in enumerate(cohort.names):
        cohort.load(name, models.random_adapters(cohort.update(name).adapters, i))
    return cohort


def same(one: flora.ClientUpdate, other: flora.ClientUpdate) -> bool:
    pairs = ((one.adapters[path], other.adapters[path]) for path in one.adapters)
    return all(torch.equal(x, y) for pair in pairs for x, y in zip(*pair, strict=True))


def test_updates_and_metrics():
    cohort = attach(client("a"), client("b", (8, 8), {"local_epochs": 3, "batch_size": 1}), client("c", rank=5))
    trainer = flora.CohortTrainer(cohort, CONFIG)
    a, b, c = trainer.run()
    assert [(u.client, u.weight, u.metrics["examples"]) for u in (a, b, c)] == [("a", 5, 5), ("b", 2, 2), ("c", 5, 5)]
    assert [(u.metrics["steps"], u.metrics["tokens"]) for u in (a, b, c)] == [(3, 38), (6, 48), (3, 38)]
    for update in (a, b, c):
        losses = trainer.clients[update.client].losses
        assert (update.metrics["loss_first"], update.metrics["loss_last"]) == (losses[0], losses[-1])
        assert update.metrics["seconds"] > 0
        assert update.metrics["tokens_per_s"] == pytest.approx(update.metrics["tokens"] / update.metrics["seconds"])
    assert set(c.ranks.values()) == {5}
    before = {path: A.clone() for path, (A, _) in a.adapters.items()}
    flora.CohortTrainer(cohort, CONFIG, round=1).run()
    assert all(torch.equal(before[path], A) for path, (A, _) in a.adapters.items()), "an update is a copy"


def test_every_epoch_shows_every_example_once():
    trainer = flora.CohortTrainer(
        attach(client(data=(5,) * 7, train={"local_epochs": 3, "gradient_accumulation": 2})), CONFIG
    )
    steps = [
        [example.record for example in trainer.clients["a"].batch(step)] for step in range(trainer.clients["a"].steps)
    ]
    assert [len(step) for step in steps] == [4, 3] * 3
    epochs = [steps[i] + steps[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_rounds_and_seeds_change_the_order():
    cohort = attach(client(data=(5,) * 12))

    def order(**how: Any) -> list[int]:
        trainer = flora.CohortTrainer(cohort, CONFIG.overridden({"seed": how.pop("seed", 3)}), **how)
        return [example.record for step in range(6) for example in trainer.clients["a"].batch(step)]

    assert order() == order()
    assert len({tuple(order()), tuple(order(round=1)), tuple(order(seed=4))}) == 3


def test_max_steps_cuts_the_round():
    trainer = flora.CohortTrainer(attach(client(train={"local_epochs": 9, "max_steps": 4})), CONFIG)
    (update,) = trainer.run()
    assert update.metrics["steps"] == 4


def test_accumulation_is_one_larger_batch():
    """The loss is the mean over the labelled tokens of the step, however it is cut."""
    cut = {"batch_size": 1, "gradient_accumulation": 4}
    runs = [
        flora.CohortTrainer(attach(client(dropout=0.2)), CONFIG.overridden(c)).run()[0]
        for c in (cut, {"batch_size": 4})
    ]
    assert same(*runs)


def test_a_schedule_over_the_whole_run(monkeypatch: pytest.MonkeyPatch):
    """With scope ``run`` the rate goes on falling in the next round; with scope ``round`` it starts again."""
    rates: list[list[float]] = []
    step = CohortAdamW.step

    def recorded(self: CohortAdamW, *args: Any) -> None:
        rates.append(self.learning_rates())
        step(self, *args)

    monkeypatch.setattr(CohortAdamW, "step", recorded)
    linear = {"schedule": "linear", "lr": 1.0, "max_steps": 2}
    cohort = attach(client("run", train={**linear, "schedule_scope": "run"}), client("round", train=linear))
    for number in range(3):
        flora.CohortTrainer(cohort, CONFIG, round=number, rounds=3).run()
    across, within = zip(*rates, strict=True)
    assert across == pytest.approx([6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert within == pytest.approx([1.0, 0.5] * 3)


def test_optimizer_state_is_kept_for_those_who_keep_it():
    """Handed to the next round's trainer, moments go on; a client that does not ask starts afresh."""
    cohort = attach(client("kept", train={"keep_optimizer": True}), client("fresh"))
    first = flora.CohortTrainer(cohort, CONFIG)
    first.run()
    assert {name: state["step"] for name, state in first.optimizer_state.items()} == {"kept": 3}
    start = {name: cohort.update(name).adapters for name in cohort.names}
    results = []
    for state in (first.optimizer_state, {}):
        for name in cohort.names:
            cohort.load(name, start[name])
        second = flora.CohortTrainer(cohort, CONFIG, round=1, rounds=2, optimizer_state=state)
        results.append({update.client: update for update in second.run()})
        assert second.optimizer_state["kept"]["step"] == (6 if state else 3)
    assert not same(results[0]["kept"], results[1]["kept"])
    assert same(results[0]["fresh"], results[1]["fresh"])


def test_a_whole_config_of_the_clients_own():
    own = flora.TrainConfig(lr=0.5, batch_size=1, max_steps=1)
    trainer = flora.CohortTrainer(attach(client("a", train=own), client("b")), CONFIG)
    assert trainer.clients["a"].config is own
    assert trainer.clients["b"].config is CONFIG


def test_events():
    events: list[dict[str, Any]] = []
    cohort = attach(client("a"), client("b", (8, 8, 8), rank=3))
    updates = flora.CohortTrainer(cohort, CONFIG, round=1, rounds=3, callbacks=[events.append]).run()
    progress = [event for event in events if event["event"] == "train_progress"]
    assert [(event["round"], event["step"], event["steps"]) for event in progress] == [(2, i, 3) for i in (1, 2, 3)]
    assert progress[-1]["tokens"] == sum(update.metrics["tokens"] for update in updates)
    assert progress[0]["loss"] == pytest.approx(sum(u.metrics["loss_first"] for u in updates) / 2)
    done = {event["client"]: event for event in events if event["event"] == "client_done"}
    assert {name: (event["rank"], event["round"], event["steps"]) for name, event in done.items()} == {
        "a": (2, 2, 3),
        "b": (3, 2, 2),
    }
    assert "refused" not in done["a"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_left_as_it_was(checkpointing: bool):
    """Modes, hooks, gradients, attention and checkpointing are as before, whatever they were."""
    cohort = attach(client(dropout=0.1), family="gpt2")
    model = cohort.model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    flora.CohortTrainer(cohort, CONFIG.overridden({"gradient_checkpointing": checkpointing})).run()
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(factor.requires_grad for e in cohort.bank.modules.values() for factor in (e.A_PK, e.B_PN))
    assert model.config._attn_implementation == "sdpa"
    assert cohort.route.batch is None


def test_a_checkpointed_layers_own_dropout_is_off_too():
    """OPT's layers call dropout themselves, and transformers recomputes only layers in training mode."""
    shape: dict[str, Any] = dict(
        hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16
    )
    config = transformers.OPTConfig(vocab_size=models.VOCAB, max_position_embeddings=64, dropout=0.5, **shape)
    model = models.randomised(transformers.AutoModelForCausalLM.from_config(config), 0)
    cohort, runs = flora.attach(model, [client()], ["q_proj", "v_proj"]), []
    for checkpointing in (False, True):
        cohort.bank.reset("a", 0)
        runs.append(flora.CohortTrainer(cohort, CONFIG.overridden({"gradient_checkpointing": checkpointing})).run()[0])
    assert same(*runs)


def test_the_bases_own_dropout_is_off():
    """Its random numbers would depend on who else is in the cohort."""
    model = models.tiny("gpt2", torch.float32, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    cohort = flora.attach(model, [client()], ["c_attn"])
    runs = []
    for _ in range(2):
        cohort.bank.reset("a", 0)
        runs.append(flora.CohortTrainer(cohort, CONFIG).run()[0])
    assert same(*runs)


def test_a_run_that_breaks_keeps_what_was_trained():
    """An error in the second cohort leaves the first one's adapters trained and nothing switched on."""
    cohort = attach(client("a"), client("b"))
    start = {name: cohort.update(name) for name in cohort.names}

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "client_done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flora.CohortTrainer(cohort, CONFIG.overridden({"token_budget": 1}), callbacks=[stop]).run()
    assert not same(cohort.update("a"), start["a"])
    assert same(cohort.update("b"), start["b"])
    assert cohort.active is cohort.bank
    assert not any(entry.A_PK.requires_grad for entry in cohort.bank.modules.values())


def test_a_client_of_rank_zero_takes_part():
    """It adapts nothing: its losses are the base's, in a cohort and alone, and its update is empty."""
    for config in (CONFIG, CONFIG.overridden({"token_budget": 1, "keep_optimizer": True})):
        trainer = flora.CohortTrainer(attach(client("a"), client("none", rank=0)), config)
        updates = {update.client: update for update in trainer.run()}
        assert updates["none"].adapters == {}
        assert len(trainer.clients["none"].losses) == 3
    assert not trainer.failures


def test_examples_without_labels():
    """One-token sequences and prompts without an answer carry no loss, even where a whole step has none."""
    silent = [Example([5], [5], 0), Example([7, 8, 9], [IGNORE] * 3, 1)]
    cohort = attach(client("a"), client("silent", silent), client("half", [*silent, *models.examples(1, [6, 7])]))
    trainer = flora.CohortTrainer(cohort, CONFIG)
    updates = {update.client: update for update in trainer.run()}
    assert not trainer.failures
    assert trainer.clients["silent"].losses == [0.0]
    assert all(A.isfinite().all() and B.isfinite().all() for A, B in updates["silent"].adapters.values())


def test_errors_before_training():
    def trainer(spec: flora.ClientSpec, config: flora.TrainConfig = CONFIG) -> flora.CohortTrainer:
        return flora.CohortTrainer(flora.attach(models.tiny("llama", torch.float32), [spec], TARGETS), config)

    with pytest.raises(ValueError, match="client 'a' has no data: pass a JSONL path"):
        trainer(flora.ClientSpec("a"))
    with pytest.raises(ValueError, match="client 'a'"):
        trainer(client(data=[]))
    with pytest.raises(ValueError, match="tokenizer must be given: client 'a' has plain records"):
        trainer(client(data=[{"text": "plain"}]))
    with pytest.raises(ValueError, match="has a sequence of 65 tokens, the model allows 64; set max_length=64"):
        trainer(client(data=(65,)))
    with pytest.raises(ValueError, match="train: unknown field 'learning_rate'"):
        trainer(client(train={"learning_rate": 1.0}))
    with pytest.raises(TypeError, match="train must be a TrainConfig or a mapping of its fields to values, got 'fast'"):
        trainer(client(train="fast"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"betas": (0.9, 1.0)}, "betas must be below 1"),
        ({"betas": 0.9}, r"betas must be two numbers such as \(0.9, 0.999\), got 0.9"),
        ({"recompute": None}, r"recompute must be a list of names, got None; write \['norms'\]"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, or None for no limit, got 0"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"dtype": "float16"}, "float16 would need a loss scale per client"),
        ({"token_budget": 0}, "token_budget must be at least 1"),
        ({"schedule_scope": "step"}, "schedule_scope must be one of round, run"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_train_config_is_checked(fields: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        flora.TrainConfig(**fields)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (flora.TrainConfig, "gradient_checkpointing"),
        (flora.TrainConfig, "keep_optimizer"),
        (flora.TrainConfig, "deterministic"),
        (partial(flora.AdapterConfig, rank=4), "use_rslora"),
        (partial(flora.FederationConfig, rounds=1), "save_model"),
        (partial(flora.FederationConfig, rounds=1), "save_adapters"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_word_is_no_flag(config: Any, name: str):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
        config(**{name: "no"})
    for flag in (True, False):
        assert getattr(config(**{name: flag}), name) is flag
