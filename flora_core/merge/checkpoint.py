"""Merge PEFT adapters into a checkpoint on disk, in memory for one block of rows and one module's factors.

    W += sum_k p_k s_k B_k A_k      p_k = weight_k / sum of all weights

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..aggregation import Deviation
from ..common import SaveError, atomic_write_bytes, atomic_write_json, parse_json, require
from .bases import check_bases
from .findings import adapter_facts, find_notes
from .shards import INDEX, RECORD, Checkpoint, open_checkpoint
from .sources import Sum, open_adapters
from .staging import Staging
from .targets import Plan, match_targets
from .tokenizer import choose_tokenizer
from .verify import certify_files
from .writer import write_shard

CARD = "README.md"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Args:
        out: The merged checkpoint.
        modules: Number of weights that changed.
        size_bytes: Bytes of all shards.
        merged_bytes: Bytes of the weights that changed.
        resumed_bytes: Bytes that earlier attempts had done; all of them where the result was there already.
        seconds: Time of this attempt, without the verification.
        aggregation_error: Relative distance of what the strategy made from the exact sum, 0 for flora.
        certificate: The result of the verification, see ``merge.verify``; None if it was not asked for.
        left_out: Files of the base that were not copied, for they hold weights or describe the base, its training or
            an adapter.
        adapters: Each adapter's name, share, ranks, scalings, the base that its config names, and missing modules.
        scale: Factor of the weighted sum.
        notes: Facts that may not be intended: dead or partial adapters, other bases, another tokenizer.
    Example:
        >>> model.save_pretrained("base")
        >>> flora.save_peft_adapter(updates[0], "a")
        >>> report: flora.MergeReport = flora.merge_into_checkpoint("base", {"a": 1.0}, "merged")
        >>> report.modules, report.aggregation_error
        (1, 0.0)
    """

    out: Path
    modules: int
    size_bytes: int
    merged_bytes: int
    resumed_bytes: int
    seconds: float
    aggregation_error: float
    certificate: Mapping[str, Any] | None
    left_out: tuple[str, ...]
    adapters: tuple[Mapping[str, Any], ...]
    scale: float
    notes: tuple[str, ...]


