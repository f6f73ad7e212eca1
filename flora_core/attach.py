"""Attach a cohort of clients to one resident model, take it off again, and explain what runs.

Letters: M packed tokens, K in_features, N out_features, C clients.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import attention, merge_ways, seeds
from .backends import resolve
from .bank import AdapterBank, AdapterConfig, BankModule, matches_target
from .calls import check_fuse
from .checks import require
from .config import TrainConfig
from .explaining import describe
from .forward import Batch, find_way
from .graphs import why_not
from .linear import Layout, MultiLoRALinear, Route, is_conv1d, weight_view
from .loss import Head
from .segments import DeviceSegments, Segments
from .update import Adapters, ClientUpdate

_COHORTS: weakref.WeakKeyDictionary[nn.Module, Cohort] = weakref.WeakKeyDictionary()
# What a newcomer means who names no targets: the attention projections of the common families.
_DEFAULT_TARGETS = (("q_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("c_attn",))


@dataclass(frozen=True)
class ClientSpec:
    """One client: a name, its data, its adapter, and what it overrides of the training settings.

    Args:
        name: Unique in the cohort; letters, digits, dots, dashes and underscores (it becomes a folder name).
        data: Path of a JSONL file, a list of records, or a list of encoded ``Example``.
        adapter: Rank, alpha, dropout, ...
        train: Fields of ``TrainConfig`` that differ for this client: a mapping, or a whole ``TrainConfig``.
    """

    name: str
    data: Any = None
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig(rank=8, alpha=16))
    train: Any = None

    def __post_init__(self) -> None:
        fine = self.name and not self.name.startswith(".") and all(ch.isalnum() or ch in "._-" for ch in self.name)
        require(
            bool(fine),
            f"a client's name must be letters, digits, '.', '_' or '-' and not begin with '.', got {self.name!r}",
        )


class Cohort:
    """Clients attached to one model: the bank of their adapters and the wrapped layers. Made by ``attach``."""

    def __init__(
        self, model: nn.Module, clients: Sequence[ClientSpec], bank: AdapterBank, backend: str, fuse: str = "auto"
    ):
        self.model: Any = model
        self.clients, self.bank, self.backend, self.fuse = tuple(clients), bank, backend, fuse
        self.active = bank
        self.route = Route()
        self.layers: dict[str, MultiLoRALinear] = {}
        self.head: Head
        self.packs, self.packing_reason = True, ""
        self._frozen: list[tuple[nn.Parameter, bool]] = []
        self._batches = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The clients' names, in order."""
        return self.bank.names

    def spec(self, client: str) -> ClientSpec:
        """A client's specification by name."""
        return self.clients[self.bank.index(client)]

    def _entry(self, path: str) -> tuple[BankModule, tuple[float, ...]]:
        return self.active.modules[path], tuple(self.spec(name).adapter.dropout for name in self.active.names)

    def parameters(self) -> list[torch.Tensor]:
        """The stacked factors, leaves that autograd trains: for your own optimizer."""
        factors = [t for entry in self.active.modules.values() for t in (entry.A_PK, entry.B_PN)]
        return [factor.requires_grad_(True) for factor in factors]

    @contextmanager
    def use(self, client: str) -> Iterator[nn.Module]:
        """Run the model with one client's adapter: evaluation, generation. Dropout is off."""
        with self._routed(client=self.active.index(client)):
            yield self.model

    @contextmanager
    def training(self, clients: Sequence[str]) -> Iterator[AdapterBank]:
        """Make a working bank of some clients the active one; what it holds at the end is kept."""
        working = self.bank.subset(clients)
        self.active = working
        try:
            yield working
        finally:
            self.active = self.bank
            if working is not self.bank:
                for client in clients:
                    self.bank.load(client, working.adapters(client))

    @contextmanager
    def batch(
        self,
        tokens: Segments | Sequence[int],
        *,
        sequences: Sequence[int] | None = None,
        real_index: torch.Tensor | None = None,
        positions: int | None = None,
        row_C: Sequence[int] | None = None,
        dropout_step: int | None = None,
        seed: int = 0,
        round: int = 0,
        seed_C: Sequence[int] | None = None,
        adapters: bool = True,
    ) -> Iterator[nn.Module]:
        """Run forward and backward of one batch whose rows belong to the clients in order.

        Args:
            tokens: Tokens of each client, zeros allowed: client c owns the next ``tokens[c]`` rows of the
                flattened input.
            sequences: Lengths of packed sequences in one row of input: attention then stays within each. Left
                out, the model's own attention runs, for batches whose sequences are rows.
            real_index: Flat positions of the real tokens of a padded batch; the others get no adapter.
            positions: All positions of a padded batch.
            row_C: Index of each client's first token within its optimizer step (for dropout).
            dropout_step: The optimizer step, which dropout masks depend on. Left out, dropout is on while the model
                is in training mode, and batches are counted.
            seed, round: What the masks depend on besides client, step and module; ``seed_C`` per client.
            adapters: False runs the base alone.
        Raises:
            ValueError: If there is not one entry for each client.
        """
        segments = tokens if isinstance(tokens, Segments) else Segments.from_lengths(tokens)
        names = self.active.names
        require(
            len(segments) == len(names),
            f"tokens must have one entry per client ({len(names)}: {', '.join(names)}), got {len(segments)}",
        )
        keys = self.dropout_seeds(dropout_step, seed_C or [seed] * len(names), round)
        if keys is not None and self.bank.param.is_cuda:
            # One copy to the device for all modules.
            keys = dict(zip(keys, torch.tensor(list(keys.values())).to(self.bank.param.device), strict=True))
        with self.laid_out(Layout(segments, keys, row_C, real_index, positions, adapters), sequences):
            yield self.model

    @contextmanager
    def laid_out(self, layout: Layout, sequences: Sequence[int] | DeviceSegments | None) -> Iterator[None]:
        """Run what a layout says, attention within each packed sequence if there are some."""
        inner = nullcontext() if sequences is None else attention.packed(self.model, sequences)
        with self._routed(layout=layout), inner:
            yield

    def dropout_seeds(self, step: int | None, seed_C: Sequence[int], round: int) -> dict[str, Any] | None:
        """Module -> dropout key of each client at an optimizer step; None where nothing is dropped."""
        names = self.active.names
        dropping = any(self.spec(name).adapter.dropout for name in names)
        if not dropping or (step is None and not self.model.training):
            return None
        if step is None:
            step = self._batches
            self._batches += 1
        return {
            path: [seeds.dropout_seed(seed, name, step, path, round) for seed, name in zip(seed_C, names, strict=True)]
            for path in self.layers
        }

    @contextmanager
    def _routed(self, layout: Layout | None = None, client: int | None = None) -> Iterator[None]:
        before = self.route.layout, self.route.client
        self.route.layout, self.route.client = layout, client
        try:
            yield
        finally:
            self.route.layout, self.route.client = before
            self.route.waiting.clear()

    def load(self, client: str, adapters: Adapters) -> None:
        """Start a client from given factors (A_RK, B_RN per module)."""
        self.bank.load(client, adapters)

    def update(self, client: str, **metrics: Any) -> ClientUpdate:
        """A copy of a client's adapter as it stands."""
        adapters = {path: (A.clone(), B.clone()) for path, (A, B) in self.bank.adapters(client).items()}
        weight = float(metrics.get("examples", 1.0))
        return ClientUpdate(client, adapters, self.bank.scaling(client), weight, metrics)


