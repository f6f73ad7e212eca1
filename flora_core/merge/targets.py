"""The tensor of a checkpoint that each adapted module is, or the reason why an adapter does not fit.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..adapters import is_target, refuse_other_tensors
from ..common import listed, require
from ..config import matches_target
from .names import PACKED, BaseNames, Reading, exact_readings, find_reading, shortened
from .shards import DTYPES, Checkpoint, Entry, same_values
from .sources import Adapter

# Model types of transformers whose linears are Conv1D, with weights stored K x N.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
_HEADS = ("lm_head", "embed_out")
# What stands beside a weight that has to be multiplied or unpacked before it is the weight.
_SCALES = ("weight_scale", "weight_scale_inv", "SCB", "scales", "weight.absmax", "weight_scale_2", "g_idx", "meta")


@dataclass(frozen=True)
class Target:
    """A module and the tensor that is its weight; ``transposed`` where it is stored K x N."""

    module: str
    entry: Entry
    transposed: bool


@dataclass(frozen=True)
class Fit:
    """The fit of an adapter to a base, beyond its factors.

    Args:
        reading: How its module paths are read; empty where they are the base's own.
        missing: Modules that its config names and it has no factors of.
        copies: Tensors beside the factors that are equal to the base's.
        doubt: The config's names that could not be checked, and why; empty where all could.
    """

    reading: str
    missing: tuple[str, ...]
    copies: tuple[str, ...]
    doubt: str


@dataclass(frozen=True)
class Plan:
    """Tensor name -> target, those of them that are quantised, and adapter name -> fit."""

    targets: Mapping[str, Target]
    quantised: frozenset[str]
    fits: Mapping[str, Fit]

    @property
    def plain(self) -> dict[str, Target]:
        """The targets whose stored numbers are the weight."""
        return {name: target for name, target in self.targets.items() if name not in self.quantised}


def match_targets(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    mixed_dtypes: bool = False,
    partial: bool = False,
    into: bool = True,
) -> Plan:
    """Find the tensor of every module that an adapter has.

    Args:
        checkpoint: The base.
        adapters: From ``open_adapters``.
        mixed_dtypes: Allow weights of several floating-point dtypes.
        partial: Allow adapters that lack modules which their config names.
        into: True where the weights are merged into; a quantised weight is refused then.
    Raises:
        ValueError: If an adapter does not fit the checkpoint, with the modules or shapes that disagree, or lacks
            modules; or if a weight is tied, quantised, or of another floating-point dtype than the rest.
    """
    base = BaseNames(checkpoint)
    tensors = base.tensors
    targets: dict[str, Target] = {}
    fits: dict[str, Fit] = {}
    packed: set[str] = set()
    for adapter in adapters:
        reading = _reading(base, adapter)
        names = {module: str(reading.tensor(module)) for module in adapter.shapes}
        _check_tied(checkpoint, tensors, adapter, names)
        quantised = _quantised(tensors, names)
        if into:
            _refuse_quantised(checkpoint, tensors, adapter, quantised)
        packed.update(names[module] for module in quantised)
        plain = {module: name for module, name in names.items() if module not in quantised}
        _check_shapes(checkpoint, tensors, adapter, plain)
        fits[adapter.name] = _fit(base, adapter, reading, partial)
        flipped = _flipped(checkpoint, tensors, adapter, plain)
        for module, name in names.items():
            target = Target(module, tensors[name], module in flipped)
            known = targets.setdefault(name, target)
            require(
                known == target,
                f"adapter {adapter.name}: module {module!r} is the tensor {name!r}, which another adapter calls"
                f" {known.module!r} or stores transposed; train both from one model class",
            )
    plan = Plan(targets, frozenset(packed), fits)
    _check_dtypes(checkpoint, plan.plain.values(), mixed_dtypes)
    return plan


def _fit(base: BaseNames, adapter: Adapter, reading: Reading, partial: bool) -> Fit:
    missing, doubt = missing_modules(base, adapter, reading)
    missing = (*missing, *(module for module in adapter.halves if module not in missing))
    hint = f" ({doubt})" if doubt else ""
    require(
        partial or not missing,
        f"adapter {adapter.name} lacks factors of {len(missing)} modules that its config names and base"
        f" {base.checkpoint.folder} has: {listed(missing)}{hint}; save or copy it again, or merge what is there with"
        " partial=True (--partial)",
    )
    copies = _copies(base, adapter, reading)
    return Fit("" if not (reading.dropped or reading.added) else str(reading), missing, copies, doubt)


def missing_modules(base: BaseNames, adapter: Adapter, reading: Reading) -> tuple[tuple[str, ...], str]:
    """Find the modules that peft would adapt by the adapter's config and that it has no factors of.

    Stored names decide where they leave nothing open: every module is there, and every name of the config is one of
    the base's. Else the modules of the model class are asked, for a stored tensor need not be a module.

    Returns:
        The modules, and what is doubtful about them.
    """
    wanted = adapter.config.get("target_modules")
    if wanted is None:
        return (), ""
    modules = reading.modules()
    missing = _missing(base, adapter, modules)
    named = isinstance(wanted, str) or all(any(matches_target([one], module) for module in modules) for one in wanted)
    if wanted != "all-linear" and named and not missing:
        return (), ""
    if base.model is None:
        # Without classes a table of embeddings looks like a linear.
        missing = () if wanted == "all-linear" else missing
        return missing, f"whether modules are missing is not certain: {base.reason}"
    kinds = base.model.linears if wanted == "all-linear" else base.model.adaptable
    by_model = Reading(base.model.paths)
    if by_model.fits(list(adapter.shapes)):
        modules = by_model.modules()
    real = {module: name for module, name in modules.items() if base.model.path_of.get(name) in kinds}
    others = [module for module in missing if module not in modules or modules[module] not in base.model.path_of]
    doubt = f"its config also names {listed(others)}, stored weights that are no modules of the model class"
    return _missing(base, adapter, real), doubt if others and wanted != "all-linear" else ""


def _missing(base: BaseNames, adapter: Adapter, modules: Mapping[str, str]) -> tuple[str, ...]:
    rest = {m: name for m, name in modules.items() if m not in adapter.shapes and len(base.tensors[name].shape) > 1}
    return tuple(module for module in rest if is_target(adapter.config, module))


def _copies(base: BaseNames, adapter: Adapter, reading: Reading) -> tuple[str, ...]:
    """The tensors beside the factors, each of which must be the base's own."""
    for key, (name, entry) in adapter.copies.items():
        module, _, last = name.rpartition(".")
        stored = reading.tensor(module)
        other = base.tensors.get(f"{stored.rpartition('.')[0]}.{last}") if stored else None
        if other is None:
            refuse_other_tensors(adapter.folder, [key])
        elif not same_values(entry, other):
            raise ValueError(_of_another_base(base, adapter, key, entry, other))
    return tuple(adapter.copies)


