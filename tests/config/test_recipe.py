"""Recipes: what they read, what overrides change, and what every mistake says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flora_core.config import recipe as recipes
from flora_core.config.federation import FederationConfig
from flora_core.config.recipe import Recipe, load
from flora_core.data.splits import split as split_data
from flora_core.runs.build import build_clients
from flora_core.runs.loading import model_folder
from flora_core.runs.recipe import load_recipe

MINIMAL = "model: smollm2-135m-instruct\nfederation: {rounds: 2}\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path):
    return write(tmp_path / "mine.yaml", MINIMAL)


def records(path: Path, count: int, **columns) -> Path:
    """Write `count` alpaca records; a column is a function of the record's number."""
    rows = [
        {"id": i, "instruction": f"say {i}", "output": str(i), **{key: make(i) for key, make in columns.items()}}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# What a recipe holds.


@pytest.mark.parametrize("name", sorted(recipes.packaged_recipes()))
def test_packaged_recipes_are_valid(name, tmp_path):
    data = records(tmp_path / "data.jsonl", 4)
    assert load(name, [f"data={data}"]).model == "smollm2-135m-instruct"


def test_quickstart_is_the_demo_that_the_readme_describes():
    recipe = load("quickstart")
    assert recipe.data.path == "demo"
    assert recipe.clients.ranks == [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
    adapters = [recipe.clients.adapter(f"client-{i}", i) for i in range(10)]
    assert all(adapter.alpha == 2 * adapter.rank for adapter in adapters)
    assert (recipe.strategy, recipe.federation.rounds, recipe.target_modules) == ("flora", 3, ["q_proj", "v_proj"])


def test_the_seed_and_out_of_the_run_hold_for_its_parts(recipe_file):
    recipe = load(recipe_file, ["seed=7"])
    assert (recipe.train.seed, recipe.federation.seed) == (7, 7)
    assert (recipe.out, str(recipe.federation.out)) == ("runs/mine", "runs/mine")
    assert load(recipe_file, ["seed=7", "train.seed=3"]).train.seed == 3


def test_ranks_are_dealt_in_turn_and_overrides_win(tmp_path):
    text = MINIMAL + (
        "clients:\n  ranks: [8, 4]\n  dropout: 0.1\n  rslora: true\n"
        "  overrides: {b: {adapter: {rank: 2, dropout: 0}, train: {lr: 1e-2}}}\n"
    )
    clients = load(write(tmp_path / "r.yaml", text)).clients
    found = [clients.adapter(name, i) for i, name in enumerate("abc")]
    assert [(a.rank, a.alpha, a.dropout, a.use_rslora) for a in found] == [
        (8, 16, 0.1, True), (2, 4, 0, True), (8, 16, 0.1, True)]  # fmt: skip
    assert clients.overrides["b"].train == {"lr": 1e-2}


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.lr=1e-3", lambda r: r.train.lr, 1e-3),  # YAML 1.1 reads 1e-3 as text
        ("train.betas=[0.8, 0.9]", lambda r: r.train.betas, (0.8, 0.9)),
        ("train.max_steps=null", lambda r: r.train.max_steps, None),
        ("train.keep_optimizer=true", lambda r: r.train.keep_optimizer, True),
        ("clients.count=4", lambda r: r.clients.count, 4),
        ("clients.ranks=[3,5]", lambda r: r.clients.ranks, [3, 5]),
        ("clients.overrides.a.train.lr=0.5", lambda r: r.clients.overrides["a"].train, {"lr": 0.5}),
        ("federation.rounds=1", lambda r: r.federation.rounds, 1),
        ("federation.weights={a: 1, b: 2.5}", lambda r: r.federation.weights, {"a": 1, "b": 2.5}),
        ("target_modules=.*_proj", lambda r: r.target_modules, ".*_proj"),
        ("target_modules=[q_proj]", lambda r: r.target_modules, ["q_proj"]),
        ("out=2024", lambda r: r.out, "2024"),
        ("out=a=b", lambda r: r.out, "a=b"),
    ],
)
def test_overrides_change_one_value(recipe_file, override, read, value):
    assert read(load(recipe_file, [override])) == value