def attach(
    model: nn.Module,
    clients: Sequence[ClientSpec],
    target_modules: Sequence[str] | str | None = None,
    *,
    seed: int = 0,
    backend: str = "auto",
    fuse: str = "auto",
) -> Cohort:
    """Attach a cohort to a transformers causal LM: freeze the base, wrap the targets, start fresh adapters.

    Args:
        model: Any transformers causal LM whose targets are ``nn.Linear`` or GPT-2's ``Conv1D``.
        clients: One ``ClientSpec`` per client, names unique.
        target_modules: Names or path suffixes, one regex over whole paths, or ``"all-linear"``; None takes the
            attention projections of the model's family. A client's own ``adapter.target_modules`` goes first.
        seed: Seed of the initial adapters: A as PEFT starts it, B zero.
        backend: auto, reference, triton or native.
        fuse: How base products and branches are put together: auto, separate, prewrite, kernel or augmented.
    Returns:
        The cohort. ``detach(model)`` undoes it.
    Raises:
        ValueError: If a target is unknown (candidates are listed), tied, quantised, the output head, or behind an
            input that is not the packed tokens; if a rank is out of range; if our loss is not the model's own.
    """
    require(model not in _COHORTS, "the model already has a cohort attached; call flora_core.detach(model) first")
    require(len(clients) > 0, "clients must hold at least one ClientSpec, got none")
    names = [client.name for client in clients]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"client names must be unique, got twice: {', '.join(twice)}")
    check_fuse(fuse, resolve(backend, "shrink")[0])
    targets = _targets(model, clients, target_modules)
    bank = _bank(model, clients, targets)
    for name in names:
        bank.reset(name, seed, new=True)
    cohort = Cohort(model, clients, bank, backend, fuse)
    _wrap(cohort, targets)
    try:
        _probe(cohort)
    except BaseException:
        detach(model)
        raise
    return cohort


