"""Parties: clients that train on machines of their own, and hold copies of the global model there.

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

from ..adapters import Adapters, ClientUpdate
from ..common import json_digest, listed, require
from ..config import AdapterConfig
from ..distributed import World
from ..model import ClientSpec
from ..runs import Event, EventLog, environment
from .clients import Round, RunSetup, Trained, client_done
from .protocol import Tensors, Terms, base_digest, weights_digest
from .server import Server

_ASK_AGAIN_SECONDS = 0.5
# Whose versions decide how sums are rounded; builds of one release (2.13.0+cpu) go with the device.
_LIBRARIES = ("flora_core", "torch", "transformers")
# Below every round that a log can hold: a client at it needs a snapshot.
_NOWHERE = -1
# What a safetensors header takes for one tensor, at most, beside the name.
_HEADER_BYTES = 256
_METRICS = ("loss_first", "loss_last", "tokens", "steps", "seconds", "tokens_per_s")
# What nonsense in a party's answer may raise.
_NONSENSE = (ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Order:
    """An order to one party, with what it lacks of the global model.

    Args:
        client: Its name.
        round: The round that is trained, or whose change is brought.
        since: The round that the changes start from, None for a snapshot.
        changes: (round, tensors) in order.
        values: JSON values for this party alone.
        start: Module -> the factors that it starts from; the others start fresh.
        limit_bytes: No answer may have more bytes of tensors.
    """

    client: str
    round: int
    since: int | None
    changes: Sequence[tuple[int, Tensors]]
    values: Mapping[str, Any] = field(default_factory=dict)
    start: Adapters = field(default_factory=dict)
    limit_bytes: int = 0

    @property
    def newest(self) -> int:
        """The round that the party holds once it has the changes."""
        return self.changes[-1][0] if self.changes else self.since or 0


@dataclass
class Answers:
    """Answers to orders.

    Args:
        read: Client -> the JSON values and tensors of its answer.
        lost: Client -> why there is none.
        unsure: Those that could not do what they were asked for: their copy may be another than the server thinks.
        up, down: Client -> bytes of its message and of that to it.
    """

    read: dict[str, tuple[dict[str, Any], Tensors]] = field(default_factory=dict)
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

    def train(self, terms: Terms, orders: Sequence[Order]) -> Answers:
        """Have parties train."""
        ...

    def follow(self, terms: Terms, orders: Sequence[Order]) -> Answers:
        """Bring parties a round's change; each answers with ``weights``, the digest of its copy."""
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
    known: dict[str, Any] = {"examples": examples}
    for name in _METRICS:
        value: Any = told.get(name) if isinstance(told, dict) else None
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        least = -math.inf if name.startswith("loss") else 0
        require(number and value >= least, f"its {name} must be a finite number, at least {least:g}, got {value!r:.40}")
        known[name] = value
    return known


