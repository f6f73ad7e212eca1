"""Evaluate a model on held-out records: loss, exact match, multiple choice; one forward pass, no generation.

Letters: M labelled positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from .checks import require
from .data.records import Record, check_records, normalise
from .data.template import EncodeReport, Example, encode, require_examples
from .data.tokens import check_ids
from .forward import Way, alone, evaluation_mode, find_way, labelled_hidden, lay_out
from .loss import Head
from .models import as_tokenizer, embedding_rows, to_evaluate
from .planner import passes

_LETTERS = "ABCDEFGHIJ"
_CHUNK_LOGITS = 1 << 24
# Without the head, which holds the model: what is kept here must not keep a model alive.
_WAYS: weakref.WeakKeyDictionary[Any, tuple[str, bool, str]] = weakref.WeakKeyDictionary()


def evaluate(
    model: Any,
    tokenizer: Any,
    data: Any,
    *,
    max_length: int = 512,
    template: str = "auto",
    loss_on: str = "answer",
    token_budget: int = 2048,
    label: str = "category",
) -> dict[str, Any]:
    """Evaluate a model, or one client's adapter inside ``cohort.use``.

    Args:
        model: A causal LM; one that is wrapped by PEFT or ``torch.compile`` is run without the wrapper, which changes
            no logits.
        tokenizer: Its tokenizer, or the folder or hub name of it.
        data: As ``load_records`` takes it. Records with ``question``, ``choices`` and ``answer`` (an index) are
            multiple choice: the letter with the highest probability counts.
        max_length: Longer sequences are cut from the right, in tokens.
        template, loss_on: As in training.
        token_budget: Tokens in flight.
        label: The field by which results are grouped.
    Returns:
        ``loss`` (mean over labelled tokens), ``exact_match`` (share of records whose every labelled token, end mark
        included, is the argmax: equal to greedy decoding), ``examples``, ``tokens``, and ``groups``: the same by label.
        For multiple choice ``accuracy`` and ``examples``, and ``groups``.
    Raises:
        ValueError: If there is nothing to evaluate, or a record has no known form.
    """
    model, tokenizer = to_evaluate(model), as_tokenizer(tokenizer)
    records = check_records(data, "data", known=(label,))
    choices = [record.choices is not None for record in records]
    require(
        all(choices) or not any(choices),
        f"data must be all multiple choice or none, got {sum(choices)} of {len(records)} records with 'choices'",
    )
    settings = {"max_length": max_length, "template": template, "loss_on": loss_on}
    with torch.no_grad(), evaluation_mode(model):
        if choices[0]:
            return _multiple_choice(model, tokenizer, records, token_budget, label, settings)
        report = EncodeReport()
        examples = encode(records, tokenizer, report=report, **settings)
        require_examples("evaluation", examples, report)
        scores = _score(model, examples, token_budget, tokenizer)
    groups: dict[str, list[dict[str, Any]]] = {}
    for example, score in zip(examples, scores, strict=True):
        groups.setdefault(str(records[example.record].get(label, "all")), []).append(score)
    result = _summary(scores)
    if set(groups) != {"all"}:
        result["groups"] = {name: _summary(group) for name, group in sorted(groups.items())}
    return result


def _summary(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens = sum(score["tokens"] for score in scores)
    return {
        "loss": math.fsum(score["loss_sum"] for score in scores) / tokens,
        "exact_match": sum(score["exact"] for score in scores) / len(scores),
        "examples": len(scores),
        "tokens": tokens,
    }


def way_of(model: Any) -> Way:
    """The way to run a model, found once per model."""
    if model not in _WAYS:
        way = find_way(model)
        _WAYS[model] = way.head.kind, way.packs, way.reason
    kind, packs, reason = _WAYS[model]
    # The head is made anew: a stand-in must not outlive a change of the model's modules.
    return Way(Head(model, kind), packs, reason)


def _score(model: Any, examples: Sequence[Example], token_budget: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Per example: summed loss, number of labelled tokens, and whether all of them are the argmax."""
    check_ids(examples, embedding_rows(model), tokenizer, "evaluation")
    way = way_of(model)
    scores: list[dict[str, Any]] = [{} for _ in examples]
    # Alike lengths side by side: little padding where sequences are padded, few attention calls where packed.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    items = [(i, len(examples[i].input_ids)) for i in order]
    pad_id = getattr(tokenizer, "pad_token_id", None) or 0
    for group in passes(items, token_budget, padded=not way.packs):
        batch = lay_out([[examples[i] for i in group]], way.packs, model.get_input_embeddings().weight.device, pad_id)
        with alone(model, batch):
            hidden_MH = labelled_hidden(model, batch)
        loss_M, hit_M = _rows(way, hidden_MH, batch.target_M)
        start = 0
        for i in group:
            count = sum(token != -100 for token in examples[i].labels[1:])
            rows = slice(start, start + count)
            scores[i] = {
                "loss_sum": loss_M[rows].sum().item(),
                "tokens": count,
                "exact": bool(hit_M[rows].all()),
            }
            start += count
    return scores


def _rows(way: Way, hidden_MH: torch.Tensor, target_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    losses, hits = [], []
    chunk = max(1, _CHUNK_LOGITS // way.head.output.weight.shape[0])
    for start in range(0, len(hidden_MH), chunk):
        logits_mV, target = way.head.logits(hidden_MH[start : start + chunk]), target_M[start : start + chunk]
        losses.append(torch.nn.functional.cross_entropy(logits_mV, target, reduction="none").double())
        hits.append(logits_mV.argmax(1) == target)
    return torch.cat(losses), torch.cat(hits)


def _multiple_choice(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    token_budget: int,
    label: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    asked: list[Record] = []
    for record in records:
        choices = record.choices or []
        lines = [record.text or "", *(f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=False))]
        fields = [{"instruction": "\n".join(lines), "output": letter} for letter in _LETTERS[: len(choices)]]
        asked += [normalise(one, record.place) for one in fields]
    scores = _score(model, encode(asked, tokenizer, **settings), token_budget, tokenizer)
    require(len(scores) == len(asked), f"{len(asked) - len(scores)} choices do not fit max_length; raise it")
    groups: dict[str, list[bool]] = {}
    right, start = [], 0
    for record in records:
        count = len(record.choices or [])
        losses = [score["loss_sum"] for score in scores[start : start + count]]
        right.append(losses.index(min(losses)) == record.correct)
        groups.setdefault(str(record.get(label, record.get("subject", "all"))), []).append(right[-1])
        start += count
    return {
        "accuracy": sum(right) / len(right),
        "examples": len(right),
        "groups": {
            name: {"accuracy": sum(group) / len(group), "examples": len(group)}
            for name, group in sorted(groups.items())
        },
    }


__all__ = ["evaluate"]
