"""A run's rounds, aggregated again from what its folder keeps: every client's adapter, its weight, and the rule.

    rounds/0001/<client>/   the adapter, as it was judged good
    rounds/0001/round.json  state.aggregation: strategy, options, client -> weight in the order of the sum, applied?

A round that was not applied changes nothing; a refused client has no adapter here, as it had no part in the sum.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters import WEIGHTS, Base, ClientUpdate, load_peft_adapter, read_base, read_config
from ..aggregation import Stack, aggregate, get_strategy
from ..common import parse_json, require
from ..runs import DAMAGE, ROUNDS, RUN, RunFolder, check_files, read_body


@dataclass(frozen=True)
class SavedRound:
    """One round of a run's folder.

    Args:
        number: From 1.
        folder: Its folder.
        strategy, options: The rule.
        clients: Client -> weight, in the order of the sum.
        folders: Client -> the folder of its adapter.
        applied: True where the round changed the global model.
    """

    number: int
    folder: Path
    strategy: str
    options: Mapping[str, Any]
    clients: Mapping[str, float]
    folders: Mapping[str, str]
    applied: bool

    def update(self, client: str) -> ClientUpdate:
        """Read a client's adapter.

        Raises:
            ValueError: If the client had no good update in the round, or its adapter is not what was saved.
        """
        require(
            client in self.clients,
            f"round {self.number} of {self.folder.parent.parent} has no update of client {client!r}; it has those of "
            f"{', '.join(map(repr, self.clients)) or 'no client'}",
        )
        place = self.folder / self.folders[client]
        require(
            (place / WEIGHTS).is_file(),
            f"{place} is missing, and the change of round {self.number} cannot be made without it: the run had "
            "save_adapters=False, or the folder was removed; the global model is in model/",
        )
        try:
            check_files(self.folder, self.folders[client])
        except DAMAGE as error:
            raise ValueError(f"{place} is not what the run saved ({error}); put it back") from None
        return load_peft_adapter(place, client=client, weight=self.clients[client])

    def updates(self) -> list[ClientUpdate]:
        """Read every client's adapter."""
        return [self.update(client) for client in self.clients]

    def bases(self) -> list[Base]:
        """The records of the base that the clients trained on."""
        places = [self.folder / self.folders[client] for client in self.clients]
        found = [read_base(place) for place in places if place.is_dir()]
        return [base for base in found if base is not None]

    def config(self) -> Mapping[str, Any]:
        """The PEFT config of any of the clients; empty where the round has none."""
        places = (self.folder / self.folders[client] for client in self.clients)
        return next((read_config(place) for place in places if place.is_dir()), {})


def read_rounds(run_dir: Path) -> list[SavedRound]:
    """Read what a run's folder says of each of its rounds, without the adapters.

    Raises:
        FileNotFoundError: If it is no run's folder, or no round of it is over.
        ValueError: If a round is missing or damaged, or the run was private: its noise is in every weight, and no
            client's adapter was kept.
    """
    if not (run_dir / RUN).is_file():
        raise FileNotFoundError(f"{run_dir} is no run's folder: it has no {RUN}; give the out= folder of a run")
    facts = parse_json(run_dir / RUN, (run_dir / RUN).read_bytes())
    identity = facts.get("identity", {})
    require(
        not any(name.startswith("federation.privacy.") for name in identity),
        f"{run_dir} is a private run: noise is in every weight and no client's adapter was kept, so there is no "
        "adapter of low rank; its global model is in model/",
    )
    home = RunFolder(run_dir)
    home.record.facts = facts
    numbers = sorted(int(path.name) for path in (run_dir / ROUNDS).glob("[0-9]*") if path.name.isdigit())
    if not numbers:
        raise FileNotFoundError(f"no round of {run_dir} is over, so that it holds no adapters; let the run go on")
    missing = sorted(set(range(1, numbers[-1] + 1)) - set(numbers))
    require(not missing, f"round {', '.join(map(str, missing))} of {run_dir} is missing; put it back")
    return [_round(home, number, identity) for number in numbers]


def _round(home: RunFolder, number: int, identity: Mapping[str, Any]) -> SavedRound:
    folder = home.folder(number)
    try:
        body = read_body(folder)
        rule = body["state"].get("aggregation") or _of_older(number, body["events"], identity)
        clients = dict(rule["clients"])
        folders = {client: home.record.client_folder(client) for client in clients}
        return SavedRound(number, folder, rule["strategy"], rule["options"], clients, folders, rule["applied"])
    except DAMAGE as error:
        raise ValueError(f"{folder} cannot be used ({error}); put it back") from None


def _of_older(number: int, events: Sequence[Mapping[str, Any]], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The rule of a round that an earlier version saved, from the run's settings and the round's events."""
    strategy, prefix = identity["strategy"], "federation.strategy_options."
    require(
        not get_strategy(strategy).population_options({}),
        f"an earlier version saved it without the options of strategy {strategy!r}; the global model is in model/",
    )
    mine = [event for event in events if event.get("round") == number]
    done = {event["client"]: event for event in mine if event["event"] == "client_done" and not event.get("refused")}
    how = identity.get("federation.weights")
    given = {name: identity.get(f"federation.weights.{name}") for name in done}
    weights = {name: 1.0 if how == "uniform" else given[name] or event[str(how)] for name, event in done.items()}
    return {
        "strategy": strategy,
        "options": {name.removeprefix(prefix): v for name, v in identity.items() if name.startswith(prefix)},
        "clients": {name: weights[name] for name in identity["clients"] if name in weights},
        "applied": any(event["event"] == "round_end" and event["applied"] for event in mine),
    }


@dataclass
class Change:
    """The change of the global model by some rounds.

    Args:
        base: Module -> the stacks that were added to the base, one a round.
        adapter: Module -> the stack of the global adapter beside the base, for strategies that keep one.
    """

    base: dict[str, list[Stack]] = field(default_factory=dict)
    adapter: dict[str, Stack] = field(default_factory=dict)

    def stacks(self, own: Mapping[str, Stack] | None = None) -> dict[str, list[Stack]]:
        """Module -> the stacks whose sum is the change of the base and of one adapter, the global one unless given."""
        last = self.adapter if own is None else own
        return {
            module: [*self.base.get(module, []), *([last[module]] if module in last else [])]
            for module in {**self.base, **last}
        }


def replay(rounds: Sequence[SavedRound]) -> Change:
    """Aggregate rounds again, one after another from the first.

    Raises:
        ValueError: If an adapter is missing or damaged.
    Deterministic: yes; the sums are those of the run, to the last bit on the same machine.
    """
    change, state = Change(), {}
    for one in rounds:
        if one.applied:
            result = aggregate(one.updates(), one.strategy, state, **one.options)
            state, change.adapter = result.state, dict(result.adapter)
            for module, stack in result.base_delta.items():
                change.base.setdefault(module, []).append(stack)
    return change
