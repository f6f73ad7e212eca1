"""Evaluation against the plain computation: one forward pass of the model for each record, alone."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.data import EncodeReport, encode, normalise
from flora_core.model import evaluation
from tests.support.federations import WORDS, make_model, make_records, make_tokenizer

LETTERS = "ABCDEFGHIJ"
# Letters are words of their own here, so that the choices differ.
LETTERED = make_tokenizer([*LETTERS, *WORDS[: len(WORDS) - len(LETTERS)]])


def alone(
    model: Any, record: dict[str, Any], tokenizer: Any, max_length: int = 512, **settings: Any
) -> tuple[float, int, bool]:
    """Summed loss of a record, its labelled tokens, and whether each of them is the likeliest."""
    (example,) = encode(
        [normalise(record, "record")], tokenizer, max_length=max_length, report=EncodeReport(), **settings
    )
    ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    kept = labels != -100
    loss = torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")
    return float(loss), int(kept.sum()), bool((logits[kept].argmax(1) == labels[kept]).all())


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("token_budget", [1, 40, 2048])
def test_loss_and_exact_match_are_those_of_each_record_alone(token_budget: int, loss_on: str, monkeypatch):
    model, tokenizer, records = make_model(dtype=torch.float64), make_tokenizer(), make_records("a", 9)
    # Logits of a few rows at a time, not of all at once.
    monkeypatch.setattr(evaluation, "CHUNK_LOGITS", 3 * len(tokenizer))
    found = flora.evaluate(model, tokenizer, records, token_budget=token_budget, loss_on=loss_on)
    scores = [alone(model, record, tokenizer, loss_on=loss_on) for record in records]
    tokens = sum(count for _, count, _ in scores)
    assert found["loss"] == pytest.approx(sum(loss for loss, _, _ in scores) / tokens, rel=1e-9)
    assert (found["examples"], found["tokens"]) == (9, tokens)
    assert found["exact_match"] == sum(exact for _, _, exact in scores) / 9
    for name, group in found["groups"].items():
        some = [score for score, record in zip(scores, records, strict=True) if record["category"] == name]
        assert group["examples"] == len(some)
        assert group["loss"] == pytest.approx(sum(one[0] for one in some) / sum(one[1] for one in some), rel=1e-9)
    assert set(found["groups"]) == {record["category"] for record in records}


def question_of(answer: int, seed: int = 0, choices: int = 4) -> dict[str, Any]:
    words = make_records(f"question {seed}", choices)
    texts = [record["output"] for record in words]
    return {"question": words[0]["instruction"], "choices": texts, "answer": answer, "subject": f"s{seed % 2}"}


def letter_losses(model: Any, question: dict[str, Any]) -> list[float]:
    """The loss of each letter as the answer, each alone."""
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, question["choices"], strict=False)]
    text = "\n".join([question["question"], *lines])
    letters = LETTERS[: len(lines)]
    return [alone(model, {"instruction": text, "output": letter}, LETTERED)[0] for letter in letters]


def test_exact_match_counts_records_whose_every_labelled_token_is_the_likeliest():
    model, tokenizer, records = make_model(dtype=torch.float64), make_tokenizer(), make_records("a", 6)
    (first, *_) = encode([normalise(records[0], "record")], tokenizer, max_length=512)
    prompt = next(i for i, label in enumerate(first.labels) if label != -100)
    for record in records[:4]:
        (example,) = encode([normalise(record, "record")], tokenizer, max_length=512)
        with torch.no_grad():
            likeliest = model(torch.tensor([example.input_ids[:prompt]])).logits[0, -1].argmax()
        record["output"] = tokenizer.decode([int(likeliest)])
    # The end mark is cut off, so the answer's only word decides.
    found = flora.evaluate(model, tokenizer, records, max_length=prompt + 1)
    wrong = sum(not alone(model, record, tokenizer, max_length=prompt + 1)[2] for record in records[4:])
    assert (found["exact_match"], found["tokens"]) == ((6 - wrong) / 6, 6)
    assert wrong
    # With it, a record is right only if the end is as well.
    assert flora.evaluate(model, tokenizer, records)["exact_match"] < found["exact_match"]


def test_the_likeliest_letter_is_the_models_answer():
    model = make_model(dtype=torch.float64)
    questions = [question_of(0, seed, choices=3 + seed % 3) for seed in range(8)]
    for question in questions:
        losses = letter_losses(model, question)
        # Neither the likeliest nor the least likely.
        question["answer"] = losses.index(sorted(losses)[1])
    assert flora.evaluate(model, LETTERED, questions)["accuracy"] == 0
    for question in questions[:5]:
        losses = letter_losses(model, question)
        question["answer"] = losses.index(min(losses))
    found = flora.evaluate(model, LETTERED, questions)
    assert (found["accuracy"], found["examples"]) == (5 / 8, 8)
    assert {name: group["accuracy"] for name, group in found["groups"].items()} == {"s0": 3 / 4, "s1": 2 / 4}
    assert len({question["answer"] for question in questions}) > 1


def test_multiple_choice_is_grouped_by_label_then_subject_then_all():
    model, first, second = make_model(), question_of(0, 1), question_of(1, 2)
    del second["subject"]
    assert list(flora.evaluate(model, LETTERED, [second])["groups"]) == ["all"]
    assert list(flora.evaluate(model, LETTERED, [first, second])["groups"]) == ["all", "s1"]
    labelled = [{**first, "category": "c"}, second]
    assert list(flora.evaluate(model, LETTERED, labelled)["groups"]) == ["all", "c"]
    assert list(flora.evaluate(model, LETTERED, labelled, label="topic")["groups"]) == ["all", "s1"]


def test_a_subject_groups_no_plain_records_and_one_group_of_all_is_left_out():
    records = [{"instruction": "w1", "output": "w2", "subject": "s"}, {"instruction": "w2", "output": "w3"}]
    found = flora.evaluate(make_model(), make_tokenizer(), records, label="topic")
    assert set(found) == {"loss", "exact_match", "examples", "tokens"}
    assert list(flora.evaluate(make_model(), make_tokenizer(), records, label="subject")["groups"]) == ["all", "s"]


def test_records_whose_answer_does_not_fit_are_left_out():
    model, tokenizer, records = make_model(dtype=torch.float64), make_tokenizer(), make_records("a", 3)
    long = {"instruction": " ".join(WORDS), "output": "w1", "category": "long"}
    found = flora.evaluate(model, tokenizer, [long, *records], max_length=20)
    assert (found["examples"], "long" in found["groups"]) == (3, False)
    assert found["loss"] == pytest.approx(flora.evaluate(model, tokenizer, records)["loss"], rel=1e-9)


def test_refuses_what_cannot_be_evaluated():
    model, tokenizer, question = make_model(), make_tokenizer(), question_of(0)
    with pytest.raises(ValueError, match="all multiple choice or none, got 1 of 2 records"):
        flora.evaluate(model, tokenizer, [question, *make_records("a", 1)])
    with pytest.warns(UserWarning, match="dropped"), pytest.raises(ValueError, match="4 choices do not fit max_length"):
        flora.evaluate(model, LETTERED, [question], max_length=3)


def test_the_defaults_are_those_of_training():
    defaults = {name: one.default for name, one in inspect.signature(flora.evaluate).parameters.items()}
    train = flora.TrainConfig()
    names = ("max_length", "template", "loss_on")
    assert {name: defaults[name] for name in names} == {name: getattr(train, name) for name in names}
    assert (defaults["token_budget"], defaults["label"], defaults["clients"]) == (2048, "category", None)
    with pytest.raises(TypeError, match="positional"):
        flora.evaluate(make_model(), make_tokenizer(), make_records("a", 2), 512)  # pyright: ignore[reportCallIssue]


def test_the_model_is_left_as_it_was():
    model = make_model().train()
    flora.evaluate(model, make_tokenizer(), make_records("a", 3))
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
