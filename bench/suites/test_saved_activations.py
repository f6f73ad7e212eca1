"""Bytes that a forward pass keeps for backward, per token: the base alone, a cohort, PEFT."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import flora_core as flora
from bench.cases import cohorts
from bench.cases.cohorts import LINEARS, RANKS
from bench.cases.grid import Case
from bench.harness.protocol import Result
from bench.suites.test_decoder_layer import Layer
from flora_core.data.pack import pack


class Saved:
    """Counts the storages that autograd keeps, each once, without those of the model and its adapters."""

    def __init__(self, fixed: list[torch.Tensor]):
        self._fixed = {tensor.untyped_storage().data_ptr() for tensor in fixed}
        self._kept: dict[int, tuple[int, torch.Tensor]] = {}

    def __enter__(self) -> Saved:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._fixed:
            # The tensor is held as well, so that no address is used twice.
            self._kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    @property
    def size_bytes(self) -> int:
        return sum(size for size, _ in self._kept.values())


def decoder_bytes(model: Any, fixed: list[torch.Tensor], inputs: dict[str, Any], context: Any = None) -> int:
    """Bytes kept by one pass through the decoder, whose input embeddings ask for a gradient."""
    inner: AbstractContextManager[Any] = context or nullcontext()
    inputs.pop("labels", None)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    with inner, Saved([*fixed, embedded]) as saved:
        hidden = model(inputs_embeds=embedded, use_cache=False, **inputs).last_hidden_state
    assert hidden.requires_grad
    return saved.size_bytes


def base_bytes(scale: Any, batches: Any) -> int:
    model = cohorts.random_model(scale.layers).requires_grad_(False)
    return decoder_bytes(model.model, list(model.parameters()), cohorts.padded_inputs(batches[0]))


def flora_bytes(scale: Any, batches: Any, dropout: float) -> int:
    model = cohorts.random_model(scale.layers)
    cohort = flora.attach(model, cohorts.specs(batches, dropout=dropout), LINEARS)
    cohort.parameters()
    batch = pack(batches)
    routed = cohort.batch(batch.tokens, sequences=batch.sequences, dropout_step=0 if dropout else None)
    return decoder_bytes(model.model, [*model.parameters(), cohort.bank.param], dict(batch.inputs), routed)


def peft_bytes(scale: Any, batches: Any, dropout: float) -> list[int]:
    """Each client's bytes, by a model of its own."""
    model, found = cohorts.random_model(scale.layers), []
    cohort = flora.attach(cohorts.shared_copy(model), cohorts.specs(batches), LINEARS)
    for name, batch in zip(cohort.names, batches, strict=True):
        peft = cohorts.peft_model(cohorts.shared_copy(model), cohort.bank.adapters(name), dropout)
        inputs = cohorts.padded_inputs(batch)
        found.append(decoder_bytes(peft.base_model.model.model, list(peft.parameters()), inputs))
    return found


def test_bench_saved_activations(benchmark: Any, scale: Any):
    batches = cohorts.random_batches(1, scale.tokens)
    hidden, tokens = 576, scale.tokens
    result = Result(
        "saved_activations",
        "Bytes that the decoder's forward pass keeps for backward, per token: frozen base, cohort, PEFT, all linears",
        {**scale.settings, "ranks": RANKS, "dtype": "float32", "hidden": hidden, "batch_size": 1},
        scale.folder,
    )
    rows: list[dict[str, Any]] = []

    def add(case: str, size: float, count: int) -> None:
        per_token = size / count
        rows.append({"case": case, "bytes_per_token": per_token, "per_hidden": per_token / hidden / scale.layers})
        result.save(rows=rows)

    def measure() -> None:
        add("frozen base alone", base_bytes(scale, batches), tokens)
        for dropout in (0.0, 0.1):
            add(f"flora, ten clients, dropout {dropout:g}", flora_bytes(scale, batches, dropout), 10 * tokens)
            sizes = peft_bytes(scale, batches, dropout)
            add(f"PEFT, mean of ten clients, dropout {dropout:g}", sum(sizes), 10 * tokens)

    with result.reported():
        result.checked(Layer(Case(tokens=scale.tokens)).check())
        benchmark.pedantic(measure, rounds=1, iterations=1)
        result.save(finished=True)
    for row in rows:
        print(f"\n{row['case']}: {row['bytes_per_token']:.0f} bytes/token", end="")
    print()
