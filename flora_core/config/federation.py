"""Settings of a federated run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..common import check_choice, check_flag, check_number, require
from .other_names import RECIPE_KEYS, refuses_other_names
from .privacy import Privacy

ROUNDINGS = ("low_bits", "nearest", "stochastic")
# Dtypes of a saved model: as it is held, as its checkpoint has it, or by name (``flora_core.runs.saving``).
SAVE_DTYPES = ("auto", "base", "float32", "bfloat16", "float16", "float64")


@refuses_other_names(RECIPE_KEYS)
@dataclass(frozen=True)
class FederationConfig:
    """Settings of a federated run.

    Args:
        rounds: How many. More of them continue a run that is in ``out``, to the bytes that it would have had with them
            from the start; refused where a schedule or the privacy of the whole run depends on their number.
        fraction: Share of the clients that is drawn for each round.
        min_clients: At least so many are drawn; with fewer good updates a round changes nothing.
        weights: A client's share in a round: its number of ``examples``, the ``tokens`` that it trained on,
            ``uniform``, or a mapping of client to weight.
        seed: Of the draws and the initial adapters.
        out: Folder of the results. A run that stopped there goes on, a finished one gives its result. None saves
            nothing.
        eval_every: Evaluate after every so many rounds, besides before the first and after the last.
        eval_template, eval_max_length, eval_label: For ``flora_core.evaluate``; None takes the length of training.
        rounding: How rounds are written into 16-bit weights: ``low_bits`` keeps an exact fp32 master of bfloat16
            targets, ``stochastic`` and ``nearest`` round every round, which loses small updates.
        check_rows: Rows of each weight, evenly spaced, in which a round's write is compared with what was to be
            written (the application error); None for all, at the cost of a copy of the target weights.
        max_norm: Bound on the norm of a client's update (``sqrt(sum ||s B A||^2)``); beyond it, it is refused.
        outlier_factor: An update whose norm is more than so many times the median of its round is refused, where there
            are at least three; None refuses none.
        clip_update: Norm down to which larger updates are scaled; None clips none.
        deadline_s: How long remote clients are waited for in a round, in seconds; None waits for ever.
        privacy: Differential privacy of the global model towards every client (``flora_core.federation.privacy``).
        keep_snapshots: Checkpoints whose weights are kept, the newest; adapters of all rounds stay (``save_adapters``).
        save_model: Save the global model as a whole at the end.
        save_dtype: In which dtype: ``auto`` as the model is held, ``base`` as its checkpoint has it (a bfloat16 base is
            held in float32 on a CPU), or float32, bfloat16, float16, float64. The report has the rounding error.
        save_adapters: Save what every client trained in every round.
        base: How several ranks hold the model (``docs/distributed.md``): ``replicated``, each whole; ``sharded``, each
            a part of every decoder layer; ``auto`` shards where it would take more than 0.6 of a rank's memory.
        strategy_options: Options of the strategy.
    Raises:
        ValueError or TypeError: If a value is out of range.
    Example:
        >>> flora.FederationConfig(rounds=3, fraction=0.5, weights={"clinic-a": 2, "clinic-b": 1}, out="run").rounds
        3
        >>> flora.FederationConfig(rounds=0)
        Traceback (most recent call last):
        ValueError: rounds must be at least 1, got 0
    """

    rounds: int
    fraction: float = 1.0
    min_clients: int = 1
    weights: Literal["examples", "tokens", "uniform"] | Mapping[str, float] = "examples"
    seed: int = 0
    out: str | Path | None = None
    eval_every: int = 1
    eval_template: str = "auto"
    eval_max_length: int | None = None
    eval_label: str = "category"
    rounding: Literal["low_bits", "nearest", "stochastic"] = "low_bits"
    check_rows: int | None = 64
    max_norm: float | None = None
    outlier_factor: float | None = None
    clip_update: float | None = None
    deadline_s: float | None = None
    privacy: Privacy | None = None
    keep_snapshots: int = 2
    save_model: bool = True
    save_dtype: Literal["auto", "base", "float32", "bfloat16", "float16", "float64"] = "auto"
    save_adapters: bool = True
    base: Literal["auto", "replicated", "sharded"] = "auto"
    strategy_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low in (("rounds", 1), ("min_clients", 1), ("seed", 0), ("eval_every", 1), ("keep_snapshots", 1)):
            check_number(name, getattr(self, name), low, whole=True)
        for name in ("save_model", "save_adapters"):
            check_flag(name, getattr(self, name))
        check_number("fraction", self.fraction, 0, 1)
        require(self.fraction > 0, "fraction must be above 0, got 0; 1 takes every client in every round")
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("save_dtype", self.save_dtype, SAVE_DTYPES)
        check_choice("base", self.base, ("auto", "replicated", "sharded"))
        check_choice("eval_template", self.eval_template, ("auto", "chat", "prompt"))
        if self.eval_max_length is not None:
            check_number("eval_max_length", self.eval_max_length, 2, whole=True)
        if self.check_rows is not None:
            check_number("check_rows", self.check_rows, 1, whole=True)
        for name in ("max_norm", "clip_update", "deadline_s"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
                require(getattr(self, name) > 0, f"{name} must be above 0, got 0; None sets no bound")
        if self.outlier_factor is not None:
            check_number("outlier_factor", self.outlier_factor, 1)
        if self.privacy is not None:
            self._check_privacy()
        if not isinstance(self.weights, Mapping):
            check_choice("weights", self.weights, ("examples", "tokens", "uniform"))
            return
        for name, weight in self.weights.items():
            check_number(f"weights[{name!r}]", weight, 0)
            require(weight > 0, f"weights[{name!r}] must be above 0, got 0; leave a client out that is not to count")

    def _check_privacy(self) -> None:
        """Refuse settings under which one client could have more, or other, influence than is accounted for."""
        if not isinstance(self.privacy, Privacy):
            raise TypeError(f"privacy must be a Privacy, such as Privacy(clip=1.0, epsilon=8.0), got {self.privacy!r}")
        own = isinstance(self.weights, Mapping) or self.weights == "uniform"
        wrong = {
            f"weights={self.weights!r}: how much data a client has would show; use 'uniform' or a mapping": not own,
            f"min_clients={self.min_clients}: whether a round counts would show; use 1": self.min_clients > 1,
            f"outlier_factor={self.outlier_factor}: it ties clients to each other; use max_norm": self.outlier_factor,
            f"clip_update={self.clip_update}: privacy has its own clip; leave it out": self.clip_update,
            f"rounding={self.rounding!r}: the noise is written with 'low_bits'": self.rounding != "low_bits",
        }
        for text, is_wrong in wrong.items():
            require(not is_wrong, f"privacy does not go with {text}")

    def check_strategy(self, name: str) -> None:
        """Check what depends on the strategy."""
        require(
            self.privacy is None or name == "flora",
            f"privacy needs strategy 'flora', whose sum alone is released, in dense form; {name!r} would hand out more",
        )

    def check_names(self, names: Sequence[str]) -> None:
        """Check what depends on who takes part."""
        require(
            self.min_clients <= len(names),
            f"min_clients must be at most the number of clients ({len(names)}), got {self.min_clients}",
        )
        if isinstance(self.weights, Mapping):
            wrong = sorted(set(self.weights) ^ set(names))
            require(not wrong, f"weights must have one entry for each client; missing or unknown: {', '.join(wrong)}")
