"""The federation between machines, on Flower (``pip install 'flora-core[flower]'``, https://flower.ai).

Flower carries the messages, with its TLS and its authentication of nodes; ``flora_core.remote`` has the server's
rounds and ``flora_core.site`` a party's. A message's tensors travel as one safetensors buffer, which keeps bfloat16
(Flower's own arrays do not), and everything else as one JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from . import recipes
from .build import build, build_clients, load_model, load_tokenizer, model_folder
from .checks import require
from .device import pick_device, pick_dtype
from .federation_config import FederationResult
from .history import Event
from .remote import Answers, RemoteFederation, metrics_of, spec_of
from .site import Site, Tensors, Terms
from .update import ClientUpdate

_PAYLOAD, _ORDER = "payload", "order"
# What a safetensors header takes for one tensor, at most, beside the name.
_HEADER_BYTES = 256
_BROKEN = (ValueError, KeyError, TypeError, AttributeError)


def pack(order: Mapping[str, Any], tensors: Tensors | None = None) -> RecordDict:
    """Make a message's content of JSON values and tensors of any dtype."""
    from safetensors.torch import save

    content = RecordDict({_ORDER: ConfigRecord({"json": json.dumps(order)})})
    if tensors:
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        content[_PAYLOAD] = ArrayRecord({"tensors": Array("uint8", (len(data),), "safetensors", data)})
    return content


def unpack(content: RecordDict, limit_bytes: int | None = None) -> tuple[dict[str, Any], Tensors]:
    """Read what ``pack`` made.

    Args:
        content: A message's content.
        limit_bytes: Refuse more than so many bytes of tensors, before they are read.
    Raises:
        ValueError: If it is not what ``pack`` makes, or larger.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    parts: Any = content
    try:
        order, data = json.loads(str(parts[_ORDER]["json"])), _data(parts)
        fits = limit_bytes is None or len(data) <= limit_bytes
        require(fits, f"its payload has {len(data)} bytes, and its configuration announced at most {limit_bytes}")
        return order, load(data) if data else {}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"its message is damaged, or no message of this program ({error})") from None


def _data(content: Any) -> bytes:
    return b"" if _PAYLOAD not in content else content[_PAYLOAD]["tensors"].data


def size_of(content: Any) -> int:
    """Bytes of a message's content, a ``RecordDict``, without what Flower wraps around it."""
    return len(_data(content)) + len(str(content[_ORDER]["json"]))


