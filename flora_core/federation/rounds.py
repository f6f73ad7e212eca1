"""The round loop: sample clients, train them as one cohort, judge, aggregate, write, evaluate, save.

Everything random derives from (seed, round, client), and a round counts only once the state after it is on disk, so a
run that is killed at any instant and started again ends as one that was not.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..adapters import ClientUpdate
from ..aggregation import get_strategy
from ..common import Stopped, generator, peak_memory_bytes, require
from ..config import FederationConfig, Privacy, TrainConfig
from ..distributed import World, shard_if_needed
from ..model import ClientSpec, as_tokenizer, check_model
from ..runs import Event, EventLog, RunFolder, environment
from ..training import Paused, stopping
from .callable_clients import CallableClients, Remote
from .clients import Clients, Round, RunSetup, Trained
from .evaluation import HeldOut
from .global_model import GlobalModel
from .judge import Judge, Verdict
from .local_clients import LocalClients
from .output import RunOutput
from .privacy import PrivateSum
from .rank_clients import RankClients
from .result import FederationResult, history
from .resume import Progress, find_progress, fingerprint, keep_alike, share_progress
from .server import Server


class Federation:
    """Fine-tune one model on many clients' data.

    Args:
        model: Any transformers causal LM, not wrapped. `flora` and `flora_svd` write the result into its weights; other
            strategies keep an adapter beside it: ``FederationResult.apply_to`` gives the result of either.
        tokenizer: Its tokenizer, or the folder or hub name of it; None if all data are encoded.
        clients: One ``ClientSpec`` each; or what makes the ``Clients`` of a ``RunSetup``, such as ``Parties`` with its
            link bound.
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
    Example:
        >>> config, records = flora.FederationConfig(rounds=2), clients[0].data
        >>> result = flora.Federation(model, tokenizer, clients, config=config, eval_data=records).run()
        >>> result.after["loss"] < result.before["loss"]
        True
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        clients: Sequence[ClientSpec] | Callable[[RunSetup], Clients],
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
        config.check_strategy(strategy)
        chosen, train = get_strategy(strategy), train or TrainConfig()
        chosen.check(config.strategy_options)
        self.model, self.tokenizer, self.config, self.world = model, as_tokenizer(tokenizer), config, World.current()
        self.setup = RunSetup(model, self.tokenizer, chosen, config, train, target_modules, backend=backend, fuse=fuse)
        self.clients = clients(self.setup) if callable(clients) else self._clients(list(clients), dict(remote or {}))
        names = list(self.clients.specs)
        config.check_names(names)
        self._check_alone("privacy", config.privacy is not None)
        self.held_out = HeldOut(list(self.clients.specs.values()), eval_data, config)
        out = config.out if self.world.first else None
        self.folder = None if out is None else RunFolder(out, config.keep_snapshots)
        self.log = EventLog(callbacks, None if self.folder is None else self.folder.metrics, self.world.first)
        self.output = RunOutput(self.setup, self.folder, self.log)
        self.private = None if config.privacy is None else self._private_sum(config.privacy, names)
        self.round, self.paused, self.present, self.stop = 0, {}, names, lambda: False

    def _clients(self, specs: Sequence[ClientSpec], remote: Mapping[str, Remote]) -> Clients:
        names = [spec.name for spec in specs]
        require(len(names) > 0, "clients must hold at least one ClientSpec, got none")
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"client names must be unique, got twice: {', '.join(twice)}")
        self._check_alone("remote", bool(remote))
        local = LocalClients(self.setup, [spec for spec in specs if spec.name not in remote])
        if self.world.size > 1:
            return RankClients(local, self.world)
        return CallableClients(local, specs, remote) if remote else local

    def _check_alone(self, name: str, wanted: bool) -> None:
        text = f"{name} is for a run in one process, got {self.world.size}; leave it out, or do without torchrun"
        require(self.world.size == 1 or not wanted, text)

    def _private_sum(self, privacy: Privacy, names: Sequence[str]) -> PrivateSum:
        config = self.config
        weights = config.weights if isinstance(config.weights, Mapping) else dict.fromkeys(names, 1.0)
        return PrivateSum(privacy, config.fraction, config.rounds, weights, self.folder and self.folder.path)

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
            self.world.together(),
            nullcontext() if self.folder is None else self.folder.locked(),
            stopping(self.config.out is not None) as self.stop,
        ):
            began = time.perf_counter()
            shard_if_needed(self.setup.model, self.config.base, self.world)
            notes = self._prepare()
            found, more = self._resume()
            if found.finished and self.round == self.config.rounds:
                text = f"{self.config.out} holds this run, finished: nothing is trained; raise rounds to go on"
                self.log.report({"event": "warning", "message": text})
                return self._result()
            self._start([*notes, *({"message": text} for text in more)])
            while self.round < self.config.rounds:
                try:
                    self._run_round()
                except Paused as pause:
                    self._pause(pause)
                if any(self.world.barrier(self.stop())) and self.round < self.config.rounds:
                    raise Stopped(
                        f"stopped after round {self.round}, as was asked: the same run goes on from {self._out}"
                    )
            self._finish(began)
            self.world.barrier()
        return self._result()

    def _prepare(self) -> list[Event]:
        """Check model, data and strategy with every client before training, and make the server; warnings."""
        clients, setup, config = self.clients, self.setup, self.config
        notes = clients.prepare()
        setup.strategy.check_fits(list(clients.expected.values()))
        targets = dict.fromkeys(module for update in clients.expected.values() for module in update.adapters)
        model = GlobalModel(setup.model, targets, config.rounding, config.check_rows)
        options = (setup.strategy.name, config.strategy_options, config.seed)
        self.server = Server(model, clients.expected, *options, sends=clients.on_own_machines)
        self.judge = Judge(config, model.largest)
        self.round, self.paused, self.log.events = 0, {}, []
        return notes

    def _resume(self) -> tuple[Progress, list[str]]:
        """Go on after the newest whole round in the folder, if it holds this run; warnings."""
        if self.folder is None and self.world.size == 1:
            return Progress(), []
        server = self.server
        start, where = server.digest(), environment(server.model.device)
        mine = fingerprint(self.setup, server, self.clients, self.held_out)
        notes, found = self.world.agree({**mine, "start": start}, where), Progress()
        if self.folder is not None:
            found, more = find_progress(self.folder, self.setup, server, (mine, where, start), self.private)
            notes += more
        found = share_progress(self.world, found, server)
        if found.server:
            server.restore(found.server)
        self.round, self.paused, self.log.events = found.round, found.paused, found.events
        self.clients.optimizer.clear()
        self.clients.optimizer.update(found.optimizer)
        return found, notes

    def _pause(self, pause: Paused) -> NoReturn:
        """Save what a round that was stopped between two steps has, and stop."""
        number = self.round + 1
        self.output.save_pause(number, self.names, pause.state)
        self.world.barrier()
        text = f"stopped within round {number}, as was asked: the same run goes on from {self._out} at this step"
        self.log.report({"event": "warning", "message": text})
        raise Stopped(text)

    def _start(self, notes: Sequence[Event]) -> None:
        """Tell what begins, and evaluate the model before training."""
        self.output.check_room(self.server, self.round < self.config.rounds)
        clients = []
        for name, spec in self.clients.specs.items():
            pairs = self.clients.expected[name].adapters.values()
            parameters = sum(factor.numel() for pair in pairs for factor in pair)
            one = {"name": name, "rank": spec.adapter.rank, "examples": len(spec.data), "parameters": parameters}
            clients.append(one)
        base = self.server.model.base
        self.log.emit(
            "run_start",
            rounds=self.config.rounds,
            strategy=self.setup.strategy.name,
            clients=clients,
            device=str(self.server.model.device),
            out=self._out,
            seed=self.config.seed,
            resumed_from=self.round or None,
            **({} if base is None else {"base": base.to_json()}),
        )
        for note in [*notes, *self._idle_processes()]:
            self.log.emit("warning", round=self.round, message=note["message"], client=note.get("client"))
        if self.round == 0:
            self._evaluate(0)

    @property
    def _out(self) -> str | None:
        return None if self.config.out is None else str(self.config.out)

    def _idle_processes(self) -> list[Event]:
        drawn = len(self.sampled(1)) if self.world.size > 1 else 1
        size = self.world.size
        text = f"{size} processes share {drawn} clients of a round: at least {size - drawn} stay idle"
        return [{"message": text}] if drawn < size and size > 1 else []

    def sampled(self, number: int) -> list[str]:
        """The clients of a round, in their order: drawn by seed and round alone, under privacy in secret."""
        names, config = list(self.present), self.config
        if self.private is not None:
            return self.private.sample(names) if self.private.affordable else []
        count = max(1, config.min_clients, round(config.fraction * len(names)))
        drawn = torch.randperm(len(names), generator=generator(config.seed, "sample", number))
        return [names[i] for i in sorted(drawn[:count].tolist())]

    def _run_round(self) -> None:
        number, began, server = self.round + 1, time.perf_counter(), self.server
        self.present = self.clients.gather(server, number, self.log)
        base = server.trained_on()
        self.names = self.paused["names"] if self.paused else self.sampled(number)
        late = {name: server.catch_up(name) for name in self.names}
        begun = self.paused.get("clients", {})
        task = Round(number, self.names, server, self.judge, self.log, self.stop, begun)
        trained = self.clients.train(task)
        self.paused = {}
        verdict = self._judged(task, trained)
        applied = self._apply(number, verdict, trained, {name: how for name, how in late.items() if how[1]})
        good = [update.client for update in verdict.good]
        self.clients.conclude(task, good, verdict.refused, applied)
        keep_alike(self.world, server, self.log, number)
        if number % self.config.eval_every == 0 or number == self.config.rounds:
            self._evaluate(number)
        end: Event = {"round": number, "rounds": self.config.rounds, "applied": applied}
        end |= {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory_bytes(server.model.device)}
        state = {} if self.config.out is None else {"server": server.saved(), "optimizer": self.clients.optimizer}
        if self.folder is not None:
            end["checkpoint"] = str(self.folder.folder(number))
            state |= {} if self.private else {"aggregation": self._aggregation(verdict.good, applied)}
            fan_in_fan_out = server.model.fan_in_fan_out
            self.output.save_round(number, verdict.good, state, {"event": "round_end", **end}, base, fan_in_fan_out)
        self.round = number
        self.log.emit("round_end", **end)

    def _judged(self, task: Round, trained: Trained) -> Verdict:
        """Judge what was trained; refused updates are kept apart, and each client's result is recorded."""
        names, expected = list(task.names), self.clients.expected
        trained.updates.sort(key=lambda update: names.index(update.client))
        verdict = self.judge.round(trained.updates, {name: expected[name] for name in names}, trained.norms)
        self.log.warn_refused(verdict.refused)
        for name, norm in verdict.clipped.items():
            bound = self.config.clip_update
            text = f"client {name!r} was clipped from a norm of {norm:.3g} to {bound:g} (clip_update)"
            self.log.emit("warning", round=task.number, client=name, message=text)
        verdict.refused |= trained.failures
        sent = {**{update.client: update for update in trained.updates}, **trained.answers}
        for name, reason in verdict.refused.items():
            self.output.set_aside(task.number, name, reason, sent.get(name), expected)
        for name in names:
            refused = {"refused": verdict.refused[name]} if name in verdict.refused else {}
            self.log.emit(**(trained.metrics[name] | refused))
        return verdict

    def _aggregation(self, updates: Sequence[ClientUpdate], applied: bool) -> dict[str, Any]:
        """Record what the round's aggregation depends on besides the clients' adapters
        (``flora_core.federation.replay``)."""
        weights = {update.client: update.weight for update in updates}
        rule = {"strategy": self.setup.strategy.name, "options": self.server.options}
        return {**rule, "clients": weights, "applied": applied}

    def _apply(self, number: int, verdict: Verdict, trained: Trained, late: Mapping[str, tuple[str, int]]) -> bool:
        """Aggregate a round's good updates and write the sum; False if there are too few."""
        updates, began = verdict.good, time.perf_counter()
        # A private round is released even if no client took part: an omission would reveal who did not.
        if not (len(updates) >= self.config.min_clients if self.private is None else self.private.affordable):
            why = f"{len(updates)} good updates, min_clients={self.config.min_clients}"
            why = why if self.private is None else "one more release would cost more than privacy.epsilon"
            self.log.emit("warning", round=number, message=f"round {number} changes nothing: {why}")
            return False
        if self.private is None:
            result = self.server.apply(updates, number, trained.sums)
        else:
            result = self.private.apply(self.server, updates, number, verdict.norms)
        errors = result.certificate
        self.log.emit(
            "aggregated",
            round=number,
            strategy=self.setup.strategy.name,
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
            peak_memory_bytes=peak_memory_bytes(self.server.model.device),
        )
        if errors and self.server.model.has_lossy_rounding and errors.application_error is not None:
            text = f"rounding='nearest' lost {errors.application_error:.1%} of round {number}; 'low_bits' loses nothing"
            self.log.emit("warning", round=number, message=text)
        return True

    def _cost(self) -> dict[str, Any]:
        return {} if self.private is None else {"privacy": self.private.report()}

    def _evaluate(self, number: int) -> None:
        if self.held_out.records is None:
            return
        began, found, model = time.perf_counter(), {}, self.server.model
        if self.world.first:
            with model.beside(self.server.adapter()) as whole:
                found = self.held_out.evaluate(whole, self.setup.tokenizer, self.setup.train.max_length)
        model.run_empty_passes()
        self.world.barrier()
        found = self.world.send(found)
        self.log.emit("evaluated", round=number, **found, seconds=time.perf_counter() - began)

    def _finish(self, began: float) -> None:
        self.output.save_result(self.server, self.round)
        self.log.emit(
            "run_end",
            rounds=self.config.rounds,
            seconds=time.perf_counter() - began,
            peak_memory_bytes=peak_memory_bytes(self.server.model.device),
            out=self._out,
            **self._cost(),
        )
        self.output.finish()

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
