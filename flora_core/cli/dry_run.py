"""Say what a recipe would do, and the memory it would take, without training: `flora run --dry-run`.

Loads the model and the data, attaches the cohort and measures one short forward pass; writes nothing.
"""

from __future__ import annotations

from typing import Any

from ..common import Table, listed, show_bytes
from ..config import Recipe
from ..data import Split, split
from ..model import attach, detach
from ..runs import build_model, specs_of
from ..training import CohortTrainer, planner


def dry_run(recipe: Recipe) -> list[Table]:
    """Return the plan of a recipe as tables: the whole, and client by client.

    Raises:
        ValueError, TypeError, OSError: Whatever would stop the run before training.
    """
    found = split(recipe)
    clients = specs_of(recipe, found)
    model, tokenizer = build_model(recipe)
    cohort, notes = attach(model, clients, recipe.target_modules, seed=recipe.seed), []
    try:
        trainer = CohortTrainer(cohort, recipe.train, tokenizer, callbacks=[notes.append])
        plan, in_flight = trainer.plan(), _tokens_in_flight(trainer)
        rows = [_client_row(trainer, name, found) for name in cohort.names]
        budgeted = any(client.config.memory_budget_gb is not None for client in trainer.clients.values())
        # The planner measures, and counts activations, only where there is a budget to keep.
        activations = 0.0 if budgeted else in_flight * planner.measure_bytes_per_token(cohort)
        targets = f"{len(cohort.layers)} layers: {', '.join(sorted({path.split('.')[-1] for path in cohort.layers}))}"
    finally:
        detach(model)
    parameters = sum(row["parameters"] for row in rows)
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    adapters, training = 4 * parameters, plan.memory_bytes + activations
    facts = [
        ("model", f"{recipe.model}, {sum(p.numel() for p in model.parameters()):,} parameters"),
        ("runs in", f"{str(model.dtype).removeprefix('torch.')} on {model.device}"),
        ("targets", targets),
        ("strategy", f"{recipe.strategy}, {recipe.federation.rounds} rounds"),
        ("results", str(recipe.out)),
        ("training examples", f"{sum(row['examples'] for row in rows):,}"),
        ("held-out examples", describe_held_out(found)),
        *([("unused records", f"{found.unused:,} of {found.count:,} that were read")] if found.unused else []),
        ("cohorts", f"{len(plan.cohorts)} ({plan.reason}): {'; '.join(_shorten(names) for names in plan.cohorts)}"),
        ("tokens in flight", f"{in_flight:,}"),
        ("memory: base", show_bytes(base)),
        ("memory: adapters", show_bytes(adapters)),
        ("memory: training", f"{show_bytes(training)} for gradients, optimizer state, activations and logits"),
        ("memory: together", f"about {show_bytes(base + adapters + training)}, besides Python and its libraries"),
        ("sent up in a round", f"{show_bytes(adapters)}, if every client takes part"),
        *(("warning", f"{note.get('client', '')}: {note['message']}") for note in notes if note["event"] == "warning"),
    ]
    columns = list(rows[0])
    cells = [[f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in columns] for row in rows]
    return [("Plan", ["what", "value"], [list(fact) for fact in facts]), ("Clients, a round", columns, cells)]


def describe_held_out(split: Split) -> str:
    """Describe the held-out records, and how many clients have none of their own where some do."""
    none = [name for name in split.train if name not in split.own]
    without = f"; clients without any of their own: {listed(none)}" if split.own and none else ""
    return f"{len(split.held_out):,}{without}"


def _client_row(trainer: CohortTrainer, name: str, split: Split) -> dict[str, Any]:
    client, adapter = trainer.clients[name], trainer.cohort.spec(name).adapter
    factors = trainer.cohort.bank.adapters(name).values()
    return {
        "client": name,
        "rank": adapter.rank,
        "alpha": f"{adapter.alpha:g}",
        "examples": len(client.examples),
        **({"held out": len(split.own.get(name, []))} if split.own else {}),
        "tokens": sum(len(example.input_ids) for example in client.examples) * client.config.local_epochs,
        "steps": client.steps,
        "lr": f"{client.config.lr:g}",
        "parameters": sum(A.numel() + B.numel() for A, B in factors),
    }


def _tokens_in_flight(trainer: CohortTrainer) -> int:
    """Return the tokens of the largest pass: an average micro-batch of each client of a cohort, within the budget."""
    plan, sizes = trainer.plan(), []
    for cohort in plan.cohorts:
        clients = [trainer.clients[name] for name in cohort]
        mean = [sum(len(ex.input_ids) for ex in client.examples) / len(client.examples) for client in clients]
        sizes.append(sum(m * client.config.batch_size for m, client in zip(mean, clients, strict=True)))
    return int(min(max(sizes), plan.token_budget))


def _shorten(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} .. {names[-1]} ({len(names)} clients)"