def merge_into_checkpoint(
    base_dir: str | os.PathLike[str],
    adapters: Mapping[Any, float],
    out_dir: str | os.PathLike[str],
    *,
    strategy: str = "flora",
    options: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    tokenizer: str | None = None,
    partial: bool = False,
    verify: bool = False,
    mixed_dtypes: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge PEFT adapters of any ranks into a copy of a safetensors checkpoint, without loading it.

    ``W += scale * sum_k p_k s_k B_k A_k`` with p_k = weight_k / sum of weights, summed in float32 (float64 for float64
    weights) and rounded once. Memory is bounded by one block of rows and one module's factors. All other bytes are
    copied, and all shards keep their names, order, metadata and sizes. ``out_dir`` appears when it is complete; a merge
    that was killed goes on where it stopped when it is called again, and ends with the same bytes.

    Args:
        base_dir: A checkpoint of transformers with safetensors, in one file or in shards.
        adapters: Folder of a PEFT LoRA adapter -> its weight, relative to the others.
        out_dir: A new or empty folder, outside of the base and the adapters.
        strategy: A name from the table of strategies.
        options: The strategy's own options.
        scale: Factor of the weighted sum: 0.5 merges at half strength, -1 subtracts. Weights are relative, so that one
            adapter's weight alone changes nothing.
        tokenizer: ``base`` or ``adapter``: whose tokenizer files the result gets; the base's unless given, with a note
            where an adapter's own differs.
        partial: Merge what is there of an adapter that lacks modules which its config names.
        verify: Read base and result again before ``out_dir`` appears; every weight must lie within its rounding bound
            of the exact sum, every other byte must be the base's.
        mixed_dtypes: Allow weights of several floating-point dtypes among those that are merged into.
        progress: Called with what is being done (``merge``, ``verify``), bytes done and bytes in all.
    Returns:
        What was done. The same facts, without times, are in ``flora_merge.json`` of the result.
    Raises:
        ValueError: If an adapter does not fit the base or lacks modules that its config names, index and shards
            disagree, a file is damaged, a weight is not a number of at least 0, scale is 0, or the tokenizer does not
            fit; nothing is written then. If the verification fails; then nothing appears.
        FileNotFoundError, FileExistsError: If an input is missing, or the output holds anything else.
        BlockingIOError: If another process makes the same output.
        SaveError: If the system refuses to write; what is done is kept.
    Deterministic: yes. Source: arXiv 2409.05976, eq. 5.
    Example:
        >>> model.save_pretrained("base")
        >>> for update in updates:
        ...     flora.save_peft_adapter(update, update.client)
        >>> report = flora.merge_into_checkpoint("base", {"a": 1.0, "b": 3.0}, "merged", verify=True)
        >>> [one["share"] for one in report.adapters]
        [0.25, 0.75]
    """
    began, base, out = time.perf_counter(), Path(base_dir), Path(out_dir)
    check_places(base, adapters, out)
    checkpoint, opened = open_checkpoint(base), open_adapters(adapters, partial=partial)
    sums = Sum(opened, strategy, options or {}, scale)
    plan = match_targets(checkpoint, opened, mixed_dtypes=mixed_dtypes, partial=partial)
    check_bases(base, opened, plan.plain)
    copies, notes = choose_tokenizer(checkpoint, opened, tokenizer)
    job = _Job(checkpoint, sums, plan, copies, notes, Staging(out), progress or (lambda *_: None))
    done = _find_done(out, job.inputs)
    if done is None:
        sums.check()
        job.notes += find_notes(checkpoint, sums, plan.fits)
        _check_room(checkpoint, job.staging)
        with job.staging.opened({"inputs": job.inputs}):
            job.write()
            seconds = time.perf_counter() - began
            certificate = job.verify(job.staging.model) if verify else None
            job.finish(certificate)
    else:
        job.staging.clear()
        job.resumed, seconds = checkpoint.size_bytes, time.perf_counter() - began
        job.notes = list(done.get("notes", []))
        sums.errors = {"": Deviation(done["aggregation_error"], 1.0)}
        certificate = done.get("certificate")
        if verify:
            certificate = job.verify(out)
            atomic_write_json(out / RECORD, {**done, "certificate": certificate})
    return MergeReport(
        out=out,
        modules=len(plan.targets),
        size_bytes=checkpoint.size_bytes,
        merged_bytes=sum(one.entry.stop - one.entry.start for one in plan.targets.values()),
        resumed_bytes=job.resumed,
        seconds=seconds,
        aggregation_error=sums.aggregation_error,
        certificate=certificate,
        left_out=checkpoint.left_out,
        adapters=tuple(adapter_facts(sums, plan.fits)),
        scale=sums.scale,
        notes=tuple(job.notes),
    )


class _Job:
    """One merge: its inputs, the folder in which it is made, and its notes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sums: Sum,
        plan: Plan,
        copies: Mapping[str, Path],
        notes: list[str],
        staging: Staging,
        progress: Progress,
    ):
        self.checkpoint, self.sums, self.plan = checkpoint, sums, plan
        self.copies, self.notes = copies, notes
        self.staging, self.progress = staging, progress
        self.resumed = 0

    @property
    def inputs(self) -> str:
        """A hash of everything that the result's bytes depend on; files by name, size and time of change."""
        one = {
            "base": [_stamp(shard.path) for shard in self.checkpoint.shards],
            "others": [(name, *_stamp(path)) for name, path in sorted(self.copies.items())],
            "adapters": [
                (
                    adapter.weight,
                    *(_stamp(path) for path in sorted(adapter.folder.glob("adapter_*.*")) if path.is_file()),
                )
                for adapter in self.sums.adapters
            ],
            "strategy": [self.sums.strategy.name, self.sums.options, self.sums.scale],
        }
        return hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()

    def write(self) -> None:
        """Make all files but the record, going on where an earlier attempt stopped."""
        model = self.staging.model
        for name, path in self.copies.items():
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, model / name)
        if self.checkpoint.index is not None:
            atomic_write_bytes(model / INDEX, self.checkpoint.index)
        self._recall()
        advance = self._counter("merge")
        with open(self.staging.notes, "a", encoding="utf-8") as notes:

            def stack(module: str) -> Any:
                applied, _ = self.sums.stacks(module)
                error = self.sums.errors[module]
                notes.write(json.dumps([module, error.difference, error.exact]) + "\n")
                notes.flush()
                return applied

            for shard in self.checkpoint.shards:
                self.resumed += write_shard(shard, model / shard.path.name, self.plan.targets, stack, advance)

    def _counter(self, what: str) -> Callable[[int], None]:
        done, whole = 0, self.checkpoint.size_bytes

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(what, done, whole)

        return advance

    def _recall(self) -> None:
        """The errors of modules that earlier attempts have merged."""
        if self.staging.notes.is_file():
            for line in self.staging.notes.read_text("utf-8").splitlines():
                try:
                    module, difference, exact = json.loads(line)
                except ValueError:
                    continue  # the line that was being written when the process was killed
                self.sums.errors[module] = Deviation(difference, exact)

    def verify(self, model: Path) -> dict[str, Any]:
        """Read base and result again."""
        errors = dict(self.sums.errors)
        found = certify_files(
            self.checkpoint, model, self.plan.targets, self.copies, self.sums.stacks, self._counter("verify")
        )
        self.sums.errors = errors
        return found

    def finish(self, certificate: Mapping[str, Any] | None) -> None:
        """Write record and card, and let the result appear."""
        record = {
            "inputs": self.inputs,
            "base": self.checkpoint.folder.resolve().name,
            "adapters": adapter_facts(self.sums, self.plan.fits),
            "scale": self.sums.scale,
            "strategy": self.sums.strategy.name,
            "options": self.sums.options,
            "modules": sorted(target.module for target in self.plan.targets.values()),
            "aggregation_error": self.sums.aggregation_error,
            "certificate": certificate,
            "notes": self.notes,
        }
        atomic_write_json(self.staging.model / RECORD, record)
        atomic_write_bytes(self.staging.model / CARD, _card(record).encode())
        self.staging.publish()


