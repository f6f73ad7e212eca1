"""A run's artefacts, loaded as their configs say, are the model that the run reports; any round is one adapter on its
base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import flora_core as flora
from flora_core.adapters.peft import load_peft_adapter, read_base, read_config
from flora_core.aggregation import STRATEGIES
from flora_core.cli.main import main
from flora_core.config.privacy import Privacy
from flora_core.federation import rebase
from flora_core.runs.folder import ROUNDS
from flora_core.runs.snapshot import ROUND, STATE, read_body
from tests.support.federations import make_clients, make_federation, make_model, make_records, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
HELD_OUT = make_records("b held out", 6)
# Every built-in one; the tests of other files register more.
NAMES = sorted(name for name, one in STRATEGIES.items() if type(one).__module__.startswith("flora_core."))
# Ranks are mixed where the strategy takes it. mixed: rsLoRA, one client trains fewer modules, two of three take part.
VARIANTS: dict[str, dict[str, Any]] = {"mixed": {"fraction": 0.7}, "bfloat16": {"dtype": torch.bfloat16}}


def clients_of(strategy: str, variant: str) -> list[flora.ClientSpec]:
    rule = STRATEGIES[strategy]
    clients = make_clients((4, 2, 3) if rule.mixed_ranks else (3, 3, 3), use_rslora=variant == "mixed")
    if variant == "mixed" and rule.mixed_modules:
        clients[1] = replace(clients[1], adapter=replace(clients[1].adapter, target_modules=["q_proj"]))
    return clients


def run(folder: Path, strategy: str = "flora", variant: str = "plain", **changes: Any) -> Any:
    """Three rounds on a base that lies on the disk; the result."""
    dtype = VARIANTS.get(variant, {}).get("dtype", torch.float32)
    make_model(dtype).save_pretrained(folder / "base")
    options = {name: value for name, value in VARIANTS.get(variant, {}).items() if name == "fraction"}
    options |= {"rounds": 3, "clients": clients_of(strategy, variant), "eval_data": HELD_OUT, **changes}
    return make_federation(folder / "out", model=load(folder / "base"), strategy=strategy, **options).run()


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def loss(model: Any) -> float:
    return flora.evaluate(model, make_tokenizer(), HELD_OUT, max_length=32)["loss"]


def loss_by_config(adapter: Path) -> float:
    """As peft loads an adapter when it is given nothing but its folder."""
    from peft import AutoPeftModelForCausalLM

    return peft_loss(AutoPeftModelForCausalLM.from_pretrained(adapter))


def peft_loss(model: Any) -> float:
    """Of a PeftModel as it is, by transformers' own loss, so that nothing is merged."""
    tokenizer = make_tokenizer()
    examples = flora.data.template.encode(HELD_OUT, tokenizer, max_length=32)
    total = count = 0.0
    model.eval()
    for example in examples:
        ids, labels = (torch.tensor([row]) for row in (example.input_ids, example.labels))
        kept = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += kept * float(model(input_ids=ids, labels=labels).loss)
        count += kept
    return total / count


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strategy", NAMES)
def test_what_a_run_leaves_is_the_model_that_it_reports(strategy, variant, tmp_path):
    result = run(tmp_path, strategy, variant)
    told = result.after["loss"]
    # In 16 bits base + adapter and their rounded sum differ by the rounding of the weights and of every layer.
    close = pytest.approx(told, abs=1e-4 if variant != "bfloat16" else 2 * torch.finfo(torch.bfloat16).eps * told)
    assert told != pytest.approx(result.before["loss"], abs=1e-3)
    assert loss(load(tmp_path / "out/model")) == close
    assert (tmp_path / "out/adapter").is_dir() is (result.adapter is not None)
    if result.adapter is not None:
        assert loss_by_config(tmp_path / "out/adapter") == close
    report = flora.rebase_adapter(tmp_path / "out", tmp_path / "whole")
    assert loss_by_config(tmp_path / "whole") == close
    assert report.base == str(tmp_path / "base")
    assert max(report.ranks.values()) <= 16
    base = read_base(tmp_path / "whole")
    assert base is not None
    assert base.round == 0


@pytest.mark.parametrize("strategy", NAMES)
def test_a_rebased_client_of_round_three_has_its_own_loss(strategy, tmp_path):
    from peft import PeftModel

    run(tmp_path, strategy, keep_snapshots=3)
    model = load(tmp_path / "base")
    state = load_file(tmp_path / "out" / ROUNDS / "0002" / STATE)
    with torch.no_grad():
        for name, weight in state.items():
            if name.startswith("server/weights/"):
                model.get_submodule(name.removeprefix("server/weights/")).weight.copy_(weight)
    own = peft_loss(PeftModel.from_pretrained(model, str(tmp_path / "out" / ROUNDS / "0003" / "b")))
    report = flora.rebase_adapter(tmp_path / "out", tmp_path / "b3", round=3, client="b")
    assert loss_by_config(tmp_path / "b3") == pytest.approx(own, abs=1e-5)
    # Float32 weights and 256 values of each: the sums are those of the run.
    assert report.error is None or report.error < 1e-4