def detach(model: nn.Module) -> None:
    """Put the model's own layers back and restore which parameters ask for gradients; weights are not touched."""
    cohort = _COHORTS.pop(model, None)
    if cohort is None:
        raise ValueError("the model has no cohort attached: there is nothing to detach; attach one first")
    for path, layer in cohort.layers.items():
        _replace(model, path, layer.original)  # pyright: ignore[reportArgumentType]
    for parameter, wanted in cohort._frozen:
        parameter.requires_grad_(wanted)


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv1D of a model by path, but for the output head."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not head
    }


def _targets(
    model: nn.Module, clients: Sequence[ClientSpec], target_modules: Sequence[str] | str | None
) -> dict[str, tuple[bool, ...]]:
    """Path of every target -> which clients adapt it."""
    known = candidates(model)
    default = target_modules if target_modules is not None else _default_targets(known)
    lists = [client.adapter.target_modules for client in clients]
    for wanted in [default, *(own for own in lists if own is not None)]:
        for name in [wanted] if isinstance(wanted, str) else wanted:
            found = any(matches_target(wanted if isinstance(wanted, str) else [name], path) for path in known)
            require(found, _unknown_target(model, name, known))
    targets = {path: tuple(client.adapter.targets(path, default) for client in clients) for path in known}
    targets = {path: who for path, who in targets.items() if any(who)}
    require(bool(targets), "no client adapts any module: every rank is 0; give at least one client a rank of 1 or more")
    for path in targets:
        _check_target(model, path, known[path])
    return targets


def _default_targets(known: Mapping[str, nn.Module]) -> Sequence[str]:
    for names in _DEFAULT_TARGETS:
        if all(any(path.endswith(f".{name}") for path in known) for name in names):
            return names
    leaves = sorted({path.rsplit(".", 1)[-1] for path in known})
    raise ValueError(f"target_modules must be given for this model; its candidates: {', '.join(leaves)}")


def _unknown_target(model: nn.Module, name: str, known: Mapping[str, nn.Module]) -> str:
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if any(module is head and matches_target([name], path) for path, module in model.named_modules()):
        return f"target_modules: {name!r} is the output head, which the loss computes in chunks; it cannot be adapted"
    leaves = sorted({path.rsplit(".", 1)[-1] for path in known})
    present = [path for path, _ in model.named_modules() if path.endswith(name)]
    kind = f" ({present[0]} is a {type(model.get_submodule(present[0])).__name__})" if present else ""
    return f"target_modules: no Linear or Conv1D of the model matches {name!r}{kind}; candidates: {', '.join(leaves)}"


def _check_target(model: nn.Module, path: str, module: nn.Module) -> None:
    weight: Any = module.weight
    require(
        (type(module) is nn.Linear or is_conv1d(module)) and weight.is_floating_point() and weight.dim() == 2,
        f"{path} is a {type(module).__module__}.{type(module).__name__} with {weight.dtype} weights: a quantised or "
        "special layer cannot be merged exactly; load the model without quantisation or leave it out",
    )
    tied = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    require(
        len(tied) == 1,
        f"{path} shares its weight with {', '.join(n for n in tied if n != path + '.weight')}: a merge would change "
        "both; leave it out of target_modules",
    )


