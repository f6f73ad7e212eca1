"""Other programs' names of our settings, so that an error can name ours."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ..common import nearest

C = TypeVar("C", bound=type)
# Names of PEFT, transformers, TRL, Flower and OpenFedLLM -> keys of a recipe.
RECIPE_KEYS = {
    "r": "clients.ranks",
    "lora_r": "clients.ranks",
    "lora_rank": "clients.ranks",
    "lora_alpha": "clients.alpha",
    "lora_dropout": "clients.dropout",
    "use_rslora": "clients.rslora",
    "num_clients": "clients.count",
    "learning_rate": "train.lr",
    "lr_scheduler_type": "train.schedule",
    "num_warmup_steps": "train.warmup_steps",
    "num_train_epochs": "train.local_epochs",
    "num_epochs": "train.local_epochs",
    "epochs": "train.local_epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "max_grad_norm": "train.clip_norm",
    "max_seq_length": "train.max_length",
    "cutoff_len": "train.max_length",
    "adam_epsilon": "train.eps",
    "num_rounds": "federation.rounds",
    "num_server_rounds": "federation.rounds",
    "fraction_fit": "federation.fraction",
    "output_dir": "out",
    "model_name_or_path": "model",
    "base_model": "model",
    "torch_dtype": "dtype",
}
# Names of PEFT's ``LoraConfig`` -> fields of ``AdapterConfig``, which recipes set for all clients at once.
ADAPTER_FIELDS = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "rslora": "use_rslora",
}


def meant(word: str, known: Iterable[str], others: Mapping[str, str] = RECIPE_KEYS) -> str:
    """Describe which known name is meant: what another program calls it, else the nearest, else all."""
    known = list(known)
    ours = others.get(word, "")
    found = next((name for name in (ours, ours.rpartition(".")[2]) if name in known), None)
    return f"did you mean {found!r}?" if found else nearest(word, known)


def refuses_other_names(others: Mapping[str, str]) -> Callable[[C], C]:
    """Have a dataclass name its own field where an argument has another program's name, or is missing."""

    def decorate(cls: C) -> C:
        init: Any = cls.__init__
        known = list(cls.__dataclass_fields__)
        fields: Any = dataclasses.fields(cls)
        required = [
            one.name
            for one in fields
            if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        ]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in kwargs:
                if name not in known:
                    raise TypeError(f"{cls.__name__} has no field {name!r}; {meant(name, known, others)}")
            missing = [name for name in required[len(args) :] if name not in kwargs]
            if missing:
                raise TypeError(f"{cls.__name__} needs {missing[0]}; add {missing[0]}=...")
            init(self, *args, **kwargs)

        cls.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
        return cls

    return decorate