def test_strategy_options_are_those_of_the_strategy(recipe_file):
    chosen = load_recipe(recipe_file, ["strategy=flora_svd", "federation.strategy_options.tau=0.9"])
    assert chosen.federation.strategy_options == {"tau": 0.9}
    for options, words in (
        ("{tau: 0.9}", r"strategy 'flora' has no option 'tau'; known: none"),
        ("{tua: 0.9}", r"no option 'tua'; did you mean 'tau'"),
        ("{tau: 0}", r"tau must be above 0 and at most 1, got 0"),
    ):
        strategy = "flora" if "known" in words else "flora_svd"
        with pytest.raises(ValueError, match=words):
            load_recipe(recipe_file, [f"strategy={strategy}", f"federation.strategy_options={options}"])


# What mistakes say.


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (MINIMAL + "train: {learning_rate: 1}", ValueError, r"mine\.yaml: unknown key 'train\.learning_rate'"),
        (MINIMAL + "train: {batchsize: 1}", ValueError, r"did you mean 'train\.batch_size'"),
        (MINIMAL + "strateg: flora", ValueError, r"unknown key 'strateg'; did you mean 'strategy'"),
        (MINIMAL + "clients: {rank: [1]}", ValueError, r"did you mean 'clients\.ranks'"),
        (MINIMAL + "clients: {overrides: {a: {adapter: {rnk: 1}}}}", ValueError, r"overrides\.a.*did you mean 'rank'"),
        (MINIMAL + "train: {lr: fast}", TypeError, r"train\.lr must be a number, got 'fast' \(str\)"),
        (MINIMAL + "train: {batch_size: 1.5}", TypeError, r"train\.batch_size must be a whole number, got 1\.5"),
        (MINIMAL + "train: {batch_size: true}", TypeError, r"train\.batch_size must be a whole number, got True"),
        (MINIMAL + "train: {betas: [0.9]}", TypeError, r"train\.betas must be a list of 2 values"),
        (MINIMAL + "train: {lr: -1}", ValueError, r"mine\.yaml: train: lr must be at least 0"),
        (MINIMAL + "train: [1]", TypeError, r"train must be a mapping"),
        (MINIMAL + "clients: {ranks: [8, x]}", TypeError, r"clients\.ranks\[1\] must be a whole number, got 'x'"),
        (MINIMAL + "clients: {ranks: []}", ValueError, r"ranks must have at least one rank"),
        (MINIMAL + "clients: {ranks: [-1]}", ValueError, r"ranks must be at least 0, got -1"),
        (MINIMAL + "clients: {dropout: 1}", ValueError, r"dropout must be below 1"),
        (MINIMAL + "clients: {names: [a, a]}", ValueError, r"names must differ, got 'a' twice"),
        (MINIMAL + "clients: {names: [a], count: 2}", ValueError, r"count must be 1, the number of names, got 2"),
        (MINIMAL + "data: {partition: random}", TypeError, r"data\.partition must be iid \| shard \| dirichlet"),
        (MINIMAL + "data: nowhere.jsonl", FileNotFoundError, r"data: data file nowhere\.jsonl does not exist"),
        (MINIMAL + "data: {split: a}", ValueError, r"split needs partitions"),
        (MINIMAL + "data: {test_fraction: 1}", ValueError, r"test_fraction must be between 0 and 0\.9"),
        (MINIMAL + "target_modules: []", ValueError, r"target_modules must name at least one layer"),
        (MINIMAL + "strategy: flroa", ValueError, r"unknown strategy 'flroa'; did you mean 'flora'\? known: fedex"),
        (MINIMAL + "seed: -1", ValueError, r"seed must be at least 0"),
        (MINIMAL + "seed: 1\nseed: 2", ValueError, r"line 4: key 'seed' is given twice"),
        ("model: x", ValueError, r"mine\.yaml: federation\.rounds is missing; add it"),
        ("federation: {rounds: 1}", ValueError, r"mine\.yaml: model is missing; add it"),
        ("", ValueError, r"must hold a mapping of keys to values; it is empty"),
        ("- a\n", ValueError, r"must hold a mapping of keys to values"),
        ("a: [", ValueError, r"malformed YAML"),
    ],
)
def test_mistakes_in_a_file_name_the_file_and_the_key(tmp_path, text, error, words):
    with pytest.raises(error, match=words):
        load(write(tmp_path / "mine.yaml", text))


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("trian.lr=1", ValueError, r"override 'trian\.lr=1': unknown key 'trian\.lr'; did you mean 'train\.lr'"),
        ("lr=1", ValueError, r"unknown key 'lr'; did you mean 'train\.lr'\?"),
        ("federation.lr=1", ValueError, r"unknown key 'federation\.lr'; did you mean 'train\.lr'\?"),
        ("zzz=1", ValueError, r"unknown key 'zzz'; known: clients, data, device"),
        ("train.lr.x=1", ValueError, r"unknown key 'train\.lr\.x'"),
        ("train.lr=fast", TypeError, r"override 'train\.lr=fast': the value must be a number, got 'fast'"),
        ("train.lr", ValueError, r"must read key=value"),
        ("=3", ValueError, r"must read key=value"),
        ("clients.ranks=[1", ValueError, r"malformed value"),
        ("data=missing.jsonl", FileNotFoundError, r"missing\.jsonl does not exist"),
    ],
)
def test_mistakes_in_an_override_name_it(recipe_file, override, error, words):
    with pytest.raises(error, match=words):
        load(recipe_file, [override])