class FloraStrategy(Strategy):
    """Flower's strategy interface to a federation: what is sent to each node, and what comes back.

    ``configure_train`` and ``configure_evaluate`` make one message for each client, with what that very client lacks;
    ``aggregate_train`` reads the adapters, which ``RemoteFederation`` judges and aggregates; ``configure_evaluate``
    brings those who took part the round's change.

    Args:
        model, tokenizer: The server's copy of the base; the weights are changed in place.
        min_nodes: The run starts as soon as so many clients have answered.
        join_timeout: Seconds to wait for them.
        round_timeout: Seconds that a round's clients have; an update that comes later is not used.
        settings: strategy, config, train, target_modules, eval_data, callbacks, backend, fuse: as in ``Federation``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        min_nodes: int = 1,
        join_timeout: float = 600.0,
        round_timeout: float = 3600.0,
        **settings: Any,
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.min_nodes, self.join_timeout, self.round_timeout = min_nodes, join_timeout, round_timeout
        self.nodes: dict[str, int] = {}
        self.met: set[int] = set()
        self.chosen: list[str] = []
        self.followed: dict[str, Any] = {}
        self.answers = Answers()
        self.grid: Grid
        self.federation: RemoteFederation

    def summary(self) -> None:
        """Flower's log asks for it; the federation's events say more."""

    def start(self, grid: Grid, *_: Any, **__: Any) -> FederationResult:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run all rounds, or those that are left of a run that stopped.

        Raises:
            TimeoutError: If too few clients answer in ``join_timeout`` seconds.
        """
        self.grid = grid
        waiting = {"min_clients_at_start": self.min_nodes, "join_seconds": self.join_timeout}
        return RemoteFederation(self, self.model, self.tokenizer, **waiting, **self.settings).run()

    def connected(self) -> set[str]:
        """Names of the clients whose nodes are connected."""
        present = set(self.grid.get_node_ids())
        return {name for name, node in self.nodes.items() if node in present}

    def meet(self, terms: Terms) -> dict[str, dict[str, Any]]:
        """Ask every node that is not known yet who it is and what it has; client -> its answer."""
        present = set(self.grid.get_node_ids())
        self.met &= present
        content, found = pack({"terms": asdict(terms)}), {}
        new = [Message(content, dst_node_id=node, message_type="query") for node in sorted(present - self.met)]
        for reply in self.grid.send_and_receive(new, timeout=self.join_timeout) if new else ():
            node = reply.metadata.src_node_id
            self.met.add(node)
            try:
                hello = _read(reply)[0]
                name, other = spec_of(hello).name, self.nodes.get(hello["client"], node)
                require(other == node or other not in present, f"client {name!r} is there already, as node {other}")
            except _BROKEN as error:
                self._warn(f"node {node} cannot take part: {error}")
                continue
            self.nodes[name], found[name] = node, hello
        return found

    def _warn(self, text: str) -> None:
        for callback in self.settings.get("callbacks", ()):
            callback({"event": "warning", "message": text})

    def train(self, run: RemoteFederation, number: int, names: Sequence[str]) -> Answers:
        """Have clients train a round on their nodes."""
        self.federation, self.chosen, self.answers = run, list(names), Answers()
        messages = self.configure_train(number, ArrayRecord(), ConfigRecord(), self.grid)
        self.aggregate_train(number, self.grid.send_and_receive(messages, timeout=self.round_timeout))
        return self.answers

    def follow(self, run: RemoteFederation, number: int, names: Sequence[str], answers: Answers) -> dict[str, Any]:
        """Bring clients the round's change; client -> digest of its weights, or why there is none."""
        self.chosen = list(names)
        messages = self.configure_evaluate(number, ArrayRecord(), ConfigRecord(), self.grid)
        self.aggregate_evaluate(number, self.grid.send_and_receive(messages, timeout=self.round_timeout))
        return self.followed

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each of the round's clients, with what it lacks and what it starts from."""
        server, unkept, messages = self.federation.server, self.federation.unkept, []
        for name in self.chosen:
            order, tensors = self._lacking(name, server_round - 1)
            order |= {"round": server_round, "trainable": list(server.trainable), "keep": name not in unkept}
            for module, pair in server.start(name, server_round).items():
                tensors |= {f"start:{module}/{part}": factor for part, factor in zip("AB", pair, strict=True)}
            messages.append(self._message("train", name, order, tensors))
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each client that took part, with the round's change."""
        messages = []
        for name in self.chosen:
            order, tensors = self._lacking(name, server_round)
            messages.append(self._message("evaluate", name, {**order, "round": server_round}, tensors))
        return messages

    def _lacking(self, name: str, newest: int) -> tuple[dict[str, Any], Tensors]:
        since, changes = self.federation.server.lacking(name, newest)
        tensors = {f"{number}:{part}": tensor for number, change in changes for part, tensor in change.items()}
        order = {"terms": asdict(self.federation.terms), "since": since, "changes": [number for number, _ in changes]}
        return order, tensors

    def _message(self, kind: str, name: str, order: dict[str, Any], tensors: Tensors) -> Message:
        content = pack(order, tensors)
        self.answers.down[name] = self.answers.down.get(name, 0) + size_of(content)
        node, group = self.nodes[name], str(order["round"])
        return Message(content, dst_node_id=node, message_type=kind, group_id=group, ttl=self.round_timeout)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Read the updates; the federation judges and aggregates them."""
        found, lost = {}, self.answers.lost
        for name, reply in self._named(replies):
            try:
                found[name] = self._update(name, server_round, reply)
            except _BROKEN as error:
                lost[name] = str(error)
        for name in self.chosen:
            if name not in found and name not in lost:
                lost[name] = f"no answer within {self.round_timeout:g} s (round-timeout)"
        self.answers.updates = [found[name] for name in self.chosen if name in found]
        return None, MetricRecord({"updates": len(found), "lost": len(lost)})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Note who has the round; the others are sent it when they take part again."""
        self.followed = dict.fromkeys(self.chosen, f"no answer within {self.round_timeout:g} s (round-timeout)")
        for name, reply in self._named(replies):
            try:
                self.followed[name] = _read(reply)[0]["weights"]
            except _BROKEN as error:
                self.followed[name] = str(error)
        return MetricRecord({"followed": sum(isinstance(found, dict) for found in self.followed.values())})

    def _named(self, replies: Iterable[Message]) -> Iterable[tuple[str, Message]]:
        names = {self.nodes[name]: name for name in self.chosen}
        return [(names[reply.metadata.src_node_id], reply) for reply in replies if reply.metadata.src_node_id in names]

    def _update(self, name: str, number: int, reply: Message) -> ClientUpdate:
        server, expected = self.federation.server, self.federation.expected[name]
        factors = [(f"{module}/A", factor) for module, pair in expected.adapters.items() for factor in pair]
        limit = sum(f.numel() * f.element_size() + len(path) + _HEADER_BYTES for path, f in factors)
        order, tensors = _read(reply, limit)
        self.answers.up[name] = size_of(reply.content)
        require(order.get("client") == name, f"its node answers as client {order.get('client')!r}")
        require(order.get("round") == number, f"it answers for round {order.get('round')!r}")
        start, adapters = server.start(name, number), {}
        for module in dict.fromkeys([*expected.adapters, *(path.rpartition("/")[0] for path in tensors)]):
            own = start.get(module, (None, None))
            pair = [tensors.get(f"{module}/{part}", kept) for part, kept in zip("AB", own, strict=True)]
            adapters[module] = tuple(factor.to(server.device) for factor in pair if factor is not None)
        metrics = metrics_of(order["metrics"], len(self.federation.specs[name].data))
        return ClientUpdate(name, adapters, dict(order["scaling"]), float(metrics["examples"]), metrics)


