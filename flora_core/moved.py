"""Import paths of the first edition, for one release: each gives the new module's names and a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "adapter_command": "cli.adapter",
    "adapter_config": "config.adapter",
    "aggregate": "aggregation",
    "aggregate.adapter": "aggregation.global_adapter",
    "aggregate.average": "aggregation.average",
    "aggregate.certificate": "aggregation.certificate",
    "aggregate.compress": "aggregation.svd",
    "aggregate.downlink": "aggregation.downlink",
    "aggregate.frozen": "aggregation.frozen",
    "aggregate.inputs": "aggregation.terms",
    "aggregate.product": "aggregation.flora",
    "aggregate.redistribute": "aggregation.redistribute",
    "aggregate.robust": "aggregation.norms",
    "aggregate.strategy": "aggregation.strategy",
    "aggregate.warm": "aggregation.flora_warm",
    "aggregate_command": "cli.aggregate",
    "arguments": "ops.validation",
    "attach": "model.attachment",
    "attention": "model.attention",
    "attention_ways": "model.attention_kernels",
    "backends": "ops.backends",
    "bank": "adapters.bank",
    "beside": "model.with_adapter",
    "build": "runs.build",
    "calls": "ops.dispatch",
    "card": "federation.model_card",
    "checkpoint": "runs.folder",
    "checks": "common.checks",
    "cohort": "model.cohort",
    "data_paths": "common.data_paths",
    "demo_model": "runs.demo_model",
    "deploy_command": "cli.deploy",
    "device": "cli.doctor",
    "dry_run": "cli.dry_run",
    "evaluate": "model.evaluation",
    "exchange": "federation.exchange",
    "explaining": "training.explanation",
    "extras": "common.extras",
    "federation_config": "config.federation",
    "files": "common.files",
    "fingerprint": "adapters.base",
    "flower_messages": "flower.messages",
    "flower_node": "flower.node",
    "forward": "model.forward",
    "fused": "ops.autograd",
    "graphs": "training.static_steps",
    "headers": "common.safetensors_header",
    "history": "runs.summary",
    "identity": "runs.fingerprint",
    "incoming": "federation.callable_clients",
    "keys": "flower.certificates",
    "keys_check": "flower.certificate_checks",
    "library": "ops.custom_ops",
    "linear": "model.layer",
    "loading": "runs.loading",
    "local": "training.client",
    "loss": "model.loss",
    "merge_ways": "ops.merging",
    "models": "model.accepted",
    "optimizer": "training.optimizer",
    "other_names": "config.other_names",
    "package_index": "common.package_index",
    "pausing": "training.pause",
    "peft_config": "adapters.peft_config",
    "peft_io": "adapters.peft",
    "peft_keys": "adapters.peft_keys",
    "penalty": "adapters.penalty",
    "planner": "training.planner",
    "privacy": "federation.privacy",
    "progress": "runs.progress",
    "rebase": "federation.rebase",
    "recipes": "config",
    "recompute": "model.recompute",
    "remote": "federation.parties",
    "repeatable": "model.deterministic",
    "replay": "federation.replay",
    "report": "runs.report",
    "resuming": "federation.resume",
    "saving": "runs.saving",
    "seeds": "common.seeds",
    "segments": "common.segments",
    "server": "federation.server",
    "sharded_merge": "merge.sharded",
    "sharding": "distributed.sharding",
    "site": "federation.party",
    "snapshot": "runs.snapshot",
    "splits": "data.splits",
    "steps": "training.steps",
    "strategy_names": "config.strategy_names",
    "streaming": "merge",
    "streaming.adapters": "merge.sources",
    "streaming.bases": "merge.bases",
    "streaming.export": "merge.export",
    "streaming.findings": "merge.findings",
    "streaming.merge": "merge.checkpoint",
    "streaming.names": "merge.names",
    "streaming.plan": "merge.targets",
    "streaming.shards": "merge.shards",
    "streaming.staging": "merge.staging",
    "streaming.tokenizer": "merge.tokenizer",
    "streaming.verify": "merge.verify",
    "streaming.write": "merge.writer",
    "strict": "config.loading",
    "tensor_checks": "common.tensor_checks",
    "trainer": "training.trainer",
    "training_round": "federation.local_clients",
    "tuning": "ops.autotune",
    "update": "adapters.update",
    "validate": "federation.judge",
    "ways": "ops.fusion",
}


def install() -> None:
    """Serve the old paths; called once, by the package itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before finders that would take a stale folder of that name


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        old = fullname.removeprefix("flora_core.")
        return ModuleSpec(fullname, _Alias(), is_package=True) if fullname != old and old in MOVED else None


class _Alias(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"flora_core.{MOVED[spec.name.removeprefix('flora_core.')]}"
        warnings.warn(
            f"{spec.name} is now {new}; the old path works in this release only", DeprecationWarning, stacklevel=2
        )
        return _Old(spec.name, import_module(new))

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs: the new module has run."""


class _Old(ModuleType):
    """A module under its old name. Where the package has a function of that name, the module can be called as it."""

    def __init__(self, name: str, new: ModuleType) -> None:
        super().__init__(name, f"The old name of {new.__name__}.")
        self._new = new

    def __getattr__(self, name: str) -> Any:
        return getattr(self._new, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self._new, self.__name__.rpartition(".")[2])(*args, **options)