def _of_another_base(base: BaseNames, adapter: Adapter, key: str, entry: Entry, other: Entry) -> str:
    """Describe a weight beside the factors that is not the base's, and what to do about it."""
    found = f"shapes {entry.shape} and {other.shape}" if entry.shape != other.shape else "other values"
    text = f"adapter {adapter.name}: {key!r} is not {other.name!r} of base {base.checkpoint.folder} ({found})"
    if "base_layer" in key:
        # PEFT never trains the weight under an adapter.
        return (
            f"{text}: it is a copy of the weight that the adapter was trained on, which is of another base;"
            f" {_trained_on(adapter)}"
        )
    return (
        f"{text}: it was trained, or is of another base, and a merge would lose it: train without it, or"
        f" {_trained_on(adapter)}; embeddings that were not trained: save with save_embedding_layers=False"
    )


def _reading(base: BaseNames, adapter: Adapter) -> Reading:
    """How the adapter's module paths are the base's, or why they are not."""
    modules, folder = list(adapter.shapes), base.checkpoint.folder
    reading = find_reading(base, adapter.name, modules)
    if reading is not None:
        return reading
    best = max(exact_readings(base), key=lambda one: sum(one.tensor(module) is not None for module in modules))
    missing = [module for module in modules if best.tensor(module) is None]
    tied = [module for module in missing if module.rpartition(".")[2] in _HEADS]
    require(
        not tied,
        f"adapter {adapter.name} adapts {listed(tied)}, of which base {folder} stores no weight of its own: it is tied"
        f" to the embeddings (tie_word_embeddings), which the merge would change too; {_UNTIE}",
    )
    made_of = base.model.converted.get(missing[0]) if base.model is not None else None
    require(
        not made_of,
        f"adapter {adapter.name}: transformers makes the weight of module {missing[0]!r} of other tensors of base"
        f" {folder} as it loads them ({listed(made_of or [], 3)}): train without it, or save the base with modules of"
        " that name",
    )
    linears = sorted({name.removesuffix(".weight") for name, one in base.tensors.items() if _is_matrix(name, one)})
    other = shortened(base, modules)
    tower = (
        f"without its first part {modules[0]!r} would be {other.tensor(modules[0])!r}, which may be another tower: give"
        " the adapter's tensors that path if it is not; "
        if other is not None
        else ""
    )
    raise ValueError(
        f"adapter {adapter.name} does not fit base {folder}: {len(missing)} of its {len(modules)} modules"
        f" are not there: {listed(missing)}; {tower}{_of_composite(base, modules)}"
        f"{_of_fused(missing[0], linears)}the base has, for example,"
        f" {listed(_kinds(linears))}; {_trained_on(adapter)}" + (f" ({base.reason})" if base.reason else "")
    )


