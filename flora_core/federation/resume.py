"""Where a run stops and how it goes on there: as the same run, on all of its ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NoReturn

import torch

from ..common import Stopped, on_device, tensor_digest
from ..ops import autotune
from ..runs import Event, RunFolder, environment, identity
from ..training import Paused
from .evaluation import HeldOut
from .local_clients import TrainingRound


class Resuming(TrainingRound):
    """The part of a ``Federation`` that stops, goes on, and keeps the ranks' copies alike."""

    names: list[str]
    held_out: HeldOut
    strategy: Any
    found: dict[str, Any]
    finished = False

    @property
    def _out(self) -> str | None:
        raise NotImplementedError

    @property
    def _kept(self) -> dict[str, Any]:
        """List the settings of the saved model; a finished run that saved it otherwise saves it anew."""
        return {"save_model": self.config.save_model, "save_dtype": self.config.save_dtype}

    @property
    def _over(self) -> bool:
        return self.finished and self.round == self.config.rounds

    def _pause(self, pause: Paused) -> NoReturn:
        """Save what a round that was stopped between two steps has, and stop."""
        number = self.round + 1
        if self.folder is not None:
            self.folder.record.keep_choices()
            self.folder.save_pause(number, {"clients": pause.state, "names": self.names})
        self.ranks.meet()
        self._stop(f"stopped within round {number}, as was asked: the same run goes on from {self._out} at this step")

    def _stop(self, text: str) -> NoReturn:
        self.log.report({"event": "warning", "message": text})
        raise Stopped(text)

    def _resume(self) -> list[Event]:
        """Go on after the newest whole round in the folder, if it holds this run; warnings."""
        if self.folder is None and self.ranks.size == 1:
            return []
        start = self.server.digest()
        mine, where = self._identity(), environment(self.server.device)
        notes = self.ranks.agree({**mine, "start": start}, where)
        if self.folder is not None:
            notes += self._read_folder(self.folder, mine, where, start)
        self._go_on_alike()
        return [{"message": text} for text in notes]

    def _read_folder(
        self, folder: RunFolder, mine: Mapping[str, Any], where: Mapping[str, Any], start: str
    ) -> list[str]:
        notes = folder.record.begin(mine, where, start)
        # Whole weights of a sharded base have no room on a device.
        place = self.server.device if self.server.base is None else torch.device("cpu")
        snapshot, damaged = folder.newest(place)
        if snapshot is None:
            folder.record.check_start(start)
        else:
            self.found = snapshot.state["server"]
            self.round, self.optimizer = snapshot.round, on_device(snapshot.state["optimizer"], self.server.device)
        if self.private is not None:
            self.private.open(self.round)
        notes += folder.record.extend(mine)
        self.paused, torn = folder.pause(self.round + 1, self.server.device)
        folder.drop_superfluous(self.round, pause=not self.paused)
        self.finished = folder.record.finished and not (
            self.config.save_model and folder.record.kept not in (None, self._kept)
        )
        self.log.events = folder.metrics.events() if self._over else folder.restore_metrics(snapshot)
        return notes + damaged + torn

    def _go_on_alike(self) -> None:
        """Give every rank what rank 0 found in the folder: the others may not even see its disk."""
        mine, self.found = self.found, {}
        if self.ranks.size == 1:
            if mine:
                self.server.restore(mine)
            return
        self.ranks.meet()
        names = ("round", "optimizer", "paused", "finished")
        state = {name: getattr(self, name) for name in names} | {"events": self.log.events}
        # What is sharded goes to each rank in parts, by itself.
        sharded = {} if self.server.base is None else {"weights": {}, "low_bits": {}}
        found = self.ranks.send({**state, "server": {**mine, **sharded} if mine else {}, "fuse": autotune.used()})
        if not self.ranks.first:
            for name in names:
                setattr(self, name, found[name])
            self.log.events = found["events"]
            mine = found["server"]
        if mine:
            self.server.restore(mine)
        self._use_choices([found["fuse"]])

    def _keep_alike(self, number: int) -> None:
        """See that the round left all ranks the same weights; where a machine rounds otherwise, rank 0's count."""
        if self.ranks.size == 1 or self.server.base is not None:
            return  # no other process has a copy
        saved = {**self.server.weights, **{f"{m} low bits": low for m, low in self.server.low_bits.items()}}
        digests = self.ranks.exchange([tensor_digest(saved.items())])
        others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            found = self.ranks.send(self.server.saved())
            if not self.ranks.first:
                self.server.restore(found)
            text = (
                f"ranks {', '.join(others)} came to other weights than rank 0, whose they take: their machines differ"
            )
            self.log.emit("warning", round=number, message=text)

    def _identity(self) -> dict[str, Any]:
        ours = asdict(replace(self.config, out=None))
        # These change what is kept, and nothing that is computed.
        for name in ("base", "out", "keep_snapshots", "save_model", "save_dtype", "save_adapters"):
            ours.pop(name)
        base, targets = self.server.base, {f"{module}.weight" for module in self.server.weights}
        parameters = self.model.named_parameters() if base is None else base.parameters()
        rest = ((name, parameter) for name, parameter in parameters if name not in targets)
        others = {
            "strategy": self.strategy.name,
            "target_modules": self.target_modules,
            "backend": self.backend,
            "fuse": self.fuse,
            **self.held_out.digests(),
            "model.class": type(self.model).__name__,
            "model.dtype": str(self.model.dtype),
            "model.weights": tensor_digest(rest),
        }
        return identity(list(self.specs.values()), self.train, ours, others)
