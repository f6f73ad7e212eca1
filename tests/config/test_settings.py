"""Settings in Python: their defaults, the bounds of each value, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flora_core.config import AdapterConfig, FederationConfig, Privacy, TrainConfig, loading
from flora_core.config.adapter import matches_target
from flora_core.config.recipe import ClientsRecipe, DataRecipe, Recipe
from flora_core.config.strategy_names import STRATEGY_NAMES, unknown_strategy

FEDERATION = FederationConfig(rounds=1)
# What each class needs besides the field that is tried.
NEEDED: dict[type, dict[str, Any]] = {
    AdapterConfig: {"rank": 4},
    FederationConfig: {"rounds": 1},
    Privacy: {"clip": 1.0, "epsilon": 1.0},
    Recipe: {"model": "m", "federation": FEDERATION},
}


def make(cls: type, **fields: Any) -> Any:
    return cls(**{**NEEDED.get(cls, {}), **fields})


class Bound(NamedTuple):
    """A number's field, the least and the greatest value that it takes, and one beyond each."""

    cls: type
    field: str
    low: float
    below: float
    high: float | None = None
    above: float | None = None


NUMBERS = [
    Bound(AdapterConfig, "rank", 0, -1),
    Bound(AdapterConfig, "alpha", 0, -0.5),
    Bound(AdapterConfig, "dropout", 0, -0.1, 0.99, 1),
    *(Bound(TrainConfig, field, 0, -1e-9) for field in ("lr", "eps", "weight_decay")),
    *(Bound(TrainConfig, field, 0, -1) for field in ("warmup_steps", "seed")),
    *(Bound(TrainConfig, field, 1, 0) for field in ("local_epochs", "batch_size", "gradient_accumulation")),
    *(Bound(TrainConfig, field, 1, 0) for field in ("max_steps", "token_budget")),
    Bound(TrainConfig, "max_length", 2, 1),
    *(Bound(TrainConfig, field, 1e-9, 0) for field in ("clip_norm", "memory_budget_gb")),
    *(Bound(FederationConfig, field, 1, 0) for field in ("rounds", "min_clients", "eval_every", "keep_snapshots")),
    Bound(FederationConfig, "seed", 0, -1),
    Bound(FederationConfig, "fraction", 1e-9, 0, 1, 1.1),
    Bound(FederationConfig, "eval_max_length", 2, 1),
    Bound(FederationConfig, "check_rows", 1, 0),
    *(Bound(FederationConfig, field, 1e-9, 0) for field in ("max_norm", "clip_update", "deadline_s")),
    Bound(FederationConfig, "outlier_factor", 1, 0.9),
    *(Bound(Privacy, field, 1e-9, 0) for field in ("clip", "epsilon")),
    Bound(Privacy, "delta", 1e-9, 0, 0.99, 1),
    *(Bound(DataRecipe, field, 1, 0) for field in ("per_client", "test_items")),
    Bound(DataRecipe, "test_fraction", 0, -0.1, 0.9, 0.91),
    Bound(ClientsRecipe, "count", 1, 0),
    Bound(Recipe, "seed", 0, -1),
    Bound(Recipe, "threads", 1, 0),
]


@pytest.mark.parametrize("bound", NUMBERS, ids=lambda bound: f"{bound.cls.__name__}.{bound.field}")
def test_a_number_is_taken_within_its_bounds_and_refused_beyond(bound: Bound):
    for good in (bound.low, bound.high):
        if good is not None:
            assert getattr(make(bound.cls, **{bound.field: good}), bound.field) == good
    for wrong in (bound.below, bound.above):
        if wrong is not None:
            with pytest.raises(ValueError, match=rf"{bound.field} must be .*, got"):
                make(bound.cls, **{bound.field: wrong})
    with pytest.raises(TypeError, match=rf"{bound.field} must be a (whole )?number, got 'many'"):
        make(bound.cls, **{bound.field: "many"})
    if isinstance(bound.low, int) and isinstance(bound.below, int):
        with pytest.raises(TypeError, match=rf"{bound.field} must be a whole number, got 2.5"):
            make(bound.cls, **{bound.field: 2.5})


FLAGS = [
    (AdapterConfig, "use_rslora"),
    *((TrainConfig, field) for field in ("gradient_checkpointing", "keep_optimizer", "deterministic")),
    *((FederationConfig, field) for field in ("save_model", "save_adapters")),
]


@pytest.mark.parametrize(("cls", "field"), FLAGS)
def test_a_flag_is_true_or_false_and_no_word(cls: type, field: str):
    for flag in (True, False):
        assert getattr(make(cls, **{field: flag}), field) is flag
    with pytest.raises(TypeError, match=rf"{field} must be True or False, got 'no'"):
        make(cls, **{field: "no"})


