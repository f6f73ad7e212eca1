"""Recipes: a whole run in one YAML file, read strictly, with `key=value` overrides.

`load` finds and reads one, `build` makes of it what `Federation` needs. Everything that can be checked without data
or a model is checked by `load`, so that a wrong key costs no waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..common import check_name, check_number, data_files, nearest, packaged, require
from . import loading
from .adapter import AdapterConfig
from .federation import FederationConfig
from .other_names import ADAPTER_FIELDS, RECIPE_KEYS, meant
from .strategy_names import check_strategy_name
from .training import TrainConfig

DEMO_DATA = "demo"


@dataclass
class DataRecipe:
    """Where the examples come from and how they are split over the clients.

    Args:
        path: "demo"; a source of records that is split (a file, a folder, a glob, or a list of these); or a mapping of
            each client to the source of its own.
        per_client: At most so many training examples a client, drawn with the run's seed; None for all.
        test: Source of held-out records, or a mapping of clients to sources of their own; None holds out a part of
            `path`.
        test_fraction: The part of `path` that is held out where neither `test` nor `partitions` says which.
        hold_out: Of what: `client` holds out that part of each client's records, so that each has held-out records of
            its own; `pool` of all, before they are dealt; `auto` is `client` where the data name the clients.
        test_items: At most so many held-out records; None for all.
        partition: How one source is split: iid, shard, dirichlet or natural.
        partitions, split: A file {split: {client: [id, ...], "test": [id, ...]}} that splits it instead, and its split.
        label: Column that shard and dirichlet separate.
        alpha: Dirichlet concentration: small means clients that differ much.
        shards_per_client: For shard.
        client_column: Column that names the client, for natural.
        id_column: Column that `partitions` names records by.
        unknown: Fields of records that nothing reads: warn (once a file, with names and counts) or refuse.
    """

    path: str | list[str] | dict[str, str | list[str]] = DEMO_DATA
    per_client: int | None = None
    test: str | list[str] | dict[str, str | list[str]] | None = None
    test_fraction: float = 0.1
    hold_out: Literal["auto", "client", "pool"] = "auto"
    test_items: int | None = None
    partition: Literal["iid", "shard", "dirichlet", "natural"] = "iid"
    partitions: str | None = None
    split: str | None = None
    label: str = "category"
    alpha: float = 0.5
    shards_per_client: int = 2
    client_column: str = "client"
    id_column: str = "id"
    unknown: Literal["warn", "refuse"] = "warn"

    def __post_init__(self) -> None:
        for name in ("per_client", "test_items"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, whole=True)
        check_number("test_fraction", self.test_fraction, 0, 0.9)
        # Clients' own files, and the held-out ones, may be other machines': who reads them says if they are not there.
        if not isinstance(self.path, dict) and self.path != DEMO_DATA:
            data_files(self.path)
        if self.partitions is not None and not Path(self.partitions).is_file():
            raise FileNotFoundError(f"file {self.partitions} does not exist (relative paths start at {Path.cwd()})")
        self._check_hold_out()
        require(
            self.split is None or self.partitions is not None, "split needs partitions, the file that has the split"
        )

    def _check_hold_out(self) -> None:
        """Check that what is asked for can be held out of these data."""
        if self.hold_out == "auto":
            return
        text = f"hold_out={self.hold_out}"
        require(self.test is None, f"{text} holds out records of path, and test gives others; leave one of them out")
        require(self.path != DEMO_DATA, f"{text}: the demo has held-out data of its own; leave it out")
        named = isinstance(self.path, dict) or self.partitions is not None
        require(
            self.hold_out == "client" or not named,
            f"{text}: the clients' records lie apart from each other; use hold_out=client",
        )


@dataclass
class ClientOverride:
    """One client's own settings: fields of AdapterConfig and of TrainConfig."""

    adapter: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": AdapterConfig})
    train: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": TrainConfig})

    def __post_init__(self) -> None:
        for part, cls, others in (
            ("adapter", AdapterConfig, ADAPTER_FIELDS),
            ("train", TrainConfig, RECIPE_KEYS),
        ):
            values, hints = getattr(self, part), loading.hints_of(cls)
            for key in values:
                require(key in hints, f"unknown key {part}.{key!r}; {meant(key, hints, others)}")
                values[key] = loading.convert(hints[key], values[key], f"{part}.{key}")


