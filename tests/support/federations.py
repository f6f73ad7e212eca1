"""A tiny federation: model, tokenizer, records and clients that a whole run takes well under a second for."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.adapters.peft import load_peft_adapter
from flora_core.adapters.update import ClientUpdate
from flora_core.runs.folder import RunFolder
from flora_core.testing import ulp

WORDS = [f"w{i}" for i in range(24)]
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)


def make_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """One token a word; another word is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<s>", "</s>", *words]
    level = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=level, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_model(dtype: torch.dtype = torch.float32, hidden: int = 16, seed: int = 0) -> Any:
    """A random Llama whose q_proj and v_proj are hidden x hidden."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    random = torch.Generator().manual_seed(seed)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.2 * noise)
    return model.to(dtype)


def make_records(name: str, count: int) -> list[dict[str, str]]:
    """Short questions whose answers depend on who asks."""
    random = Random(name)
    words = WORDS[:12] if name < "c" else WORDS[12:]
    rows = [[random.choice(words) for _ in range(4)] for _ in range(count)]
    return [{"instruction": " ".join(row[:3]), "output": row[3], "category": row[0]} for row in rows]


def make_clients(ranks: Sequence[int] = (4, 2, 3), **adapter: Any) -> list[flora.ClientSpec]:
    """Clients a, b, c, ... with these ranks, and 5, 6, 7, ... records."""
    names = [chr(ord("a") + i) for i in range(len(ranks))]
    return [
        flora.ClientSpec(name, make_records(name, 5 + i), flora.AdapterConfig(rank, 2 * rank, **adapter))
        for i, (name, rank) in enumerate(zip(names, ranks, strict=True))
    ]


TRAIN: dict[str, Any] = dict(lr=1e-2, batch_size=2, max_length=32)


def make_federation(out: Path | str | None = None, **changes: Any) -> flora.Federation:
    """Three clients, two rounds; ``changes`` go to ``FederationConfig``, ``TrainConfig`` or ``Federation``."""
    config: dict[str, Any] = dict(rounds=2, out=out)
    train = dict(TRAIN)
    for name in list(changes):
        for home, cls in ((config, flora.FederationConfig), (train, flora.TrainConfig)):
            if name in cls.__dataclass_fields__ and not (name == "seed" and cls is flora.TrainConfig):
                home[name] = changes.pop(name)
                break
    whole: dict[str, Any] = {
        "model": None,
        "clients": None,
        "tokenizer": None,
        "target_modules": ["q_proj", "v_proj"],
        "eval_data": make_records("b held out", 6),
        "callbacks": [lambda event: None],
        **changes,
    }
    for name, make in (("model", make_model), ("clients", make_clients), ("tokenizer", make_tokenizer)):
        whole[name] = make() if whole[name] is None else whole[name]
    return flora.Federation(config=flora.FederationConfig(**config), train=flora.TrainConfig(**train), **whole)


def target_weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what rounds change."""
    return {
        path: module.weight.detach().clone()
        for path, module in model.named_modules()
        if path.endswith(("q_proj", "v_proj"))
    }


def files(folder: Path, *kinds: str) -> dict[str, bytes]:
    """The bytes of every file of these endings below a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(kinds))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def updates_of(out: Path, number: int, weights: dict[str, float]) -> list[ClientUpdate]:
    """The adapters that a round saved."""
    folders = sorted(path for path in (out / "rounds" / f"{number:04d}").iterdir() if path.is_dir())
    return [load_peft_adapter(folder, weight=weights[folder.name]) for folder in folders]


def no_training(event) -> None:
    """A callback for runs that must stop before."""
    assert event["event"] not in ("round_start", "train_progress")


def new_folder(path: Path, **options) -> RunFolder:
    """A folder in which a run has begun."""
    folder = RunFolder(path, **options)
    path.mkdir(exist_ok=True)
    folder.record.begin({"rounds": 3}, {"torch": "1"}, "start")
    return folder


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Like a full disk, for this process: no file may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Stop(Exception):  # noqa: N818
    """How a test stops a run."""


def stop_after(number: int, out: Path, model=None, **changes) -> None:
    """Run until a round is over."""

    def callback(event) -> None:
        if event["event"] == "round_end" and event["round"] == number:
            raise Stop

    with pytest.raises(Stop):
        make_federation(out, model=model, callbacks=[callback], **{"rounds": 3, **changes}).run()


def starts(out: Path, number: int) -> dict[str, torch.Tensor]:
    """The A that clients a, b and c sent in a round, of their first module."""
    return {
        update.client: next(iter(update.adapters.values()))[0]
        for update in updates_of(out, number, dict.fromkeys("abc", 1))
    }


def assert_within_one_ulp(after: torch.Tensor, ideal: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> None:
    off = (after.double() - ideal.to(dtype).double()).abs()
    assert (off <= ulp(torch.maximum(before.abs(), after.abs()), dtype)).all(), float(off.max())