CHOICES = [
    (TrainConfig, "schedule", ("constant", "linear", "cosine")),
    (TrainConfig, "schedule_scope", ("round", "run")),
    (TrainConfig, "loss_on", ("answer", "all")),
    (TrainConfig, "template", ("auto", "chat", "prompt")),
    (TrainConfig, "dtype", (None, "bfloat16")),
    (TrainConfig, "cuda_graphs", ("auto", True, False)),
    (TrainConfig, "recompute", ((), ("norms",), ("activations",), ("norms", "activations"))),
    (FederationConfig, "rounding", ("low_bits", "nearest", "stochastic")),
    (FederationConfig, "save_dtype", ("auto", "base", "float32", "bfloat16", "float16", "float64")),
    (FederationConfig, "base", ("auto", "replicated", "sharded")),
    (FederationConfig, "eval_template", ("auto", "chat", "prompt")),
    (FederationConfig, "weights", ("examples", "tokens", "uniform")),
]


@pytest.mark.parametrize(
    ("cls", "field", "choices"), CHOICES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_word_is_one_of_its_choices(cls: type, field: str, choices: tuple[Any, ...]):
    for choice in choices:
        assert getattr(make(cls, **{field: choice}), field) == choice
    wrong = ("other",) if isinstance(choices[0], tuple) else "other"
    with pytest.raises(ValueError, match=rf"{field} must be .*got 'other'"):
        make(cls, **{field: wrong})


def test_defaults_are_the_documented_ones():
    train = TrainConfig()
    assert (train.lr, train.betas, train.eps, train.weight_decay) == (3e-4, (0.9, 0.999), 1e-8, 0.0)
    assert (train.schedule, train.warmup_steps, train.schedule_scope) == ("constant", 0, "round")
    assert (train.local_epochs, train.max_steps, train.batch_size, train.gradient_accumulation) == (1, None, 4, 1)
    assert (train.max_length, train.clip_norm, train.loss_on, train.template, train.dtype) == (
        (512, None, "answer", "auto", None)
    )
    assert (train.gradient_checkpointing, train.recompute, train.token_budget) == (False, (), None)
    assert (train.memory_budget_gb, train.seed, train.keep_optimizer) == (None, 0, False)
    assert (train.deterministic, train.cuda_graphs) == (True, "auto")
    run = FederationConfig(rounds=3)
    assert (run.fraction, run.min_clients, run.weights, run.seed, run.out) == (1.0, 1, "examples", 0, None)
    assert (run.eval_every, run.eval_template, run.eval_max_length, run.eval_label) == (1, "auto", None, "category")
    assert (run.rounding, run.check_rows, run.max_norm, run.outlier_factor) == ("low_bits", 64, None, None)
    assert (run.clip_update, run.deadline_s, run.privacy, run.keep_snapshots) == (None, None, None, 2)
    assert (run.save_model, run.save_dtype, run.save_adapters, run.base) == (True, "auto", True, "auto")
    assert run.strategy_options == {}
    adapter = AdapterConfig(rank=8)
    assert (adapter.alpha, adapter.dropout, adapter.use_rslora) == (16.0, 0.0, False)
    assert Privacy(clip=1.0, epsilon=8.0).delta == 1e-5


def test_defaults_of_a_recipe_are_the_documented_ones():
    recipe = make(Recipe)
    assert (recipe.target_modules, recipe.strategy, recipe.out, recipe.seed) == (["q_proj", "v_proj"], "flora", None, 0)
    assert (recipe.device, recipe.dtype, recipe.threads, recipe.trust_remote_code) == ("auto", "auto", None, False)
    data = recipe.data
    assert (data.path, data.per_client, data.test, data.test_fraction) == ("demo", None, None, 0.1)
    assert (data.hold_out, data.test_items, data.partition, data.partitions) == ("auto", None, "iid", None)
    assert (data.label, data.alpha, data.shards_per_client, data.client_column) == ("category", 0.5, 2, "client")
    assert (data.id_column, data.unknown, data.split) == ("id", "warn", None)
    clients = recipe.clients
    assert (clients.count, clients.names, clients.ranks, clients.alpha) == (None, None, [8], None)
    assert (clients.alpha_over_rank, clients.dropout, clients.rslora, clients.overrides) == (2.0, 0.0, False, {})


@pytest.mark.parametrize(
    ("betas", "error", "words"),
    [
        ((0.9,), ValueError, "betas must be two numbers"),
        (0.9, ValueError, "betas must be two numbers"),
        ((0.9, 1), ValueError, "betas must be below 1"),
        ((-0.1, 0.9), ValueError, "betas must be at least 0"),
        (("a", 0.9), TypeError, "betas must be a number"),
    ],
)
def test_betas_are_two_numbers_from_0_and_below_1(betas: Any, error: type[Exception], words: str):
    assert TrainConfig(betas=[0, 0.99]).betas == (0, 0.99)  # pyright: ignore[reportArgumentType]
    with pytest.raises(error, match=words):
        TrainConfig(betas=betas)


def test_recompute_is_a_list_of_names():
    assert TrainConfig(recompute=["norms"]).recompute == ("norms",)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"recompute must be a list of names, got 'norms'; write \['norms'\]"):
        TrainConfig(recompute="norms")  # pyright: ignore[reportArgumentType]