def _of_composite(base: BaseNames, modules: Sequence[str]) -> str:
    """Describe an adapter of a composite model whose language model alone may be this base."""
    part = "language_model."
    plain = [module.replace(part, "", 1) for module in modules]
    if plain == list(modules) or not any(reading.fits(plain) for reading in exact_readings(base)):
        return ""
    return (
        f"its modules are those of a composite model's language model, and without {part!r} they fit: take that part"
        " out of its tensors' names if this base is that language model; "
    )


_UNTIE = "untie it first (load, set config.tie_word_embeddings=False, save), or train without this module"


def _is_matrix(name: str, entry: Entry) -> bool:
    return len(entry.shape) == 2 and name.endswith(".weight")


def _kinds(linears: Iterable[str]) -> list[str]:
    """One module for each last part of the names."""
    return list({name.rpartition(".")[2]: name for name in reversed(list(linears))}.values())


def _of_fused(module: str, linears: Sequence[str]) -> str:
    """Describe a projection that the checkpoint stores fused and the adapter has by itself, or the reverse."""
    parent, _, last = module.rpartition(".")
    near = [name.rpartition(".")[2] for name in linears if name.rpartition(".")[0] == parent]
    fused = [name for name in near if "_proj" in name and ("qkv" in name or "gate_up" in name)]
    if fused and last not in fused:
        return f"it stores {parent} fused as {listed(fused)}: train on the fused module, or save the base unfused; "
    if "qkv" in last or "gate_up" in last:
        return f"it stores {parent} as {listed(near)}, not fused: train on these; "
    return ""


def _trained_on(adapter: Adapter) -> str:
    named = f", its config names {adapter.base!r}" if adapter.base else ""
    return f"give the base that it was trained on{named}"


def _check_tied(
    checkpoint: Checkpoint, tensors: Mapping[str, Entry], adapter: Adapter, names: Mapping[str, str]
) -> None:
    config = checkpoint.config
    stated = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    for module in names:
        last = module.rpartition(".")[2]
        tied = last in _HEADS and (stated is True or (stated is None and _repeated(tensors, names[module])))
        require(
            not tied,
            f"adapter {adapter.name} adapts {module}, which base {checkpoint.folder} ties to its embeddings"
            f" (tie_word_embeddings): a sum merged into it would be lost or change both; {_UNTIE}",
        )


def _repeated(tensors: Mapping[str, Entry], name: str) -> bool:
    """True where another tensor has the very same values."""
    mine = tensors[name]
    like = [one for one in tensors.values() if one.name != name and (one.shape, one.dtype) == (mine.shape, mine.dtype)]
    return any(same_values(mine, other) for other in like)


