"""A whole model's training step by every contender, on the same weights, data and adapters.

Letters: M packed tokens, C clients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from bench.cases import cohorts
from bench.cases.cohorts import LR, Packed, SequentialPeft, check_losses, exact_losses, padded_inputs
from bench.cases.grid import TARGETS, Case
from bench.cases.rivals import FROZEN, Rival, need_bfloat16, need_gpu, need_package
from bench.harness.deadline import within
from bench.harness.protocol import Check, Missing
from bench.harness.rates import device, dtype
from flora_core import Segments
from flora_core.model.loss import client_losses

Work = Callable[[], Any]
FEW, COMPILE_SECONDS = 10, 75.0


class Step:
    """One case's model, data and our packed cohort; ``config`` changes its training settings."""

    def __init__(
        self, case: Case, layers: int, compiles: bool = False, where: torch.device | None = None, **config: Any
    ):
        self.case, self.layers, self.compiles = case, layers, compiles
        self.device = where or device()
        self.dtype = dtype(self.device)
        self.model = cohorts.random_model(layers, case.model, self.device, self.dtype)
        self.batches = cohorts.random_batches(1, case.tokens, len(case.ranks), case.shapes.vocab)
        everybody = case.tokens * len(case.ranks)
        config = config if self.device.type == "cpu" else {"token_budget": everybody, **config}
        self.packed = Packed(self.model, self.batches, case.ranks, TARGETS[case.targets], case.dropout, **config)
        self.adapters = self.packed.adapters

    @property
    def tokens(self) -> int:
        return self.case.tokens * len(self.case.ranks)

    @property
    def rows(self) -> list[Any]:
        """Every client's sequences in one batch."""
        return [example for batch in self.batches for example in batch]

    def check(self, clients: Sequence[int]) -> Check:
        """Two steps' losses of a two-layer model of the same shapes and cohort, without dropout's random masks."""
        small = Step(replace(self.case, dropout=0.0), min(2, self.layers), where=self.device)
        with small.packed.running():
            ours = [small.packed.step() for _ in range(2)]
        peft = SequentialPeft(small.model, small.batches, small.adapters)
        theirs = [peft.step() for _ in range(2)]
        exact = exact_losses(small.model, small.batches, small.adapters, clients)
        found = check_losses(ours, theirs, exact, clients, self.dtype)
        return replace(found, how=f"{found.how}; {small.layers} layers, no dropout")


def _frozen(setting: Step) -> Work:
    model = cohorts.shared_copy(setting.model).requires_grad_(False)
    ids = padded_inputs(setting.rows, setting.device)["input_ids"]
    target_M, head = ids[:, 1:].flatten(), setting.packed.cohort.head
    rows = Segments([ids.shape[1] - 1] * len(ids))
    weight_C = [1 / length for length in rows.lengths]

    def work() -> list[float]:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        loss_C = client_losses(head, hidden, target_M, rows, weight_C)
        torch.autograd.grad(loss_C.sum(), embedded)
        return loss_C.tolist()

    return work


def _sequential(setting: Step, **options: Any) -> SequentialPeft:
    return SequentialPeft(setting.model, setting.batches, setting.adapters, dropout=setting.case.dropout, **options)


def _peft(setting: Step) -> Work:
    return _sequential(setting).step


def _need_few_clients(setting: Step) -> None:
    if len(setting.case.ranks) > FEW:
        raise Missing(f"left out with more than {FEW} clients: each needs a PEFT model, which takes seconds to make")


def _peft_bf16(setting: Step) -> Work:
    need_bfloat16(setting)
    _need_few_clients(setting)
    return _sequential(setting, autocast=False).step


def _peft_compiled(setting: Step) -> Work:
    if not setting.compiles:
        raise Missing(
            "compiling for every rank takes minutes: flora bench cohort_rivals --compile; on a GPU it takes part in "
            "the case of TinyLlama without dropout"
        )
    _need_few_clients(setting)
    peft = _sequential(setting, autocast=setting.dtype.itemsize != 2)
    dynamo: Any = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = 64
    for model in peft.models:
        for layer in model.base_model.model.model.layers:
            layer.compile()
    gpu = setting.device.type == "cuda"
    with within(COMPILE_SECONDS, "compiling every layer for every rank") if gpu else nullcontext():
        peft.step()
    return peft.step


def _peft_one(setting: Step) -> Work:
    mean = max(1, round(sum(setting.case.ranks) / len(setting.case.ranks)))
    shapes = setting.adapters[next(iter(setting.adapters))]
    start = {path: (A[:1].repeat(mean, 1), B[:1].repeat(mean, 1)) for path, (A, B) in shapes.items()}
    model = cohorts.peft_model(
        cohorts.shared_copy(setting.model), start, setting.case.dropout, autocast=setting.dtype.itemsize != 2
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    inputs = padded_inputs(setting.rows, setting.device)
    return lambda: SequentialPeft._one(model, optimizer, inputs)


def _liger(setting: Step) -> Work:
    need_package("liger_kernel", "pip install liger-kernel")
    need_gpu(setting, "its kernels are written in Triton")
    _need_few_clients(setting)
    patch = importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama
    peft = _sequential(setting, autocast=False)
    for model in peft.models:
        patch(model=model.base_model.model)
    return peft.step


def _unsloth(setting: Step) -> Work:
    need_package("unsloth", "pip install unsloth, on a machine with a GPU")
    need_gpu(setting, "it refuses to be imported without one")
    raise Missing("it patches transformers for the whole process, so it cannot run beside the others")


def _mlora(setting: Step) -> Work:
    need_package("mlora", "it is installed from its repository; it has no release on the package index")
    need_gpu(setting, "its trainer has no other device")
    raise Missing("it reads models and data from files by its own launcher, so it cannot run on these weights in turns")


RIVALS = (
    Rival(
        FROZEN,
        "forward, loss and dX of the base without adapters, every client's sequence in one batch: the limit; the loss "
        "is ours, which is faster than the model's own",
        _frozen,
    ),
    Rival(
        "PEFT",
        "get_peft_model as it comes and torch's AdamW, one client after another; a PEFT model for every client on "
        "the shared weights, so that none pays for switching; no cache of keys and values",
        _peft,
    ),
    Rival("PEFT bf16", "the same with autocast_adapter_dtype=False: adapters in the base's 16 bits", _peft_bf16),
    Rival(
        "PEFT compiled",
        "the same with every decoder layer compiled by torch.compile (regional, as torch's tutorial advises); "
        "compiling is not timed",
        _peft_compiled,
    ),
    Rival(
        "PEFT, one adapter",
        "one adapter of the clients' mean rank, everybody's sequences in one batch: no federation, the same FLOPs",
        _peft_one,
    ),
    Rival("Liger", "PEFT bf16 with apply_liger_kernel_to_llama on each client's model, as its README says", _liger),
    Rival("Unsloth", "FastLanguageModel.get_peft_model, as its README says", _unsloth),
    Rival("mLoRA", "many adapters on one base in one process", _mlora),
)

__all__ = ["RIVALS", "Step"]
