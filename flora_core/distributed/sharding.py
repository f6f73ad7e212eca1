"""A base in shards: each process has a part of every decoder layer (torch's ``fully_shard``).

A layer's weights are gathered right before its forward and its backward, and let go of after. That takes all
processes at once, and each has clients of its own with as many steps as they need. So the processes meet before every
pass of the decoder: one without work runs an empty pass, until all are done.

Embeddings, norms and head outside the layers, and adapters, are whole on every process. Letters: K in_features,
N out_features, W processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..common import memory_bytes, require, show_bytes
from ..config import TrainConfig

if TYPE_CHECKING:
    from .world import World

# What a process brings to a meeting before a pass: nothing to run, a forward pass, or one with its backward.
_NONE, _FORWARD, _TRAINING = 0, 1, 2
_KEPT = "_flora_sharded_base"
# Of a device's memory, what a base may take so that every process has it whole: the rest is for training.
_ROOM = 0.6


class ShardedBase:
    """A model whose decoder layers are spread over the processes. Made by ``shard_base``.

    Args:
        model: Sharded already.
        world: The processes that hold it.
        mesh: Their mesh.
        reason: Why it is sharded.
    """

    def __init__(self, model: Any, world: World, mesh: Any, reason: str):
        self.model, self.world, self.mesh, self.reason = model, world, mesh, reason
        self._along = False
        model.base_model.register_forward_pre_hook(self._before, prepend=True)
        model.base_model.register_forward_hook(self._after)
        model.get_input_embeddings().register_forward_hook(self._embedded)

    @property
    def held_bytes(self) -> int:
        """Of the base, what this process holds between passes."""
        return sum(_local(parameter).nbytes for parameter in self.model.parameters())

    def to_json(self) -> dict[str, Any]:
        """Facts of sharding for the event of a run's start."""
        return {"held": "sharded", "reason": self.reason, "bytes": self.held_bytes}

    def __str__(self) -> str:
        size = show_bytes(self.held_bytes)
        return f"sharded over {self.world.size} processes, {size} of it on this one between passes ({self.reason})"

    # Passes.

    def run_along(self) -> None:
        """Run the other processes' passes along until no process has any left; all processes end here together."""
        while any(kinds := self.world.barrier(_NONE, passes=True)):
            self._run_empty(min(filter(None, kinds)))

    def _before(self, module: nn.Module, args: Any) -> None:
        if self._along:
            return
        if self.world.busy:
            raise ConnectionError(
                "a pass of the sharded base was not finished before the next began: the other processes cannot follow; "
                "each forward pass with gradients needs its backward pass, and none may fail"
            )
        kind = _TRAINING if torch.is_grad_enabled() else _FORWARD
        while (first := min(filter(None, self.world.barrier(kind, passes=True)))) != kind:
            self._run_empty(first)
        self.world.busy = True

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._along and not torch.is_grad_enabled():
            self.world.busy = False

    def _embedded(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        # Every layer then has a backward pass on every process, whichever layers its clients adapt.
        if torch.is_grad_enabled():
            (output if output.requires_grad else output.requires_grad_(True)).register_hook(self._done)

    def _done(self, grad: torch.Tensor) -> None:
        self.world.busy = False

    def _run_empty(self, kind: int) -> None:
        """A pass of one token through the base alone, so that the others' passes find all processes."""
        weight = self.model.get_input_embeddings().weight
        self._along = self.world.busy = True
        try:
            with torch.set_grad_enabled(kind == _TRAINING), torch.autocast(weight.device.type, enabled=False):
                token = weight.new_zeros(1, 1, weight.shape[1], requires_grad=kind == _TRAINING)
                hidden = self.model.base_model(inputs_embeds=token, use_cache=False).last_hidden_state
                if kind == _TRAINING:
                    hidden.sum().backward()
        finally:
            self._along = False
        self.world.busy = False

    # Parts and wholes.

    def weights(self, modules: Iterable[str]) -> dict[str, torch.Tensor]:
        """This process's rows of modules' weights; writing to them changes the base."""
        return {module: _local(self.model.get_submodule(module).weight) for module in modules}

    def shape(self, module: str) -> tuple[int, int]:
        """(N, K) of a module's whole weight."""
        return tuple(self.model.get_submodule(module).weight.shape)

    def rows(self, module: str) -> slice:
        """Which rows of a module's weight this process has: an even share, as ``torch.chunk`` gives it."""
        N = self.shape(module)[0]
        share = -(-N // self.world.size)
        first = min(self.world.process * share, N)
        return slice(first, min(first + share, N))

    def wholes(self, parts: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Module -> all rows of what every process has its rows of, one module at a time; all processes take part."""
        self.world.barrier()
        for module, part in parts.items():
            yield module, self._whole(part, self.shape(module))

    def gathered(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``wholes`` in the memory of process 0's host; nothing on the others."""
        return {module: whole.cpu() for module, whole in self.wholes(parts) if self.world.first}

    def scatter_(self, parts: Mapping[str, torch.Tensor], wholes: Mapping[str, torch.Tensor]) -> None:
        """Give every process its rows of what process 0 has whole, one module at a time."""
        self.world.barrier()
        for module, part in parts.items():
            whole = self.world.send({"whole": wholes[module]} if self.world.first else None)["whole"]
            part.copy_(whole[self.rows(module)])

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by name, whole, one at a time; all processes take part."""
        self.world.barrier()
        for name, parameter in self.model.named_parameters():
            yield name, self._full(parameter)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model in the memory of process 0's host, tied weights once; nothing on the others."""
        self.world.barrier()
        found: dict[str, torch.Tensor] = {}
        copies: dict[int, torch.Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            whole = self._full(tensor)
            if self.world.first:
                found[name] = copies.setdefault(whole.data_ptr(), whole.cpu()) if whole is tensor else whole.cpu()
        return found

    def _full(self, tensor: Any) -> torch.Tensor:
        if not is_sharded(tensor):
            return tensor
        with self.world.noticing_loss(), torch.no_grad():
            return tensor.full_tensor()

    def _whole(self, part: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Shard

        # NCCL has no int16; bits move as they are.
        sent = part.view(torch.bfloat16) if part.dtype == torch.int16 else part
        stride = (shape[1], 1)
        spread = DTensor.from_local(
            sent, self.mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )
        return self._full(spread).view(part.dtype)


def sharded(model: Any) -> ShardedBase | None:
    """Return the sharded base of a model; None for a base that is whole here."""
    return vars(model).get(_KEPT)


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is one of which every process has a part."""
    return hasattr(tensor, "device_mesh")


def _local(tensor: Any) -> torch.Tensor:
    """This process's part of a tensor, without a copy."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor.detach()


def shard_base(model: Any, world: World, device: torch.device | None = None, reason: str = "as asked") -> ShardedBase:
    """Spread a model's decoder layers over the processes and freeze it; every process calls this with the same model.

    Args:
        model: A transformers causal LM, whole; on the CPU, or where it is to stay.
        world: Its processes.
        device: Where parts go, a layer at a time; None for where the model is.
        reason: Reported in the run's events.
    Raises:
        ValueError: If there is one process alone, the model is sharded already, or has no decoder layers to spread.
    """
    from torch.distributed.fsdp import fully_shard

    check_plain(model)
    require(
        world.size > 1,
        "base='sharded' needs several processes to spread the base over, got 1; start them with torchrun, or use "
        "base='auto'",
    )
    layers: list[nn.Module] = _layers(model)
    place: torch.device = device or model.get_input_embeddings().weight.device
    # Before anything is gathered: what is gathered asks for gradients as its parts did then.
    model.requires_grad_(False)
    mesh = world.mesh(place.type)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    rest = {parameter for parameter in model.parameters() if not is_sharded(parameter)}
    # The decoder itself holds nothing: as the root it has the layers gathered one ahead.
    fully_shard(model.base_model, mesh=mesh, ignored_params=rest)
    for parameter in rest:
        parameter.data = parameter.data.to(place)
    base = ShardedBase(model, world, mesh, reason)
    vars(model)[_KEPT] = base
    return base


def _layers(model: Any) -> list[nn.Module]:
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.base_model.modules() if type(module).__name__ in names]
    require(
        bool(layers),
        f"base='sharded' needs decoder layers to spread, and {type(model).__name__} names none in _no_split_modules "
        f"(got {sorted(names)}); use base='replicated'",
    )
    return layers


def check_plain(model: Any) -> None:
    """Refuse a model that something else has spread over processes.

    Raises:
        ValueError: If it is sharded, and not by ``shard_base``; or by it, already.
    """
    require(sharded(model) is None, "the model's base is sharded already: load it anew")
    found = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    require(
        not found,
        f"{len(found)} parameters are sharded over processes, such as {', '.join(found[:1])}, by other code than "
        "ours, whose passes would not wait for one another; load the model without FSDP and tensor parallelism, and "
        "use base='sharded'",
    )


def why_shard(model: Any, wanted: str, world: World, device: torch.device) -> str | None:
    """Why the base is to be sharded, on all processes alike; None where every process holds it whole.

    Args:
        wanted: auto, replicated or sharded. ``auto`` shards where on any process the base would take more than 0.6 of
            the memory of its GPU, or of its share of the host.
    """
    if wanted != "auto" or world.size == 1:
        return "as asked" if wanted == "sharded" else None
    size, room = sum(parameter.nbytes for parameter in model.parameters()), _memory_bytes(device)
    if not any(world.barrier(size > _ROOM * room)):
        return None
    return f"the base's {show_bytes(size)} are more than {_ROOM:g} of a process's memory, {show_bytes(room)} here"


def shard_if_needed(model: Any, wanted: str, world: World, device: torch.device | None = None) -> bool:
    """Spread a model's base over the processes where that is wanted or it does not fit otherwise; whether it is spread.

    Args:
        wanted: auto, replicated or sharded, as ``FederationConfig.base``.
        device: Where it is to be; None for where it is.
    Raises:
        ValueError: If it cannot be spread, or is already and should not be.
    """
    if sharded(model) is not None:
        require(wanted != "replicated", "base='replicated', and the model is sharded already: load it anew")
        return True
    place: torch.device = device or model.get_input_embeddings().weight.device
    why = why_shard(model, wanted, world, place)
    if why is not None:
        shard_base(model, world, place, why)
    return why is not None


def _memory_bytes(device: torch.device) -> int:
    """Return the memory of a GPU, or this process's share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return (memory_bytes() or 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_training(model: Any, config: TrainConfig, client: str) -> None:
    """Refuse settings of training that a sharded base cannot follow.

    Raises:
        ValueError: For ``memory_budget_gb`` and for ``recompute`` of activations.
    """
    if sharded(model) is None:
        return
    require(
        config.memory_budget_gb is None,
        f"client {client!r}: memory_budget_gb cannot be kept with a sharded base, whose gathered layers would be "
        f"counted, got {config.memory_budget_gb}; use token_budget",
    )
    require(
        "activations" not in config.recompute,
        f"client {client!r}: recompute cannot have 'activations' with a sharded base, whose layers run as a whole, got "
        f"{list(config.recompute)}; use gradient_checkpointing",
    )
