"""One client's part of local training: its encoded examples, the order of its batches, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..common import require
from ..config import TrainConfig
from ..data import EncodeReport, Example, check_ids, check_records, encode, epoch_order, require_examples
from ..model import ClientSpec
from .planner import Demand


@dataclass
class LocalClient:
    """One client's data and progress in this round."""

    name: str
    config: TrainConfig
    examples: list[Example]
    round: int
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    failure: str | None = None

    @property
    def per_step(self) -> int:
        """Examples of one optimizer step."""
        return self.config.batch_size * self.config.gradient_accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps of this round."""
        steps = math.ceil(len(self.examples) / self.per_step) * self.config.local_epochs
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def batch(self, step: int) -> list[Example]:
        """The examples of one optimizer step; epochs are shuffled by seed, client, round and epoch alone."""
        per_epoch = math.ceil(len(self.examples) / self.per_step)
        epoch, within = divmod(step, per_epoch)
        order = epoch_order(len(self.examples), self.config.seed, self.name, self.round, epoch)
        return [self.examples[i] for i in order[within * self.per_step : (within + 1) * self.per_step]]

    def metrics(self) -> dict[str, Any]:
        """Metrics of the client, as its events and its update carry them."""
        first, last = (self.losses[0], self.losses[-1]) if self.losses else (None, None)
        return {
            "loss_first": first,
            "loss_last": last,
            "examples": len(self.examples),
            "tokens": self.tokens,
            "steps": len(self.losses),
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / self.seconds if self.seconds else 0.0,
        }

    def demand(self, parameters: int) -> Demand:
        """Estimate this client's demand for the planner, given the numbers of its adapter."""
        lengths = sorted((len(example.input_ids) for example in self.examples), reverse=True)
        mean = math.ceil(sum(lengths) / len(lengths))
        tokens = mean * min(self.config.batch_size, len(lengths))
        return Demand(self.name, self.config, tokens, lengths[0], parameters)

    def check_ids(self, rows: int, tokenizer: Any) -> None:
        """Refuse tokens that the model has no embedding for."""
        check_ids(self.examples, rows, tokenizer, f"client {self.name!r}")

    def check_lengths(self, limit: int | None) -> None:
        """Refuse sequences longer than the model allows."""
        longest = max(len(example.input_ids) for example in self.examples)
        require(
            limit is None or longest <= limit,
            f"client {self.name!r} has a sequence of {longest} tokens, the model allows {limit}; "
            f"set max_length={limit} or shorter",
        )


def examples_of(spec: ClientSpec, config: TrainConfig, tokenizer: Any, warn: Callable[[str], None]) -> list[Example]:
    """Read and encode a client's data.

    Args:
        spec: Its data are a path, records, or encoded already.
        config: Its own settings.
        tokenizer: For what is not encoded.
        warn: Gets what is to be reported: examples that were cut or left out, unknown fields, what a template left out.
    Raises:
        ValueError: With the client's name and the record's place, for missing data, data without a tokenizer, records
            that cannot be trained on, or a client that is left without examples.
    """
    data: Any = spec.data
    require(data is not None, f"client {spec.name!r} has no data: pass a JSONL path, records or encoded examples")
    report = EncodeReport()
    if not (isinstance(data, (list, tuple)) and data and isinstance(data[0], Example)):
        require(tokenizer is not None, f"tokenizer must be given: client {spec.name!r} has plain records")
        settings = {"max_length": config.max_length, "loss_on": config.loss_on, "template": config.template}
        try:
            records = check_records(data, f"client {spec.name!r}", warn=warn)
            data = encode(records, tokenizer, report=report, **settings)
        except ValueError as error:
            named = str(error).startswith(f"client {spec.name!r}")
            raise ValueError(str(error) if named else f"client {spec.name!r}: {error}") from error
    require_examples(spec.name, data, report)
    if report:
        warn(str(report))
    return list(data)
