"""Training steps on the Triton backend: every client's gradients against PEFT, their bits again, and CUDA graphs."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

import flora_core as flora
from flora_core.data.pack import lay_out
from flora_core.testing import plain_rounding
from flora_core.training import cuda_graphs, static_steps, steps
from tests.support import models
from tests.support.fake_graphs import FakeGraphs, attend_by_offsets

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS, LENGTHS = (5, 2, 16), ((9, 4), (1,), (17,))


def small_llama() -> Any:
    """Two layers, wide enough for a tile and no multiple of one."""
    config = transformers.LlamaConfig(
        vocab_size=models.VOCAB,
        hidden_size=48,
        head_dim=16,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return models.randomised(transformers.AutoModelForCausalLM.from_config(config))


def start(model: Any) -> flora.Cohort:
    """A cohort whose B is not zero, for else a wrong dA would pass."""
    clients = [flora.ClientSpec(f"c{i}", adapter=flora.AdapterConfig(rank, 2 * rank)) for i, rank in enumerate(RANKS)]
    cohort = flora.attach(model, clients, LINEARS, backend="triton", fuse="separate")
    random = torch.Generator().manual_seed(0)
    for entry in cohort.bank.modules.values():
        entry.B_PN.copy_(torch.randn(entry.B_PN.shape, generator=random) * 0.1)
    return cohort


def cohort_gradients(cohort: flora.Cohort, rows: Any) -> dict[str, torch.Tensor]:
    """The gradient of every factor, named by client and module, of the sum of the hidden states' squares."""
    batch = lay_out(rows, packs=True, device=cohort.bank.param.device)
    factors = cohort.parameters()
    with cohort.batch(batch.tokens, sequences=batch.sequences):
        hidden = cohort.model.model(**batch.inputs, use_cache=False).last_hidden_state
        grads = torch.autograd.grad(hidden.pow(2).sum(), factors)
    found = {}
    for (path, entry), dA, dB in zip(cohort.bank.modules.items(), grads[::2], grads[1::2], strict=True):
        for name, bank in zip(cohort.names, entry.ranks, strict=True):
            found |= {f"{name} {path} A": dA[bank], f"{name} {path} B": dB[bank].T}
    return found


