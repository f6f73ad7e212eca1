"""Names of a base's weights, as they are stored and as transformers calls the modules, and how an adapter's are read.

transformers renames tensors when it loads a checkpoint: ``model.layers`` of a stored Qwen2.5-VL is the module
``model.language_model.layers``, ``block_sparse_moe.gate`` of Mixtral ``mlp.gate``. Its own tables say which; they are
asked, with the model class on the meta device, where the stored names alone leave something open.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..common import listed
from .shards import Checkpoint, Entry

# Tensors that hold a linear's weight in a packed form: GPTQ and AWQ, compressed-tensors, HQQ.
PACKED = ("qweight", "weight_packed", "W_q")
# First parts of module paths that a base saved without its head lacks, where the model class is not known.
_HEADLESS = ("model", "transformer")


@dataclass(frozen=True)
class ModelNames:
    """A base's weights by the modules of its transformers class.

    Args:
        paths: Module path -> tensor name, for weights that are loaded as they are stored.
        converted: Module path -> names of the stored tensors that its weight is made of.
        linears: Paths of linear modules, without the output head.
        adaptable: Paths of linear, convolution and embedding modules.
        prefix: First part of a path that a model without head lacks.
        decoder: Path of a composite model's language model; empty where the model is not composite.
    """

    paths: Mapping[str, str]
    converted: Mapping[str, Sequence[str]]
    linears: Collection[str]
    adaptable: Collection[str]
    prefix: str
    decoder: str

    @functools.cached_property
    def path_of(self) -> dict[str, str]:
        """Tensor name -> module path."""
        return {tensor: path for path, tensor in self.paths.items()}


class BaseNames:
    """A checkpoint's weights by module path.

    Args:
        checkpoint: The base.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.tensors: dict[str, Entry] = checkpoint.tensors
        self.stored: dict[str, str] = {}
        for name in self.tensors:
            module, _, last = name.rpartition(".")
            if last == "weight" or last in PACKED:
                self.stored.setdefault(module, name)
        # Why transformers could not be asked; empty unless it could not.
        self.reason = ""

    @functools.cached_property
    def model(self) -> ModelNames | None:
        """The names of its transformers class; None where it is not available, with ``reason``."""
        try:
            return _ask_transformers(self.checkpoint, self.tensors)
        except Exception as error:  # whatever a model class of any version raises at being built
            self.reason = f"transformers does not name its modules ({type(error).__name__}: {str(error)[:120]})"
            return None

    def in_decoder(self, names: Collection[str]) -> bool:
        """True where tensors belong to the language model of a composite model."""
        if self.model is None or not self.model.decoder:
            return False
        return all(self.model.path_of.get(name, "").startswith(f"{self.model.decoder}.") for name in names)


@dataclass(frozen=True)
class Reading:
    """One reading of an adapter's module paths: ``dropped.PATH`` is the base's ``added.PATH``."""

    names: Mapping[str, str] = field(repr=False)
    dropped: str = ""
    added: str = ""

    def path(self, module: str) -> str | None:
        """The base's path of a module; None where it does not begin with what is dropped."""
        if self.dropped and not module.startswith(f"{self.dropped}."):
            return None
        rest = module[len(self.dropped) + 1 :] if self.dropped else module
        return f"{self.added}.{rest}" if self.added else rest

    def tensor(self, module: str) -> str | None:
        """The tensor that is a module's weight; None where the base has none."""
        return self.names.get(self.path(module) or "")

    def modules(self) -> dict[str, str]:
        """Every module that an adapter of this reading could have -> tensor name."""
        start = f"{self.added}." if self.added else ""
        first = f"{self.dropped}." if self.dropped else ""
        return {first + path[len(start) :]: name for path, name in self.names.items() if path.startswith(start)}

    def fits(self, modules: Collection[str]) -> bool:
        """True where the base has all modules."""
        return all(self.tensor(module) is not None for module in modules)

    def __str__(self) -> str:
        before, after = (f"{part}.*" if part else "*" for part in (self.dropped, self.added))
        return f"{before} as {after}"


def exact_readings(base: BaseNames) -> Iterator[Reading]:
    """The readings that take every path as it is: stored names first, which need no model library."""
    yield Reading(base.stored)
    if base.model is not None:
        yield Reading(base.model.paths)