def test_the_scale_is_alpha_over_the_rank_or_its_root_by_module():
    patterns: dict[str, Any] = dict(rank_pattern={"v_proj": 9, "o_proj": 0}, alpha_pattern={"k_proj": 32})
    plain = AdapterConfig(4, 16, **patterns)
    rooted = AdapterConfig(4, 16, use_rslora=True, **patterns)
    for name, rank, alpha in (("q_proj", 4, 16), ("v_proj", 9, 16), ("k_proj", 4, 32)):
        module = f"layers.0.self_attn.{name}"
        assert plain.rank_of(module) == rank
        assert plain.scaling_of(module) == alpha / rank
        assert rooted.scaling_of(module) == alpha / math.sqrt(rank)
    assert (plain.rank_of("o_proj"), plain.scaling_of("o_proj")) == (0, 0.0)
    assert AdapterConfig(4, 0).scaling_of("q_proj") == 0.0
    assert AdapterConfig(3, alpha=None).scaling_of("q_proj") == 2.0


def test_the_first_pattern_that_matches_a_whole_name_wins():
    config = AdapterConfig(4, rank_pattern={"layers.1.v_proj": 5, "v_proj": 6, "q": 7})
    ranks = {"layers.1.v_proj": 5, "layers.0.v_proj": 6, "v_proj": 6, "layers.0.q_proj": 4, "my_v_proj": 4, "q": 7}
    assert {module: config.rank_of(module) for module in ranks} == ranks


def test_targets_are_the_clients_own_or_the_cohorts():
    assert AdapterConfig(4).targets("layers.0.q_proj", ["q_proj"])
    assert not AdapterConfig(4).targets("layers.0.q_proj", ["v_proj"])
    own = AdapterConfig(4, target_modules=["v_proj"], rank_pattern={"layers.1.v_proj": 0})
    assert own.targets("layers.0.v_proj", ["q_proj"])
    assert not own.targets("layers.0.q_proj", ["q_proj"])
    assert not own.targets("layers.1.v_proj", ["v_proj"])


