"""A party's side of a federation on Flower: ``flora_core.federation.party`` answers what Flower's messages ask for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ..common import folder_names, pick_device, pick_dtype, require
from ..data import split_names
from ..federation import Site, Tensors, Terms
from ..runs import build_client, load_model, load_recipe, load_tokenizer, model_folder
from .messages import pack, unpack


def client_app() -> ClientApp:
    """Flower's client side: answer for the client that the node's configuration names.

    Node config (``flower-supernode --node-config '...'``): ``recipe`` and ``overrides`` as for the server, of which
    model, data and adapters count; ``client`` (its name in that recipe) and ``folder`` (where its copies are kept).
    In Flower's simulation, where nodes have numbers instead, node i is client i of the run's recipe.
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


_log = logging.getLogger(__name__)
_SITES: dict[tuple[str, ...], Site] = {}


def settings_of(context: Context) -> Mapping[str, Any]:
    """The node's configuration; in Flower's simulation what the run's recipe says of the client of this number.

    Raises:
        ValueError: If a simulation has more nodes than the recipe has clients, or the recipe no ``out``.
    """
    node, run = context.node_config, context.run_config
    if "partition-id" not in node or "recipe" in node:
        return node
    text, overrides = str(run["recipe"]), str(run.get("overrides", ""))
    recipe = load_recipe(text, overrides.split())
    names, number = split_names(recipe), int(node["partition-id"])
    out = recipe.federation.out
    require(number < len(names), f"the recipe has {len(names)} clients, and the simulation more nodes: num-supernodes")
    require(out is not None, "a simulated node keeps its copy beside the run's folder: set out in the recipe")
    client = names[number]
    folder = f"{out}-sites/{folder_names(names)[client]}"
    return {"recipe": text, "overrides": overrides, "client": client, "folder": folder}


def site_of(values: Mapping[str, Any]) -> Site:
    """The party that a node's configuration describes; it is kept for the process's next message.

    Raises:
        ValueError: If the configuration lacks something, or the recipe has no such client.
    """
    for name in ("recipe", "client", "folder"):
        require(bool(values.get(name)), f"the node's configuration lacks {name}: flower-supernode --node-config")
    key = tuple(str(values.get(name, "")) for name in ("recipe", "overrides", "client", "folder"))
    if key not in _SITES:
        # A process of Flower's simulation answers for many clients: one model at a time.
        _SITES.clear()
        # How many rounds there are is the server's business; a site's recipe need not say.
        own = [word for word in key[1].split() if not word.startswith("federation.rounds=")]
        recipe = load_recipe(key[0], ["federation.rounds=1", *own])
        spec = build_client(recipe, key[2])
        device, folder = pick_device(recipe.device), model_folder(recipe.model)
        model = load_model(folder, device, pick_dtype(recipe.dtype, device), recipe.trust_remote_code)
        tokenizer = load_tokenizer(folder, recipe.trust_remote_code)
        _SITES[key] = Site(model, tokenizer, spec, Path(key[3]).expanduser())
    return _SITES[key]


Act = Callable[[Site, _Order, Tensors], tuple[dict[str, Any], Tensors]]


def _answer(message: Message, context: Context, act: Act) -> Message:
    """Do what a message asks for; what cannot be done is answered with its reason, and said here too."""
    try:
        values, tensors = unpack(message.content)
        require("refused" not in values, f"the server refuses this node: {values.get('refused')}")
        order = _Order(**{**values, "terms": Terms(**values["terms"])})
        site = site_of(settings_of(context))
        site.begin(order.terms)
        reply, sent = act(site, order, tensors)
    except (ValueError, TypeError, KeyError, OSError) as error:
        _log.error(error)
        return Message(pack({"error": f"{type(error).__name__}: {error}"}), reply_to=message)
    return Message(pack({"client": site.spec.name, "round": order.round, **reply}, sent), reply_to=message)


def _follow(site: Site, order: _Order, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    changes: dict[int, Tensors] = {number: {} for number in order.changes}
    for name, tensor in tensors.items():
        number, _, part = name.partition(":")
        if number != "start":
            changes[int(number)][part] = tensor
    site.copy.receive(order.terms, order.since, list(changes.items()))
    return {"weights": site.copy.digest()}, {}


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
