"""Adapters: the bank of all clients' factors, what a client sends, PEFT folders, and the base that an adapter fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import face

if TYPE_CHECKING:
    from .bank import AdapterBank, BankModule
    from .base import Base, check_base, place_of, values, values_of
    from .peft import (
        RECORD,
        WEIGHTS,
        load_peft_adapter,
        pair_factors,
        read_base,
        refuse_other_tensors,
        save_peft_adapter,
        save_stacked_adapter,
        weights_path,
    )
    from .peft_config import CONFIG, base_of, is_target, read_config, scaling_of
    from .peft_keys import sort_keys
    from .penalty import TailPenalty
    from .update import Adapters, ClientUpdate, RoundResult, packed, unpacked

__getattr__, __dir__, __all__ = face(__name__, __file__)
