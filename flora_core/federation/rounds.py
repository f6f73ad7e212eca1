"""The round loop: sample clients, train them as one cohort, judge, aggregate, write, evaluate, save.

Everything random derives from (seed, round, client), and a round counts only once the state after it is on disk, so a
run that is killed at any instant and started again ends as one that was not.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters import Base, ClientUpdate
from ..aggregation import get_strategy
from ..common import Stopped, peak_memory_bytes, require
from ..config import FederationConfig, TrainConfig
from ..distributed import ranks, shard_if_needed
from ..model import ClientSpec, as_tokenizer, check_model
from ..runs import Event, EventLog, RunFolder, converted, dtype_to_save
from ..training import CohortTrainer, Paused, stopping
from .callable_clients import Remote
from .evaluation import HeldOut
from .judge import promised
from .model_card import model_card
from .privacy import Privacy, PrivateSum
from .rebase import rebase_adapter
from .result import FederationResult, history
from .resume import Resuming
from .server import Server

# Clients that are checked together before training: their adapters are in memory at one time.
_CHECKED_TOGETHER = 64


class Federation(Resuming):
    """Fine-tune one model on many clients' data.

    Args:
        model: Any transformers causal LM, not wrapped. `flora` and `flora_svd` write the result into its weights; other
            strategies keep an adapter beside it: ``FederationResult.apply_to`` gives the result of either.
        tokenizer: Its tokenizer, or the folder or hub name of it; None if all data are encoded.
        clients: One ``ClientSpec`` each.
        strategy: A name from the table of ``flora_core.aggregation``.
        config: Rounds, sampling, weights, folder, ...
        train: Settings of local training.
        target_modules: As in ``attach``.
        eval_data: Held-out records, as ``load_records`` takes them; None: those of all clients. Each client's own
            (``ClientSpec.eval_data``) are evaluated as a group too.
        callbacks: Called with every event (``flora_core.runs.progress`` lists them).
        backend: auto, reference, triton or native.
        fuse: As in ``attach``.
        remote: Client -> the function that trains it remotely (``flora_core.federation.callable_clients``): asked
            while the others train here, for ``config.deadline_s`` at most. Its spec needs no data; what it sends is not
            trusted.
    In processes that torchrun started each trains its share of the clients (``flora_core.distributed``).

    Raises:
        ValueError, TypeError: If the settings do not fit the clients or the strategy.
    Deterministic: yes, on one machine with one number of threads, also over kills and resumes; but for the noise and
        the draws of ``config.privacy``, which are secret, and for who is late.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        clients: Sequence[ClientSpec],
        strategy: str = "flora",
        config: FederationConfig | None = None,
        train: TrainConfig | None = None,
        target_modules: Sequence[str] | str | None = None,
        eval_data: Any = None,
        callbacks: Sequence[Callable[[Event], None]] = (),
        backend: str = "auto",
        fuse: str = "auto",
        remote: Mapping[str, Remote] | None = None,
    ):
        if not isinstance(config, FederationConfig):
            raise TypeError(f"config must be a FederationConfig, such as FederationConfig(rounds=3), got {config!r}")
        check_model(model)
        self.model, self.tokenizer = model, as_tokenizer(tokenizer)
        self.save_dtype = dtype_to_save(config.save_dtype, model) if config.save_model and config.out else None
        self.config, self.train = config, train or TrainConfig()
        self.strategy, self.target_modules, self.backend, self.fuse = (
            get_strategy(strategy),
            target_modules,
            backend,
            fuse,
        )
        clients = list(clients)
        self.held_out = HeldOut(clients, eval_data, config)
        self.remote = dict(remote or {})
        self.paused, self.found, self.heard, self.sums, self.stop = {}, {}, [], {}, lambda: False
        self.ranks = ranks()
        self._check_settings([spec.name for spec in clients])
        self.specs = {spec.name: spec for spec in clients}
        out = config.out if self.ranks.first else None
        self.folder = None if out is None else RunFolder(out, config.keep_snapshots)
        self.log = EventLog(callbacks, None if self.folder is None else self.folder.metrics, self.ranks.first)
        self.private = None if config.privacy is None else self._private_sum(config.privacy)

    def _private_sum(self, privacy: Privacy) -> PrivateSum:
        config = self.config
        weights = config.weights if isinstance(config.weights, Mapping) else dict.fromkeys(self.specs, 1.0)
        return PrivateSum(privacy, config.fraction, config.rounds, weights, self.folder and self.folder.path)

    def _check_settings(self, names: Sequence[str]) -> None:
        require(len(names) > 0, "clients must hold at least one ClientSpec, got none")
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"client names must be unique, got twice: {', '.join(twice)}")
        self.config.check_names(names)
        self.config.check_strategy(self.strategy.name)
        self.strategy.check(self.config.strategy_options)
        for name, wanted in (("privacy", self.config.privacy is not None), ("remote", bool(self.remote))):
            text = (
                f"{name} is for a run in one process, got {self.ranks.size} ranks; leave it out, or do without torchrun"
            )
            require(self.ranks.size == 1 or not wanted, text)
        unknown = sorted(set(self.remote) - set(names))
        require(not unknown, f"remote names clients that are not there: {', '.join(unknown)}; give each a ClientSpec")
        require(
            not self.remote or self.config.weights not in ("examples", "tokens"),
            f"weights={self.config.weights!r} would take the word of clients elsewhere for how much they count; with "
            "remote= use weights='uniform' or a mapping",
        )

    def run(self) -> FederationResult:
        """Run all rounds that are still to be done, and save the result.

        Raises:
            ValueError: If model, data and settings do not fit (before anything is trained), or ``out`` holds a run
                with another configuration.
            OSError: If another process works in ``out``, it holds foreign files, or saving fails; what was saved
                stays, and the same run started again goes on from there.
            Stopped: After SIGTERM, where there is an ``out``: the step in flight was finished and saved, and the same
                run started again goes on there. Left alone it ends the process with exit code 0.
        """
        with (
            self.ranks.together(),
            nullcontext() if self.folder is None else self.folder.locked(),
            stopping(self.config.out is not None) as self.stop,
        ):
            began = time.perf_counter()
            shard_if_needed(self.model, self.config.base, self.ranks)
            notes = self._check_clients()
            notes += self._resume()
            if self._over:
                text = f"{self.config.out} holds this run, finished: nothing is trained; raise rounds to go on"
                self.log.report({"event": "warning", "message": text})
                return self._result()
            self._start(notes)
            while self.round < self.config.rounds:
                try:
                    self._run_round()
                except Paused as pause:
                    self._pause(pause)
                if any(self.ranks.meet(self.stop())) and self.round < self.config.rounds:
                    raise Stopped(
                        f"stopped after round {self.round}, as was asked: the same run goes on from {self._out}"
                    )
            self._finish(began)
            self.ranks.meet()
        return self._result()

    def _check_clients(self) -> list[Event]:
        """Check model, data and strategy with every client before training, and encode the data once; warnings."""
        notes: list[Event] = []
        self.expected: dict[str, ClientUpdate] = {}
        here = [spec for name, spec in self.specs.items() if name not in self.remote]
        elsewhere = [replace(self.specs[name], data=[]) for name in self.specs if name in self.remote]
        for specs, trains in ((here, True), (elsewhere, False)):
            for first in range(0, len(specs), _CHECKED_TOGETHER):
                notes += self._check_some(specs[first : first + _CHECKED_TOGETHER], trains)
        self.expected = {name: self.expected[name] for name in self.specs}
        self.strategy.check_fits(list(self.expected.values()))
        config = self.config
        settings = (self.strategy.name, config.strategy_options, config.rounding, config.seed, config.check_rows)
        self.server = Server(self.model, self.expected, *settings)
        self.round, self.optimizer, self.paused = 0, {}, {}
        self.log.events = []
        return notes

    def _check_some(self, specs: Sequence[ClientSpec], trains: bool) -> list[Event]:
        notes: list[Event] = []
        with self._attached(specs) as cohort:
            trainer = CohortTrainer(cohort, self.train, self.tokenizer, callbacks=[notes.append]) if trains else None
            for spec in specs:
                data = spec.data if trainer is None else trainer.clients[spec.name].examples
                self.specs[spec.name] = replace(spec, data=data)
                self.expected[spec.name] = mine = promised(cohort, spec.name)
                require(bool(mine.adapters), f"client {spec.name!r} has rank 0 everywhere; leave it out")
        return notes

    def _start(self, notes: Sequence[Event]) -> None:
        """Tell what begins, and evaluate the model before training."""
        require(
            self.private is None or type(self.server) is Server,
            "privacy is for clients that this process asks itself; a server of another kind would not send the noise",
        )
        if self.folder is not None:
            self.folder.check_room(self._bytes_to_save())
        clients = []
        for name, spec in self.specs.items():
            parameters = sum(factor.numel() for pair in self.expected[name].adapters.values() for factor in pair)
            one = {"name": name, "rank": spec.adapter.rank, "examples": len(spec.data), "parameters": parameters}
            clients.append(one)
        self.log.emit(
            "run_start",
            rounds=self.config.rounds,
            strategy=self.strategy.name,
            clients=clients,
            device=str(self.server.device),
            out=self._out,
            seed=self.config.seed,
            resumed_from=self.round or None,
            **({} if self.server.base is None else {"base": self.server.base.to_json()}),
        )
        for note in [*notes, *self._idle_ranks()]:
            self.log.emit("warning", round=self.round, message=note["message"], client=note.get("client"))
        if self.round == 0:
            self._evaluate(0)

    @property
    def _out(self) -> str | None:
        return None if self.config.out is None else str(self.config.out)

    def _idle_ranks(self) -> list[Event]:
        drawn = len(self.sampled(1)) if self.ranks.size > 1 else 1
        text = (
            f"{self.ranks.size} ranks share {drawn} clients of a round: at least {self.ranks.size - drawn} train nobody"
        )
        return [{"message": text}] if drawn < self.ranks.size and self.ranks.size > 1 else []

    def _bytes_to_save(self) -> int:
        model = self.model.parameters() if self.config.save_model else []
        width = 0 if self.save_dtype is None else self.save_dtype.itemsize
        whole = sum(parameter.numel() * max(width, parameter.element_size()) for parameter in model)
        return whole + (self.server.size_bytes if self.round < self.config.rounds else 0)

    def _run_round(self) -> None:
        number, began = self.round + 1, time.perf_counter()
        base = self.server.trained_on()
        self.names = self.paused["names"] if self.paused else self.sampled(number)
        late = {name: self.server.catch_up(name) for name in self.names}
        updates = self._train(number, self.names)
        self.paused = {}
        # A private round is released even if no client took part: an omission would reveal who did not.
        applied = len(updates) >= self.config.min_clients if self.private is None else self.private.affordable
        if applied:
            self._apply(number, updates, {name: how for name, how in late.items() if how[1]})
        else:
            why = f"{len(updates)} good updates, min_clients={self.config.min_clients}"
            why = why if self.private is None else "one more release would cost more than privacy.epsilon"
            text = f"round {number} changes nothing: {why}"
            self.log.emit("warning", round=number, message=text)
        self._keep_alike(number)
        if number % self.config.eval_every == 0 or number == self.config.rounds:
            self._evaluate(number)
        end: Event = {"round": number, "rounds": self.config.rounds, "applied": applied}
        end |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory_bytes(self.server.device)}
        state = {} if self.config.out is None else {"server": self.server.saved(), "optimizer": self.optimizer}
        if self.folder is not None:
            end["checkpoint"] = str(self.folder.folder(number))
            state |= {} if self.private else {"aggregation": self._aggregation(updates, applied)}
            self._save_round(self.folder, number, updates, state, {"event": "round_end", **end}, base)
        self.round = number
        self.log.emit("round_end", **end)

    def _save_round(
        self,
        folder: RunFolder,
        number: int,
        updates: Sequence[ClientUpdate],
        state: dict[str, Any],
        end: Event,
        base: Base,
    ) -> None:
        folder.record.keep_choices()
        # Those before the first round have no snapshot of their own.
        events = [event for event in self.log.events if event.get("round") == number or number == 1]
        # Under differential privacy, individual updates are never written to disk.
        updates = updates if self.private is None and self.config.save_adapters else []
        folder.save_round(number, updates, state, [*events, end], base, self.server.fan_in_fan_out)

    def _aggregation(self, updates: Sequence[ClientUpdate], applied: bool) -> dict[str, Any]:
        """Record what the round's aggregation depends on besides the clients' adapters
        (``flora_core.federation.replay``)."""
        weights = {update.client: update.weight for update in updates}
        rule = {"strategy": self.strategy.name, "options": self.server.options}
        return {**rule, "clients": weights, "applied": applied}

    def _apply(self, number: int, updates: Sequence[ClientUpdate], late: Mapping[str, tuple[str, int]]) -> None:
        began = time.perf_counter()
        if self.private is None:
            result = self.server.apply(updates, number, **({"sums": self.sums} if self.sums else {}))
        else:
            result = self.private.apply(self.server, updates, number)
        errors = result.certificate
        self.log.emit(
            "aggregated",
            round=number,
            strategy=self.strategy.name,
            clients=len(updates),
            **(errors.to_json() if errors else {}),
            **self._cost(),
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
            up=dict(result.up),
            down=dict(result.down),
            forms=dict(Counter(kind for kind, _ in result.forms.values())),
            catch_up={name: {"kind": kind, "bytes": size} for name, (kind, size) in late.items()},
            seconds=time.perf_counter() - began,
            seconds_of=result.seconds,
            peak_memory_bytes=peak_memory_bytes(self.server.device),
        )
        if errors and self.server.has_lossy_rounding and errors.application_error is not None:
            text = f"rounding='nearest' lost {errors.application_error:.1%} of round {number}; 'low_bits' loses nothing"
            self.log.emit("warning", round=number, message=text)

    def _cost(self) -> dict[str, Any]:
        return {} if self.private is None else {"privacy": self.private.report()}

    def _evaluate(self, number: int) -> None:
        if self.held_out.records is None:
            return
        began, found = time.perf_counter(), {}
        if self.ranks.first:
            with self.server.in_use() as model:
                found = self.held_out.evaluate(model, self.tokenizer, self.train.max_length)
        self._run_along()
        self.ranks.meet()
        found = self.ranks.send(found)
        self.log.emit("evaluated", round=number, **found, seconds=time.perf_counter() - began)

    def _finish(self, began: float) -> None:
        adapter = self.server.adapter()
        if self.folder is not None and adapter is not None:
            self._save_adapter(self.folder, adapter)
        if self.config.out is not None and self.config.save_model:
            with self.server.merged() as model:
                state = None if self.server.base is None else self.server.base.state_dict()
                if self.folder is not None:
                    state = self._converted(model, state)
                    card = model_card(
                        model, self.tokenizer, self.strategy.name, self.config, self.train, self.log.events
                    )
                    self.folder.save_model(model, self.tokenizer, card, state, self.save_dtype)
        self.log.emit(
            "run_end",
            rounds=self.config.rounds,
            seconds=time.perf_counter() - began,
            peak_memory_bytes=peak_memory_bytes(self.server.device),
            out=self._out,
            **self._cost(),
        )
        if self.folder is not None:
            self.folder.record.finish(self._kept)

    def _converted(self, model: Any, state: Any) -> Any:
        """The tensors to save, in the dtype that they are to have."""
        if self.save_dtype is None:
            return state
        state, error = converted(model.state_dict() if state is None else state, model, self.save_dtype)
        dtype = str(self.save_dtype).removeprefix("torch.")
        self.log.emit("converted", round=self.round, dtype=dtype, rounding_error=error)
        return state

    def _save_adapter(self, folder: RunFolder, adapter: ClientUpdate) -> None:
        """Save the global adapter as one that fits the original base."""
        if not self.server.log.changed:
            folder.save_adapter(adapter, self.server.fan_in_fan_out)
            return
        # The strategy changed the base too, which no adapter beside the original one would have.
        try:
            rebase_adapter(folder.path, folder.adapter)
        except ValueError as error:
            text = f"adapter/ is not written, the result is in model/: {error}"
            self.log.emit("warning", round=self.round, message=text)

    def _result(self) -> FederationResult:
        evaluations = {event["round"]: event for event in self.log.events if event["event"] == "evaluated"}
        return FederationResult(
            history=history(self.log.events),
            before=evaluations.get(0),
            after=evaluations.get(self.config.rounds),
            adapter=self.server.adapter(),
            state=self.server.state,
            out=None if self.config.out is None else Path(self.config.out),
            events=self.log.events,
        )