def test_an_unknown_recipe_lists_those_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml does not exist.*quickstart"):
        load(tmp_path / "nothing.yaml")


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load(tmp_path / "r.yaml")


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(FileNotFoundError, match=r"model \./nowhere is not a folder"):
        model_folder("./nowhere")
    assert model_folder("owner/name") == "owner/name"


# What the data become.


def recipe_on(recipe_file: Path, data: Path | str, *overrides: str) -> Recipe:
    return load(recipe_file, [f"data={data}", *overrides])


def split_of(recipe: Recipe) -> tuple[dict[str, list[dict]], list[dict]]:
    """The training records of each client and the held-out ones, as plain dicts."""
    split = split_data(recipe)
    train = {name: [dict(record) for record in part] for name, part in split.train.items()}
    return train, [dict(record) for record in split.held_out]


def test_one_file_is_split_without_loss_or_overlap(recipe_file, tmp_path):
    recipe = recipe_on(recipe_file, records(tmp_path / "d.jsonl", 50), "clients.count=4")
    parts, test_records = split_of(recipe)
    ids = [record["id"] for part in [*parts.values(), test_records] for record in part]
    assert sorted(ids) == list(range(50))
    assert (len(parts), len(test_records)) == (4, 5)
    assert split_of(recipe) == (parts, test_records)
    assert split_of(recipe_on(recipe_file, tmp_path / "d.jsonl", "clients.count=4", "seed=1")) != (
        parts,
        test_records,
    )


def test_numbers_are_cut_down_and_names_given(recipe_file, tmp_path):
    recipe = recipe_on(recipe_file, records(tmp_path / "d.jsonl", 60), "clients.names=[a, b]", "data.per_client=5",
                       "data.test_items=3")  # fmt: skip
    parts, test_records = split_of(recipe)
    assert {name: len(part) for name, part in parts.items()} == {"a": 5, "b": 5}
    assert len(test_records) == 3


def test_a_test_file_is_held_out_and_all_else_trains(recipe_file, tmp_path):
    test = records(tmp_path / "t.jsonl", 4)
    recipe = recipe_on(recipe_file, records(tmp_path / "d.jsonl", 10), "clients.count=2", f"data.test={test}")
    parts, test_records = split_of(recipe)
    assert (sum(map(len, parts.values())), len(test_records)) == (10, 4)


def test_one_file_per_client(recipe_file, tmp_path):
    files = {name: str(records(tmp_path / f"{name}.jsonl", 10)) for name in ("x", "y")}
    recipe = load(recipe_file, [f"data.path={json.dumps(files)}", "data.test_fraction=0.2"])
    parts, test_records = split_of(recipe)
    assert {name: len(part) for name, part in parts.items()} == {"x": 8, "y": 8}
    assert len(test_records) == 4


