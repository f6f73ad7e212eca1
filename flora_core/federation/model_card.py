"""The model card beside what a run saved: who trained what, on how much data, how good it is, what it is not.

It says only what was done: the strategy's own paper, the privacy that was paid for, the base and the licence where they
are known. It names no client and holds no time, so that it may be published, and a resumed run writes the same bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..aggregation import get_strategy
from ..config import FederationConfig, TrainConfig
from ..data import Plain, normalise
from ..merge import front_matter
from ..runs import Event, History, show_cost

# What evaluations give -> its heading and how it is written.
_SCORES = {"loss": ("loss", ".3f"), "exact_match": ("exact match", ".1%"), "accuracy": ("accuracy", ".1%")}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/[^/]+/?$")
_QUESTION = "Write your question here."
_NOT_PRIVATE = """Updates were not made differentially private: what clients trained on may be recovered from the
weights in part."""
_PRIVATE = """The weights are differentially private towards every client, its whole data added or removed{cost}: each
update was clipped to a norm of {clip:g} and Gaussian noise was added to the sum. That holds for this model alone, not
for the folder of the run."""


def model_card(
    model: Any, tokenizer: Any, strategy: str, config: FederationConfig, train: TrainConfig, events: Iterable[Event]
) -> str:
    """Write the card of a finished run's model as Markdown with the metadata that model hubs read.

    Args:
        model: The fine-tuned base, for its name.
        tokenizer: Its tokenizer, for how a prompt is made; None leaves the example of generation out.
        strategy, config, train: How the run went about it.
        events: All events of the run.
    """
    history, name = History.of(events), base_name(model)
    ranks = sorted((client["rank"] for client in history.start.get("clients", [])), reverse=True)
    examples = sum(client["examples"] for client in history.start.get("clients", []))
    facts = [
        f"- Base: {name}",
        f"- Method: {_method(strategy, config)}",
        f"- Rounds: {config.rounds}",
        f"- Clients: {len(ranks)}, {config.fraction:.0%} of them drawn each round; weights by {_weights(config)}",
        f"- Ranks of their LoRA adapters: {', '.join(map(str, ranks))}",
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
    licence = base_licence(model)
    parts = [
        front_matter(["federated-learning", "lora", "flora"], hub_name(model), licence),
        f"# {name}, fine-tuned by {len(ranks)} clients",
        "The whole model; no adapter is needed beside it.",
        "## Usage",
        _usage(tokenizer),
        "## Training",
        "\n".join(facts),
        "## Evaluation",
        _evaluation(history),
        "## Limits",
        _limits(config, history, licence),
    ]
    return "\n\n".join(parts) + "\n"


def base_name(model: Any) -> str:
    """The base's name on the hub, or that of the folder it lay in."""
    path = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return hub_name(model) or os.path.basename(os.path.normpath(path))


def hub_name(model: Any) -> str | None:
    """The base's name on the model hub; None for a folder that is not the hub's cache."""
    path = str(getattr(model.config, "_name_or_path", "") or "")
    cached = _CACHED.search(path)
    if cached:
        return f"{cached['owner']}/{cached['name']}"
    return path if _HUB_NAME.fullmatch(path) and not os.path.isdir(path) else None


def base_licence(model: Any) -> str | None:
    """The licence in the front matter of the base's own card, as far as that is on this machine; else None."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path = str(getattr(model.config, "_name_or_path", "") or "")
    card = Path(path) / "README.md"
    name = hub_name(model)
    if not card.is_file() and name:
        found = try_to_load_from_cache(name, "README.md")
        card = Path(found) if isinstance(found, str) else card
    if not path or not card.is_file():
        return None
    try:
        found = ModelCard(card.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True).data.get(
            "license"
        )
    except ValueError:  # its front matter is no YAML
        return None
    return found if isinstance(found, str) else None


def _method(strategy: str, config: FederationConfig) -> str:
    """The strategy's rule and its own source."""
    chosen = get_strategy(strategy)
    rule = re.sub(r"\s*\([^()]*arXiv [^()]*\)", "", chosen.rule).rstrip(".")
    source = f" ({chosen.source})" if chosen.source else ""
    options = "; ".join(f"{name}={value}" for name, value in config.strategy_options.items())
    return f"{strategy}{source}: {rule}" + (f"; {options}" if options else "")


def _usage(tokenizer: Any) -> str:
    """Code that loads the model, and asks it as the clients' examples were laid out."""
    load = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", 'folder = "."  # this folder']
    load += ["model = AutoModelForCausalLM.from_pretrained(folder)"]
    if tokenizer is None:
        return "\n".join(["```python", load[0].removesuffix(", AutoTokenizer"), *load[1:], "```"])
    if getattr(tokenizer, "chat_template", None):
        prompt = f'"role": "user", "content": "{_QUESTION}"'
        ask = f"prompt = tokenizer.apply_chat_template([{{{prompt}}}], tokenize=False, add_generation_prompt=True)"
    else:
        ask = f"prompt = {Plain(tokenizer).prompt(normalise({'instruction': _QUESTION, 'output': 'x'}, 'card'))!r}"
    special = "False" if getattr(tokenizer, "chat_template", None) else "True"
    lines = [
        *load,
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ask,
        f'asked = tokenizer(prompt, return_tensors="pt", add_special_tokens={special})',
        "answer = model.generate(asked.input_ids, attention_mask=asked.attention_mask, max_new_tokens=64)",
        "print(tokenizer.decode(answer[0, asked.input_ids.shape[1] :], skip_special_tokens=True))",
    ]
    return "\n".join(["```python", *lines, "```"])


def _limits(config: FederationConfig, history: History, licence: str | None) -> str:
    judged = "It was judged on the data above and on nothing else."
    if len(history.evaluated) < 2:
        judged = "It was not judged on any data."
    privacy = _NOT_PRIVATE
    if config.privacy is not None:
        spent = [show_cost(event) for _, event in sorted(history.aggregated.items())]
        privacy = _PRIVATE.format(cost=spent[-1] if spent else ", with nothing released", clip=config.privacy.clip)
    known = f"The base's licence ({licence}) and limits hold."
    unknown = "The licence of the base is not stated in the files that were at hand; it and the base's limits hold."
    return f"{judged} {privacy} {known if licence else unknown}"


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
