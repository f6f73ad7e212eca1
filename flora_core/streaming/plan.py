"""Which tensor of a checkpoint each adapted module is, or why an adapter does not fit.

Letters: K in_features, N out_features, R one client's rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..checks import listed, require
from .adapters import Adapter
from .shards import DTYPES, Checkpoint, Entry

# Model types of transformers whose linears are Conv1D, with weights stored K x N.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class Target:
    """A module and the tensor that is its weight; ``transposed`` where it is stored K x N."""

    module: str
    entry: Entry
    transposed: bool


def match_targets(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], *, mixed_dtypes: bool = False
) -> dict[str, Target]:
    """Find the tensor of every module that an adapter has.

    Returns:
        Tensor name -> target.
    Raises:
        ValueError: If an adapter does not fit the checkpoint, with the modules or shapes that disagree; or if a weight
            is tied, quantised, or of another floating-point dtype than the rest (unless ``mixed_dtypes``).
    """
    tensors = checkpoint.tensors
    targets: dict[str, Target] = {}
    for adapter in adapters:
        names = _tensor_names(checkpoint, tensors, adapter)
        _check_tied(checkpoint, tensors, adapter, names)
        _check_kinds(checkpoint, tensors, adapter, names)
        _check_shapes(checkpoint, tensors, adapter, names)
        flipped = _flipped(checkpoint, tensors, adapter, names)
        for module, name in names.items():
            target = Target(module, tensors[name], module in flipped)
            known = targets.setdefault(name, target)
            require(
                known == target,
                f"adapter {adapter.name}: module {module!r} is the tensor {name!r}, which another adapter calls"
                f" {known.module!r} or stores the other way round; train both from one model class",
            )
    _check_dtypes(checkpoint, targets.values(), mixed_dtypes)
    return targets


def _tensor_names(checkpoint: Checkpoint, tensors: Mapping[str, Entry], adapter: Adapter) -> dict[str, str]:
    """Module -> tensor. A base saved without its head, or an adapter trained on one, lacks the path's first part."""
    modules = list(adapter.shapes)
    ways = [{module: f"{module}.weight" for module in modules}]
    if all("." in module for module in modules):
        ways.append({module: f"{module.partition('.')[2]}.weight" for module in modules})
    for prefix in sorted({name.partition(".")[0] for name in tensors}):
        ways.append({module: f"{prefix}.{module}.weight" for module in modules})
    fitting = [way for way in ways if all(name in tensors for name in way.values())]
    if fitting:
        return fitting[0]
    best = max(ways, key=lambda way: sum(name in tensors for name in way.values()))
    missing = [module for module, name in best.items() if name not in tensors]
    tied = [module for module in missing if module.rpartition(".")[2] in _HEADS]
    require(
        not tied,
        f"adapter {adapter.name} adapts {listed(tied)}, of which base {checkpoint.folder} stores no weight of its own:"
        f" it is tied to the embeddings (tie_word_embeddings), which the merge would change too; {_UNTIE}",
    )
    linears = sorted({name.removesuffix(".weight") for name, one in tensors.items() if _is_matrix(name, one)})
    raise ValueError(
        f"adapter {adapter.name} does not fit base {checkpoint.folder}: {len(missing)} of its {len(modules)} modules"
        f" are not there: {listed(missing)}; {_of_fused(missing[0], linears)}the base has, for example,"
        f" {listed(_kinds(linears))}; {_trained_on(adapter)}"
    )


_UNTIE = "untie it first (load, set config.tie_word_embeddings=False, save), or train without this module"


def _is_matrix(name: str, entry: Entry) -> bool:
    return len(entry.shape) == 2 and name.endswith(".weight")


def _kinds(linears: Iterable[str]) -> list[str]:
    """One module for each last part of the names."""
    return list({name.rpartition(".")[2]: name for name in reversed(list(linears))}.values())


