"""The global model: its sizes and roundings, and the same weights in every process."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from flora_core.distributed import World
from flora_core.federation.global_model import GlobalModel
from flora_core.federation.resume import keep_alike
from flora_core.federation.server import Server
from flora_core.runs import EventLog
from tests.support.federations import make_model

Q = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]


@pytest.mark.parametrize(
    ("dtype", "rounding", "lossy", "size"),
    [
        (torch.float32, "low_bits", False, 4),
        (torch.bfloat16, "low_bits", False, 4),
        (torch.bfloat16, "stochastic", False, 2),
        (torch.bfloat16, "nearest", True, 2),
        (torch.float16, "nearest", True, 2),
        (torch.float32, "nearest", False, 4),
    ],
)
def test_sixteen_bits_without_low_bits_are_lossy_and_half_the_size(dtype, rounding, lossy, size):
    model = GlobalModel(make_model(dtype), Q, rounding)
    assert model.has_lossy_rounding is lossy
    assert model.size_bytes == 2 * 16 * 16 * size
    assert model.largest == torch.finfo(dtype).max


class TwoProcesses:
    """A world of two, as one of its processes sees it; ``other`` stands for the digest of the other."""

    size = 2

    def __init__(self, first: bool, other: str | None, sent: Any = None):
        self.first, self.other, self.sent = first, other, sent

    def exchange(self, mine: list[str]) -> list[str]:
        pair = [mine[0], self.other or mine[0]]
        return pair if self.first else pair[::-1]

    def send(self, value: Any) -> Any:
        return value if self.first else self.sent


def keep(server: Server, world: Any) -> list[str]:
    """Messages of the round's end."""
    log = EventLog([lambda _: None], None, True)
    keep_alike(cast(World, world), server, log, 3)
    assert all((event["event"], event["round"]) == ("warning", 3) for event in log.events)
    return [event["message"] for event in log.events]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_processes_with_other_weights_take_those_of_the_first(dtype):
    first, second = (Server(GlobalModel(make_model(dtype, seed=seed), Q), {}, "flora") for seed in (0, 1))
    for server in (first, second):
        server.state = {"of": server.digest()}
    digest = first.digest()
    assert digest != second.digest()
    words = "processes 1 came to other weights than process 0 and take its: their machines differ"
    assert keep(first, TwoProcesses(True, "other")) == [words]
    assert first.digest() == digest
    assert keep(second, TwoProcesses(False, "other", first.saved())) == [words]
    assert (second.digest(), second.state) == (digest, {"of": digest})
    assert all(torch.equal(low, first.model.low_bits[module]) for module, low in second.model.low_bits.items())
    assert keep(first, TwoProcesses(True, None)) == keep(second, TwoProcesses(False, None)) == []
