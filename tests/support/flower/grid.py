"""A grid in memory that carries Flower's messages to parties with a folder each, and can lose, spoil and delay them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import flora_core as flora
from flora_core.federation.party import Site
from flora_core.flower import link as flower
from flora_core.flower import node
from tests.support.federations import TRAIN, make_clients, make_model, make_records, make_tokenizer

Fault = Callable[[Message, Message], Message | None]


class MemoryGrid:
    """Nodes by number; each answers with the same code as a real one.

    Args:
        sites: Node -> its party.
        fault: Called with (message, reply): what arrives instead of the reply, None for nothing.
    """

    def __init__(self, sites: dict[int, Site], fault: Fault | None = None):
        self.sites, self.fault = sites, fault
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.app = node.client_app()
        self.sent: list[Message] = []

    def get_node_ids(self) -> list[int]:
        """Who is connected."""
        return list(self.sites)

    def push_messages(self, messages: Iterable[Message]) -> None:
        """Deliver; nobody waits for the answers."""
        self.send_and_receive(messages)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Deliver, have the parties answer, and bring back what arrives; last first, for order must not count."""
        replies, wanted = [], sum(1 for _ in messages)  # Flower goes through them twice
        for message in messages:
            wanted -= 1
            self.sent.append(message)
            message.metadata.__dict__["_message_id"] = f"message {len(self.sent)}"
            context = Context(1, message.metadata.dst_node_id, {"node": message.metadata.dst_node_id}, RecordDict(), {})
            # As over a wire: nobody holds the other's tensors.
            reply = copy.deepcopy(self.app(copy.deepcopy(message), context))
            arrives = reply if self.fault is None else self.fault(message, reply)
            replies += [] if arrives is None else [arrives]
        assert wanted == 0
        return replies[::-1]


def make_sites(folder: Path, clients: list[flora.ClientSpec] | None = None, **model: Any) -> dict[int, Site]:
    """One party a node, numbered from 100; each has its own model and folder."""
    specs = make_clients() if clients is None else clients
    return {
        100 + i: Site(make_model(**model), make_tokenizer(), spec, folder / spec.name) for i, spec in enumerate(specs)
    }


def serve(grid: MemoryGrid, monkeypatch, out: Path | None, *, strategy: str = "flora", **changes: Any):
    """Run a federation on the grid; returns what holds its model, and the result."""
    monkeypatch.setattr(node, "site_of", lambda values: grid.sites[values["node"]])
    events = changes.pop("events", [])
    train = {name: changes.pop(name) for name in list(changes) if name in flora.TrainConfig.__dataclass_fields__}
    model = changes.pop("model", None) or make_model()
    result = flower.serve(
        grid,  # pyright: ignore[reportArgumentType]
        model,
        make_tokenizer(),
        strategy=strategy,
        min_nodes=changes.pop("min_nodes", len(grid.sites)),
        join_timeout=changes.pop("join_timeout", 5.0),
        round_timeout=changes.pop("round_timeout", 60.0),
        train=flora.TrainConfig(**{**TRAIN, "token_budget": 1, **train}),
        target_modules=["q_proj", "v_proj"],
        eval_data=make_records("b held out", 6),
        callbacks=[events.append],
        config=flora.FederationConfig(**{"rounds": 2, "out": out, **changes}),
    )
    return SimpleNamespace(model=model), result


def in_process(out: Path | None, taking_part: dict[int, list[str]] | None = None, **changes: Any) -> SimpleNamespace:
    """The same run in one process, one client a cohort; ``taking_part`` names each round's clients."""
    from tests.support.federations import make_federation

    federation = make_federation(out, token_budget=1, **changes)
    if taking_part is not None:
        federation.sampled = taking_part.__getitem__  # pyright: ignore[reportAttributeAccessIssue]
    return SimpleNamespace(result=federation.run(), model=federation.model)
