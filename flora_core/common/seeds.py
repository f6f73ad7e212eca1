"""Every random number of a run comes from here: seeds are hashes of what they are for.

A seed depends on the run's seed and on names (client, module, purpose), never on who else takes part
or on the order of calls, so a client's random numbers are the same in any cohort and after a resume.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *parts: int | str) -> int:
    """Hash a seed and what it is for into a new seed in [0, 2**63).

    Args:
        seed: The run's seed, any int.
        parts: What the seed is for: names and counters. ``"1"`` and ``1`` differ.
    Returns:
        63 bits of BLAKE2b over an unambiguous encoding of the parts.
    """
    text = "\x1f".join(f"{type(part).__name__}:{len(str(part))}:{part}" for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """Make a CPU generator seeded with ``derive(seed, *parts)``."""
    return torch.Generator().manual_seed(derive(seed, *parts))


def dropout_seed(run_seed: int, client: str, step: int, module: str, round: int = 0) -> int:
    """Derive the Philox key of one client's dropout mask in one module at one optimizer step."""
    return derive(run_seed, "dropout", round, client, step, module)
