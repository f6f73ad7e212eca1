"""Several processes that train one run: each trains a share of a round's clients and receives the others' results.

Every process has the same model, clients and settings. torch's launcher starts them and torch's process group carries
what moves between them: JSON, and tensors as raw bytes. Before anything moves the processes meet at a barrier: one that
failed says so there, and all end with its message, so that none waits for it. ``docs/distributed.md`` shows how it is
run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..common import Stopped, differences, is_out_of_memory, put_in, require, take_out

_log = logging.getLogger(__name__)
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_START = "start the processes with torchrun --nproc-per-node N -m flora_core.cli run RECIPE, or unset WORLD_SIZE"
# To find each other; a process then waits for the slowest one, whose share may take long.
_JOIN_SECONDS, _WAIT_SECONDS = 300, 7200
_BUCKET_BYTES = 1 << 28
# Parts of the environment that must be alike on all processes; others may change the last bits.
_VERSIONS = ("flora_core", "torch", "transformers")


class WorldError(ConnectionError):
    """Another process failed or was lost: this one cannot go on without it."""


class World:
    """The processes of one run and this one's place among them; alone, nothing moves.

    Args:
        group: The process group; None for a process that is alone.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.process, self.size = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
        self.moved_bytes = 0
        # Within a pass of a sharded base, which takes all processes: then none receives anything else.
        self.busy = False
        self._told: BaseException | None = None
        self._meshes: dict[str, Any] = {}

    @classmethod
    def current(cls) -> World:
        """The processes of the process group that this process has joined, else this process alone.

        Raises:
            ValueError: If a launcher started several processes and this one has not joined them.
        """
        if not (dist.is_available() and dist.is_initialized()):
            require(
                _launched() == 1,
                f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} says that several processes run this, and this one has "
                f"not joined them: put `with flora_core.distributed.session():` around the run, or {_START}",
            )
            return cls()
        joined = dist.group.WORLD
        if not _JOINED or _JOINED[0][0] is not joined:
            # A group of our own: it has a backend for tensors of the CPU too, and time for a process's whole share.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            timeout = timedelta(seconds=_wait_seconds())
            _JOINED[:] = [(joined, cls(dist.new_group(backend=backend, timeout=timeout)))]
        return _JOINED[0][1]

    @property
    def first(self) -> bool:
        """Return whether this is process 0, which alone writes files, evaluates and tells progress."""
        return self.process == 0

    def barrier(self, value: int = 0, *, passes: bool = False) -> list[int]:
        """Wait for all processes; the number that each brings.

        Args:
            value: What this process brings.
            passes: Whether it is about the next pass of a sharded base.
        Raises:
            WorldError: If one failed since the last meeting, with its words, was lost, or meets about something else.
        """
        return [value] if self.size == 1 else self._barrier(value, None, passes)

    def _barrier(self, value: int, error: BaseException | None, passes: bool = False) -> list[int]:
        mine = torch.tensor([int(value), error is not None, passes], dtype=torch.int64)
        found = [torch.zeros_like(mine) for _ in range(self.size)]
        with _lost():
            dist.all_gather(found, mine, group=self.group)
        failed = [process for process, (_, wrong, _) in enumerate(found) if wrong]
        if failed:
            words = f"{type(error).__name__}: {error}".encode()
            said = self._send_bytes(words, failed[0]).decode()
            raise WorldError(f"process {failed[0]} of {self.size} failed, and no process goes on without it: {said}")
        others = [str(process) for process, (_, _, theirs) in enumerate(found) if bool(theirs) != passes]
        if others:
            places = ("between passes of the sharded base", "before a pass of the sharded base")
            raise WorldError(
                f"process {self.process} of {self.size} is {places[passes]}, processes {', '.join(others)} are "
                f"{places[not passes]}: they do not run the same program; where one process runs the model alone, the "
                "others must run along (ShardedBase.run_along)"
            )
        return [int(brought) for brought, _, _ in found]

    def mesh(self, device_type: str) -> Any:
        """Torch's mesh of the processes, for tensors that are spread over them."""
        from torch.distributed.device_mesh import DeviceMesh

        if device_type not in self._meshes:
            # By the group that has time for a process's whole share: within a pass one may compile its kernels.
            self._meshes[device_type] = DeviceMesh.from_group(self.group, device_type)
        return self._meshes[device_type]

    @contextmanager
    def together(self) -> Iterator[World]:
        """Tell the other processes, at their next meeting, of an error that ends this one."""
        try:
            yield self
        except (Stopped, WorldError):
            raise  # all know of it
        except BaseException as error:
            if self.busy:
                raise self._within_pass(error) from error
            self._tell(error)
            raise

    def _within_pass(self, error: BaseException) -> BaseException:
        """End this process within a pass: the others wait in there, and hear of it as connections close."""
        if is_out_of_memory(error) or not isinstance(error, RuntimeError):
            _log.error("process %d of %d failed within a pass of the sharded base", self.process, self.size)
            return error
        return WorldError(
            f"a pass of the sharded base ended on process {self.process} of {self.size}, here or because another was "
            f"lost ({_first_line(error)}); start the same run again: it goes on after its newest whole round"
        )

    def _tell(self, error: BaseException) -> None:
        if self.size == 1 or error is self._told:
            return
        self._told = error
        # The others may be in the midst of their shares: this is reported without waiting for them.
        kind = type(error).__name__
        _log.error("process %d of %d failed (%s: %s); telling the others", self.process, self.size, kind, error)
        with suppress(WorldError):
            self._barrier(0, error)

    def send(self, state: Any, source: int = 0) -> Any:
        """Share each process's value with all: nested dicts and lists of tensors and JSON values.

        Args:
            state: On the source, where it comes back as it is; of no account on the others.
            source: The process that has it.
        """
        if self.size == 1:
            return state
        tensors: dict[str, torch.Tensor] = {}
        body = b""
        if self.process == source:
            skeleton = take_out(state, tensors)
            places = {
                name: (list(t.shape), str(t.dtype)[len("torch.") :], t.device.type) for name, t in tensors.items()
            }
            body = json.dumps([skeleton, places]).encode()
        skeleton, places = json.loads(self._send_bytes(body, source))
        if self.process != source:
            for name, (shape, dtype, device) in places.items():
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for bucket in _buckets(list(tensors.values())):
            self._send_bucket(bucket, source)
        return state if self.process == source else put_in(skeleton, tensors)

    def exchange(self, parts: Sequence[Any]) -> list[list[Any]]:
        """All processes' parts, by process, on all of them; each part is a state as ``send`` takes it."""
        counts = self.barrier(len(parts))
        return [
            [self.send(parts[number] if process == self.process else None, process) for number in range(count)]
            for process, count in enumerate(counts)
        ]

    def add_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add all processes' tensors up, in place; every process gets the same bits."""
        if self.size > 1:
            self.barrier()
            with _lost():
                dist.all_reduce(tensor, group=self.group)
            self.moved_bytes += 2 * (self.size - 1) * _size(tensor)
        return tensor

    def agree(self, identity: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
        """Make sure that all processes run the same thing with the same software; warnings of what else differs.

        Raises:
            ValueError: On a process that differs from process 0.
            WorldError: On the others.
        """
        if self.size == 1:
            return []
        self.barrier()
        first = self.send({"identity": identity, "environment": environment})
        versions = {name: environment[name] for name in _VERSIONS}
        fields = differences(first["identity"], identity)
        fields += differences({name: first["environment"][name] for name in _VERSIONS}, versions)
        some = "; ".join(fields[:8]) + (f"; and {len(fields) - 8} more" if len(fields) > 8 else "")
        require(
            not fields,
            f"process {self.process} would run something else than process 0: {some} here; start all processes with "
            "the same recipe, model, data and versions",
        )
        others = {name: value for name, value in first["environment"].items() if name not in _VERSIONS}
        mine = {name: value for name, value in environment.items() if name not in _VERSIONS}
        notes = [
            f"{text} on process {self.process}: the last bits may depend on the process"
            for text in differences(others, mine)
        ]
        return [text for part in self.exchange(notes) for text in part]

    @staticmethod
    def noticing_loss() -> AbstractContextManager[None]:
        """Say what it means where torch's collectives fail within."""
        return _lost()

    def _send_bytes(self, body: bytes, source: int) -> bytes:
        length = torch.tensor([len(body)])
        self._broadcast(length, source)
        if self.process != source:
            body = bytes(int(length))
        data = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(0, dtype=torch.uint8)
        self._broadcast(data, source)
        return data.numpy().tobytes()

    def _send_bucket(self, bucket: Sequence[torch.Tensor], source: int) -> None:
        if self.process == source:
            flat = torch.cat([_bytes_of(tensor.contiguous()) for tensor in bucket])
        else:
            flat = torch.empty(sum(map(_size, bucket)), dtype=torch.uint8, device=bucket[0].device)
        self._broadcast(flat, source)
        if self.process != source:
            for tensor, part in zip(bucket, flat.split([_size(tensor) for tensor in bucket]), strict=True):
                _bytes_of(tensor).copy_(part)

    def _broadcast(self, data: torch.Tensor, source: int) -> None:
        if data.numel():
            with _lost():
                dist.broadcast(data, source, group=self.group)
            self.moved_bytes += (self.size - 1) * _size(data)


@contextmanager
def _lost() -> Iterator[None]:
    """Say what it means where torch's process group fails: a process was killed, or is out of reach."""
    try:
        yield
    except RuntimeError as error:
        text = (
            f"a process was lost, and no process goes on without it ({_first_line(error)}); start the same run again: "
            "it goes on after its newest whole round"
        )
        # At once: the launcher is about to end this process too.
        _log.error(text)
        raise WorldError(text) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _buckets(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Consecutive tensors of one device that travel at once, so that what is copied for it stays small."""
    buckets: list[list[torch.Tensor]] = []
    filled = 0
    for tensor in tensors:
        if not buckets or buckets[-1][0].device != tensor.device or filled + _size(tensor) > _BUCKET_BYTES:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += _size(tensor)
    return buckets


_JOINED: list[tuple[Any, World]] = []


@contextmanager
def session() -> Iterator[World]:
    """Join the processes that torchrun started, if it did, and leave them at the end; what is done within is theirs.

    An error on one process ends all of them with its words. Without a launcher this process is alone, and nothing
    changes.

    Raises:
        ValueError: If variables of the launcher are missing or make no sense.
        WorldError: If the others are not found, or another process failed or was lost.
    """
    own = _launched() > 1 and not dist.is_initialized()
    if own:
        _join()
    try:
        with World.current().together() as joined:
            yield joined
    finally:
        if own:
            # The group goes with its last reference, and its threads with it: one that lives on when Python ends aborts
            # the process ("terminate called without an active exception").
            for _, those in _JOINED:
                those.group = None
            _JOINED.clear()
            dist.destroy_process_group()


def _join() -> None:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=_JOIN_SECONDS))
    except (RuntimeError, ValueError) as error:
        raise WorldError(
            f"the other processes were not found at MASTER_ADDR:MASTER_PORT = {address} ({_first_line(error)}); give "
            "torchrun the same --rdzv-endpoint on every machine, one that all of them reach"
        ) from error


def _launched() -> int:
    """How many processes a launcher says that there are."""
    text = os.environ.get("WORLD_SIZE", "1")
    require(text.isdecimal() and int(text) > 0, f"WORLD_SIZE must be a number above 0, got {text!r}; {_START}")
    if int(text) == 1:
        return 1
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    require(not missing, f"WORLD_SIZE={text} needs {', '.join(missing)} too, which torchrun sets; {_START}")
    rank = os.environ["RANK"]
    fits = rank.isdecimal() and int(rank) < int(text)
    require(fits, f"RANK must be from 0 to {int(text) - 1}, got {rank!r}; {_START}")
    return int(text)


def _wait_seconds() -> float:
    text = os.environ.get("FLORA_RANK_TIMEOUT_S", str(_WAIT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    require(seconds > 0, f"FLORA_RANK_TIMEOUT_S must be a number of seconds above 0, got {text!r}")
    return seconds
