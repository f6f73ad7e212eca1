"""A client as it is asked for: its name, adapter and data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..common import check_name
from ..config import AdapterConfig


@dataclass(frozen=True)
class ClientSpec:
    """One client: a name, its data, its adapter, and what it overrides of the training settings.

    Args:
        name: Any text of one line, unique in the cohort, such as "St. Mary Hospital".
        data: Whatever ``load_records`` reads (a path, an iterable of dicts, a ``datasets.Dataset``), or a list of
            encoded ``Example``. A generator is read at once.
        adapter: Rank, alpha, dropout, ...
        train: Fields of ``TrainConfig`` that differ for this client: a mapping, or a whole ``TrainConfig``.
        eval_data: The client's own held-out records, as ``data``: a federation evaluates the global model on them too.
    Raises:
        ValueError, TypeError: If the name is no text of one line, or the adapter is no ``AdapterConfig``.
    Example:
        >>> records = [{"instruction": "Name a colour.", "output": "Blue."}]
        >>> client = flora.ClientSpec("clinic-a", records, flora.AdapterConfig(rank=64, alpha=128), train={"lr": 1e-3})
        >>> client.name, client.adapter.rank
        ('clinic-a', 64)
    """

    name: str
    data: Any = None
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig(rank=8, alpha=16))
    train: Any = None
    eval_data: Any = None

    def __post_init__(self) -> None:
        name = check_name(self.name)
        for part in ("data", "eval_data"):
            # Data are read more than once: for training, and for the fingerprint of a run.
            if isinstance(getattr(self, part), Iterator):
                object.__setattr__(self, part, list(getattr(self, part)))
        if not isinstance(self.adapter, AdapterConfig):
            raise TypeError(
                f"client {name!r}: adapter must be an AdapterConfig such as AdapterConfig(rank=8, alpha=16), "
                f"got {self.adapter!r:.80}"
            )