def _bank(model: nn.Module, clients: Sequence[ClientSpec], targets: Mapping[str, tuple[bool, ...]]) -> AdapterBank:
    modules = {path: model.get_submodule(path) for path in targets}
    weights = [module.weight for module in modules.values()]
    devices = {str(weight.device) for weight in weights}
    require(len(devices) == 1, f"all targets must be on one device, got {', '.join(sorted(devices))}")
    require(
        not weights[0].is_meta, "the model's weights are on the meta device: load it without disk or meta offloading"
    )
    shapes = {path: tuple(weight_view(module).shape) for path, module in modules.items()}
    ranks = {
        path: [client.adapter.rank_of(path) if adapts else 0 for client, adapts in zip(clients, who, strict=True)]
        for path, who in targets.items()
    }
    scaling = {
        path: [client.adapter.scaling_of(path) if adapts else 0.0 for client, adapts in zip(clients, who, strict=True)]
        for path, who in targets.items()
    }
    double = any(weight.dtype == torch.float64 for weight in weights)
    dtype = torch.float64 if double else torch.float32
    return AdapterBank([c.name for c in clients], ranks, scaling, shapes, dtype, weights[0].device)  # pyright: ignore


def _wrap(cohort: Cohort, targets: Mapping[str, Any]) -> None:
    model = cohort.model
    cohort._frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for path in targets:

        def entry(path: str = path) -> tuple[BankModule, tuple[float, ...]]:
            return cohort._entry(path)

        layer = MultiLoRALinear(model.get_submodule(path), path, cohort.route, entry, cohort.backend, cohort.fuse)
        cohort.layers[path] = layer
        _replace(model, path, layer)
    _COHORTS[model] = cohort


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _probe(cohort: Cohort) -> None:
    """Find how to run the model, under the row check of every wrapped layer."""

    def context(_: nn.Module, batch: Batch) -> AbstractContextManager[Any]:
        counts = [*batch.tokens] + [0] * (len(cohort.names) - 1)
        return cohort.batch(counts, sequences=batch.sequences, positions=batch.positions, adapters=False)

    with cohort.route.finding_groups():
        way = find_way(cohort.model, context)
    cohort.head, cohort.packs, cohort.packing_reason = way.head, way.packs, way.reason


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found: one row per target and one line per decision about the whole model."""

    rows: tuple[dict[str, str], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        columns = list(self.rows[0]) if self.rows else []
        table = [columns, *([row[column] for column in columns] for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*self.notes, *lines])


def explain(model: nn.Module) -> Explanation:
    """Tell for every target which op, backend, kernel, way to fuse and tiles run and why, and which path is slower."""
    cohort = _COHORTS.get(model)
    if cohort is None:
        raise ValueError("the model has no cohort attached; call flora_core.attach first")
    _, reason = resolve(cohort.backend, "shrink", next(iter(cohort.layers.values())).weight)
    rows = tuple(
        {
            "module": path,
            "shape": f"{layer.out_features}x{layer.in_features} {str(layer.weight.dtype).removeprefix('torch.')}",
            "ranks": ",".join(str(rank) for rank in cohort.bank.modules[path].ranks.lengths),
            **describe(layer, cohort.route.groups.get(path, (layer,))),
        }
        for path, layer in cohort.layers.items()
    )
    way, why = attention.way_of(model)
    packing = f"packed without padding, attention: {way} ({why})" if cohort.packs else "padded"
    head = {
        "linear": "hidden @ W^T in chunks, gradient written out",
        "model": "the model's own head in chunks: it transforms logits after the product",
    }[cohort.head.kind]
    against = why_not(cohort, TrainConfig())
    notes = (
        f"batches: {packing}{f' ({cohort.packing_reason})' if cohort.packing_reason else ''}",
        f"loss: {head}",
        f"backend: {reason}",
        f"CUDA graphs: {f'off ({against})' if against else 'on, for shapes that come again'}",
        f"merge: {merge_ways.told(next(iter(cohort.layers.values())).weight)}",
    )
    return Explanation(rows, notes)


__all__ = ["ClientSpec", "Cohort", "Explanation", "attach", "candidates", "detach", "explain"]