def _quantised(tensors: Mapping[str, Entry], names: Mapping[str, str]) -> dict[str, str]:
    """Module -> how its weight is stored, for weights that are not plain floating-point numbers."""
    found = {}
    for module, name in names.items():
        stem, _, last = name.rpartition(".")
        beside = [f"{stem}.{scale}" for scale in _SCALES if f"{stem}.{scale}" in tensors]
        if last in PACKED or tensors[name].dtype not in DTYPES or beside:
            found[module] = f"{name!r} as {tensors[name].dtype}" + (f" with {beside[0]!r} beside it" if beside else "")
    return found


def _refuse_quantised(
    checkpoint: Checkpoint, tensors: Mapping[str, Entry], adapter: Adapter, quantised: Mapping[str, str]
) -> None:
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    kind = f" ({method})" if method else ""
    require(
        not quantised,
        f"adapter {adapter.name}: base {checkpoint.folder} is quantised{kind}: it stores"
        f" {next(iter(quantised.values()), '')}, which would lose the update; give the base in BF16, F16 or F32, or"
        " keep the adapter beside it (--as-adapter)",
    )


def _fits(entry: Entry, shape: tuple[int, int, int]) -> tuple[bool, bool]:
    """The fit of a weight to an adapter's (R, K, N): as N x K, and as K x N."""
    _, K, N = shape
    return entry.shape == (N, K), entry.shape == (K, N)


def _check_shapes(
    checkpoint: Checkpoint, tensors: Mapping[str, Entry], adapter: Adapter, names: Mapping[str, str]
) -> None:
    wrong = [
        f"{module}: the adapter has (N, K) = {adapter.shapes[module][:0:-1]}, the base {tensors[name].shape}"
        for module, name in names.items()
        if not any(_fits(tensors[name], adapter.shapes[module]))
    ]
    require(
        not wrong,
        f"adapter {adapter.name} does not fit base {checkpoint.folder}: {len(wrong)} of its {len(names)} modules have"
        f" another shape: {'; '.join(wrong[:3])}; {_trained_on(adapter)}",
    )


def _flipped(
    checkpoint: Checkpoint, tensors: Mapping[str, Entry], adapter: Adapter, names: Mapping[str, str]
) -> set[str]:
    """The modules whose weight is stored K x N: all or none; where all are square the model's type decides."""
    fits = {module: _fits(tensors[name], adapter.shapes[module]) for module, name in names.items()}
    clear = {module: flipped for module, (straight, flipped) in fits.items() if straight != flipped}
    if len(set(clear.values())) == 2:
        straight, flipped = (next(m for m, value in clear.items() if value is flag) for flag in (False, True))
        raise ValueError(
            f"adapter {adapter.name} does not fit base {checkpoint.folder}: its weights are stored as (out, in), such"
            f" as {straight}, and as (in, out), such as {flipped}; {_trained_on(adapter)}"
        )
    conv1d = checkpoint.config.get("model_type") in _CONV1D
    if clear:
        conv1d = next(iter(clear.values()))
    else:
        require(
            conv1d or not adapter.fan_in_fan_out,
            f"adapter {adapter.name} says fan_in_fan_out=True, model_type"
            f" {checkpoint.config.get('model_type')!r} is not known to store weights as (in, out), and square weights"
            " do not decide it; set fan_in_fan_out to false in its config if the model has nn.Linear layers",
        )
    return set(names) if conv1d else set()


def _check_dtypes(checkpoint: Checkpoint, targets: Iterable[Target], mixed_dtypes: bool) -> None:
    targets = list(targets)
    found = Counter(target.entry.dtype for target in targets)
    examples = [
        f"{dtype} ({count}, such as {next(t.entry.name for t in targets if t.entry.dtype == dtype)})"
        for dtype, count in found.most_common()
    ]
    require(
        len(found) <= 1 or mixed_dtypes,
        f"base {checkpoint.folder} stores the weights to merge into in several dtypes: {', '.join(examples)}; its"
        " shards may be of two downloads: save it in one dtype, or allow it with mixed_dtypes=True (--mixed-dtypes)",
    )
