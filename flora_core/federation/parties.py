"""A federation whose clients train on their own machines: the rounds of ``Federation``, with messages for training.

What a party lacks of the global model is sent with its orders; those who took part in a round are sent its change at
once, so that they end with the global model. How messages travel is the link's business (``flora_core.flower``).

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..adapters import Adapters, ClientUpdate, RoundResult
from ..common import json_digest, listed, require
from ..config import AdapterConfig, FederationConfig, TrainConfig
from ..distributed import ranks
from ..model import ClientSpec
from ..runs import Event, environment
from .judge import promised
from .protocol import Tensors, Terms, base_digest, dense_tensors, round_tensors, weights_digest
from .rounds import Federation
from .server import Server

_ASK_AGAIN_SECONDS = 0.5
# Whose versions decide how sums are rounded; builds of one release (2.13.0+cpu) go with the device.
_LIBRARIES = ("flora_core", "torch", "transformers")
# Below every round that a log can hold: a client at it needs a snapshot.
_NOWHERE = -1


@dataclass
class Answers:
    """Answers of a round's clients.

    Args:
        updates: Those that could be read, in the order of the round's clients.
        lost: Client -> why there is none.
        unsure: Those that could not do what they were asked for: their copy may be another than the server thinks.
        up, down: Client -> bytes of its message and of those to it.
    """

    updates: list[ClientUpdate] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)


class Link(Protocol):
    """Transport of messages between the server and the parties."""

    def meet(self, terms: Terms) -> dict[str, dict[str, Any]]:
        """Ask the parties that joined since the last call; client -> what ``Site.begin`` says of it."""
        ...

    def connected(self) -> set[str]:
        """Names of the clients that can be reached."""
        ...

    def train(self, run: RemoteFederation, number: int, names: Sequence[str]) -> Answers:
        """Have clients train a round."""
        ...

    def follow(self, run: RemoteFederation, number: int, names: Sequence[str], answers: Answers) -> dict[str, Any]:
        """Send clients the round's change; client -> digest of its weights, or the text of an error."""
        ...


@dataclass(frozen=True)
class _Away:
    """Data that stay with their party."""

    examples: int

    def __len__(self) -> int:
        return self.examples

    def __iter__(self) -> Any:
        return iter(())


def spec_of(hello: Mapping[str, Any]) -> ClientSpec:
    """The client that a party says it is; ``ValueError``, ``TypeError`` or ``KeyError`` for nonsense."""
    examples, number, weights = hello["examples"], hello["round"], hello["weights"]
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (examples, number))
    require(whole and examples > 0, f"examples and round must be whole numbers, got {examples!r} and {number!r}")
    require(isinstance(weights, dict), f"weights must be a digest, got {type(weights).__name__}")
    return ClientSpec(hello["client"], _Away(examples), AdapterConfig(**hello["adapter"]), hello["train"])


def metrics_of(told: Any, examples: int) -> dict[str, Any]:
    """Read a client's metrics; only finite numbers under known names are kept.

    Args:
        told: What it sent.
        examples: How many it announced before the run: its share in the sum may depend on them.
    Raises:
        ValueError: If a number is missing, negative or not finite.
    """
    known: dict[str, Any] = {}
    for name in _nothing(0):
        value: Any = told.get(name) if isinstance(told, dict) else None
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        least = -math.inf if name.startswith("loss") else 0
        require(number and value >= least, f"its {name} must be a finite number, at least {least:g}, got {value!r:.40}")
        known[name] = value
    return {**known, "examples": examples}