def _of_fused(module: str, linears: Sequence[str]) -> str:
    """Say so if the checkpoint stores this projection with others in one tensor, or the other way round."""
    parent, _, last = module.rpartition(".")
    near = [name.rpartition(".")[2] for name in linears if name.rpartition(".")[0] == parent]
    fused = [name for name in near if "_proj" in name and ("qkv" in name or "gate_up" in name)]
    if fused and last not in fused:
        return f"it stores {parent} fused as {listed(fused)}: train on the fused module, or save the base unfused; "
    if "qkv" in last or "gate_up" in last:
        return f"it stores {parent} as {listed(near)}, not fused: train on these; "
    return ""


def _trained_on(adapter: Adapter) -> str:
    told = f", its config says {adapter.base!r}" if adapter.base else ""
    return f"give the base that it was trained on{told}"


def _check_tied(
    checkpoint: Checkpoint, tensors: Mapping[str, Entry], adapter: Adapter, names: Mapping[str, str]
) -> None:
    config = checkpoint.config
    told = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    for module in names:
        last = module.rpartition(".")[2]
        tied = last in _HEADS and (told is True or (told is None and _repeated(tensors, names[module])))
        require(
            not tied,
            f"adapter {adapter.name} adapts {module}, which base {checkpoint.folder} ties to its embeddings"
            f" (tie_word_embeddings): whatever is merged into it would be lost or change both; {_UNTIE}",
        )


def _repeated(tensors: Mapping[str, Entry], name: str) -> bool:
    """Whether another tensor has the very same bytes."""
    mine = tensors[name]
    like = [one for one in tensors.values() if one.name != name and (one.shape, one.dtype) == (mine.shape, mine.dtype)]
    return any(_equal(mine, other) for other in like)


def _equal(one: Entry, other: Entry) -> bool:
    with open(one.path, "rb") as left, open(other.path, "rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        todo = one.stop - one.start
        while todo:
            size = min(todo, 1 << 22)
            if left.read(size) != right.read(size):
                return False
            todo -= size
    return True


def _check_kinds(
    checkpoint: Checkpoint, tensors: Mapping[str, Entry], adapter: Adapter, names: Mapping[str, str]
) -> None:
    for name in names.values():
        entry = tensors[name]
        require(
            entry.dtype in DTYPES,
            f"adapter {adapter.name}: base {checkpoint.folder} stores {name!r} quantised, as {entry.dtype}, which would"
            " lose the update; give the base in BF16, F16 or F32, or keep the adapter beside it (--as-adapter)",
        )
        require(
            len(entry.shape) == 2,
            f"adapter {adapter.name}: {name!r} must be a matrix to be merged into, got shape {entry.shape}",
        )


def _fits(entry: Entry, shape: tuple[int, int, int]) -> tuple[bool, bool]:
    """Whether a weight fits an adapter's (R, K, N) as N x K, and as K x N."""
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
    """The modules whose weight is stored K x N: all or none; where all are square the model's type must tell."""
    fits = {module: _fits(tensors[name], adapter.shapes[module]) for module, name in names.items()}
    clear = {module: flipped for module, (straight, flipped) in fits.items() if straight != flipped}
    if len(set(clear.values())) == 2:
        ways = [f"{next(m for m, way in clear.items() if way is flag)}" for flag in (False, True)]
        raise ValueError(
            f"adapter {adapter.name} does not fit base {checkpoint.folder}: its weights are stored as (out, in), such"
            f" as {ways[0]}, and as (in, out), such as {ways[1]}; {_trained_on(adapter)}"
        )
    conv1d = checkpoint.config.get("model_type") in _CONV1D
    if clear:
        conv1d = next(iter(clear.values()))
    else:
        require(
            conv1d or not adapter.fan_in_fan_out,
            f"adapter {adapter.name} says fan_in_fan_out=True, model_type"
            f" {checkpoint.config.get('model_type')!r} is not known to store weights as (in, out), and square weights"
            " do not tell; set fan_in_fan_out to false in its config if the model has nn.Linear layers",
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


__all__ = ["Target", "match_targets"]
