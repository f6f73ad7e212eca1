"""Adapters know the base that they were trained on, and are refused on another one."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import flora_core as flora
from flora_core.adapters.base import Base, check_base, values_of
from flora_core.adapters.peft import RECORD, read_base
from flora_core.adapters.update import packed, unpacked
from tests.support.federations import make_federation, make_model, target_weights

SHAPE = (96, 64)


def weight(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def base_of(tensor: torch.Tensor) -> Base:
    return Base("m", 0, values_of([("q", tensor)]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_small_change_of_rank_one_is_another_base(dtype):
    first, base = weight(dtype), base_of(weight(dtype))
    assert base.distance(lambda _: first) == 0
    change = 1e-3 * torch.outer(torch.ones(SHAPE[0]), torch.ones(SHAPE[1]))
    with pytest.raises(ValueError, match="adapter x was trained on 'm' itself, and y is another base"):
        check_base(base, lambda _: (first.double() + change).to(dtype), "adapter x", "y")


def test_the_last_bit_of_a_float32_sum_is_the_same_base():
    first = weight()
    other = torch.nextafter(first, torch.full_like(first, torch.inf))
    found = base_of(first).compare(lambda _: other)
    assert found.distance > 0
    assert found.same


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_a_file_does_not_matter(trained):
    stored = weight(torch.bfloat16 if trained is torch.float32 else torch.float32)
    assert base_of(stored.to(trained)).distance(lambda _: stored) == 0


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
def test_a_base_that_was_saved_in_fewer_bits_is_the_same_and_a_changed_one_is_not(coarse):
    base = base_of(weight())
    check_base(base, lambda _: weight().to(coarse), "adapter x", "y")
    change = 1e-3 * torch.outer(torch.ones(SHAPE[0]), torch.ones(SHAPE[1]))
    with pytest.raises(ValueError, match="y is another base"):
        check_base(base, lambda _: (weight() + change).to(coarse), "adapter x", "y")
    with pytest.raises(ValueError, match="adapter x was trained on a base that it does not name, and y is another"):
        check_base(replace(base, name=None), lambda _: weight(seed=1), "adapter x", "y")


def test_one_value_in_a_thousand_may_round_the_other_way_in_bfloat16():
    first = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    base = Base("m", 0, {name: values_of([(name, first)])[name] for name in "abcd"})
    flipped = first.clone()
    flipped[0, 0] += torch.finfo(torch.bfloat16).eps
    assert base.compare(lambda name: flipped if name == "a" else first).same
    assert not base.compare(lambda name: flipped + flipped[0, 0] * 0.01).same


def test_values_are_taken_from_all_columns():
    first = torch.zeros(512, 64)
    first[:] = torch.arange(64.0)
    assert len(values_of([("q", first)])["q"].unique()) == 64


def test_only_the_original_base_has_a_name_that_can_be_loaded():
    assert (Base(), Base().label) == (Base(None, 0, {}), None)
    assert Base("owner/name").label == "owner/name"
    assert Base("owner/name", 1).label == "the base after round 1 of a run on owner/name, see README.md"
    assert Base(None, 2).label == "the base after round 2 of a run on a base without a name, see README.md"
    with pytest.raises(FrozenInstanceError):
        Base().round = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        ({"name": "m"}, torch.ones(2)),
        ({"name": "m", "round": 0, "more": 1}, torch.ones(2)),
        ({"name": 3, "round": 0}, torch.ones(2)),
        ({"name": "m", "round": True}, torch.ones(2)),
        ({"name": "m", "round": 0.0}, torch.ones(2)),
        (["name", "round"], torch.ones(2)),
        ({"name": "m", "round": 0}, torch.ones(2, 2)),
        ({"name": "m", "round": 0}, torch.ones(2, dtype=torch.int64)),
        ({"name": "m", "round": 0}, [1.0]),
    ],
)
def test_refuses_a_record_of_another_form(record, kept):
    assert Base.from_json({"name": None, "round": 2}, {"q": torch.ones(2)}).round == 2
    with pytest.raises(
        ValueError, match=r"the file(: 'q' must be values of a weight| must hold name and round).*copy it"
    ):
        Base.from_json(record, {"q": kept}, "the file")


def test_a_record_travels_with_the_adapter(tmp_path):
    update = flora.ClientUpdate("a", {"q": (torch.ones(2, 64), torch.ones(2, 96))}, {"q": 1.0})
    update = replace(update, trained_on=replace(base_of(weight()), round=3))
    flora.save_peft_adapter(update, tmp_path / "a")
    for found in (flora.load_peft_adapter(tmp_path / "a").trained_on, unpacked(packed(update)).trained_on):
        assert found is not None
        assert (found.name, found.round) == ("m", 3)
        assert found.distance(lambda _: weight()) == 0
    flora.save_peft_adapter(replace(update, trained_on=None), tmp_path / "a")
    assert read_base(tmp_path / "a") is None


def test_a_damaged_record_is_refused_by_its_file(tmp_path):
    update = flora.ClientUpdate("a", {"q": (torch.ones(2, 64), torch.ones(2, 96))}, {"q": 1.0})
    flora.save_peft_adapter(replace(update, trained_on=base_of(weight())), tmp_path / "a")
    path = tmp_path / "a" / RECORD
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=RECORD):
        flora.load_peft_adapter(tmp_path / "a")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rounds of flora on a saved base."""
    folder = tmp_path_factory.mktemp("run")
    make_model().save_pretrained(folder / "base")
    model = type(make_model()).from_pretrained(folder / "base")
    make_federation(folder / "out", model=model).run()
    return folder