class RemoteServer(Server):
    """A server that keeps what each round changed, to send it."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.changes: dict[int, Tensors] = {}

    def apply(self, updates: Sequence[ClientUpdate], number: int) -> RoundResult:
        """As ``Server.apply``; no party has the change yet."""
        had = {update.client: self.log.have.get(update.client, 0) for update in updates}
        result = super().apply(updates, number)
        self.log.have.update(had)
        self.changes[number] = round_tensors(result, self.weights, self.low_bits)
        self.changes = {known: change for known, change in self.changes.items() if known in self.log.sizes}
        return result

    def lacking(self, client: str, newest: int) -> tuple[int | None, list[tuple[int, Tensors]]]:
        """Compute what a client needs to hold the newest round.

        Returns:
            The round that the changes start from, None for a snapshot; and (round, tensors) in order.
        """
        since, (kind, _, rounds) = self.log.have.get(client, 0), self.log.missed(client)
        if kind == "none":
            return since, []
        if kind == "log" and all(number in self.changes for number in rounds):
            return since, [(number, self.changes[number]) for number in rounds]
        whole: Tensors = {}
        for module in self.weights:
            whole |= dense_tensors(module, self.weights, self.low_bits)
        return None, [(newest, whole)]

    def start(self, client: str, number: int) -> Adapters:
        """Module -> factors that a client is to start a round from; the others start fresh."""
        own, start = self.expected[client], {}
        if self.strategy.shared_start:
            for module, A_PK in self._common_start(number).items():
                if module in own.adapters:
                    R, N = own.adapters[module][1].shape
                    start[module] = (A_PK[:R], torch.zeros(R, N))
        return start | (self.strategy.next_adapter(self.state, client, own.ranks, own.scaling) or {})


class RemoteFederation(Federation):
    """Fine-tune one model with parties that keep their data.

    Args:
        link: Carries the messages.
        model, tokenizer: The server's copy of the base; the weights are changed in place.
        min_clients_at_start: The run begins as soon as so many have answered.
        join_seconds: How long to wait for them.
        settings: The other arguments of ``Federation``: strategy, config, train, target_modules, eval_data, ...
    Raises:
        TimeoutError: If too few clients answer in time.
        ValueError, TypeError: If the settings do not fit the clients or the strategy.
    """

    server: RemoteServer

    def __init__(
        self,
        link: Link,
        model: Any,
        tokenizer: Any = None,
        *,
        min_clients_at_start: int = 1,
        join_seconds: float = 600.0,
        **settings: Any,
    ):
        count = ranks().size
        require(count == 1, f"a server of parties elsewhere is one process, got {count} ranks; do without torchrun")
        self.link, self.terms = link, make_terms(model, **settings)
        self.hellos = self._gather(min_clients_at_start, join_seconds)
        self.present, self.unkept = ordered(self.hellos), set[str]()
        super().__init__(model, tokenizer, [spec_of(self.hellos[name]) for name in self.present], **settings)

    def _gather(self, wanted: int, seconds: float) -> dict[str, dict[str, Any]]:
        hellos, deadline = self.link.meet(self.terms), time.monotonic() + seconds
        while len(hellos) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{_too_few(hellos, wanted)} They had {seconds:g} s (join_timeout).")
            time.sleep(_ASK_AGAIN_SECONDS)
            hellos |= self.link.meet(self.terms)
        return hellos

    def _check_clients(self) -> list[Event]:
        self.expected = {}
        self._expect(list(self.specs.values()))
        config = self.config
        settings = (self.strategy.name, config.strategy_options, config.rounding, config.seed, config.check_rows)
        self.server = RemoteServer(self.model, self.expected, *settings)
        self.server.refuse_penalties(list(self.expected))
        self.round, self.optimizer, self.paused = 0, {}, {}
        self.log.events = []
        return [{"event": "warning", "message": text} for text in other_versions(self.model, self.hellos)]

    def _expect(self, specs: Sequence[ClientSpec]) -> None:
        with self._attached(specs) as cohort:
            found = {name: promised(cohort, name) for name in cohort.names}
        for name, update in found.items():
            require(bool(update.adapters), f"client {name!r} has rank 0 everywhere; leave it out")
        self.strategy.check_fits([*self.expected.values(), *found.values()])
        self.expected |= found

    def _identity(self) -> dict[str, Any]:
        # Parties come and go within one run.
        return {name: value for name, value in super()._identity().items() if not name.startswith("clients")}

    def sampled(self, number: int) -> list[str]:
        """The clients of a round among those who are there, in their order."""
        everybody, self.specs = self.specs, {name: self.specs[name] for name in self.present}
        try:
            return super().sampled(number)
        finally:
            self.specs = everybody

    def _run_round(self) -> None:
        for name, hello in self.link.meet(self.terms).items():
            self._admit(name, hello)
        reached = self.link.connected()
        self.present = [name for name in self.specs if name in reached]
        wanted = self.config.min_clients
        require(len(self.present) >= wanted, _too_few(self.present, wanted))
        for name in self.present:
            self._place(name)
        super()._run_round()

    def _admit(self, name: str, hello: dict[str, Any]) -> None:
        """Take in a party that came after the start, or came back."""
        self.hellos[name] = hello
        if name in self.specs:
            return
        try:
            spec = spec_of(hello)
            self._expect([spec])
            strange = sorted(set(self.expected[name].adapters) - set(self.server.weights))
            require(not strange, f"it adapts {', '.join(strange[:3])}, which nobody did at the start")
        except ValueError as error:
            self.expected.pop(name, None)
            self.log.emit("warning", round=self.round + 1, message=f"client {name!r} cannot join: {error}", client=name)
            return
        specs = {**self.specs, name: spec}
        self.specs = {known: specs[known] for known in ordered(specs)}
        for text in other_versions(self.model, {name: hello}):
            self.log.emit("warning", round=self.round + 1, message=text, client=name)

    def _place(self, name: str) -> None:
        """Believe a party about the round that it holds only if its weights are those of that round."""
        hello = self.hellos.pop(name, None)
        if hello is None:
            return
        newest = max([number for number in self.server.log.sizes if number <= self.round], default=0)
        known = hello["round"] <= newest
        if hello["round"] == newest:
            known = self._is_same(hello["weights"])
        self.server.log.have[name] = hello["round"] if known else _NOWHERE

    def _is_same(self, found: Any) -> bool:
        """Return whether a party's digest is that of the server's weights; it may send anything."""
        modules = found.get("modules") if isinstance(found, dict) else None
        if not isinstance(modules, list) or not all(isinstance(m, str) and m in self.server.weights for m in modules):
            return False
        return found == weights_digest(self.server.weights, modules)

    def _train(self, number: int, names: Sequence[str]) -> list[ClientUpdate]:
        self.log.emit("round_start", round=number, rounds=self.config.rounds, clients=list(names), cohorts=len(names))
        self.answers = self.link.train(self, number, names)
        good, refused = self._judge(self.answers.updates, names)
        refused |= self.answers.lost
        self.server.log.have |= dict.fromkeys(self.answers.unsure, _NOWHERE)
        self.unkept = (self.unkept | set(refused)) - {update.client for update in good}
        sent = {update.client: update for update in self.answers.updates}
        for name, reason in refused.items():
            self._set_aside(number, name, reason, sent.get(name))
        for name in names:
            spec, reason = self.specs[name], {"refused": refused[name]} if name in refused else {}
            metrics = {**_nothing(len(spec.data)), **(sent[name].metrics if name in sent else {})}
            self.log.emit("client_done", round=number, client=name, rank=spec.adapter.rank, **{**metrics, **reason})
        return good

    def _apply(self, number: int, updates: Sequence[ClientUpdate], late: Mapping[str, tuple[str, int]]) -> None:
        super()._apply(number, updates, late)
        names = [update.client for update in updates]
        for name, found in self.link.follow(self, number, names, self.answers).items():
            same = self._is_same(found)
            self.server.log.have[name] = number if same else _NOWHERE
            if not same:
                why = "its copy of the global model differs" if isinstance(found, dict) else found
                text = f"client {name!r} did not follow: {why}; it is sent a snapshot when it takes part again"
                self.log.emit("warning", round=number, message=text, client=name)
        self.log.emit("wire", round=number, up=self.answers.up, down=self.answers.down)


def make_terms(model: Any, config: FederationConfig, train: TrainConfig | None = None, **settings: Any) -> Terms:
    """Make a run's terms for every party, with an identifier made of the settings, the base and the folder."""
    shared = {name: settings[name] for name in ("target_modules", "backend", "fuse") if name in settings}
    terms = Terms("", config.rounds, config.seed, base_digest(model), **shared, rounding=config.rounding)
    terms = replace(terms, train=asdict(train or TrainConfig()))
    out = None if config.out is None else str(Path(config.out).resolve())
    return replace(terms, run=json_digest([asdict(terms), settings.get("strategy"), out])[:16])