def _card(record: Mapping[str, Any]) -> str:
    ranks = ", ".join("/".join(map(str, one["ranks"])) for one in record["adapters"])
    times = "" if record["scale"] == 1 else f"{record['scale']:g} times "
    return (
        f"{front_matter(['lora', 'flora', 'merge'])}\n\n"
        f"# {record['base']} with {len(record['adapters'])} LoRA adapters merged\n\n"
        f"The base's weights plus {times}the weighted sum of adapters of ranks {ranks}, made by `flora aggregate`"
        f" (strategy {record['strategy']}) in {len(record['modules'])} modules; every other weight is the base's, byte"
        f" for byte. Details: `{RECORD}`. It was not evaluated. The base model's licence and limits hold.\n"
    )


def front_matter(tags: list[str], base: str | None = None, licence: str | None = None) -> str:
    """Write the metadata of a causal LM's card, as model hubs read it; ``base`` is the hub name that it was made of."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", license=licence, tags=tags)
    if base is not None:
        data.base_model, data["base_model_relation"] = base, "finetune"
    return f"---\n{data.to_yaml()}\n---"


def _stamp(path: Path) -> tuple[str, int, int]:
    info = path.stat()
    return path.name, info.st_size, info.st_mtime_ns


def _find_done(out: Path, inputs: str) -> dict[str, Any] | None:
    """The record of a result that is there already, of these very inputs; None where there is room for one."""
    if not os.path.lexists(out):
        return None
    if not out.is_dir():
        raise FileExistsError(f"out {out} is a file, and a folder is to be made there: choose another place")
    names = sorted(os.listdir(out))
    if not names:
        return None
    record = out / RECORD
    if record.is_file():
        found = parse_json(record, record.read_bytes())
        if found.get("inputs") == inputs:
            return found
        raise FileExistsError(
            f"out {out} holds a merge of other inputs, or of files that changed since: choose another place"
        )
    raise FileExistsError(f"out {out} already holds {', '.join(names[:5])}: choose a new or an empty folder")


def check_places(base: Path, adapters: Sequence[Any] | Mapping[Any, Any], out: Path) -> None:
    """Check that the output is neither inside an input nor around one."""
    target = out.resolve()
    for what, folder in [("base", base), *(("adapter", Path(path)) for path in adapters)]:
        place = folder.resolve()
        require(
            place != target and place not in target.parents and target not in place.parents,
            f"out {out} and {what} {folder} lie in one another; choose a place for the output that is in none of the"
            " inputs and holds none of them",
        )


def _check_room(checkpoint: Checkpoint, staging: Staging) -> None:
    """Check that the disk has room for what is not there yet."""
    place = staging.target.parent
    while not place.exists():
        place = place.parent
    there = sum(path.stat().st_size for path in staging.model.glob("*")) if staging.model.is_dir() else 0
    needed, free = checkpoint.size_bytes - there, shutil.disk_usage(place).free
    if needed > free:
        raise SaveError(
            errno.ENOSPC,
            f"{staging.target} takes {needed / 1e9:.1f} GB more, and the disk has {free / 1e9:.1f} GB free; free some"
            " space or choose another place; nothing was written",
        )
