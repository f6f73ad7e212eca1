"""The dtype of the saved model: as it is held, as its checkpoint has it, or as one likes, with what rounding costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import flora_core as flora
from flora_core.federation.model_card import model_card
from flora_core.runs.progress import sentence
from flora_core.runs.saving import converted, dtype_to_save
from flora_core.runs.summary import History, summary_tables
from tests.support.federations import files, make_federation, make_model, no_training


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model of bfloat16 on disk, held in another dtype, as on a CPU."""
    make_model(torch.bfloat16).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def run(out: Path, model: Any, **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[dict[str, Any]]]:
    """The saved tensors, the saved configuration and the events of a run of one round."""
    result = make_federation(out, model=model, rounds=1, **changes).run()
    config = json.loads((out / "model/config.json").read_text())
    return load_file(out / "model/model.safetensors"), config, result.events


def test_saves_a_16_bit_base_in_16_bits_where_that_is_asked(tmp_path: Path):
    model = loaded(tmp_path / "base")
    exact, config, events = run(tmp_path / "as_held", model)
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert config["dtype"] == "float32"
    assert not any(event["event"] == "converted" for event in events)
    saved, config, events = run(tmp_path / "as_base", loaded(tmp_path / "base"), save_dtype="base")
    assert config["dtype"] == "bfloat16"
    assert all(torch.equal(saved[name], tensor.bfloat16()) for name, tensor in exact.items())
    (event,) = [event for event in events if event["event"] == "converted"]
    off = sum(float((saved[name].double() - tensor.double()).square().sum()) for name, tensor in exact.items())
    size = sum(float(tensor.double().square().sum()) for tensor in exact.values())
    assert event["rounding_error"] == pytest.approx((off / size) ** 0.5, rel=1e-6)
    assert 0 < event["rounding_error"] < 2**-9
    assert event["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "as_base/model", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert (tmp_path / "as_base/model/model.safetensors").stat().st_size < 0.7 * (
        tmp_path / "as_held/model/model.safetensors"
    ).stat().st_size


def test_the_model_in_memory_keeps_its_dtype(tmp_path: Path):
    model = make_model()
    make_federation(tmp_path, model=model, rounds=1, save_dtype="float16").run()
    assert model.dtype == torch.float32
    assert str(model.config.dtype).endswith("float32")


@pytest.mark.parametrize("strategy", ["flora", "flexlora"])
def test_widens_without_an_error(strategy: str, tmp_path: Path):
    held, _, _ = run(tmp_path / "held", make_model(torch.bfloat16), strategy=strategy)
    wide, config, events = run(tmp_path / "wide", make_model(torch.bfloat16), strategy=strategy, save_dtype="float32")
    assert config["dtype"] == "float32"
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in held.items())
    assert next(event for event in events if event["event"] == "converted")["rounding_error"] == 0


def test_leaves_what_has_that_dtype_already_alone(tmp_path: Path):
    assert dtype_to_save("float32", make_model()) is None
    assert dtype_to_save("base", loaded(tmp_path, torch.bfloat16)) is None


def test_says_what_it_cannot_find_out_before_training(tmp_path: Path):
    with pytest.raises(ValueError, match=r"save_dtype='base' needs a model that was loaded from a checkpoint; give"):
        make_federation(tmp_path / "run", callbacks=[no_training], save_dtype="base")
    model = make_model()
    model.config._name_or_path = str(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"save_dtype='base': .*gone cannot be read again \(.*such as bfloat16"):
        make_federation(tmp_path / "run", model=model, save_dtype="base")
    with pytest.raises(ValueError, match=r"save_dtype must be one of auto, base, .* got 'bf16'"):
        flora.FederationConfig(rounds=1, save_dtype="bf16")  # pyright: ignore


def test_shared_tensors_stay_shared_and_those_kept_in_float32_stay_so():
    model = make_model()
    model._keep_in_fp32_modules_strict = {"norm"}
    model.lm_head.weight = model.model.embed_tokens.weight
    state, _ = converted(model.state_dict(), model, torch.bfloat16)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert {name for name, tensor in state.items() if tensor.dtype == torch.float32} == {"model.norm.weight"}


def large_model() -> Any:
    """A model with a weight that float16 cannot hold."""
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    return model


def test_refuses_numbers_that_the_dtype_cannot_hold(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.norm\.weight has numbers that torch\.float16 cannot hold: the run"):
        make_federation(tmp_path, model=large_model(), rounds=1, save_dtype="float16").run()
    saved, _, _ = run(tmp_path, large_model(), callbacks=[no_training], save_dtype="bfloat16")
    assert float(saved["model.norm.weight"].max()) > 65504


def test_a_finished_run_that_is_asked_for_another_dtype_saves_its_model_anew(tmp_path: Path):
    exact, _, _ = run(tmp_path, make_model())
    rounds = files(tmp_path / "rounds", "")
    saved, config, _ = run(tmp_path, make_model(), callbacks=[no_training], save_dtype="bfloat16")
    assert config["dtype"] == "bfloat16"
    assert all(torch.equal(saved[name], tensor.bfloat16()) for name, tensor in exact.items())
    assert files(tmp_path / "rounds", "") == rounds
    told: list[Any] = []
    run(tmp_path, make_model(), callbacks=[told.append], save_dtype="bfloat16")
    assert [event["event"] for event in told] == ["warning"], "it is as it was asked for"


def test_report_and_card_give_the_rounding_error(tmp_path: Path):
    federation = make_federation(tmp_path, rounds=1, save_dtype="bfloat16")
    events = federation.run().events
    history = History.of(events)
    (total,) = [table for table in summary_tables(history) if table[0] == "The whole run"]
    (row,) = [row for row in total[2] if row[0] == "rounding to bfloat16, saved"]
    assert 0 < float(row[1]) < 2**-9
    card = (tmp_path / "model/README.md").read_text()
    assert "Saved in bfloat16, after the evaluation below: rounding changed the weights by 1." in card
    of_run = (federation.model, federation.setup.tokenizer, "flora", federation.config, federation.setup.train)
    assert card == model_card(*of_run, events)
    assert "saving the model as bfloat16: rounding changes it by 1." in str(sentence(history.converted))