def other_versions(model: Any, hellos: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning for each release of a library that clients have and the server has not: the last bits depend on it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    mine = environment(model.device)
    for client in ordered(hellos):
        told = hellos[client].get("environment")
        for library in _LIBRARIES:
            theirs, ours = (
                str(side.get(library) if isinstance(side, dict) else None)[:40].partition("+")[0]
                for side in (told, mine)
            )
            if theirs != ours:
                found.setdefault((library, theirs, ours), []).append(client)
    return [
        f"{library} is {theirs} at {listed(clients)}, and {ours} at the server: results may differ in the last bits "
        "from those of one machine; install the same version on both sides where that matters"
        for (library, theirs, ours), clients in found.items()
    ]


def ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of people: client-2 before client-10."""

    def key(name: str) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", name)
        return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]

    return sorted(names, key=key)


def _too_few(names: Iterable[str], wanted: int) -> str:
    known = ordered(names)
    return (
        f"{len(known)} clients are connected ({', '.join(known) or 'none'}), and {wanted} are needed: start more "
        "nodes, or lower min-nodes and federation.min_clients."
    )


def _nothing(examples: int) -> dict[str, Any]:
    """The metrics of a client that sent nothing usable."""
    zero = {"loss_first": None, "loss_last": None, "tokens": 0, "steps": 0, "seconds": 0.0, "tokens_per_s": 0.0}
    return {"examples": examples, **zero}
