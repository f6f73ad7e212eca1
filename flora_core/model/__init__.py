"""One resident causal language model with the adapters of many clients."""

from __future__ import annotations

from . import attention
from .accepted import as_tokenizer, check_model, decoder_of, embedding_rows, sequence_limit
from .attachment import attach, cohort_of, detach
from .client import ClientSpec
from .cohort import Cohort
from .deterministic import deterministic_libraries
from .evaluation import evaluate
from .forward import evaluation_mode, labelled_hidden
from .layer import MultiLoRALinear
from .loss import client_losses
from .recompute import keeping_less
from .targets import target_weights
from .weights import is_conv1d
from .with_adapter import adapter_beside

__all__ = [
    "ClientSpec",
    "Cohort",
    "MultiLoRALinear",
    "adapter_beside",
    "as_tokenizer",
    "attach",
    "attention",
    "check_model",
    "client_losses",
    "cohort_of",
    "decoder_of",
    "detach",
    "deterministic_libraries",
    "embedding_rows",
    "evaluate",
    "evaluation_mode",
    "is_conv1d",
    "keeping_less",
    "labelled_hidden",
    "sequence_limit",
    "target_weights",
]