def test_natural_clients_come_from_their_column(recipe_file, tmp_path):
    data = records(tmp_path / "d.jsonl", 30, client=lambda i: f"site-{i % 3}")
    recipe = recipe_on(recipe_file, data, "data.partition=natural", "data.test_fraction=0")
    assert {name: len(part) for name, part in split_of(recipe)[0].items()} == {f"site-{i}": 10 for i in range(3)}


def test_a_partition_file_says_who_has_what(recipe_file, tmp_path):
    data = records(tmp_path / "d.jsonl", 9)
    file = write(tmp_path / "p.json", json.dumps({"s": {"0": [0, 1, 2], "1": [5, 3], "test": [8]}, "u": {}}))
    recipe = recipe_on(recipe_file, data, f"data.partitions={file}", "data.split=s")
    parts, test_records = split_of(recipe)
    assert {name: [r["id"] for r in part] for name, part in parts.items()} == {"0": [0, 1, 2], "1": [5, 3]}
    assert [record["id"] for record in test_records] == [8]
    with pytest.raises(ValueError, match="has no split ''; known: s, u"):
        split_data(recipe_on(recipe_file, data, f"data.partitions={file}"))
    with pytest.raises(ValueError, match=r"asks for 3 clients, and the data has 2 \(0, 1\); lower it"):
        split_data(recipe_on(recipe_file, data, f"data.partitions={file}", "data.split=s", "clients.count=3"))


def test_clients_carry_their_adapter_records_and_overrides(recipe_file, tmp_path):
    data = records(tmp_path / "d.jsonl", 20)
    more = ["clients.names=[a, b]", "clients.ranks=[8, 4]", "clients.overrides.b.train.lr=0.5"]
    clients, _ = build_clients(recipe_on(recipe_file, data, *more))
    assert [(c.name, c.adapter.rank, c.adapter.alpha, c.train) for c in clients] == [
        ("a", 8, 16, None), ("b", 4, 8, {"lr": 0.5})]  # fmt: skip
    with pytest.raises(ValueError, match="names 'c', which is not a client; known: a, b"):
        build_clients(recipe_on(recipe_file, data, *more, "clients.overrides.c.train.lr=1"))


def test_the_demo_makes_its_own_data(recipe_file):
    recipe = load(recipe_file, ["clients.count=3", "data.per_client=6", "data.test_items=10"])
    parts, test_records = split_of(recipe)
    assert [len(part) for part in parts.values()] == [6, 6, 6]
    assert len(test_records) == 10


def test_real_data_trains_by_its_partition(shared_data):
    folder = shared_data / "dolly"
    if not folder.is_dir():
        pytest.skip("needs the dolly data set beside the checkout")
    recipe = load("quickstart", [f"data={folder / 'dolly15k.jsonl'}", f"data.partitions={folder / 'partitions.json'}",
                                 "data.split=dirichlet05_10"])  # fmt: skip
    parts, test_records = split_of(recipe)
    assert (len(parts), len(test_records)) == (10, min(80, recipe.data.test_items or 80))


# Sections on the command line.