@dataclass
class ClientsRecipe:
    """The clients and their adapters.

    Args:
        count: How many; None: as many as names, or as the data defines, or as ranks. Where the data name the clients,
            it must be their number: none is left out in silence.
        names: Their names; None: the data's, or client-0, client-1, ... Of a natural partition, the order of its
            clients.
        ranks: Dealt to the clients in turn: ranks[i % len(ranks)].
        alpha: LoRA alpha of all; None takes alpha_over_rank times the rank.
        alpha_over_rank: The usual 2.
        dropout, rslora: As in `AdapterConfig`.
        overrides: Client name -> {adapter: {...}, train: {...}}.
    """

    count: int | None = None
    names: list[str] | None = None
    ranks: list[int] = field(default_factory=lambda: [8])
    alpha: float | None = None
    alpha_over_rank: float = 2.0
    dropout: float = 0.0
    rslora: bool = False
    overrides: dict[str, ClientOverride] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(len(self.ranks) > 0, "ranks must have at least one rank")
        for rank in self.ranks:
            check_number("ranks", rank, 0, whole=True)
        if self.count is not None:
            check_number("count", self.count, 1, whole=True)
        if self.names is not None:
            self.names = [check_name(name) for name in self.names]
            twice = [name for name in self.names if self.names.count(name) > 1]
            require(not twice, f"names must differ, got {twice[0]!r} twice" if twice else "")
            require(
                self.count in (None, len(self.names)),
                f"count must be {len(self.names)}, the number of names, got {self.count}; leave it out",
            )
        self.adapter("", 0)

    def adapter(self, name: str, index: int) -> AdapterConfig:
        """Return the adapter of the client with this name and number."""
        rank = self.ranks[index % len(self.ranks)]
        override = self.overrides[name].adapter if name in self.overrides else {}
        rank = override.get("rank", rank)
        alpha = self.alpha if self.alpha is not None else self.alpha_over_rank * rank
        fields = dict(rank=rank, alpha=alpha, dropout=self.dropout, use_rslora=self.rslora)
        return AdapterConfig(**{**fields, **override})


