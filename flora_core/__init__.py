"""FLoRA: federated fine-tuning of language models with LoRA adapters of different ranks.

Names are imported on first use, so that ``import flora_core`` needs torch alone.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.bank import AdapterBank
    from .adapters.peft import load_peft_adapter, save_peft_adapter
    from .adapters.update import ClientUpdate, RoundResult
    from .aggregation import aggregate
    from .common.segments import Segments
    from .config.adapter import AdapterConfig
    from .config.training import TrainConfig
    from .federation.rebase import RebaseReport, rebase_adapter
    from .federation.rounds import Federation, FederationConfig
    from .merge import MergeReport, export_adapter, merge_into_checkpoint
    from .merge.in_place import merge_adapter_
    from .model.attachment import attach, detach
    from .model.client import ClientSpec
    from .model.cohort import Cohort
    from .model.evaluation import evaluate
    from .ops import api
    from .ops.api import (
        LoraWeights,
        MergeItem,
        cohort_adamw_,
        lora_linear,
        lora_linears,
        stacked_merge_,
        stacked_merge_many_,
    )
    from .training.explanation import explain
    from .training.optimizer import CohortAdamW
    from .training.trainer import CohortTrainer

_HOMES = {
    "adapter_config": "AdapterConfig",
    "aggregate": "aggregate",
    "attach": "attach detach",
    "bank": "AdapterBank",
    "cohort": "ClientSpec Cohort",
    "evaluate": "evaluate",
    "explaining": "explain",
    "federation": "Federation FederationConfig",
    "merge": "merge_adapter_",
    "ops": "LoraWeights MergeItem cohort_adamw_ lora_linear lora_linears stacked_merge_ stacked_merge_many_",
    "optimizer": "CohortAdamW",
    "peft_io": "load_peft_adapter save_peft_adapter",
    "rebase": "RebaseReport rebase_adapter",
    "segments": "Segments",
    "streaming": "MergeReport export_adapter merge_into_checkpoint",
    "config": "TrainConfig",
    "trainer": "CohortTrainer",
    "update": "ClientUpdate RoundResult",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(".ops", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module 'flora_core' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]


class _Package(ModuleType):
    """A package in which a function wins over the submodule that it is named after (attach, aggregate, evaluate)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME_OF.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

__all__ = [
    "AdapterBank",
    "AdapterConfig",
    "ClientSpec",
    "ClientUpdate",
    "Cohort",
    "CohortAdamW",
    "CohortTrainer",
    "Federation",
    "FederationConfig",
    "LoraWeights",
    "MergeItem",
    "MergeReport",
    "RebaseReport",
    "RoundResult",
    "Segments",
    "TrainConfig",
    "aggregate",
    "attach",
    "cohort_adamw_",
    "detach",
    "evaluate",
    "explain",
    "export_adapter",
    "load_peft_adapter",
    "lora_linear",
    "lora_linears",
    "merge_adapter_",
    "merge_into_checkpoint",
    "ops",
    "rebase_adapter",
    "save_peft_adapter",
    "stacked_merge_",
    "stacked_merge_many_",
]