def test_adapters_of_a_later_round_are_refused_on_the_original_base(run, tmp_path):
    first, second = ({str(run / f"out/rounds/000{number}/{name}"): 1 for name in "abc"} for number in (1, 2))
    with pytest.raises(ValueError, match=r"as round 1 of its run left it.*`flora adapter RUN --round"):
        flora.merge_into_checkpoint(run / "base", second, tmp_path / "wrong")
    with pytest.raises(ValueError, match="is another base"):
        flora.export_adapter(run / "base", second, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    first = dict(zip(first, (5, 6, 7), strict=True))
    flora.merge_into_checkpoint(run / "base", first, tmp_path / "one")
    second = dict(zip(second, (5, 6, 7), strict=True))
    flora.export_adapter(tmp_path / "one", second, tmp_path / "stack")
    stack = flora.load_peft_adapter(tmp_path / "stack")
    assert stack.base == str(tmp_path / "one")
    with pytest.raises(ValueError, match="is another base"):
        flora.merge_into_checkpoint(run / "base", {str(tmp_path / "stack"): 1}, tmp_path / "wrong")
    flora.merge_into_checkpoint(tmp_path / "one", second, tmp_path / "two")
    with pytest.raises(ValueError, match=r"itself, and .* is another base"):
        flora.merge_into_checkpoint(tmp_path / "one", first, tmp_path / "again")


def test_a_model_is_compared_before_an_adapter_is_merged_into_it(run):
    model = type(make_model()).from_pretrained(run / "base")
    later = flora.load_peft_adapter(run / "out/rounds/0002/a")
    before = target_weights(model)
    with pytest.raises(ValueError, match="any_base=True"):
        flora.merge_adapter_(model, later)
    assert all(torch.equal(old, target_weights(model)[name]) for name, old in before.items())
    flora.merge_adapter_(model, flora.load_peft_adapter(run / "out/rounds/0001/a"))
    flora.merge_adapter_(model, later, any_base=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_config_of_a_later_round_names_no_base_that_can_be_loaded(run):
    from peft import AutoPeftModelForCausalLM

    assert flora.load_peft_adapter(run / "out/rounds/0001/a").base == str(run / "base")
    AutoPeftModelForCausalLM.from_pretrained(run / "out/rounds/0001/a")
    folder = run / "out/rounds/0002/a"
    with pytest.raises(OSError, match="the base after round 1 of a run on"):
        AutoPeftModelForCausalLM.from_pretrained(folder)
    assert "flora adapter RUN --round 2 --client a" in (folder / "README.md").read_text()