def test_an_earlier_round_of_the_global_model_is_written_too(tmp_path):
    run(tmp_path)
    two = run(tmp_path / "two", rounds=2)
    flora.rebase_adapter(tmp_path / "out", tmp_path / "second", round=2)
    assert loss_by_config(tmp_path / "second") == pytest.approx(two.after["loss"], abs=1e-5)


def test_a_round_that_was_not_applied_and_a_refused_client_are_not_in_the_sum(tmp_path):
    clients = make_clients((4, 2, 3))
    clients[2] = replace(clients[2], train={"lr": 1e4})  # its norm is refused in every round
    with pytest.warns(RuntimeWarning, match="'c' was"):
        result = run(tmp_path, clients=clients, max_norm=50.0)
    assert all("c" in one["refused"] for one in result.history)
    flora.rebase_adapter(tmp_path / "out", tmp_path / "whole")
    assert loss_by_config(tmp_path / "whole") == pytest.approx(result.after["loss"], abs=1e-5)
    with pytest.raises(ValueError, match=r"round 2 of .* has no update of client 'c'; it has those of 'a', 'b'"):
        flora.rebase_adapter(tmp_path / "out", tmp_path / "c2", round=2, client="c")


def test_a_dropped_round_changes_nothing(tmp_path):
    clients = make_clients((4, 2, 3))
    clients[2] = replace(clients[2], train={"lr": 1e4})
    with pytest.warns(RuntimeWarning, match="'c' was"):
        run(tmp_path, clients=clients, max_norm=50.0, min_clients=3)
    with pytest.raises(ValueError, match="is the original base: no adapter to write"):
        flora.rebase_adapter(tmp_path / "out", tmp_path / "whole")
    flora.rebase_adapter(tmp_path / "out", tmp_path / "b3", round=3, client="b")
    assert read_config(tmp_path / "b3")["base_model_name_or_path"] == str(tmp_path / "base")


def test_rounding_to_nearest_is_reported_as_the_difference(tmp_path):
    make_model(torch.bfloat16).save_pretrained(tmp_path / "base")
    federation = make_federation(tmp_path / "out", model=load(tmp_path / "base"), rounding="nearest", lr=1e-3)
    federation.log.callbacks = ()
    with pytest.warns(RuntimeWarning, match="rounding='nearest' lost"):
        federation.run()
    report = flora.rebase_adapter(tmp_path / "out", tmp_path / "whole")
    assert report.error is not None
    assert 1e-2 < report.error < 10


def test_vllm_gets_one_rank_and_scale_one(tmp_path):
    result = run(tmp_path)
    report = flora.rebase_adapter(tmp_path / "out", tmp_path / "served", layout="vllm")
    config = read_config(tmp_path / "served")
    assert set(report.ranks.values()) == {16}
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (16, 16, {}, {})
    assert loss_by_config(tmp_path / "served") == pytest.approx(result.after["loss"], abs=1e-5)


def test_wide_modules_keep_the_stack_and_narrow_ones_are_recompressed(tmp_path):
    make_model(hidden=64).save_pretrained(tmp_path / "base")
    make_federation(tmp_path / "out", model=load(tmp_path / "base"), rounds=3).run()
    assert set(flora.rebase_adapter(tmp_path / "out", tmp_path / "whole").ranks.values()) == {27}
    run(tmp_path / "narrow")
    assert set(flora.rebase_adapter(tmp_path / "narrow/out", tmp_path / "small").ranks.values()) == {16}


def test_rows_that_cancel_are_left_out_without_a_decomposition(monkeypatch):
    """The global adapter puts back what a round of flora_warm or fedex takes out of the base."""
    random = torch.Generator().manual_seed(0)
    A, B = torch.randn(5, 64, generator=random), torch.randn(5, 48, generator=random)
    shared = A[3:], B[3:]
    parts = [(A, B, torch.tensor([2.0, 1, 1, -1, -1])), (*shared, torch.ones(2))]
    monkeypatch.setattr(rebase, "stack_svd", None)
    A_PK, B_PN, coef_P = rebase._smallest(parts)
    assert len(A_PK) == 3
    want = (B[:3].double().T * torch.tensor([2.0, 1, 1]).double()) @ A[:3].double()
    found = (B_PN.double().T * coef_P) @ A_PK.double()
    assert float((found - want).norm()) <= 1e-6 * float(want.norm())


