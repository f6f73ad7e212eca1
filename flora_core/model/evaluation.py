"""Evaluate a model on held-out records: loss, exact match, multiple choice; one forward pass, no generation.

Letters: M labelled positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..common import require
from ..data import (
    EncodeReport,
    Example,
    Record,
    check_ids,
    check_records,
    encode,
    lay_out,
    normalise,
    passes,
    require_examples,
)
from .accepted import as_tokenizer, embedding_rows, to_evaluate
from .forward import Way, alone, evaluation_mode, find_way, labelled_hidden
from .loss import CHUNK_LOGITS, Head

_LETTERS = "ABCDEFGHIJ"
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
    clients: Mapping[str, Any] | None = None,
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
        clients: Client -> its own held-out records, as ``data``; a record that is one object in both runs once.
    Returns:
        ``loss`` (mean over labelled tokens), ``exact_match`` (share of records whose every labelled token, end mark
        included, is the argmax: equal to greedy decoding), ``examples``, ``tokens``, and ``groups``: the same by label.
        For multiple choice ``accuracy`` and ``examples``, and ``groups``. With ``clients`` also ``clients``: the same
        of each client's own records, and ``over_clients``: of each number ``mean``, ``weighted_mean`` (by examples)
        and ``std`` over the clients.
    Raises:
        ValueError: If there is nothing to evaluate, or a record has no known form.
    Example:
        >>> records = [{"instruction": "w1 w2", "output": "w3"}, {"instruction": "w4", "output": "w5 w6"}]
        >>> report = flora.evaluate(model, tokenizer, records)
        >>> report["examples"], report["loss"] > 0
        (2, True)
    """
    model, tokenizer = to_evaluate(model), as_tokenizer(tokenizer)
    records = check_records(data, "data", known=(label,))
    own = {
        name: check_records(part, f"data of client {name!r}", known=(label,)) for name, part in (clients or {}).items()
    }
    # A record that stands in several places is run once.
    every = list({id(record): record for part in (records, *own.values()) for record in part}.values())
    choices = [record.choices is not None for record in every]
    require(
        all(choices) or not any(choices),
        f"data must be all multiple choice or none, got {sum(choices)} of {len(every)} records with 'choices'",
    )
    settings = {"max_length": max_length, "template": template, "loss_on": loss_on}
    with torch.no_grad(), evaluation_mode(model):
        measure = _choose if choices[0] else _predict
        scores = measure(model, tokenizer, every, token_budget, settings)
    found = dict(zip(map(id, every), scores, strict=True))
    scored = [(record, found[id(record)]) for record in records if found[id(record)]]
    require(bool(scored), "no record of data has an answer token within max_length; raise it or shorten the prompts")
    result = _summary([score for _, score in scored])
    groups: dict[str, list[dict[str, Any]]] = {}
    for record, score in scored:
        groups.setdefault(_group(record, label), []).append(score)
    if choices[0] or set(groups) != {"all"}:
        result["groups"] = {name: _summary(group) for name, group in sorted(groups.items())}
    return {**result, **_by_client({name: [found[id(record)] for record in part] for name, part in own.items()})}


def _group(record: Record, label: str) -> str:
    """The group of a record: its label; a subject of multiple choice; or all."""
    columns = (label, "subject") if record.choices is not None else (label,)
    return next((str(record[column]) for column in columns if record.get(column) is not None), "all")


def _by_client(scores: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Summaries of the clients that have scores, and of each number over them."""
    clients = {name: _summary(part) for name, found in scores.items() if (part := [score for score in found if score])}
    if not clients:
        return {}
    weights = [one["examples"] for one in clients.values()]
    over: dict[str, dict[str, float]] = {}
    for metric in ("loss", "exact_match", "accuracy"):
        values = [one[metric] for one in clients.values() if metric in one]
        if values:
            mean = math.fsum(values) / len(values)
            over[metric] = {
                "mean": mean,
                "weighted_mean": math.fsum(map(operator.mul, weights, values)) / sum(weights),
                "std": math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)),
            }
    return {"clients": clients, "over_clients": over}


def _summary(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if "right" in scores[0]:
        return {"accuracy": sum(score["right"] for score in scores) / len(scores), "examples": len(scores)}
    tokens = sum(score["tokens"] for score in scores)
    return {
        "loss": math.fsum(score["loss_sum"] for score in scores) / tokens,
        "exact_match": sum(score["exact"] for score in scores) / len(scores),
        "examples": len(scores),
        "tokens": tokens,
    }


def _predict(
    model: Any, tokenizer: Any, records: Sequence[Record], token_budget: int, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each record's score; nothing for one of which no answer fits."""
    report = EncodeReport()
    examples = encode(records, tokenizer, report=report, **settings)
    require_examples("evaluation", examples, report)
    scores: list[dict[str, Any]] = [{} for _ in records]
    for example, score in zip(examples, _score(model, examples, token_budget, tokenizer), strict=True):
        scores[example.record] = score
    return scores


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
    chunk = max(1, CHUNK_LOGITS // way.head.output.weight.shape[0])
    for start in range(0, len(hidden_MH), chunk):
        logits_mV, target = way.head.logits(hidden_MH[start : start + chunk]), target_M[start : start + chunk]
        losses.append(torch.nn.functional.cross_entropy(logits_mV, target, reduction="none").double())
        hits.append(logits_mV.argmax(1) == target)
    return torch.cat(losses), torch.cat(hits)


def _choose(
    model: Any, tokenizer: Any, records: Sequence[Record], token_budget: int, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return whether each question's likeliest letter is the right one."""
    asked: list[Record] = []
    for record in records:
        choices = record.choices or []
        lines = [record.text or "", *(f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=False))]
        fields = [{"instruction": "\n".join(lines), "output": letter} for letter in _LETTERS[: len(choices)]]
        asked += [normalise(one, record.place) for one in fields]
    scores = _score(model, encode(asked, tokenizer, **settings), token_budget, tokenizer)
    require(len(scores) == len(asked), f"{len(asked) - len(scores)} choices do not fit max_length; raise it")
    right, start = [], 0
    for record in records:
        count = len(record.choices or [])
        losses = [score["loss_sum"] for score in scores[start : start + count]]
        right.append({"right": losses.index(min(losses)) == record.correct})
        start += count
    return right
