"""A model with a global adapter beside its base, to run: what a run evaluates, and what its result is applied with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..adapters import ClientUpdate, check_base
from ..config import AdapterConfig
from .attachment import attach, detach
from .client import ClientSpec
from .weights import weight_view


@contextmanager
def adapter_beside(model: Any, adapter: ClientUpdate) -> Iterator[Any]:
    """Give a model that computes base + adapter inside the block; the weights are not touched.

    Args:
        model: The base, to which no cohort is attached.
        adapter: Of scalings 1.
    Raises:
        ValueError: If the adapter was trained on another base, or its modules do not fit.
    """
    if adapter.trained_on is not None:
        known = adapter.trained_on.of(adapter.adapters)
        check_base(known, lambda module: weight_view(model.get_submodule(module)), "the global adapter", "this model")
    ranks = {f"^{re.escape(module)}": rank for module, rank in adapter.ranks.items()}
    config = AdapterConfig(1, 1, rank_pattern=ranks, alpha_pattern=ranks, target_modules=list(adapter.adapters))
    cohort = attach(model, [ClientSpec(adapter.client, adapter=config)], list(adapter.adapters))
    try:
        cohort.load(adapter.client, adapter.adapters)
        with cohort.use(adapter.client) as whole:
            yield whole
    finally:
        detach(model)