class Parties:
    """Clients on machines of their own; see ``Clients``. ``Federation`` takes it in the place of its clients::

        Federation(model, tokenizer, partial(Parties, link=link), config=FederationConfig(rounds=3))

    Args:
        setup: The run's model and settings.
        link: Carries the messages.
        min_clients_at_start: The run begins as soon as so many have answered.
        join_seconds: How long to wait for them.
    Raises:
        TimeoutError: If too few clients answer in time.
        ValueError, TypeError: If they do not fit the settings.
    """

    on_own_machines = True

    def __init__(self, setup: RunSetup, link: Link, min_clients_at_start: int = 1, join_seconds: float = 600.0):
        count = World.current().size
        require(count == 1, f"a server of parties elsewhere is one process, got {count} processes; do without torchrun")
        require(
            setup.config.privacy is None,
            "privacy is for clients that this process asks itself; parties elsewhere would not be sent the noise",
        )
        self.setup, self.link, self.terms = setup, link, make_terms(setup)
        self.hellos = self._meet(min_clients_at_start, join_seconds)
        self.specs = {name: spec_of(self.hellos[name]) for name in ordered(self.hellos)}
        self.expected: dict[str, ClientUpdate] = {}
        # Each party keeps its own.
        self.optimizer: dict[str, Any] = {}
        self.unkept: set[str] = set()
        self.answers = Answers()

    def _meet(self, wanted: int, seconds: float) -> dict[str, dict[str, Any]]:
        hellos, deadline = self.link.meet(self.terms), time.monotonic() + seconds
        while len(hellos) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{_too_few(hellos, wanted)} They had {seconds:g} s (join_timeout).")
            time.sleep(_ASK_AGAIN_SECONDS)
            hellos |= self.link.meet(self.terms)
        return hellos

    def prepare(self) -> list[Event]:
        """Check the model with what each party says of itself; warnings."""
        self._expect(list(self.specs.values()))
        return [{"event": "warning", "message": text} for text in other_versions(self.setup.model, self.hellos)]

    def _expect(self, specs: Sequence[ClientSpec]) -> None:
        found = self.setup.expect(specs)
        self.setup.strategy.check_fits([*self.expected.values(), *found.values()])
        self.expected |= found

    def gather(self, server: Server, number: int, log: EventLog) -> list[str]:
        """Admit those who came, and name those who can be reached."""
        for name, hello in self.link.meet(self.terms).items():
            self._admit(name, hello, server, number, log)
        reached, wanted = self.link.connected(), self.setup.config.min_clients
        present = [name for name in self.specs if name in reached]
        require(len(present) >= wanted, _too_few(present, wanted))
        for name in present:
            self._place(name, server, number)
        return present

    def _admit(self, name: str, hello: dict[str, Any], server: Server, number: int, log: EventLog) -> None:
        """Take in a party that came after the start, or came back."""
        self.hellos[name] = hello
        if name in self.specs:
            return
        try:
            spec = spec_of(hello)
            self._expect([spec])
            strange = sorted(set(self.expected[name].adapters) - set(server.model.weights))
            require(not strange, f"it adapts {', '.join(strange[:3])}, which nobody did at the start")
        except ValueError as error:
            self.expected.pop(name, None)
            log.emit("warning", round=number, message=f"client {name!r} cannot join: {error}", client=name)
            return
        specs = {**self.specs, name: spec}
        self.specs = {known: specs[known] for known in ordered(specs)}
        for text in other_versions(self.setup.model, {name: hello}):
            log.emit("warning", round=number, message=text, client=name)

    def _place(self, name: str, server: Server, number: int) -> None:
        """Believe a party about the round that it holds only if its weights are those of that round."""
        hello = self.hellos.pop(name, None)
        if hello is None:
            return
        newest = max([known for known in server.log.sizes if known < number], default=0)
        known = hello["round"] <= newest
        if hello["round"] == newest:
            known = _is_same(hello["weights"], server)
        server.log.have[name] = hello["round"] if known else _NOWHERE

    def train(self, round: Round) -> Trained:
        """Have parties train a round, and read what they answer."""
        round.start(self.setup.config.rounds, len(round.names))
        self.answers = self.link.train(self.terms, [self._order(name, round) for name in round.names])
        round.server.log.have |= dict.fromkeys(self.answers.unsure, _NOWHERE)
        done = Trained(failures=self.answers.lost)
        for name in round.names:
            if name not in self.answers.read:
                continue
            try:
                done.updates.append(self._update(name, round, *self.answers.read[name]))
            except _NONSENSE as error:
                done.failures[name] = str(error)
        sent = {update.client: update.metrics for update in done.updates}
        done.metrics = {name: client_done(round.number, self.specs[name], **sent.get(name, {})) for name in round.names}
        return done

    def _order(self, name: str, round: Round) -> Order:
        server, expected = round.server, self.expected[name]
        factors = [(f"{module}/A", factor) for module, pair in expected.adapters.items() for factor in pair]
        return Order(
            name,
            round.number,
            *server.lacking(name, round.number - 1),
            values={"trainable": list(server.trainable), "keep": name not in self.unkept},
            start=server.start(name, round.number),
            limit_bytes=sum(f.numel() * f.element_size() + len(path) + _HEADER_BYTES for path, f in factors),
        )

    def _update(self, name: str, round: Round, values: Mapping[str, Any], tensors: Tensors) -> ClientUpdate:
        """Make an update of what a party sent; a frozen factor did not travel."""
        require(values.get("client") == name, f"its node answers as client {values.get('client')!r}")
        require(values.get("round") == round.number, f"it answers for round {values.get('round')!r}")
        start, adapters = round.server.start(name, round.number), {}
        modules = (path.rpartition("/")[0] for path in tensors)
        for module in dict.fromkeys([*self.expected[name].adapters, *modules]):
            own = start.get(module, (None, None))
            pair = [tensors.get(f"{module}/{part}", kept) for part, kept in zip("AB", own, strict=True)]
            adapters[module] = tuple(factor.to(round.server.model.device) for factor in pair if factor is not None)
        metrics = metrics_of(values["metrics"], len(self.specs[name].data))
        return ClientUpdate(name, adapters, dict(values["scaling"]), float(metrics["examples"]), metrics)

    def conclude(self, round: Round, good: Sequence[str], refused: Mapping[str, str], applied: bool) -> None:
        """Bring those who took part the round's change, if there is one."""
        self.unkept = (self.unkept | set(refused)) - set(good)
        if not applied:
            return
        orders = [Order(name, round.number, *round.server.lacking(name, round.number)) for name in good]
        answers = self.link.follow(self.terms, orders)
        for name in good:
            found = answers.read[name][0].get("weights") if name in answers.read else None
            same = _is_same(found, round.server)
            round.server.log.have[name] = round.number if same else _NOWHERE
            if not same:
                why = answers.lost.get(name, "its copy of the global model differs")
                text = f"client {name!r} did not follow: {why}; it is sent a snapshot when it takes part again"
                round.log.emit("warning", round=round.number, message=text, client=name)
        down = {name: self.answers.down.get(name, 0) + answers.down.get(name, 0) for name in self.answers.down}
        round.log.emit("wire", round=round.number, up=self.answers.up, down=down)


def _is_same(found: Any, server: Server) -> bool:
    """Return whether a party's digest is that of the server's weights; it may send anything."""
    weights = server.model.weights
    modules = found.get("modules") if isinstance(found, dict) else None
    if not isinstance(modules, list) or not all(isinstance(m, str) and m in weights for m in modules):
        return False
    return found == weights_digest(weights, modules)


def make_terms(setup: RunSetup) -> Terms:
    """Make a run's terms for every party, with an identifier made of the settings, the base and the folder."""
    config = setup.config
    shared = {"target_modules": setup.target_modules, "backend": setup.backend, "fuse": setup.fuse}
    terms = Terms("", config.rounds, config.seed, base_digest(setup.model), **shared, rounding=config.rounding)
    terms = replace(terms, train=asdict(setup.train))
    out = None if config.out is None else str(Path(config.out).resolve())
    return replace(terms, run=json_digest([asdict(terms), setup.strategy.name, out])[:16])


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