def find_reading(base: BaseNames, adapter: str, modules: Sequence[str]) -> Reading | None:
    """Find the one reading of an adapter's module paths that the base has.

    A path that is the base's own is taken as it is. Else the base may lack its first part (saved without head), or the
    path may lack the base's (trained on a part of it).

    Returns:
        The reading, None where there is none.
    Raises:
        ValueError: If several fit; the candidates are named.
    """
    for reading in exact_readings(base):
        if reading.fits(modules):
            return reading
    found: dict[tuple[str | None, ...], Reading] = {}
    for reading in _partial_readings(base, modules):
        if reading.fits(modules):
            found.setdefault(tuple(reading.tensor(module) for module in modules), reading)
    if not found:
        return None
    likely = next(iter(found.values()))
    # A path that lost one part and gained another may be of any tower, unless that is the language model.
    if len(found) == 1 and not (likely.dropped and likely.added):
        return likely
    unshortened = {names: reading for names, reading in found.items() if not reading.dropped}
    for names, reading in (unshortened or found).items():
        if len(unshortened or found) == 1 and base.in_decoder([name for name in names if name]):
            return reading
    candidates = [f"{reading.tensor(modules[0])!r}" for reading in found.values()]
    raise ValueError(
        f"adapter {adapter}: base {base.checkpoint.folder} has no module {modules[0]!r}, and which part it belongs to"
        f" is not clear: candidates are {listed(candidates)}; give the adapter's tensors the full module path of the"
        " part that they were trained on, or merge them into a checkpoint of that part alone"
        + (f" ({base.reason})" if base.reason else "")
    )


def shortened(base: BaseNames, modules: Sequence[str]) -> Reading | None:
    """The reading without the paths' first part, whatever that part is: what a misfit may have meant."""
    first = modules[0].partition(".")[0]
    return next((r for r in _of_tail(base.stored, modules, first) if r.fits(modules)), None)


def _partial_readings(base: BaseNames, modules: Sequence[str]) -> Iterator[Reading]:
    namings = [base.stored, *([base.model.paths] if base.model is not None else [])]
    heads = {*_HEADLESS, *([base.model.prefix] if base.model is not None else [])}
    first = modules[0].partition(".")[0]
    for names in namings:
        yield from _of_tail(names, modules, "")
        if first in heads:
            yield from _of_tail(names, modules, first)


def _of_tail(names: Mapping[str, str], modules: Sequence[str], dropped: str) -> Iterator[Reading]:
    """Every place in the base where the first module's path, less its dropped part, is the end of a path."""
    if dropped and not all(module.startswith(f"{dropped}.") for module in modules):
        return
    tail = modules[0][len(dropped) + 1 :] if dropped else modules[0]
    for path in names:
        if path == tail and dropped:
            yield Reading(names, dropped)
        elif path.endswith(f".{tail}"):
            yield Reading(names, dropped, path[: -len(tail) - 1])


def _ask_transformers(checkpoint: Checkpoint, tensors: Mapping[str, Entry]) -> ModelNames:
    """Rename every tensor as ``from_pretrained`` of the config's class does; no weight is made.

    Facts are those of transformers 5 (``conversion_mapping``, ``core_model_loading``).
    """
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    kind = getattr(transformers, (checkpoint.config.get("architectures") or ["none"])[0])
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of the library about the base's config
        model = kind(kind.config_class.from_pretrained(checkpoint.folder, local_files_only=True))
    mapping = get_model_conversion_mapping(model)
    renamings: list[Any] = [one for one in mapping if not isinstance(one, WeightConverter)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state = model.state_dict()
    paths: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    for name in tensors:
        # A packed weight stands where the plain one would.
        module, _, last = name.rpartition(".")
        plain = f"{module}.weight" if last in PACKED else name
        new, pattern = rename_source_key(plain, renamings, converters, model.base_model_prefix, state)
        path, _, last = new.rpartition(".")
        if pattern is not None:
            converted.setdefault(path if last == "weight" else new, []).append(name)
        elif last == "weight":
            paths[path] = name
    return ModelNames(paths, converted, *_module_kinds(model), model.base_model_prefix, _decoder_path(model))


def _module_kinds(model: Any) -> tuple[set[str], set[str]]:
    from transformers.pytorch_utils import Conv1D

    nn = torch.nn
    head = model.get_output_embeddings()
    modules = list(model.named_modules())
    linears = {path for path, one in modules if isinstance(one, (nn.Linear, Conv1D)) and one is not head}
    others = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return linears, {path for path, one in modules if isinstance(one, others)}


def _decoder_path(model: Any) -> str:
    text = model.config.get_text_config()
    if text is model.config:
        return ""
    return next((path for path, one in model.named_modules() if path and getattr(one, "config", None) is text), "")
