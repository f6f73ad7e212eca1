"""Show a federated run while it goes on: live bars on a terminal, timed lines anywhere else.

`Federation` calls its callbacks with plain dicts ("events"), and writes the same dicts, one JSON object per line, to
`metrics.jsonl`. Every event has `event` (its kind). Rounds count from 1; round 0 is the model before training. A field
marked ? may be missing or None. Losses are means over labelled tokens; sizes are bytes; times are seconds.

run_start       rounds, strategy, clients: [{name, rank, examples, parameters?}], device?, out?, seed?,
                resumed_from?: the last round found done in `out` (its events stand in metrics.jsonl already)
round_start     round, rounds, clients: [name], cohorts?: number of cohorts the planner made
train_progress  round, step, steps: optimizer steps done and planned in this round, over all cohorts,
                loss: mean over the clients that just stepped, tokens: trained so far in this round, seconds: since
                round_start, cohort?: 1.., cohorts?            (not written to metrics.jsonl)
client_done     round, client, rank, examples, tokens, steps, loss_first, loss_last, seconds, tokens_per_s,
                refused?: why this update was not used (non-finite, too large, ...)
aggregated      round, strategy, clients: number of updates used, aggregation_error?, application_error?,
                bytes_up, bytes_down, seconds
evaluated       round, loss, examples, exact_match? (0..1), seconds,
                groups?: {skill: {loss, exact_match?, examples}}
round_end       round, rounds, applied: False if too few updates were good, seconds, peak_memory_bytes, checkpoint?: path
run_end         rounds, seconds, peak_memory_bytes, out?
warning         message, round?, client?

Unknown kinds and unknown fields are ignored, so that the list may grow.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TextIO

Event = dict[str, Any]