def test_more_rows_than_the_matrix_has_become_the_matrix_without_a_decomposition(monkeypatch):
    random = torch.Generator().manual_seed(0)
    A, B = torch.randn(40, 24, generator=random), torch.randn(40, 16, generator=random)
    monkeypatch.setattr(rebase, "stack_svd", None)
    A_PK, B_PN, _ = rebase._smallest([(A, B, torch.ones(40))])
    want = B.double().T @ A.double()
    assert len(A_PK) == 16
    assert float((B_PN.double().T @ A_PK.double() - want).norm()) <= 1e-6 * float(want.norm())


def test_a_folder_of_an_earlier_version_is_read_by_its_settings_and_events(tmp_path):
    result = run(tmp_path, weights={"a": 1.0, "b": 2.5, "c": 4.0})
    for folder in (tmp_path / "out" / ROUNDS).iterdir():
        for record in folder.glob("*/flora_base.safetensors"):
            record.unlink()
        body = read_body(folder)
        del body["state"]["aggregation"]
        rewrite(folder / ROUND, body)
    flora.rebase_adapter(tmp_path / "out", tmp_path / "whole")
    assert loss_by_config(tmp_path / "whole") == pytest.approx(result.after["loss"], abs=1e-5)


def rewrite(path: Path, body: dict[str, Any]) -> None:
    from flora_core.runs.snapshot import _sha256_of

    body["files"] = {name: digest for name, digest in body["files"].items() if "flora_base" not in name}
    path.write_text(json.dumps({**body, "sha256": _sha256_of(body)}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


def test_what_cannot_be_made_is_refused_before_anything_is_written(finished, tmp_path):
    with pytest.raises(ValueError, match="round must be one of the 3 rounds"):
        flora.rebase_adapter(finished / "out", tmp_path / "x", round=4)
    with pytest.raises(ValueError, match="no update of client 'z'"):
        flora.rebase_adapter(finished / "out", tmp_path / "x", client="z")
    with pytest.raises(FileNotFoundError, match=r"is no run's folder: it has no run\.json"):
        flora.rebase_adapter(finished, tmp_path / "x")
    copy = shutil.copytree(finished / "out", tmp_path / "copy")
    (copy / ROUNDS / "0001" / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"0001/a is not what the run saved .*put it back"):
        flora.rebase_adapter(copy, tmp_path / "x")
    shutil.rmtree(copy / ROUNDS / "0001")
    with pytest.raises(ValueError, match=r"round 1 of .* is missing"):
        flora.rebase_adapter(copy, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_adapters_that_are_not_those_of_the_weights_are_refused(finished, tmp_path):
    copy = shutil.copytree(finished / "out", tmp_path / "copy")
    folder = copy / ROUNDS / "0002"
    body = read_body(folder)
    body["state"]["aggregation"]["clients"]["a"] *= 2
    rewrite(folder / ROUND, body)
    with pytest.raises(ValueError, match="do not give the weights of the run"):
        flora.rebase_adapter(copy, tmp_path / "x")


@pytest.mark.parametrize("client", [None, "a"])
def test_a_private_run_has_no_client_s_adapter_and_is_refused(client, tmp_path, capsys):
    run(tmp_path, rounds=1, weights="uniform", privacy=Privacy(clip=1.0, noise_multiplier=1.0))
    assert not list((tmp_path / "out").glob(f"{ROUNDS}/*/*/adapter_model.safetensors"))
    with pytest.raises(ValueError, match=r"is a private run: .*no client's adapter was kept.*in model/"):
        flora.rebase_adapter(tmp_path / "out", tmp_path / "x", client=client)
    words = ["adapter", str(tmp_path / "out"), "--out", str(tmp_path / "x")]
    assert main([*words, *(["--client", client] if client else [])]) == 2
    assert "is a private run" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_a_run_without_adapters_says_where_the_model_is(tmp_path):
    run(tmp_path, save_adapters=False)
    with pytest.raises(ValueError, match="save_adapters=False"):
        flora.rebase_adapter(tmp_path / "out", tmp_path / "x")
    result = run(tmp_path / "fedex", "fedex", save_adapters=False)
    assert not (tmp_path / "fedex/out/adapter").exists()
    assert any(
        "adapter/ is not written, the result is in model/" in str(event.get("message")) for event in result.events
    )


def test_the_command_writes_what_the_function_writes(finished, tmp_path, capsys):

    command = ["adapter", str(finished / "out"), "--round", "2", "--client", "a", "--out", str(tmp_path / "a2")]
    assert main(command) == 0
    assert str(finished / "base") in capsys.readouterr().out
    flora.rebase_adapter(finished / "out", tmp_path / "same", 2, "a")
    one, other = (load_peft_adapter(tmp_path / name).adapters for name in ("a2", "same"))
    assert all(torch.equal(A, other[module][0]) and torch.equal(B, other[module][1]) for module, (A, B) in one.items())