@dataclass
class Recipe:
    """A whole run; see recipes/quickstart.yaml for one with comments.

    Args:
        model: A folder or hub name of a transformers causal LM, or smollm2-135m-instruct, the demo's.
        target_modules: Names or suffixes of the layers that get adapters, or one regex over their whole paths.
        strategy: How updates are aggregated, one of your own as FILE.py:NAME; its options are
            federation.strategy_options.
        out: Folder of the results; a run that stopped there is continued.
        seed: Seed of everything random, also of `train` and `federation`.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: The base's: auto is bfloat16 on CUDA, float32 on a CPU.
        threads: CPU threads for torch; None leaves torch's choice, but for containers with a smaller share of the
            processor. On a machine that is busy with other work, fewer threads than free cores are far faster.
        trust_remote_code: Whether Python code that lies beside the model's weights may run.
    """

    model: str
    federation: FederationConfig
    data: DataRecipe = field(default_factory=DataRecipe)
    clients: ClientsRecipe = field(default_factory=ClientsRecipe)
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: str = "flora"
    out: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_number("seed", self.seed, 0, whole=True)
        if self.threads is not None:
            check_number("threads", self.threads, 1, whole=True)
        require(len(self.target_modules) > 0, "target_modules must name at least one layer")
        check_strategy_name(self.strategy)
        self.federation.check_strategy(self.strategy)


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change it by `key=value` overrides.

    Args:
        recipe: A file, or the bare name of one that travels with the package (quickstart).
        overrides: Such as "train.lr=1e-3", "clients.count=4", "data=my.jsonl" (short for data.path). A section, such as
            "train={lr: 1e-3}", changes the keys that it names; an empty one, "train={}", takes all of its defaults.
    Raises:
        FileNotFoundError: If there is no such recipe.
        ValueError, TypeError: If a key is unknown, missing or given twice, or a value does not fit.
    """
    path = find(recipe)
    raw = _read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(
            f"{path} must hold a mapping of keys to values; it {'is empty' if raw is None else 'does not'}"
        )
    _expand(raw)
    for parts, value in _read_overrides(overrides).items():
        _apply(raw, parts, value)
    raw.setdefault("out", f"runs/{path.stem}")
    for part in ("train", "federation"):
        section = raw.setdefault(part, {})
        if isinstance(section, dict):
            section.setdefault("seed", raw.get("seed", 0))
    if isinstance(raw["federation"], dict):
        raw["federation"].setdefault("out", raw["out"])
    return loading.read(Recipe, raw, str(path))


def find(recipe: str | Path) -> Path:
    """Return the path of a recipe that is given by path or by the bare name of a packaged one."""
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = packaged_recipes()
    if str(recipe) in packaged:
        return packaged[str(recipe)]
    require("=" not in str(recipe), f"the recipe comes before key=value, got {str(recipe)!r}; {_names(packaged)}")
    if path.is_dir():
        raise IsADirectoryError(f"recipe {recipe} is a folder; give a YAML file in it, or a name: {_names(packaged)}")
    close = nearest(path.stem, packaged)
    raise FileNotFoundError(
        f"recipe {recipe} does not exist (relative paths start at {Path.cwd()}); "
        f"{close + ' ' if close.startswith('did') else ''}{_names(packaged)}"
    )


def _names(packaged: dict[str, Path]) -> str:
    return f"packaged recipes, by name: {', '.join(packaged) or 'none'}"


def packaged_recipes() -> dict[str, Path]:
    """Return name -> path of the recipes that travel with the package."""
    return {path.stem: path for path in sorted(packaged("recipes", "recipes").glob("*.yaml"))}


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, of which YAML would drop the first in silence."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node)
            if key in found:
                raise ValueError(f"{path}, line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            found[key] = loader.construct_object(value_node, deep=True)
        return found

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(path.read_text("utf-8"), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: malformed YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; a recipe is a YAML file") from None


def _expand(raw: dict[str, Any]) -> None:
    """Write `data: PATH` out as `data: {path: PATH}`; of a list of paths too."""
    if isinstance(raw.get("data"), (str, list)):
        raw["data"] = {"path": raw["data"]}


def _read_overrides(overrides: Sequence[str]) -> dict[tuple[str, ...], Any]:
    """Return path -> value of every key; one that is given twice, of which one would be dropped, is refused."""
    found: dict[tuple[str, ...], Any] = {}
    given: dict[tuple[str, ...], str] = {}
    for override in overrides:
        for parts, value in _read_override(override).items():
            for other, first in given.items():
                size = min(len(parts), len(other))
                twice = parts[:size] == other[:size]
                require(not twice, f"key {'.'.join(parts)!r} is given twice: {first!r} and {override!r}; give it once")
            found[parts] = value
        given.update(dict.fromkeys(list(found)[len(given) :], override))
    return found


def _read_override(override: str) -> dict[tuple[str, ...], Any]:
    """Return path -> value of the keys that an override changes: one, or those of a section."""
    import yaml

    key, equals, text = override.partition("=")
    require(bool(key and equals), f"override {override!r} must read key=value, such as train.lr=1e-3")
    try:
        loading.hint_at(Recipe, key)
        # Of data, whatever is no section is short for its path; clients may have any names but those of the keys.
        if key == "data" and not loading.hints_of(DataRecipe).keys() & _keys_of(text, yaml):
            key = "data.path"
        return _parse(key, text, yaml)
    except (ValueError, TypeError) as error:
        raise type(error)(f"override {override!r}: {error}") from None


def _keys_of(text: str, yaml: Any) -> set[str]:
    """Return the keys of a text that is a YAML mapping; none of any other."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return set()
    return set(map(str, value)) if isinstance(value, dict) else set()


def _apply(raw: dict[str, Any], parts: tuple[str, ...], value: Any) -> None:
    for parent in parts[:-1]:
        if not isinstance(raw.get(parent), dict):
            raw[parent] = {}
        raw = raw[parent]
    raw[parts[-1]] = value


def _parse(key: str, text: str, yaml: Any) -> dict[tuple[str, ...], Any]:
    """Read an override's text as YAML, or as it stands where only text fits (out=2024); return path -> value."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        if not text.startswith("*"):
            raise ValueError(f"malformed value: {' '.join(str(error).split())}") from None
        # A glob, which YAML takes for a reference.
        value = text
    found: dict[tuple[str, ...], Any] = {}
    for path, kind, one in loading.leaves_at(Recipe, key, value):
        is_key = ".".join(path) == key
        name = "the value" if is_key else ".".join(path)
        found[path] = one
        try:
            loading.convert(kind, one, name, ".".join(path), "the value")
        except TypeError:
            if not is_key or not _is_text(kind, text):
                raise
            found[path] = text
    return found


def _is_text(hint: Any, text: str) -> bool:
    try:
        loading.convert(hint, text, "the value")
    except TypeError:
        return False
    return True
