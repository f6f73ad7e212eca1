"""The contenders: a packed cohort and sequential PEFT on the same base, data and adapters, and their float64 oracle.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

import flora_core as flora
from bench.cases.grid import LINEARS, MODELS
from bench.cases.grid import TEN as RANKS
from bench.harness.protocol import Check
from flora_core.adapters.update import Adapters
from flora_core.data.pack import pad
from flora_core.data.template import IGNORE, Example
from flora_core.model.deterministic import deterministic_libraries
from flora_core.model.forward import evaluation_mode
from flora_core.runs.demo_model import demo_model_dir
from tests.support.models import exact64

LR = 3e-4
Batches = Sequence[Sequence[Example]]


def llama_config(name: str, layers: int) -> Any:
    """The configuration of a model in ``MODELS`` with so many layers."""
    from transformers import LlamaConfig

    shapes = MODELS[name]
    return LlamaConfig(
        vocab_size=shapes.vocab,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0 if shapes.tied else 10000.0, "rope_type": "default"},
        tie_word_embeddings=shapes.tied,
        pad_token_id=2,
        use_cache=False,
    )


def random_model(
    layers: int, name: str = "SmolLM2-135M", where: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A model's shapes with random weights, made where and as it will be used."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(where):
        return AutoModelForCausalLM.from_config(llama_config(name, layers), dtype=dtype).eval()


def real_model(layers: int) -> Any:
    """SmolLM2-135M-Instruct, cut to its first layers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(demo_model_dir(), dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    # A training step needs no cache of keys and values; without it PEFT is faster.
    model.config.use_cache = False
    return model.eval()


def random_batches(batch_size: int, tokens: int, clients: int = len(RANKS), vocab: int = 49152) -> list[list[Example]]:
    """One batch per client of random tokens, each with a label: labels = input_ids."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (clients, batch_size, tokens), generator=random).tolist()
    return [[Example(row, list(row), i) for i, row in enumerate(rows)] for rows in ids]


def specs(batches: Batches, ranks: Sequence[int] = RANKS, dropout: float = 0.0) -> list[flora.ClientSpec]:
    """Clients of these ranks, alpha = 2r, each with one batch that it takes at every step."""
    return [
        flora.ClientSpec(
            f"client-{c}",
            list(batch),
            flora.AdapterConfig(rank, 2 * rank, dropout=dropout),
            {"batch_size": len(batch), "local_epochs": 1 << 20, "lr": LR},
        )
        for c, (rank, batch) in enumerate(zip(ranks, batches, strict=True))
    ]


def shared_copy(model: Any) -> Any:
    """A model of its own modules that shares the parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def start_adapters(cohort: Any) -> dict[str, Adapters]:
    """Give every client a B that is not zero, so that the branch shows in the first loss; return all adapters."""
    random, found = torch.Generator().manual_seed(2), {}
    for name in cohort.names:
        for A_RK, B_RN in cohort.bank.adapters(name).values():
            B_RN.copy_((torch.randn(B_RN.shape, generator=random) * 0.005).to(B_RN.device))
            assert A_RK.any()
        found[name] = cohort.update(name).adapters
    return found


class Packed:
    """One optimizer step of all clients at a time, by ``CohortTrainer`` as users run it."""

    def __init__(
        self,
        model: Any,
        batches: Batches,
        ranks: Sequence[int] = RANKS,
        targets: Sequence[str] = LINEARS,
        dropout: float = 0.0,
        **config: Any,
    ):
        self.model = shared_copy(model)
        self.cohort = flora.attach(self.model, specs(batches, ranks, dropout), targets)
        self.adapters = start_adapters(self.cohort)
        self.trainer = flora.CohortTrainer(self.cohort, flora.TrainConfig(**config))
        self.budget, self._step = self.trainer.plan().token_budget, 0

    @contextmanager
    def running(self) -> Iterator[Packed]:
        """The trainer's state of a round: a working bank, its optimizer, evaluation mode."""
        self._clients = list(self.trainer.clients.values())
        with evaluation_mode(self.model), self.cohort.training(self.cohort.names) as bank:
            self._steps = self.trainer.steps_of(bank, self._clients)
            try:
                yield self
            finally:
                self._steps.release()

    def step(self) -> list[float]:
        """Forward, backward and AdamW for every client; their losses."""
        # Here and not around the whole run, for the rivals take their turns in between.
        with deterministic_libraries(self.cohort.bank.param.device, self.trainer.config.deterministic):
            self._steps.step(self._step, self.budget)
        self._step += 1
        return [client.losses[-1] if len(client.losses) == self._step else math.nan for client in self._clients]


class SequentialPeft:
    """One client after another, as PEFT's documentation trains: padded batch, model's own loss, torch's AdamW.

    Every client has a PEFT model of its own on the same shared weights, so that none pays for switching adapters.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        adapters: dict[str, Adapters],
        only: Sequence[int] | None = None,
        **options: Any,
    ):
        self.chosen = list(range(len(batches))) if only is None else list(only)
        names = list(adapters)
        self.models = [peft_model(shared_copy(model), adapters[names[c]], **options) for c in self.chosen]
        self.weights = [[p for p in one.parameters() if p.requires_grad] for one in self.models]
        self.optimizers = [torch.optim.AdamW(weights, lr=LR, weight_decay=0.0) for weights in self.weights]
        self.inputs = [padded_inputs(batches[c], model.device) for c in self.chosen]

    def step(self) -> list[float]:
        """One step of every client, one after another; their losses."""
        return [self._one(*parts) for parts in zip(self.models, self.optimizers, self.inputs, strict=True)]

    @staticmethod
    def _one(model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor]) -> float:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        return loss.item()


def peft_model(model: Any, adapters: Adapters, dropout: float = 0.0, autocast: bool = True) -> Any:
    """A model with one client's adapter, by ``get_peft_model``; ``autocast`` keeps adapters of 16 bits in float32."""
    rank = next(iter(adapters.values()))[0].shape[0]
    targets = sorted({path.rsplit(".", 1)[-1] for path in adapters})
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft's own call
        peft: Any = get_peft_model(model, config, autocast_adapter_dtype=autocast)
    load_peft(peft, "default", adapters)
    return peft.train()


def load_peft(peft: Any, adapter: str, adapters: Adapters) -> None:
    """Copy factors into one of a PEFT model's adapters."""
    layers: dict[str, Any] = {path: layer for path, layer in peft.named_modules() if isinstance(layer, LoraLayer)}
    for path, layer in layers.items():
        A_RK, B_RN = adapters[path.removeprefix("base_model.model.")]
        A, B = (factors[adapter].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        A.copy_(A_RK)
        B.copy_(B_RN.T)


def padded_inputs(batch: Sequence[Example], where: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, padded on the right to the batch's longest."""
    inputs = pad([batch], 2).inputs
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    for row, example in zip(labels, batch, strict=True):
        row[: len(example.labels)] = torch.tensor(example.labels)
    return {name: tensor.to(where) for name, tensor in {**inputs, "labels": labels}.items()}


def exact_losses(
    model: Any, batches: Batches, adapters: dict[str, Adapters], clients: Sequence[int], steps: int = 2
) -> list[list[float]]:
    """Losses [step][client] of some clients in float64: each record by itself, no padding, one AdamW per client."""
    names, columns = list(adapters), []
    wide = copy.deepcopy(model).double()
    with exact64():
        for c in clients:
            columns.append(_exact_client(peft_model(shared_copy(wide), adapters[names[c]]).double(), batches[c], steps))
    gc.collect()
    return [list(row) for row in zip(*columns, strict=True)]


def _exact_client(peft: Any, batch: Sequence[Example], steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    count = sum(label != IGNORE for example in batch for label in example.labels[1:])
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        last, total = step == steps - 1, 0.0
        with torch.no_grad() if last else nullcontext():
            for example in batch:
                z_MV = peft(input_ids=torch.tensor([example.input_ids], device=peft.device)).logits[0, :-1]
                target = torch.tensor(example.labels[1:], device=peft.device)
                loss = F.cross_entropy(z_MV, target, ignore_index=IGNORE, reduction="sum") / count
                total += loss.item()
                if not last:
                    loss.backward()
        optimizer.step()
        losses.append(total)
    return losses


def check_losses(
    ours: Sequence[Sequence[float]],
    peft: Sequence[Sequence[float]],
    exact: Sequence[Sequence[float]],
    clients: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Check:
    """Hold losses [step][client] to the error budget: some clients to float64, all of them to PEFT.

    The second step's losses come after an update, so that a wrong gradient shows. PEFT is ``low``: its own error
    against float64 is what this dtype, the base's, cannot avoid. Where there is no float64 run, ours may be one budget
    off and PEFT half of one.
    """
    steps = len(exact)
    out, low = (torch.tensor(list(rows[:steps]), dtype=torch.float32) for rows in (ours, peft))
    ref64 = torch.tensor(exact, dtype=torch.float64)
    chosen = list(clients)
    ours_off, error = ((rows[:, chosen].double() - ref64).abs().max().item() for rows in (out, low))
    budget = 2 * (error + torch.finfo(dtype).eps * ref64.abs().max().item())
    to_exact = ours_off / budget
    difference = (out.double() - low.double()).abs().max().item()
    ratios = [to_exact, difference / (1.5 * budget) if math.isfinite(difference) else math.inf]
    how = f"losses of {steps} steps: {len(chosen)} clients against float64, all {out.shape[1]} against PEFT"
    return Check(
        max(ratios, key=lambda ratio: (math.isnan(ratio), ratio)),
        how,
        {
            "losses": {"flora": out.tolist(), "peft": low.tolist(), "float64": ref64.tolist(), "clients": chosen},
            "budget": budget,
            "ratio_to_float64": to_exact,
            "ratio_to_peft": ratios[1],
        },
    )
