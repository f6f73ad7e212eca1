"""Exceptions of several packages: a stop on request, and memory that ran out."""

from __future__ import annotations

import torch

# What torch says on a CPU, where it has no type of its own for this.
_CPU_WORDS = ("can't allocate memory", "cannot allocate memory", "not enough memory")


class Stopped(SystemExit):
    """A run stopped as SIGTERM asked, and saved where it is; an uncaught one ends the process with exit code 0."""

    def __init__(self, text: str):
        super().__init__(0)
        self.text = text

    def __str__(self) -> str:
        return self.text


class CrowdedError(MemoryError):
    """Memory does not hold one sequence beside these clients' adapters, gradients and moments."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_WORDS)


def crowded_text(round: int, step: int, what: str) -> str:
    """Say where memory ran out, and what is done about it; ``round`` and ``step`` count from 0."""
    text = f"memory ran out at step {step + 1} of round {round + 1}: {what}"
    return f"{text}; a token_budget or memory_budget_gb avoids this"