def test_targets_are_names_suffixes_or_one_regex_over_the_path():
    assert matches_target(["v_proj"], "v_proj")
    assert matches_target(["attn.v_proj"], "layers.0.attn.v_proj")
    assert not matches_target(["v_proj"], "layers.0.my_v_proj")
    assert matches_target("all-linear", "anything")
    assert matches_target(r".*\.[qv]_proj", "layers.0.q_proj")
    assert not matches_target(r"[qv]_proj", "layers.0.q_proj")


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (dict(rank_pattern=[("q", 4)]), TypeError, "rank_pattern must map patterns of module paths to numbers"),
        (dict(rank_pattern={"q": 1.5}), TypeError, r"rank_pattern\['q'\] must be a whole number, got 1.5"),
        (dict(alpha_pattern={"q": -1}), ValueError, r"alpha_pattern\['q'\] must be at least 0, got -1"),
        (dict(rank_pattern={"(": 4}), ValueError, r"rank_pattern: '\(' is not a regular expression"),
        (dict(target_modules="("), ValueError, r"target_modules: '\(' is not a regular expression"),
        (dict(target_modules=[1]), TypeError, "target_modules must be a list of names, a regex or 'all-linear'"),
        (dict(target_modules=1), TypeError, "target_modules must be a list of names, a regex or 'all-linear'"),
    ],
)
def test_refuses_patterns_and_targets_of_another_kind(fields: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        AdapterConfig(4, **fields)
    assert AdapterConfig(4, alpha_pattern={"q": 1.5}).alpha_pattern == {"q": 1.5}


def test_a_clients_own_training_settings_lie_over_the_cohorts():
    base = TrainConfig(lr=1e-2, batch_size=2)
    assert base.overridden(None) is base
    other = TrainConfig(lr=1)
    assert base.overridden(other) is other
    assert base.overridden({"lr": 1e-3}) == TrainConfig(lr=1e-3, batch_size=2)
    with pytest.raises(TypeError, match="train must be a TrainConfig or a mapping of its fields to values, got 3"):
        base.overridden(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="train: unknown field 'batch'; did you mean 'batch_size'"):
        base.overridden({"batch": 3})


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_over_the_warmup_and_falls_to_the_end_of_the_schedule(schedule: str):
    config = TrainConfig(lr=2.0, schedule=schedule, warmup_steps=4)
    rates = [config.learning_rate(step, total=12) for step in range(15)]
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    middle = {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[schedule]
    quarter = {"constant": 2.0, "linear": 1.5, "cosine": 1 + math.cos(math.pi / 4)}[schedule]
    assert (rates[6], rates[8]) == (pytest.approx(quarter), pytest.approx(middle))
    assert rates[12] == (2.0 if schedule == "constant" else pytest.approx(0.0, abs=1e-12))
    if schedule == "linear":
        assert rates[13:] == [0.0, 0.0]
    assert TrainConfig(lr=2.0, schedule=schedule).learning_rate(0, total=0) == {"linear": 0.0}.get(schedule, 2.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(weights="examples"), "weights='examples'"),
        (dict(weights="tokens"), "weights='tokens'"),
        (dict(min_clients=2), "min_clients=2"),
        (dict(outlier_factor=2.0), "outlier_factor=2.0"),
        (dict(clip_update=1.0), "clip_update=1.0"),
        (dict(rounding="nearest"), "rounding='nearest'"),
    ],
)
def test_privacy_refuses_what_gives_a_client_other_influence(changes: dict[str, Any], words: str):
    private: dict[str, Any] = dict(rounds=1, weights="uniform", privacy=Privacy(clip=1.0, epsilon=8.0))
    FederationConfig(**private)
    FederationConfig(**{**private, "weights": {"a": 1.0}})
    with pytest.raises(ValueError, match=f"privacy does not go with {words}"):
        FederationConfig(**{**private, **changes})


def test_privacy_is_a_privacy_with_one_measure_and_strategy_flora():
    with pytest.raises(TypeError, match=r"privacy must be a Privacy, such as .*got 8\.0"):
        FederationConfig(rounds=1, weights="uniform", privacy=8.0)  # pyright: ignore[reportArgumentType]
    for measures in ({}, {"epsilon": 1.0, "noise_multiplier": 1.0}):
        with pytest.raises(ValueError, match="privacy needs epsilon or noise_multiplier, and not both"):
            Privacy(clip=1.0, **measures)
    assert Privacy(clip=1.0, noise_multiplier=0.5).epsilon is None
    with pytest.raises(ValueError, match=r"privacy\.noise_multiplier must be above 0"):
        Privacy(clip=1.0, noise_multiplier=0.0)
    private = FederationConfig(rounds=1, weights="uniform", privacy=Privacy(clip=1.0, epsilon=8.0))
    private.check_strategy("flora")
    FEDERATION.check_strategy("fedit")
    with pytest.raises(ValueError, match=r"privacy needs strategy 'flora'.*'fedit' would hand out more"):
        private.check_strategy("fedit")


