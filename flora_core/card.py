"""The model card beside what a run saved: who trained what, on how much data, how good it is, what it is not.

It names no client and holds no time, so that it may be published, and a resumed run writes the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from .config import TrainConfig
from .federation_config import FederationConfig
from .history import Event, History

# What evaluations give -> its heading and how it is written.
_SCORES = {"loss": ("loss", ".3f"), "exact_match": ("exact match", ".1%"), "accuracy": ("accuracy", ".1%")}
_LIMITS = """It was judged on the data above and on nothing else. Updates were not made differentially private: what
clients trained on may be recovered from the weights in part. The base model's licence and limits hold."""


def model_card(model: Any, strategy: str, config: FederationConfig, train: TrainConfig, events: Iterable[Event]) -> str:
    """Write the card of a finished run's model as Markdown with the metadata that model hubs read.

    Args:
        model: The fine-tuned base, for its name.
        strategy, config, train: How the run went about it.
        events: All events of the run.
    """
    history, name = History.of(events), base_name(model)
    ranks = sorted((client["rank"] for client in history.start.get("clients", [])), reverse=True)
    examples = sum(client["examples"] for client in history.start.get("clients", []))
    facts = [
        f"- Method: {strategy} over LoRA adapters of different ranks (FLoRA, arXiv 2409.05976); {config.rounds} rounds",
        f"- Clients: {len(ranks)}, {config.fraction:.0%} of them drawn each round; weights by {_weights(config)}",
        f"- Ranks: {', '.join(map(str, ranks))}",
        f"- Training examples: {examples}, at most {train.max_length} tokens each",
        f"- Local training: AdamW, rate {train.lr:g} ({train.schedule}), batches of {train.batch_size}",
        f"- Epochs a round: {train.local_epochs}; loss on {train.loss_on}",
        f"- Seed: {config.seed}",
    ]
    totals = history.totals()
    if totals["aggregation_error"] is not None:
        facts.append(f"- Aggregation error against the exact weighted sum, at most: {totals['aggregation_error']:.1e}")
    saved = history.converted
    if saved:
        error = f"{saved['rounding_error']:.1e} of the weights' norm"
        facts.append(
            f"- Saved in {saved['dtype']}, after the evaluation below: rounding changed the weights by {error}"
        )
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [federated-learning, lora, flora]\n---",
        f"# {name}, fine-tuned by {len(ranks)} clients",
        "`AutoModelForCausalLM.from_pretrained(folder)` loads it; no adapter is needed beside it.",
        "## Training",
        "\n".join(facts),
        "## Evaluation",
        _evaluation(history),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def base_name(model: Any) -> str:
    """The base's name without the folder it lay in."""
    path = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return os.path.basename(os.path.normpath(path))


def _weights(config: FederationConfig) -> str:
    return config.weights if isinstance(config.weights, str) else "given numbers"


def _evaluation(history: History) -> str:
    if len(history.evaluated) < 2:
        return "None: the run had no held-out data."
    before, after = (history.evaluated[number] for number in (min(history.evaluated), max(history.evaluated)))
    scores = [name for name in _SCORES if name in after]
    titles = [f"{_SCORES[name][0]} {when}" for name in scores for when in ("before", "after")]
    groups = {"all": (before, after)}
    groups |= {name: (before["groups"][name], last) for name, last in sorted(after.get("groups", {}).items())}
    rows = [["held-out data", "examples", *titles], ["---"] * (2 + len(titles))]
    for group, (first, last) in groups.items():
        numbers = [format(one[name], _SCORES[name][1]) for name in scores for one in (first, last)]
        rows.append([group, str(last["examples"]), *numbers])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


__all__ = ["base_name", "model_card"]
