"""A cohort in use: one client's adapter around the model, and batches of own training loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import flora_core as flora
from flora_core.data.pack import lay_out
from flora_core.testing import budget_ratio
from tests.support import models, peft_oracle
from tests.support.attached import TARGETS, client, ids, llama
from tests.support.models import FAMILIES, exact64


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_use(family: str):
    """Inside ``use`` the model is peft's with that client's adapter; after it, the base again."""
    with exact64():
        model = models.tiny(family).eval()
        plain, base = models.tiny(family).eval(), model(input_ids=ids()).logits
        clients, targets = models.clients(family), FAMILIES[family].targets
        cohort = flora.attach(model, clients, targets)
        for i, spec in enumerate(clients[:3]):
            cohort.load(spec.name, models.random_adapters(cohort.update(spec.name).adapters, i))
            peft = peft_oracle.peft_model(plain, spec, targets, cohort.update(spec.name).adapters).eval()
            for layer in peft_oracle.lora_layers(peft).values():
                layer.lora_dropout["default"] = nn.Identity()
            with cohort.use(spec.name):
                logits = model(input_ids=ids()).logits
                written = model.generate(ids(4), max_new_tokens=6, do_sample=False)
            expected = peft(input_ids=ids()).logits
            assert budget_ratio(logits, expected, expected) <= 1
            assert (logits - base).abs().max() > 1e-3, "the adapter must matter"
            assert torch.equal(written, peft.generate(input_ids=ids(4), max_new_tokens=6, do_sample=False))
        assert torch.equal(model(input_ids=ids()).logits, base)


def test_use_names_its_clients():
    cohort = flora.attach(llama(), [client("a"), client("b")], TARGETS)
    with pytest.raises(ValueError, match="client must be one of a, b, got 'c'"), cohort.use("c"):
        pass


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_own_training_loop(family: str):
    """``cohort.batch`` around the model's own forward gives the gradients that CohortTrainer steps with."""
    clients = models.clients(family)
    with exact64():
        cohort = flora.attach(models.tiny(family), clients, FAMILIES[family].targets)
        for i, name in enumerate(cohort.names):
            cohort.load(name, models.random_adapters(cohort.update(name).adapters, i))
        config = flora.TrainConfig(max_steps=1)
        own = [config.overridden(spec.train) for spec in clients]
        first = [peft_oracle.step_batches(spec, train)[0] for spec, train in zip(clients, own, strict=True)]
        factors = cohort.parameters()
        batch = lay_out(first, packs=True)
        with cohort.batch(batch.tokens, sequences=batch.sequences, dropout_step=0, seed_C=[c.seed for c in own]):
            logits = cohort.model(**batch.inputs, use_cache=False).logits[0, batch.label_index]
            loss_M = nn.functional.cross_entropy(logits, batch.target_M, reduction="none")
            counts = [sum(label != models.IGNORE for e in rows for label in e.labels[1:]) for rows in first]
            torch.stack([loss_C.mean() for loss_C in loss_M.split(counts)]).sum().backward()
        found: dict[str, Any] = {}
        mine = {path: (entry.A_PK.grad, entry.B_PN.grad) for path, entry in cohort.bank.modules.items()}
        assert len(factors) == 2 * len(mine)
        with peft_oracle.first_gradients(found):
            flora.CohortTrainer(cohort, config).run()
    for c, name in enumerate(cohort.names):
        for path, pair in found[name].items():
            for grad, expected in zip(mine[path], pair, strict=True):
                assert grad is not None
                assert budget_ratio(grad[cohort.bank.modules[path].ranks[c]], expected, expected) <= 1


def test_batch_of_rows():
    """Without ``sequences`` rows are sequences, and a client may have none of them."""
    cohort = flora.attach(llama(), [client("a"), client("b"), client("c")], TARGETS)
    for i, name in enumerate(cohort.names):
        cohort.load(name, models.random_adapters(cohort.update(name).adapters, i))
    rows = torch.cat([ids(7, seed) for seed in range(3)])
    with torch.no_grad(), cohort.batch([14, 0, 7]) as model:
        together = model(input_ids=rows).logits
    for name, part in (("a", slice(0, 2)), ("c", slice(2, 3))):
        with torch.no_grad(), cohort.use(name) as model:
            alone = model(input_ids=rows[part]).logits
        torch.testing.assert_close(together[part], alone)


def test_batch_counts_clients_and_rows():
    cohort = flora.attach(llama(), [client("a"), client("b")], TARGETS)
    with pytest.raises(ValueError, match=r"one entry per client \(2: a, b\), got 3"), cohort.batch([1, 2, 3]):
        pass
    with pytest.raises(ValueError, match="q_proj got 9 rows of input, the batch has 8 tokens"), cohort.batch([3, 5]):
        cohort.model(input_ids=ids(9))


def test_dropout_in_batches_is_counted_and_follows_the_mode():
    """In training mode every batch has masks of its own; in evaluation, and inside ``use``, nothing is dropped."""
    model = llama()
    cohort = flora.attach(model, [client(dropout=0.5)], TARGETS)
    cohort.load("a", models.random_adapters(cohort.update("a").adapters, 1))

    def logits(**how: Any) -> torch.Tensor:
        with torch.no_grad(), cohort.batch([9], **how):
            return model(input_ids=ids()).logits

    with torch.no_grad(), cohort.use("a"):
        kept = model(input_ids=ids()).logits
    model.eval()
    assert torch.equal(logits(), kept)
    assert not torch.equal(logits(dropout_step=0), kept)
    model.train()
    first, second = logits(), logits()
    assert not torch.equal(first, second)
    assert torch.equal(first, logits(dropout_step=0))
    assert torch.equal(second, logits(dropout_step=1))
    assert not torch.equal(first, logits(dropout_step=0, seed=1))
    assert not torch.equal(first, logits(dropout_step=0, round=1))
