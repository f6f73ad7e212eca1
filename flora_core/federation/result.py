"""A finished run: its global model, adapter, history and final evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs import Event

if TYPE_CHECKING:
    from ..adapters import ClientUpdate


@dataclass
class FederationResult:
    """Result of a run.

    Strategies differ in where the global model is. ``flora`` and ``flora_svd`` write it into the weights of the model
    that ``Federation`` was given. The others keep an adapter beside the base: that model alone is then *not* the result
    (for most of them it is the untouched base), and must be evaluated and run inside ``apply_to``, which is right for
    every strategy. ``out/model/`` is the whole global model in every case.

    Args:
        history: A dict per round: ``round``, ``applied``, ``clients`` {name: its ``client_done`` event}, ``refused``
            {name: reason}, errors, bytes and seconds, and ``evaluation`` where there was one.
        before, after: The evaluations before the first and after the last round; None without ``eval_data``.
        adapter: The global adapter (scalings 1), for strategies that keep one beside the base: the global model is
            the model of the ``Federation``, as the run left it, plus this.
        state: What the strategy would carry to the next round.
        out: The run's folder, None if nothing was saved.
        events: All events of the run (``flora_core.runs.progress``), those before a resume too.
    """

    history: list[dict[str, Any]]
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    adapter: ClientUpdate | None
    state: dict[str, Any]
    out: Path | None
    events: list[Event]

    @contextmanager
    def apply_to(self, model: Any) -> Iterator[Any]:
        """Give the global model inside the block, whatever the strategy; the weights are not touched.

        Args:
            model: That of the ``Federation``, after the run; for strategies that leave the base as it is, also the same
                base loaded anew.
        Raises:
            ValueError: If the adapter was trained on another base.
        Example:
            >>> config = flora.FederationConfig(rounds=1)
            >>> result = flora.Federation(model, tokenizer, clients, "zero_pad", config).run()
            >>> with result.apply_to(model) as whole:
            ...     report = flora.evaluate(whole, tokenizer, clients[0].data)
            >>> report["examples"]
            5
        """
        if self.adapter is None:
            yield model
            return
        from ..model import adapter_beside

        with adapter_beside(model, self.adapter) as whole:
            yield whole


def history(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Gather a run's events into one dict per round."""
    rounds: dict[int, dict[str, Any]] = {}
    for event in events:
        number, kind = event.get("round", 0), event["event"]
        if kind == "round_start":
            rounds[number] = {"round": number, "clients": {}, "refused": {}, "evaluation": None}
        elif kind == "client_done":
            rounds[number]["clients"][event["client"]] = event
            if event.get("refused"):
                rounds[number]["refused"][event["client"]] = event["refused"]
        elif kind == "evaluated" and number:
            rounds[number]["evaluation"] = event
        elif kind in ("aggregated", "round_end"):
            rounds[number] |= {key: value for key, value in event.items() if key not in ("event", "clients")}
    return list(rounds.values())
