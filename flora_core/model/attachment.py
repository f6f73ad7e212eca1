"""Attach a cohort of clients to one resident model, and take it off again.

Letters: M packed tokens, K in_features, N out_features, C clients.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from ..adapters import AdapterBank, BankModule
from ..common import require
from ..config import check_targets, matches_target
from ..data import PackedBatch
from ..distributed import check_plain, is_sharded, sharded
from ..ops import check_fuse, resolve
from .accepted import check_model, is_linear
from .client import ClientSpec
from .cohort import Cohort
from .forward import find_way
from .layer import MultiLoRALinear
from .weights import is_conv1d, weight_view

# A cohort holds its model, and the layers that it wrapped hold it: a strong reference here would keep both for ever.
_COHORTS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Cohort]] = weakref.WeakKeyDictionary()
# What a newcomer means who names no targets: the attention projections of the common families.
_DEFAULT_TARGETS = (("q_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("c_attn",))


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
        TypeError: If the model is no transformers causal LM or is wrapped (PEFT, ``torch.compile``, ``DataParallel``),
            or a client no ``ClientSpec``.
        ValueError: If a target is unknown (candidates are listed), tied, quantised, the output head, or behind an
            input that is not the packed tokens; if a rank is out of range; if our loss is not the model's own.
    Example:
        >>> cohort = flora.attach(model, clients, target_modules=["q_proj", "v_proj"])
        >>> len(cohort.layers), [cohort.spec(name).adapter.rank for name in cohort.names]
        (4, [4, 2, 3])
    """
    check_model(model)
    require(_attached(model) is None, "the model already has a cohort attached; call flora_core.detach(model) first")
    require(len(clients) > 0, "clients must hold at least one ClientSpec, got none")
    for client in clients:
        if not isinstance(client, ClientSpec):
            raise TypeError(f"clients must hold ClientSpec only, got {client!r:.80}; write ClientSpec(name, data=...)")
    if target_modules is not None:
        check_targets(target_modules)
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
    """Put the model's own layers back and restore which parameters ask for gradients; weights are not touched.

    Raises:
        ValueError: If the model has no cohort attached.
    Example:
        >>> cohort = flora.attach(model, clients, ["q_proj"])
        >>> flora.detach(model)
        >>> type(model.model.layers[0].self_attn.q_proj).__name__
        'Linear'
    """
    cohort = _attached(model)
    if cohort is None:
        raise ValueError("the model has no cohort attached: there is nothing to detach; attach one first")
    del _COHORTS[model]
    for path, layer in cohort.layers.items():
        _replace(model, path, layer.original)  # pyright: ignore[reportArgumentType]
        # A layer and its cohort hold each other. Separated they are freed at once, with the model, and not by a later
        # pass of the garbage collector, which counts objects and not their bytes.
        layer.entry = _detached
    cohort.route.groups.clear()
    cohort.route.waiting.clear()
    for parameter, wanted in cohort.frozen:
        parameter.requires_grad_(wanted)


def _detached() -> NoReturn:
    raise ValueError("this layer's cohort was detached from its model; attach it again")


def cohort_of(model: nn.Module) -> Cohort:
    """The cohort that is attached to a model.

    Raises:
        ValueError: If none is.
    """
    cohort = _attached(model)
    if cohort is None:
        raise ValueError("the model has no cohort attached; call flora_core.attach first")
    return cohort


def _attached(model: nn.Module) -> Cohort | None:
    held = _COHORTS.get(model)
    return None if held is None else held()


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
    require(bool(targets), "no client adapts any module: no targets, or every rank is 0; give at least one client both")
    for path in targets:
        _check_target(model, path, known[path])
    if sharded(model) is None:
        check_plain(model)
    else:
        _check_rows_spread(targets, known)
    return targets


def _check_rows_spread(targets: Iterable[str], known: Mapping[str, nn.Module]) -> None:
    whole = [path for path in targets if not is_sharded(known[path].weight)]
    require(
        not whole,
        f"{', '.join(whole[:3])} is outside the decoder layers, which alone are sharded; leave it out of "
        "target_modules, or use base='replicated'",
    )
    turned = [path for path in targets if is_conv1d(known[path])]
    require(
        not turned,
        f"{', '.join(turned[:3])} is a Conv1D, whose weight is stored K x N, and a sharded base has rows of N; use "
        "base='replicated'",
    )


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
        (is_linear(module) or is_conv1d(module)) and weight.is_floating_point() and weight.dim() == 2,
        f"{path} is a {type(module).__module__}.{type(module).__name__} with {weight.dtype} weights, which does not "
        "compute x W^T + b: a quantised or special layer cannot be merged exactly; load the model without "
        "quantisation, or leave the layer out of target_modules",
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
    require(
        len(devices) == 1,
        f"all targets must be on one device, got {', '.join(sorted(devices))}: load the model without device_map, or "
        "move it with .to()",
    )
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
    cohort.frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for path in targets:

        def entry(path: str = path) -> tuple[BankModule, tuple[float, ...]]:
            return cohort.entry(path)

        layer = MultiLoRALinear(model.get_submodule(path), path, cohort.route, entry, cohort.backend, cohort.fuse)
        cohort.layers[path] = layer
        _replace(model, path, layer)
    _COHORTS[model] = weakref.ref(cohort)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _probe(cohort: Cohort) -> None:
    """Find how to run the model, under the row check of every wrapped layer."""

    def context(_: nn.Module, batch: PackedBatch) -> AbstractContextManager[Any]:
        return cohort.running(replace(batch, adapters=False))

    with cohort.route.finding_groups():
        way = find_way(cohort.model, context)
    cohort.head, cohort.packs = way.head, way.packs
    cohort.packing_reason, cohort.packing_failed = way.reason, way.failed
    _check_reached(cohort)


def _check_reached(cohort: Cohort) -> None:
    """Refuse clients none of whose targets saw a token: they lie in another tower, such as that of images."""
    for client in cohort.names:
        targets = list(cohort.bank.adapters(client))
        require(
            not targets or any(path in cohort.route.groups for path in targets),
            f"client {client!r}: text tokens reach none of its {len(targets)} targets ({', '.join(targets[:2])}, ...); "
            "choose target_modules in the part that computes the logits, for instance by a regex over whole paths",
        )