def _read(reply: Message, limit_bytes: int | None = None) -> tuple[dict[str, Any], Tensors]:
    """A reply's content; ``ValueError`` with the node's own reason if it failed."""
    if reply.has_error():
        raise ValueError(f"its node failed: {reply.error.reason or f'code {reply.error.code}'}")
    order, tensors = unpack(reply.content, limit_bytes)
    require("error" not in order, f"its node says: {order.get('error')}")
    return order, tensors


def server_app() -> ServerApp:
    """Flower's server side: run the recipe that ``flwr run --run-config 'recipe="..."'`` names.

    Run config: ``recipe`` (a file, or the name of a packaged one), ``overrides`` (``key=value`` parts, separated by
    spaces), ``min-nodes`` (0: the recipe's number of clients), ``join-timeout`` and ``round-timeout`` in seconds.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_server(grid, context.run_config)

    return app


def run_server(grid: Grid, values: Mapping[str, Any]) -> FederationResult:
    """Run a recipe on Flower's grid; ``values`` is the run config (see ``server_app``)."""
    recipe = recipes.load(str(values["recipe"]), str(values.get("overrides", "")).split())
    model, tokenizer, clients, test = build(recipe)
    link = FloraStrategy(
        model,
        tokenizer,
        min_nodes=int(values.get("min-nodes", 0)) or len(clients),
        join_timeout=float(values.get("join-timeout", 600)),
        round_timeout=float(values.get("round-timeout", 3600)),
        strategy=recipe.strategy,
        config=recipe.federation,
        train=recipe.train,
        target_modules=recipe.target_modules,
        eval_data=test or None,
        callbacks=[tell],
    )
    return link.start(grid)


