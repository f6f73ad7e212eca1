"""Capture and replay of steps as CUDA graphs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

# A shape runs so often as it is, which compiles kernels and measures ways to fuse, before it is captured.
WARM_UP = 2
# Each holds the memory of its kernels' launches; they share that of their tensors.
MOST_GRAPHS = 32


class Executor(Protocol):
    """Runs a function of static buffers; ``key`` identifies a function, None is for one that does not come again."""

    def run(self, key: Hashable | None, function: Callable[[], None]) -> None:
        """Run a function."""
        ...


class Eager:
    """Calls the function."""

    def __str__(self) -> str:
        return "off: static shapes, called step by step"

    def run(self, key: Hashable | None, function: Callable[[], None]) -> None:
        function()


class Graphs:
    """Calls a function a few times, then captures it and replays what was captured.

    At most ``MOST_GRAPHS`` are captured; functions beyond are called, and those without a key. Between replays nothing
    of a graph's own memory is in use, so all of them share it.
    """

    def __init__(self, device: Any):
        self.device, self.seen = device, Counter[Hashable]()
        self.replays: dict[Hashable, Callable[[], None]] = {}
        self.replayed, self.called = 0, 0

    def run(self, key: Hashable | None, function: Callable[[], None]) -> None:
        if key not in self.replays:
            self.seen[key] += 1
            if key is None or self.seen[key] <= WARM_UP or len(self.replays) >= MOST_GRAPHS:
                self.called += 1
                self.device.call(function)
                return
            self.replays[key] = self.device.capture(function)
        self.replayed += 1
        self.replays[key]()

    def __str__(self) -> str:
        return f"on: {len(self.replays)} captured, {self.replayed} replays, {self.called} calls before or beside them"


class Cuda:
    """The few things that only a GPU does."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def call(self, function: Callable[[], None]) -> None:
        """Call a function on the stream that captures: torch asks for a warm-up there."""
        # The caller's current device may be another one than the cohort's, whose streams are the ones to wait for.
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture a function, which runs nothing, and give back what replays it."""
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                function()
        return functools.partial(self._replay, graph)

    def _replay(self, graph: Any) -> None:
        with torch.cuda.device(self.device):
            graph.replay()


def executor_for(device: torch.device) -> Executor:
    """Graphs on a GPU, plain calls on other devices."""
    return Graphs(Cuda(device)) if device.type == "cuda" else Eager()