SECTIONS = (
    MINIMAL + "train: {lr: 0.1, batch_size: 3}\ndata: {path: {z: z.jsonl}, test_fraction: 0.2}\n"
    "clients: {ranks: [4], overrides: {a: {adapter: {rank: 2}, train: {lr: 0.5, batch_size: 2}}}}\n"
)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train={lr: 1}", lambda r: (r.train.lr, r.train.batch_size), (1, 3)),
        ("train={}", lambda r: (r.train.lr, r.train.batch_size), (3e-4, 4)),
        ("data={path: demo}", lambda r: (r.data.path, r.data.test_fraction), ("demo", 0.2)),
        ("data={a: a.jsonl}", lambda r: (r.data.path, r.data.test_fraction), ({"a": "a.jsonl"}, 0.2)),
        ("data.path={a: a.jsonl}", lambda r: r.data.path, {"a": "a.jsonl"}),
        ("federation={eval_every: 2}", lambda r: (r.federation.rounds, r.federation.eval_every), (2, 2)),
        (
            "clients={overrides: {a: {train: {lr: 1}}}}",
            lambda r: (r.clients.ranks, r.clients.overrides["a"].train, r.clients.overrides["a"].adapter),
            ([4], {"lr": 1, "batch_size": 2}, {"rank": 2}),
        ),
        ("clients.overrides.a.train={lr: 1}", lambda r: r.clients.overrides["a"].train, {"lr": 1, "batch_size": 2}),
        ("clients.overrides={St. B: {adapter: {rank: 1}}}", lambda r: sorted(r.clients.overrides), ["St. B", "a"]),
        ("federation.weights.a=3", lambda r: r.federation.weights, {"a": 3, "b": 2}),
        ("federation.weights={a: 3}", lambda r: r.federation.weights, {"a": 3}),
        ("clients.overrides={}", lambda r: r.clients.overrides, {}),
        (
            "federation={weights: uniform, privacy: {clip: 1, noise_multiplier: 2}}",
            lambda r: (r.federation.privacy.clip, r.federation.privacy.noise_multiplier),
            (1, 2),
        ),
    ],
)
def test_a_section_changes_the_keys_that_it_names(tmp_path, override, read, value):
    text = SECTIONS.replace("rounds: 2", "rounds: 2, weights: {a: 1, b: 2}")
    assert read(load(write(tmp_path / "r.yaml", text), [override])) == value


@pytest.mark.parametrize(
    "overrides",
    [
        ("train={lr: 1}", "train.lr=2"),
        ("train.lr=2", "train={lr: 1}"),
        ("train={lr: 1}", "train={lr: 1}"),
        ("train.lr=2", "train={}"),
        ("data=demo", "data={path: demo}"),
        ("clients={overrides: {a: {train: {lr: 1}}}}", "clients.overrides.a.train.lr=2"),
    ],
)
def test_refuses_a_key_that_is_given_on_its_own_and_in_a_section(tmp_path, overrides):
    with pytest.raises(ValueError, match=r"is given twice: .*; give it once"):
        load(write(tmp_path / "r.yaml", SECTIONS), overrides)


def test_takes_different_keys_of_a_section_from_several_overrides(tmp_path):
    recipe = load(write(tmp_path / "r.yaml", SECTIONS), ["train={lr: 1}", "train.batch_size=7", "train={eps: 1e-6}"])
    assert (recipe.train.lr, recipe.train.batch_size, recipe.train.eps) == (1, 7, 1e-6)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "clients.overrides={a: {rank: 4}}",
            r"unknown key 'clients\.overrides\.a\.rank'; did you mean 'cl.*a\.adapter\.rank'",
        ),
        (
            "clients.overrides={a: {lr: 4}}",
            r"override 'cl.*: unknown key .*did you mean 'clients\.overrides\.a\.train\.lr'",
        ),
        ("train={lrr: 4}", r"override 'train={lrr: 4}': unknown key 'train\.lrr'; did you mean 'train\.lr'"),
        ("data={path: x, alhpa: 1}", r"unknown key 'data\.alhpa'; did you mean 'data\.alpha'"),
    ],
)
def test_names_an_unknown_key_of_a_section(tmp_path, override, words):
    with pytest.raises(ValueError, match=words):
        load(write(tmp_path / "r.yaml", SECTIONS), [override])


def test_names_the_key_that_a_client_override_lacks_in_a_file(tmp_path):
    text = MINIMAL + "clients: {overrides: {a: {rank: 4}}}"
    with pytest.raises(
        ValueError, match=r"r\.yaml: unknown key 'clients.overrides.a.rank'; did you mean '.*adapter\.rank'"
    ):
        load(write(tmp_path / "r.yaml", text))


def test_a_configuration_names_the_field_that_is_missing():
    with pytest.raises(TypeError, match=r"FederationConfig needs rounds; add rounds=\.\.\."):
        FederationConfig(save_dtype="base")  # pyright: ignore[reportCallIssue]
