"""Held-out records of a run: evaluated together, and each client's own as a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..common import json_digest
from ..config import FederationConfig
from ..data import Record, check_records
from ..model import ClientSpec, evaluate


class HeldOut:
    """The records that a run evaluates.

    Args:
        clients: Their ``eval_data`` are evaluated as groups.
        eval_data: Evaluated together; None for all clients' own.
        config: ``eval_max_length``, ``eval_template`` and ``eval_label``.

    Attributes:
        records: The records that are evaluated together; None if there are none.
        own: Client -> its own records.
    """

    def __init__(self, clients: Sequence[ClientSpec], eval_data: Any, config: FederationConfig):
        self.config, known = config, (config.eval_label,)
        self.own: dict[str, list[Record]] = {
            spec.name: check_records(spec.eval_data, f"eval_data of client {spec.name!r}", known=known)
            for spec in clients
            if spec.eval_data is not None
        }
        together = [record for part in self.own.values() for record in part] or None
        self.records = together if eval_data is None else check_records(eval_data, "eval_data", known=known)

    def evaluate(self, model: Any, tokenizer: Any, max_length: int) -> dict[str, Any]:
        """Evaluate a model (see ``flora_core.evaluate``); ``max_length`` where the settings have none."""
        return evaluate(
            model,
            tokenizer,
            self.records,
            max_length=self.config.eval_max_length or max_length,
            template=self.config.eval_template,
            label=self.config.eval_label,
            clients=self.own,
        )

    def digests(self) -> dict[str, str | None]:
        """Digests for the run's fingerprint; of the clients' own records, those that ``records`` has not."""
        known = set(map(id, self.records or ()))
        more = {name: [dict(r) for r in part if id(r) not in known] for name, part in self.own.items()}
        whole = None if self.records is None else json_digest([dict(record) for record in self.records])
        return {"eval_data": whole, **({"eval_data.clients": json_digest(more)} if any(more.values()) else {})}
