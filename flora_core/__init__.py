"""FLoRA: federated fine-tuning of language models with LoRA adapters of different ranks.

Names are imported on first use, so that ``import flora_core`` needs torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import face
from .moved import install as _serve_old_paths
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import ops
    from .adapters import AdapterBank, ClientUpdate, RoundResult, load_peft_adapter, save_peft_adapter
    from .aggregation import aggregate
    from .common import Segments
    from .config import AdapterConfig, TrainConfig
    from .federation import Federation, FederationConfig, RebaseReport, rebase_adapter
    from .merge import MergeReport, export_adapter, merge_adapter_, merge_into_checkpoint
    from .model import ClientSpec, Cohort, attach, detach, evaluate
    from .ops import (
        LoraWeights,
        MergeItem,
        api,
        cohort_adamw_,
        lora_linear,
        lora_linears,
        stacked_merge_,
        stacked_merge_many_,
    )
    from .training import CohortAdamW, CohortTrainer, explain

_serve_old_paths()
__getattr__, __dir__, __all__ = face(__name__, __file__)
