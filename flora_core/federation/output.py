"""Everything that a federation leaves in its run's folder: rounds, refused updates, the global adapter, the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters import Base, ClientUpdate
from ..runs import Event, EventLog, RunFolder, converted, dtype_to_save
from .clients import RunSetup
from .model_card import model_card
from .quarantine import quarantine
from .rebase import rebase_adapter
from .resume import kept_settings
from .server import Server


@dataclass
class RunOutput:
    """The writer of a run's files. A process without a folder writes nothing, but takes part for a base in shards.

    Args:
        setup: The run's model and settings.
        folder: Its folder; None if nothing is saved, and in all processes but the first.
        log: For what could not be kept.
    """

    setup: RunSetup
    folder: RunFolder | None
    log: EventLog

    def __post_init__(self) -> None:
        config = self.setup.config
        wanted = config.save_model and config.out
        self.dtype: torch.dtype | None = dtype_to_save(config.save_dtype, self.setup.model) if wanted else None

    def check_room(self, server: Server, more_rounds: bool) -> None:
        """Refuse a disk that has no room for the model and one round's state."""
        if self.folder is None:
            return
        model = self.setup.model.parameters() if self.setup.config.save_model else []
        width = 0 if self.dtype is None else self.dtype.itemsize
        whole = sum(parameter.numel() * max(width, parameter.element_size()) for parameter in model)
        self.folder.check_room(whole + (server.model.size_bytes if more_rounds else 0))

    def save_round(
        self,
        number: int,
        updates: Sequence[ClientUpdate],
        state: Mapping[str, Any],
        end: Event,
        base: Base,
        fan_in_fan_out: bool,
    ) -> None:
        """Save a round: the state after it, its events and the clients' adapters."""
        if self.folder is None:
            return
        self.folder.record.keep_choices()
        # Those before the first round have no snapshot of their own.
        events = [event for event in self.log.events if event.get("round") == number or number == 1]
        # Under differential privacy, individual updates are never written to disk.
        config = self.setup.config
        kept = updates if config.privacy is None and config.save_adapters else []
        self.folder.save_round(number, kept, dict(state), [*events, end], base, fan_in_fan_out)

    def save_pause(self, number: int, names: Sequence[str], states: Mapping[str, Any]) -> None:
        """Save what a round that was stopped between two steps has."""
        if self.folder is not None:
            self.folder.record.keep_choices()
            self.folder.save_pause(number, {"clients": states, "names": names})

    def set_aside(self, number: int, name: str, reason: str, answer: Any, expected: Mapping[str, ClientUpdate]) -> None:
        """Keep what was refused, for inspection; that this fails must not cost the others their round."""
        if self.folder is None:
            return
        # Under privacy nothing of a client's is kept but what went wrong.
        answer = None if self.setup.config.privacy else answer
        # Only a client of the run has a folder of its own name.
        folder = self.folder.record.client_folder(name) if name in expected else None
        try:
            quarantine(self.folder.path, number, name, reason, answer, expected.get(name), folder)
        except OSError as error:
            text = f"{name}'s update is not kept apart: {error}"
            self.log.emit("warning", round=number, client=name, message=text)

    def save_result(self, server: Server, number: int) -> None:
        """Save the global adapter, where the strategy keeps one, and the whole global model."""
        adapter = server.adapter()
        if self.folder is not None and adapter is not None:
            self._save_adapter(self.folder, adapter, server, number)
        if self.setup.config.out is not None and self.setup.config.save_model:
            self._save_model(adapter, server, number)

    def _save_adapter(self, folder: RunFolder, adapter: ClientUpdate, server: Server, number: int) -> None:
        """Save the global adapter as one that fits the original base."""
        if not server.log.changed:
            folder.save_adapter(adapter, server.model.fan_in_fan_out)
            return
        # The strategy changed the base too, which no adapter beside the original one would have.
        try:
            rebase_adapter(folder.path, folder.adapter)
        except ValueError as error:
            text = f"adapter/ is not written, the result is in model/: {error}"
            self.log.emit("warning", round=number, message=text)

    def _save_model(self, adapter: ClientUpdate | None, server: Server, number: int) -> None:
        setup, base = self.setup, server.model.base
        with server.model.merged(adapter) as model:
            state = None if base is None else base.state_dict()
            if self.folder is None:
                return
            state = self._converted(model, state, number)
            strategy, events = setup.strategy.name, self.log.events
            card = model_card(model, setup.tokenizer, strategy, setup.config, setup.train, events)
            self.folder.save_model(model, setup.tokenizer, card, state, self.dtype)

    def _converted(self, model: Any, state: Any, number: int) -> Any:
        """The tensors to save, in the dtype that they are to have."""
        if self.dtype is None:
            return state
        state, error = converted(model.state_dict() if state is None else state, model, self.dtype)
        dtype = str(self.dtype).removeprefix("torch.")
        self.log.emit("converted", round=number, dtype=dtype, rounding_error=error)
        return state

    def finish(self) -> None:
        """Mark the run as over."""
        if self.folder is not None:
            self.folder.record.finish(kept_settings(self.setup))
