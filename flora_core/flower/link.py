"""The federation between machines, on Flower (the extra ``flower``, https://flower.ai).

Flower carries the messages, with its TLS and its authentication of nodes; ``flora_core.federation.parties`` has the
server's side of a round, ``flora_core.federation.party`` a party's, ``flora_core.flower.node`` answers for one, and
``flora_core.flower.messages`` has the form in which all of it travels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, Context, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from ..data import split_held_out, split_names
from ..federation import Answers, Federation, FederationResult, Order, Parties, Tensors, Terms, spec_of
from ..runs import Event, build_model, load_recipe
from .messages import BROKEN, NodeError, pack, read, record, size_of

# Flower's number for the SuperLink, which answers for nodes that are gone.
_SUPERLINK = 1
# Its answers when a message, or the node's answer to it, was older than the deadline.
_EXPIRED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


class FlowerLink:
    """Carry a federation's orders over Flower's grid, one message each, and bring the answers.

    Args:
        grid: Flower's.
        join_timeout: Seconds that nodes have to say who they are.
        round_timeout: Seconds that a round's clients have; an answer that comes later is not used.
        callbacks: Called with a warning for each node that cannot take part.
    """

    def __init__(
        self,
        grid: Grid,
        join_timeout: float = 600.0,
        round_timeout: float = 3600.0,
        callbacks: Sequence[Callable[[Event], None]] = (),
    ):
        self.grid, self.callbacks = grid, callbacks
        self.join_timeout, self.round_timeout = join_timeout, round_timeout
        self.nodes: dict[str, int] = {}
        self.met: set[int] = set()

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
        for callback in self.callbacks:
            callback({"event": "warning", "message": text})

    def train(self, terms: Terms, orders: Sequence[Order]) -> Answers:
        """Have clients train a round on their nodes."""
        return self._exchange("train", terms, orders)

    def follow(self, terms: Terms, orders: Sequence[Order]) -> Answers:
        """Bring clients a round's change."""
        return self._exchange("evaluate", terms, orders)

    def _exchange(self, kind: str, terms: Terms, orders: Sequence[Order]) -> Answers:
        """Send each order to its client's node, wait for the answers, and read them."""
        found, shared = Answers(), _Shared()
        messages = [self._message(kind, terms, order, shared, found) for order in orders]
        replies = list(self.grid.send_and_receive(messages, timeout=self.round_timeout))
        # The SuperLink answers in its own name for a node that is gone: the message tells whose answer it is.
        asked = {message.metadata.message_id: order for message, order in zip(messages, orders, strict=True)}
        for reply in replies:
            order = asked.get(reply.metadata.reply_to_message_id)
            if order is None or (reply.has_error() and reply.error.code in _EXPIRED):
                continue
            try:
                found.read[order.client] = read(reply, order.limit_bytes)
                found.up[order.client] = size_of(reply.content)
            except BROKEN as error:
                found.lost[order.client] = str(error)
                found.unsure |= {order.client} if isinstance(error, NodeError) else set()
        for order in orders:
            if order.client not in found.read and order.client not in found.lost:
                found.lost[order.client] = f"no answer within {self.round_timeout:g} s (round-timeout)"
        return found

    def _message(self, kind: str, terms: Terms, order: Order, shared: _Shared, found: Answers) -> Message:
        values = {"terms": asdict(terms), "round": order.round, **order.values, "since": order.since}
        values["changes"] = [number for number, _ in order.changes]
        tensors: Tensors = {}
        for module, pair in order.start.items():
            tensors |= {f"start:{module}/{part}": factor for part, factor in zip("AB", pair, strict=True)}
        content = pack(values, tensors, shared.record(order))
        found.down[order.client] = size_of(content)
        node, number = self.nodes[order.client], str(order.round)
        return Message(content, dst_node_id=node, message_type=kind, group_id=number, ttl=self.round_timeout)


class _Shared:
    """Changes that several orders of one round have in common: one record, which Flower keeps and stores once."""

    def __init__(self) -> None:
        self.records: dict[tuple[int | None, int], ArrayRecord | None] = {}

    def record(self, order: Order) -> ArrayRecord | None:
        """The record of an order's changes; None if it has none."""
        place = (order.since, order.newest)
        if place not in self.records:
            named = {f"{at}:{part}": tensor for at, change in order.changes for part, tensor in change.items()}
            self.records[place] = record(named)
        return self.records[place]


def serve(
    grid: Grid,
    model: Any,
    tokenizer: Any = None,
    *,
    min_nodes: int = 1,
    join_timeout: float = 600.0,
    round_timeout: float = 3600.0,
    callbacks: Sequence[Callable[[Event], None]] = (),
    **settings: Any,
) -> FederationResult:
    """Run all rounds with the clients of Flower's nodes, or those that are left of a run that stopped.

    Args:
        grid: Flower's, as its ``ServerApp`` is given it.
        model, tokenizer: The server's copy of the base; the weights are changed in place.
        min_nodes: The run starts as soon as so many clients have answered.
        join_timeout: Seconds to wait for them.
        round_timeout: Seconds that a round's clients have; an update that comes later is not used.
        callbacks: As in ``Federation``.
        settings: strategy, config, train, target_modules, eval_data, backend, fuse: as in ``Federation``.
    Raises:
        TimeoutError: If too few clients answer in ``join_timeout`` seconds.
    """
    link = FlowerLink(grid, join_timeout, round_timeout, callbacks)
    parties = partial(Parties, link=link, min_clients_at_start=min_nodes, join_seconds=join_timeout)
    return Federation(model, tokenizer, parties, callbacks=callbacks, **settings).run()


class FloraStrategy:
    """Deprecated: ``FloraStrategy(model, tokenizer, ...).start(grid)`` is ``serve(grid, model, tokenizer, ...)``."""

    def __init__(self, model: Any, tokenizer: Any = None, **settings: Any):
        text = "flora_core.flower.FloraStrategy goes with the next release: call flora_core.flower.serve(grid, ...)"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    def start(self, grid: Grid, *_: Any, **__: Any) -> FederationResult:
        """Run all rounds; see ``serve``."""
        return serve(grid, self.model, self.tokenizer, **self.settings)


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
    names, test = split_names(recipe), split_held_out(recipe)
    model, tokenizer = build_model(recipe)
    return serve(
        grid,
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


def tell(event: Event) -> None:
    """Print what happens, a line each; it shows in Flower's log."""
    shown = ("round", "client", "message", "loss", "aggregation_error", "bytes_up", "bytes_down", "seconds", "refused")
    print(event["event"], *(f"{name}={event[name]}" for name in shown if event.get(name) is not None), flush=True)