def test_weights_and_numbers_fit_the_clients():
    FederationConfig(rounds=1, min_clients=2).check_names(["a", "b"])
    with pytest.raises(ValueError, match=r"min_clients must be at most the number of clients \(1\), got 2"):
        FederationConfig(rounds=1, min_clients=2).check_names(["a"])
    weighted = FederationConfig(rounds=1, weights={"a": 1, "b": 0.5})
    weighted.check_names(["b", "a"])
    for names in (["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=r"weights must have one entry for each client; missing or unknown: [bc]"):
            weighted.check_names(names)
    for weight, words in ((0, "must be above 0, got 0"), (-1, "must be at least 0, got -1")):
        with pytest.raises(ValueError, match=rf"weights\['a'\] {words}"):
            FederationConfig(rounds=1, weights={"a": weight})


@pytest.mark.parametrize("cls", [AdapterConfig, FederationConfig, Privacy, TrainConfig])
def test_settings_do_not_change_once_they_are_made(cls: type):
    settings = make(cls)
    with pytest.raises(FrozenInstanceError):
        setattr(settings, next(iter(cls.__dataclass_fields__)), 1)


def test_ranks_alphas_and_overrides_make_each_clients_adapter():
    clients = ClientsRecipe(ranks=[8, 4], alpha_over_rank=3.0, dropout=0.25, rslora=True)
    adapters = [clients.adapter(f"c{index}", index) for index in range(3)]
    assert [(one.rank, one.alpha, one.dropout, one.use_rslora) for one in adapters] == [
        (8, 24.0, 0.25, True),
        (4, 12.0, 0.25, True),
        (8, 24.0, 0.25, True),
    ]
    assert ClientsRecipe(ranks=[8], alpha=5.0).adapter("a", 0).alpha == 5.0
    for fields, words in (
        (dict(ranks=[]), "ranks must have at least one rank"),
        (dict(names=["a", "b", "a"]), "names must differ, got 'a' twice"),
        (dict(names=["a", "b"], count=3), "count must be 2, the number of names, got 3"),
        (dict(ranks=[-1]), "ranks must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            ClientsRecipe(**fields)  # pyright: ignore[reportArgumentType]
    assert ClientsRecipe(names=["a", "b"], count=2).count == 2


def test_what_is_held_out_fits_the_data(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "p.json").write_text("{}")
    path, file = str(tmp_path / "a.jsonl"), str(tmp_path / "p.json")
    DataRecipe(path={"a": path}, hold_out="client")
    DataRecipe(path=path, hold_out="pool")
    DataRecipe(path=path, hold_out="client")
    DataRecipe(path=path, partitions=file, split="s")
    for fields, words in (
        (dict(path=path, hold_out="client", test=path), "hold_out=client holds out records of path, and test gives"),
        (dict(hold_out="pool"), "hold_out=pool: the demo has held-out data of its own"),
        (
            dict(path={"a": path}, hold_out="pool"),
            "the clients' records lie apart from each other; use hold_out=client",
        ),
        (dict(path=path, partitions=file, hold_out="pool"), "lie apart from each other"),
        (dict(path=path, split="s"), "split needs partitions"),
    ):
        with pytest.raises(ValueError, match=words):
            DataRecipe(**fields)  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError, match=r"missing\.json does not exist"):
        DataRecipe(path=path, partitions=str(tmp_path / "missing.json"))


def test_the_nearest_path_is_named_before_the_others():
    with pytest.raises(ValueError, match=r"unknown key 'federation\.round'; did you mean 'federation\.rounds'\?$"):
        loading.hint_at(Recipe, "federation.round")
    with pytest.raises(ValueError, match=r"unknown key 'rounds'; did you mean 'federation\.rounds'\?$"):
        loading.hint_at(Recipe, "rounds")
    with pytest.raises(ValueError, match=r"unknown key 'zzz'; known: .*clients, data"):
        loading.hint_at(Recipe, "zzz")


@pytest.mark.parametrize(
    ("hint", "value", "wanted"),
    [
        (int, "3", "a whole number"),
        (int, True, "a whole number"),
        (int, 2.0, "a whole number"),
        (float, "x", "a number"),
        (float, True, "a number"),
        (bool, 1, "true or false"),
        (str, 1, "text"),
        (int | None, "x", r"a whole number or nothing \(null\)"),
        (list[int], 3, "a list"),
        (tuple[float, float], [1.0], "a list of 2 values"),
        (dict[str, int], [1], "a mapping"),
        (ClientsRecipe, [1], "a mapping"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_wanted_one(hint: Any, value: Any, wanted: str):
    with pytest.raises(TypeError, match=f"train.key must be {wanted}, got "):
        loading.convert(hint, value, "train.key")


@pytest.mark.parametrize(
    ("hint", "value", "read"),
    [
        (float, "1e-3", 1e-3),
        (float, 2, 2.0),
        (float | str, "1e-3", 1e-3),
        (int | float, 3, 3),
        (str | int, 3, 3),
        (int | None, None, None),
        (Path, "a/b", Path("a/b")),
        (list[int], (1, 2), [1, 2]),
        (tuple[float, float], [1, "2"], (1.0, 2.0)),
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (dict[str, float], {1: "2"}, {"1": 2.0}),
        (list, [1, "a"], [1, "a"]),
    ],
)
def test_a_value_is_read_as_its_type(hint: Any, value: Any, read: Any):
    found = loading.convert(hint, value, "key")
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("FedAvg", "fedit"),
        ("zero-padding", "zero_pad"),
        ("FFA-LoRA", "ffa"),
        ("stacking", "flora"),
        ("hetlor", "hetlora"),
    ],
)
def test_an_unknown_strategy_names_the_one_that_is_meant(word: str, meant: str):
    assert f"unknown strategy {word!r}; did you mean {meant!r}? known: fedex, " in str(
        unknown_strategy(word, STRATEGY_NAMES)
    )
    assert "did you mean" not in str(unknown_strategy("zzzzzz", STRATEGY_NAMES))
