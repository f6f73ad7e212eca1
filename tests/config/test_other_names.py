"""Settings by the names of other programs: an error that names ours."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import flora_core as flora
from flora_core.config import loading
from flora_core.config import recipe as recipes
from flora_core.config.other_names import ADAPTER_FIELDS, RECIPE_KEYS
from flora_core.config.recipe import Recipe, load
from flora_core.data.partition import partition

MINIMAL = "model: owner/name\nfederation: {rounds: 1}\n"


def recipe(tmp_path: Path, *overrides: str, text: str = "") -> Recipe:
    """A recipe of one's own."""
    (tmp_path / "r.yaml").write_text(MINIMAL + text)
    return load(tmp_path / "r.yaml", overrides)


def test_every_name_leads_to_a_key_that_is_there():
    assert set(RECIPE_KEYS.values()) <= set(loading.key_paths(Recipe))
    assert not set(RECIPE_KEYS) & set(loading.key_paths(Recipe))
    assert set(ADAPTER_FIELDS.values()) <= set(flora.AdapterConfig.__dataclass_fields__)


def override(**fields: Any) -> Any:
    """One client's training settings."""
    return flora.TrainConfig().overridden(fields)


@pytest.mark.parametrize(
    ("make", "fields", "words"),
    [
        (flora.AdapterConfig, {"r": 8}, "AdapterConfig has no field 'r'; did you mean 'rank'?"),
        (flora.AdapterConfig, {"rank": 8, "lora_alpha": 16}, "no field 'lora_alpha'; did you mean 'alpha'?"),
        (flora.AdapterConfig, {"rank": 8, "drpout": 0.1}, "no field 'drpout'; did you mean 'dropout'?"),
        (flora.TrainConfig, {"learning_rate": 1}, "TrainConfig has no field 'learning_rate'; did you mean 'lr'?"),
        (override, {"learning_rate": 1}, "unknown field 'learning_rate'; did you mean 'lr'?"),
        (flora.FederationConfig, {"num_rounds": 3}, "no field 'num_rounds'; did you mean 'rounds'?"),
    ],
)
def test_python_names_its_own_field(make: Any, fields: dict[str, Any], words: str):
    with pytest.raises((TypeError, ValueError)) as caught:
        make(**fields)
    assert words in str(caught.value)


def test_a_checked_class_keeps_its_signature_and_positions():
    assert list(inspect.signature(flora.AdapterConfig).parameters)[:3] == ["rank", "alpha", "dropout"]
    assert flora.AdapterConfig(4, 8) == flora.AdapterConfig(rank=4, alpha=8)


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("train.learning_rate=1", "train.lr"),
        ("learning_rate=1", "train.lr"),
        ("lora_alpha=16", "clients.alpha"),
        ("train.r=8", "clients.ranks"),
        ("num_clients=3", "clients.count"),
    ],
)
def test_a_recipe_names_its_own_key(override: str, ours: str, tmp_path: Path):
    key, _, value = override.partition("=")
    with pytest.raises(ValueError, match=rf"unknown key '{key}'; did you mean '{ours}'\?"):
        recipe(tmp_path, override)
    section, _, name = key.rpartition(".")
    text = f"{section}: {{{name}: {value}}}\n" if section else f"{key}: {value}\n"
    with pytest.raises(ValueError, match=rf"unknown key '{key}'; did you mean '{ours}'\?"):
        recipe(tmp_path, text=text)


def test_a_client_of_a_recipe_names_its_own_fields(tmp_path: Path):
    for key, ours in (("adapter: {r: 8}", "rank"), ("train: {learning_rate: 1}", "lr")):
        with pytest.raises(ValueError, match=rf"unknown key .*; did you mean '{ours}'\?"):
            recipe(tmp_path, text=f"clients: {{overrides: {{a: {{{key}}}}}}}\n")


def test_refuses_an_override_that_is_given_twice(tmp_path: Path):
    for twice in (("train.lr=1", "train.lr=2"), ("data=demo", "data.path=demo"), ("out=a", "seed=1", "out=a")):
        with pytest.raises(ValueError, match=rf"is given twice: '{twice[0]}' and '{twice[-1]}'; give it once"):
            recipe(tmp_path, *twice)
    assert recipe(tmp_path, "train.lr=1", "train.eps=1").train.lr == 1
    assert recipes.load(tmp_path / "r.yaml").train.lr != 1


def test_too_many_clients_name_the_recipe_s_key():
    records: Any = [{"instruction": str(i), "output": "x", "client": "a"} for i in range(3)]
    with pytest.raises(ValueError, match=r"40 clients need at least 40 examples .*in a recipe clients\.count"):
        partition(records, 40, "iid", seed=0)
    with pytest.raises(ValueError, match=r"names 1 clients, got num_clients=3; leave it out"):
        partition(records, 3, "natural", seed=0)