def peft_gradients(model: Any, cohort: flora.Cohort, rows: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same by PEFT, one client after another on a model of its own."""
    found = {}
    for name, rank, examples in zip(cohort.names, RANKS, rows, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a deprecated name
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS, task_type="CAUSAL_LM")
            peft = cast(Any, get_peft_model(copy.deepcopy(model).to(dtype), config))
        inner = peft.to(dtype).base_model.model
        adapters = cohort.bank.adapters(name)
        layers = {path: layer for path, layer in inner.named_modules() if isinstance(layer, LoraLayer)}
        weights = []
        for path, (A_RK, B_RN) in adapters.items():
            pair: Any = [getattr(layers[path], factor)["default"].weight for factor in ("lora_A", "lora_B")]
            for weight, value in zip(pair, (A_RK, B_RN.T), strict=True):
                weight.data.copy_(value)
                weights.append((f"{name} {path} {'AB'[weight is pair[1]]}", weight))
        total = torch.zeros((), dtype=dtype, device=weights[0][1].device)
        for example in examples:
            ids = torch.tensor([example.input_ids], device=total.device)
            total = total + inner.model(input_ids=ids, use_cache=False).last_hidden_state.pow(2).sum()
        grads = torch.autograd.grad(total, [weight for _, weight in weights])
        found |= {key: grad for (key, _), grad in zip(weights, grads, strict=True)}
    return found


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The largest error in each tensor by its own size, as a root mean square: any one of them is a draw of chance."""
    sizes = {key: exact[key].abs().max().item() for key in exact}
    return math.sqrt(sum(((found[k] - exact[k]).abs().max().item() / sizes[k]) ** 2 for k in exact) / len(exact))


def check(device: str) -> dict[str, Any]:
    """Share of the error budget of the gradients, in float32, and whether a second step has the same bits."""
    model = small_llama().to(device)
    rows = [models.examples(3 + i, lengths) for i, lengths in enumerate(LENGTHS)]
    cohort = start(copy.deepcopy(model))
    one, two = (cohort_gradients(cohort, rows) for _ in range(2))
    exact, low = (peft_gradients(model, cohort, rows, dtype) for dtype in (torch.float64, torch.float32))
    if one.keys() != exact.keys():
        raise AssertionError(f"gradients of other tensors than PEFT's: {sorted(one.keys() ^ exact.keys())}")
    ratio = error(one, exact) / (2 * (error(low, exact) + torch.finfo(torch.float32).eps))
    repeats = all(torch.equal(one[key], two[key]) for key in one)
    return {"green": ratio <= 1 and repeats, "error / budget": ratio, "repeats bit for bit": repeats}


Factors = dict[str, torch.Tensor]


def train(device: str, way: str, dtype: torch.dtype) -> tuple[Factors, str]:
    """Train a cohort, by Triton in static shapes (called, replayed) or by the reference as it is (ordinary, exact).

    Gives all factors and losses, and what became of graphs.
    """
    shape = dict(hidden_size=64, head_dim=16, intermediate_size=48, num_hidden_layers=1, pad_token_id=0)
    model = models.tiny("llama", dtype, **shape).to(device)
    static, dtype = way in ("called", "replayed"), torch.float64 if way == "exact" else dtype
    adapters = [flora.AdapterConfig(rank, 2 * rank, dropout=0.1 * (rank > 3)) for rank in (3, 16, 7)]
    lengths = (9, 4), (8, 12, 5, 9), (13,) * 4  # the first is done early
    clients = [
        flora.ClientSpec(f"c{i}", models.examples(i, lengths[i]), adapters[i], {"clip_norm": 0.5} if i else None)
        for i in range(3)
    ]
    backend = "triton" if static else "reference"
    cohort = flora.attach(model.to(dtype), clients, ["q_proj", "v_proj"], backend=backend, fuse="separate")
    for i, name in enumerate(cohort.names):
        cohort.load(name, models.random_adapters(cohort.update(name).adapters, i))
    wanted = static and (device == "cuda" or "auto")
    runner = flora.CohortTrainer(cohort, flora.TrainConfig(lr=1e-2, batch_size=1, cuda_graphs=wanted))
    with pytest.MonkeyPatch.context() as patch, models.exact64() if way == "exact" else nullcontext():
        # Few sizes, so that they come again in a short training.
        patch.setattr(static_steps, "round_up", lambda count, _: max(32, 1 << (count - 1).bit_length()))
        if way == "called":
            patch.setattr(steps, "executor_for", lambda _: cuda_graphs.Eager())
        if device == "cpu" and static:
            attend_by_offsets(patch)
            patch.setattr(steps, "why_not", lambda *_: None)
            patch.setattr(steps, "executor_for", lambda _: FakeGraphs())
        updates = runner.run()
    factors = {
        f"{u.client} {m} {'AB'[i]}": t for u in updates for m, ab in u.adapters.items() for i, t in enumerate(ab)
    }
    losses = {f"{name} losses": torch.tensor(client.losses) for name, client in runner.clients.items()}
    return {**factors, **losses}, runner.cuda_graphs


def check_graphs(device: str) -> dict[str, Any]:
    """Return whether replays have the bits of calls, and their training the error of ordinary steps against float64."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    (exact, _), (replayed, told) = (train(device, way, dtype) for way in ("exact", "replayed"))
    # On a CPU the ordinary steps' rounding, and so the budget, would be the processor's.
    with plain_rounding() if device == "cpu" else nullcontext():
        low, _ = train(device, "ordinary", dtype)
    # Without a GPU a replay is a call.
    called = train(device, "called", dtype)[0] if device == "cuda" else replayed
    same = all(torch.equal(called[key], replayed[key]) for key in called)
    ratio = error(replayed, exact) / (2 * (error(low, exact) + torch.finfo(dtype).eps))
    green = same and ratio <= 1 and told.startswith("on: ")
    return {"green": green, "replays are calls bit for bit": same, "error / budget": ratio, "graphs": told}


def check_repeats(device: str) -> dict[str, Any]:
    """Return whether the same training gives the same bits twice, over sequences of many key blocks, replayed and
    called.

    Attention's backward is where it would differ: a sequence of more than one block of keys sums dQ from several.
    """
    full = device == "cuda"
    found: dict[str, Any] = {"green": True}
    for wanted in ("auto", False) if full else (False,):
        (one, told), (two, _) = (_train_llama(device, full, wanted) for _ in range(2))
        same = all(torch.equal(one[key], two[key]) for key in one)
        found["replayed" if wanted else "called"] = {"repeats bit for bit": same, "how": told}
        found["green"] &= same
    return found


def _train_llama(device: str, full: bool, cuda_graphs: Any) -> tuple[Factors, str]:
    """Train two layers of TinyLlama's shapes on 10 x 1,024 tokens for four steps (or tiny ones); factors, and how."""
    dtype, lengths, ranks = (torch.bfloat16, (512, 512), RANKS * 3 + (4,)) if full else (torch.float32, (7,), (2,))
    sizes = (2048, 5632, 32, 4) if full else (32, 48, 2, 2)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    fields: dict[str, Any] = dict(zip(names, sizes, strict=True))
    model = models.tiny("llama", dtype, num_hidden_layers=2 if full else 1, **fields).to(device)
    clients = [
        flora.ClientSpec(f"c{i}", models.examples(i, lengths * 4), flora.AdapterConfig(rank, 2 * rank, dropout=0.1))
        for i, rank in enumerate(ranks)
    ]
    targets = LINEARS if full else ["v_proj"]
    cohort = flora.attach(model, clients, targets, backend="triton", fuse="separate")
    config = flora.TrainConfig(lr=1e-2, batch_size=len(lengths), cuda_graphs=cuda_graphs, token_budget=1 << 14)
    trainer = flora.CohortTrainer(cohort, config)
    updates = trainer.run()
    factors = {
        f"{u.client} {path} {'AB'[i]}": t for u in updates for path, ab in u.adapters.items() for i, t in enumerate(ab)
    }
    return factors, f"{flora.explain(model).notes[0]}; graphs {trainer.cuda_graphs}"


__all__ = ["check", "check_graphs", "check_repeats"]
