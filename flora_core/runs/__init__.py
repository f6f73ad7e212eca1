"""One run: what it is made of, its folder, events, progress and report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import face

if TYPE_CHECKING:
    from .build import build_client, build_model, build_run, save_inputs, specs_of
    from .demo_model import is_ready
    from .event_log import EventLog
    from .events import Event
    from .fingerprint import environment, identity
    from .folder import ROUNDS, RUN, RunFolder
    from .loading import load_model, load_tokenizer, model_folder
    from .progress import Bar, RunProgress
    from .recipe import load_recipe, use_strategy
    from .report import missing_plots, write_report
    from .saving import converted, dtype_to_save
    from .snapshot import DAMAGE, STATE, check_files, read_body
    from .summary import History, show_cost, summary_tables

__getattr__, __dir__, __all__ = face(__name__, __file__)
