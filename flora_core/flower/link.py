"""The federation between machines, on Flower (the extra ``flower``, https://flower.ai).

Flower carries the messages, with its TLS and its authentication of nodes; ``flora_core.federation.parties`` has the
server's rounds, ``flora_core.federation.party`` a party's, ``flora_core.flower.node`` answers for one, and
``flora_core.flower.messages`` has the form in which all of it travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from ..adapters import ClientUpdate
from ..common import require
from ..federation import Answers, FederationResult, RemoteFederation, Tensors, Terms, metrics_of, spec_of
from ..runs import Event, build_held_out, build_model, client_names, load_recipe
from .messages import BROKEN, NodeError, pack, read, record, size_of

# What a safetensors header takes for one tensor, at most, beside the name.
_HEADER_BYTES = 256
# Flower's number for the SuperLink, which answers for nodes that are gone.
_SUPERLINK = 1
# Its answers when a message, or the node's answer to it, was older than the deadline.
_EXPIRED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


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
        self.asked: dict[str, str] = {}
        self.changes: dict[tuple[int | None, int], ArrayRecord | None] = {}
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
        replies = list(self.grid.send_and_receive(new, timeout=self.join_timeout)) if new else []
        asked = {message.metadata.message_id: message.metadata.dst_node_id for message in new}
        for reply in replies:
            node = asked[reply.metadata.reply_to_message_id]
            if reply.metadata.src_node_id != _SUPERLINK:
                self.met.add(node)
            try:
                hello = read(reply)[0]
                name = spec_of(hello).name
            except BROKEN as error:
                self._warn(f"node {node} cannot take part: {error}")
                continue
            if (other := self.nodes.get(name, node)) != node and other in present:
                self._refuse(node, f"client {name!r} is there already, as node {other}")
                continue
            self.nodes[name], found[name] = node, hello
        return found

    def _refuse(self, node: int, reason: str) -> None:
        """Tell both sides that a node cannot take part; its answer is not waited for."""
        self._warn(f"node {node} cannot take part: {reason}")
        self.grid.push_messages([Message(pack({"refused": reason}), dst_node_id=node, message_type="query")])

    def _warn(self, text: str) -> None:
        for callback in self.settings.get("callbacks", ()):
            callback({"event": "warning", "message": text})

    def train(self, run: RemoteFederation, number: int, names: Sequence[str]) -> Answers:
        """Have clients train a round on their nodes."""
        self.federation, self.chosen, self.answers = run, list(names), Answers()
        messages = self.configure_train(number, ArrayRecord(), ConfigRecord(), self.grid)
        self.aggregate_train(number, self._exchange(messages))
        return self.answers

    def follow(self, run: RemoteFederation, number: int, names: Sequence[str], answers: Answers) -> dict[str, Any]:
        """Bring clients the round's change; client -> digest of its weights, or why there is none."""
        self.chosen = list(names)
        messages = self.configure_evaluate(number, ArrayRecord(), ConfigRecord(), self.grid)
        self.aggregate_evaluate(number, self._exchange(messages))
        return self.followed

    def _exchange(self, messages: Iterable[Message]) -> Iterable[Message]:
        """Send a message to each chosen client, and wait for the answers."""
        sent = list(messages)
        replies = self.grid.send_and_receive(sent, timeout=self.round_timeout)
        # The SuperLink answers in its own name for a node that is gone: the message tells whose answer it is.
        self.asked = {message.metadata.message_id: name for message, name in zip(sent, self.chosen, strict=True)}
        self.changes.clear()
        return replies

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each of the round's clients, with what it lacks and what it starts from."""
        server, unkept, messages = self.federation.server, self.federation.unkept, []
        for name in self.chosen:
            order = {"trainable": list(server.trainable), "keep": name not in unkept}
            tensors: Tensors = {}
            for module, pair in server.start(name, server_round).items():
                tensors |= {f"start:{module}/{part}": factor for part, factor in zip("AB", pair, strict=True)}
            messages.append(self._message("train", name, server_round, server_round - 1, order, tensors))
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each client that took part, with the round's change."""
        return [self._message("evaluate", name, server_round, server_round) for name in self.chosen]

    def _message(
        self,
        kind: str,
        name: str,
        number: int,
        newest: int,
        order: Mapping[str, Any] | None = None,
        tensors: Tensors | None = None,
    ) -> Message:
        """An order of a round to one client, with what it lacks of the newest round and what is for it alone."""
        since, changes = self.federation.server.lacking(name, newest)
        place = (since, newest)
        if place not in self.changes:
            numbered = ((f"{at}:{part}", tensor) for at, change in changes for part, tensor in change.items())
            self.changes[place] = record(dict(numbered))
        told = {"terms": asdict(self.federation.terms), "round": number, **(order or {})}
        told |= {"since": since, "changes": [at for at, _ in changes]}
        content = pack(told, tensors, self.changes[place])
        self.answers.down[name] = self.answers.down.get(name, 0) + size_of(content)
        node = self.nodes[name]
        return Message(content, dst_node_id=node, message_type=kind, group_id=str(number), ttl=self.round_timeout)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Read the updates; the federation judges and aggregates them."""
        found, lost = {}, self.answers.lost
        for name, reply in self._named(replies):
            try:
                found[name] = self._update(name, server_round, reply)
            except BROKEN as error:
                lost[name] = str(error)
                self.answers.unsure |= {name} if isinstance(error, NodeError) else set()
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
                self.followed[name] = read(reply)[0]["weights"]
            except BROKEN as error:
                self.followed[name] = str(error)
        return MetricRecord({"followed": sum(isinstance(found, dict) for found in self.followed.values())})

    def _named(self, replies: Iterable[Message]) -> Iterable[tuple[str, Message]]:
        """The answers to this round's messages that came in time, with their clients."""
        named = ((self.asked.get(reply.metadata.reply_to_message_id), reply) for reply in replies)
        late = lambda reply: reply.has_error() and reply.error.code in _EXPIRED  # noqa: E731
        return [(name, reply) for name, reply in named if name is not None and not late(reply)]

    def _update(self, name: str, number: int, reply: Message) -> ClientUpdate:
        server, expected = self.federation.server, self.federation.expected[name]
        factors = [(f"{module}/A", factor) for module, pair in expected.adapters.items() for factor in pair]
        limit = sum(f.numel() * f.element_size() + len(path) + _HEADER_BYTES for path, f in factors)
        order, tensors = read(reply, limit)
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
    recipe = load_recipe(str(values["recipe"]), str(values.get("overrides", "")).split())
    names, test = client_names(recipe), build_held_out(recipe)
    model, tokenizer = build_model(recipe)
    link = FloraStrategy(
        model,
        tokenizer,
        min_nodes=int(values.get("min-nodes", 0)) or len(names),
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
