"""The measured cases, as data: models, cohorts, tokens, dropout and targets, and the cases that each selection takes.

A selection varies one axis at a time around a base case, for the whole grid of a question takes days:

    cpu      fits ``make bench`` in a quarter of an hour on two cores
    gpu      fits ``make bench-gpu`` in nine minutes
    quick    a smoke test: everything runs once, nothing is worth publishing
    all      what the CPU or the GPU can hold of the full grid
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {"qv": ("q_proj", "v_proj"), "all": LINEARS}
TEN = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
# "few" and the model "tiny" are for trials of the machinery, and are not in the full grid.
MIXES = {"mixed": TEN, "equal16": (16,) * 10, "one": (16,), "clients64": (TEN * 7)[:64], "few": (8, 4, 1)}
TOKENS = (128, 819, 3277)
DROPOUTS = (0.0, 0.1)
SELECTIONS = ("cpu", "gpu", "quick", "all")


@dataclass(frozen=True)
class Model:
    """The shapes of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    tied: bool = False

    def linear(self, name: str) -> tuple[int, int]:
        """(N, K) of one of its linears."""
        kv = self.hidden * self.kv_heads // self.heads
        out = {"k_proj": kv, "v_proj": kv, "gate_proj": self.intermediate, "up_proj": self.intermediate}
        return out.get(name, self.hidden), self.intermediate if name == "down_proj" else self.hidden


MODELS = {
    "SmolLM2-135M": Model(576, 1536, 9, 3, 30, 49152, tied=True),
    "TinyLlama-1.1B": Model(2048, 5632, 32, 4, 22, 32000),
    "Llama-7B": Model(4096, 11008, 32, 32, 32, 32000),
    "tiny": Model(48, 80, 4, 2, 2, 97),
}


@dataclass(frozen=True)
class Case:
    """One point of the grid.

    Args:
        model: A name in ``MODELS``.
        mix: A name in ``MIXES``: the clients' ranks.
        tokens: Of each client.
        dropout: On the branch's input.
        targets: A name in ``TARGETS``.
        linear: Which linear, where a question is about one.
    """

    model: str = "SmolLM2-135M"
    mix: str = "mixed"
    tokens: int = 128
    dropout: float = 0.0
    targets: str = "all"
    linear: str = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        return MIXES[self.mix]

    @property
    def shapes(self) -> Model:
        return MODELS[self.model]

    @property
    def id(self) -> str:
        drop = f"drop{self.dropout:g}" if self.dropout else ""
        where = self.linear or ("qv" if self.targets == "qv" else "")
        return "-".join(part for part in (self.model, where, self.mix, f"{self.tokens}t", drop) if part)

    @property
    def settings(self) -> dict[str, Any]:
        return {**asdict(self), "ranks": list(self.ranks), "clients": len(self.ranks)}


def around(base: Case, **axes: Sequence[Any]) -> list[Case]:
    """The base case, and those that differ from it in one axis."""
    cases = [base, *(replace(base, **{axis: value}) for axis, values in axes.items() for value in values)]
    return list(dict.fromkeys(cases))


def full(question: str) -> Iterator[Case]:
    """Every point of a question's grid."""
    linear = question.startswith("linear")
    axes = [
        [name for name in MODELS if name != "tiny"],
        [name for name in MIXES if name != "few"],
        list(TOKENS),
        list(DROPOUTS),
        ["all"] if linear else list(TARGETS),
        list(LINEARS) if linear else [""],
    ]
    yield from (Case(*point) for point in itertools.product(*axes))


_LINEAR = Case(linear="q_proj")
_WIDE = replace(_LINEAR, model="TinyLlama-1.1B", tokens=819)
_LARGE = replace(_WIDE, model="Llama-7B")
_SMALL = Case("tiny", "few", tokens=8)
_LINEARS_CPU = around(
    _LINEAR,
    linear=["v_proj", "gate_proj", "down_proj"],
    mix=["equal16", "one", "clients64"],
    tokens=[819, 3277],
    dropout=[0.1],
    model=["TinyLlama-1.1B"],
)
_LINEARS_GPU = around(
    _LARGE, linear=["gate_proj", "down_proj"], mix=["equal16", "one", "clients64"], tokens=[128, 3277], dropout=[0.1]
) + around(_WIDE, linear=["v_proj", "gate_proj"], dropout=[0.1])
_LARGE_LAYER, _WIDE_LAYER = (replace(case, linear="") for case in (_LARGE, _WIDE))
_CHOSEN: dict[str, dict[str, list[Case]]] = {
    "linear": {
        "cpu": _LINEARS_CPU,
        "gpu": _LINEARS_GPU,
        "quick": around(replace(_SMALL, linear="v_proj"), dropout=[0.1]),
    },
    "decoder_layer": {
        "cpu": around(Case(), targets=["qv"], dropout=[0.1], mix=["one", "equal16"]),
        "gpu": around(_LARGE_LAYER, targets=["qv"], dropout=[0.1]) + around(_WIDE_LAYER, mix=["clients64"]),
        "quick": around(_SMALL, targets=["qv"]),
    },
    "cohort_rivals": {
        "cpu": [Case()],
        "gpu": [
            replace(_WIDE_LAYER, dropout=0.1),
            replace(_LARGE_LAYER, dropout=0.1),
            replace(_WIDE_LAYER, mix="clients64", tokens=128),
            _LARGE_LAYER,
            _WIDE_LAYER,
        ],
        "quick": [_SMALL],
    },
    "memory": {
        "cpu": [Case()],
        "gpu": [replace(_WIDE_LAYER, dropout=0.1), replace(_LARGE_LAYER, dropout=0.1)],
        "quick": [_SMALL],
    },
    "federated_round": {
        "cpu": [Case(targets="qv", tokens=64)],
        "gpu": [replace(_WIDE_LAYER, targets="qv")],
        "quick": [replace(_SMALL, targets="qv")],
    },
    "optimizer": {
        "cpu": around(Case(), targets=["qv"], mix=["clients64"]),
        "gpu": around(_LARGE_LAYER, targets=["qv"]),
        "quick": [_SMALL],
    },
}


def cases(question: str, selection: str) -> list[Case]:
    """The cases that a selection takes of a question.

    Raises:
        ValueError: For a question or selection that is not known.
    """
    key = "linear" if question.startswith("linear") else question
    if key not in _CHOSEN or selection not in SELECTIONS:
        raise ValueError(
            f"question must be one of {', '.join(_CHOSEN)} and selection one of {', '.join(SELECTIONS)}, "
            f"got {question!r} and {selection!r}"
        )
    if selection == "all":
        return list(full(question))
    return _CHOSEN[key][selection]


__all__ = ["LINEARS", "MIXES", "MODELS", "SELECTIONS", "TARGETS", "Case", "Model", "around", "cases", "full"]