def tell(event: Event) -> None:
    """Print what happens, a line each; it shows in Flower's log."""
    shown = ("round", "client", "message", "loss", "aggregation_error", "bytes_up", "bytes_down", "seconds", "refused")
    print(event["event"], *(f"{name}={event[name]}" for name in shown if event.get(name) is not None), flush=True)


def client_app() -> ClientApp:
    """Flower's client side: answer for the client that the node's configuration names.

    Node config (``flower-supernode --node-config '...'``): ``recipe`` and ``overrides`` as for the server, of which
    model, data and adapters count; ``client`` (its name in that recipe) and ``folder`` (where its copies are kept).
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _answer(message, context, lambda site, order, _: (site.begin(order.terms), {}))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(message, context, _train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(message, context, _follow)

    return app


@dataclass
class _Order:
    """A message's JSON, at a node."""

    terms: Terms
    round: int = 0
    since: int | None = None
    changes: list[int] = field(default_factory=list)
    trainable: list[str] = field(default_factory=list)
    keep: bool = True


_SITES: dict[tuple[str, ...], Site] = {}


def site_of(values: Mapping[str, Any]) -> Site:
    """The party that a node's configuration describes; it is kept for the process's next message.

    Raises:
        ValueError: If the configuration lacks something, or the recipe has no such client.
    """
    for name in ("recipe", "client", "folder"):
        require(bool(values.get(name)), f"the node's configuration lacks {name}: flower-supernode --node-config")
    key = tuple(str(values.get(name, "")) for name in ("recipe", "overrides", "client", "folder"))
    if key not in _SITES:
        recipe = recipes.load(key[0], key[1].split())
        specs = {spec.name: spec for spec in build_clients(recipe)[0]}
        require(key[2] in specs, f"the node's recipe has no client {key[2]!r}; it has {', '.join(specs)}")
        device, folder = pick_device(recipe.device), model_folder(recipe.model)
        model = load_model(folder, device, pick_dtype(recipe.dtype, device))
        _SITES[key] = Site(model, load_tokenizer(folder), specs[key[2]], Path(key[3]).expanduser())
    return _SITES[key]


Act = Callable[[Site, _Order, Tensors], tuple[dict[str, Any], Tensors]]


def _answer(message: Message, context: Context, act: Act) -> Message:
    """Do what a message asks for; what cannot be done is answered with its reason."""
    try:
        values, tensors = unpack(message.content)
        order = _Order(**{**values, "terms": Terms(**values["terms"])})
        site = site_of(context.node_config)
        site.begin(order.terms)
        reply, sent = act(site, order, tensors)
    except (ValueError, TypeError, KeyError, OSError) as error:
        return Message(pack({"error": f"{type(error).__name__}: {error}"}), reply_to=message)
    return Message(pack({"client": site.spec.name, "round": order.round, **reply}, sent), reply_to=message)


def _follow(site: Site, order: _Order, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    changes: dict[int, Tensors] = {number: {} for number in order.changes}
    for name, tensor in tensors.items():
        number, _, part = name.partition(":")
        if number != "start":
            changes[int(number)][part] = tensor
    site.receive(order.terms, order.since, list(changes.items()))
    return {"weights": site.digest()}, {}


def _train(site: Site, order: _Order, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    _follow(site, order, tensors)
    given = {name.removeprefix("start:"): tensor for name, tensor in tensors.items() if name.startswith("start:")}
    modules = dict.fromkeys(name.rpartition("/")[0] for name in given)
    start = {module: (given[f"{module}/A"], given[f"{module}/B"]) for module in modules}
    update = site.train(order.terms, order.round, order.trainable, start, order.keep)
    # A factor that is frozen, and came from the server, does not travel back.
    sent = {
        f"{module}/{part}": factor
        for module, pair in update.adapters.items()
        for part, factor in zip("AB", pair, strict=True)
        if part in order.trainable or module not in start
    }
    return {"metrics": update.metrics, "scaling": update.scaling}, sent


__all__ = ["FloraStrategy", "client_app", "pack", "run_server", "server_app", "site_of", "unpack"]
