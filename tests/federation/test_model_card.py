"""The model card of a run: the truth about it, no client's name, no time."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace

import pytest
import torch
import yaml

from flora_core.aggregation import STRATEGIES
from flora_core.config.federation import FederationConfig
from flora_core.config.privacy import Privacy
from flora_core.config.training import TrainConfig
from flora_core.federation.model_card import base_licence, hub_name, model_card
from flora_core.model.deterministic import deterministic_libraries
from tests.support.federations import make_clients, make_federation, make_model, make_tokenizer


def test_the_card_lies_beside_the_model_and_tells_the_run(tmp_path):
    clients = [replace(spec, name=f"hospital-{i}") for i, spec in enumerate(make_clients((4, 2, 3)))]
    federation = make_federation(tmp_path / "run", clients=clients, rounds=2)
    result = federation.run()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert "Ranks of their LoRA adapters: 4, 3, 2" in body
    assert "Rounds: 2" in body
    assert "were not made differentially private" in body
    assert "arXiv 2409.05976" in body
    assert result.before is not None
    assert result.after is not None
    for evaluation in (result.before, result.after):
        assert f"{evaluation['loss']:.3f}" in body
    assert "hospital" not in card


def test_a_run_without_held_out_data_says_so(tmp_path):
    federation = make_federation(tmp_path / "run", rounds=1)
    federation.held_out.records = None
    federation.run()
    assert "None: the run had no held-out data." in (tmp_path / "run" / "model" / "README.md").read_text()


def card(strategy="flora", name="", tokenizer=None, events=(), **config) -> str:
    model = make_model()
    model.config._name_or_path = str(name)
    return model_card(model, tokenizer, strategy, FederationConfig(rounds=1, **config), TrainConfig(), events)


PAPERS = {
    "flora": "2409.05976",
    "flora_svd": "2506.09199",
    "flora_warm": "2409.05976",
    "fedit": "2305.05644",
    "zero_pad": "2409.05976",
    "hetlora": "2401.06432",
    "flexlora": "2402.11505",
    "raflora": "2602.13486",
    "ffa": "2403.12313",
    "rolora": "2502.01755",
    "fedex": "2410.09432",
}


def test_every_strategy_has_its_own_paper_and_no_other():
    own = {name for name, one in STRATEGIES.items() if type(one).__module__.startswith("flora_core.")}
    assert own == set(PAPERS)
    for name, number in PAPERS.items():
        text = card(name)
        assert set(re.findall(r"arXiv (\d+\.\d+)", text)) == {number}, name
        assert f"- Method: {name} (" in text


def test_a_private_run_is_called_private_with_what_it_cost():
    cost = {"epsilon": 3.25, "releases": 2, "delta": 1e-5, "noise_multiplier": 1.0, "clip": 0.5}
    events = [{"event": "aggregated", "round": 1, "privacy": cost, "bytes_up": 0, "bytes_down": 0}]
    text = " ".join(card(events=events, weights="uniform", privacy=Privacy(clip=0.5, noise_multiplier=1.0)).split())
    assert "differentially private towards every client" in text
    assert "epsilon 3.25 at delta 1e-05 after 2 releases" in text
    assert "not made differentially private" not in text


def test_the_base_is_named_where_the_hub_knows_it(tmp_path):
    (tmp_path / "models--owner--name/snapshots/abc").mkdir(parents=True)
    cases = {"owner/name": "owner/name", str(tmp_path): None, "": None}
    cases[str(tmp_path / "models--owner--name/snapshots/abc")] = "owner/name"
    for path, name in cases.items():
        model = make_model()
        model.config._name_or_path = path
        assert hub_name(model) == name
        assert yaml.safe_load(card(name=path).split("---\n")[1]).get("base_model") == name


def test_the_licence_is_that_of_the_bases_card_or_is_said_to_be_unknown(tmp_path):
    assert "is not stated in the files that were at hand" in card(name=tmp_path)
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# Base\nlicense: mit\n")
    model = make_model()
    model.config._name_or_path = str(tmp_path)
    assert base_licence(model) == "apache-2.0"
    assert yaml.safe_load(card(name=tmp_path).split("---\n")[1])["license"] == "apache-2.0"


@pytest.mark.parametrize("chat", [False, True])
def test_the_example_of_usage_runs_where_the_model_lies(chat, tmp_path, monkeypatch, capsys):
    tokenizer = make_tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    model = make_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card(tokenizer=tokenizer), re.S)
    (tmp_path / "usage.py").write_text(code.replace("max_new_tokens=64", "max_new_tokens=3"))
    monkeypatch.chdir(tmp_path)
    runpy.run_path("usage.py")
    assert len(capsys.readouterr().out) > 0


def test_without_a_tokenizer_the_example_loads_the_model_alone(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card(tokenizer=None), re.S)
    assert "AutoTokenizer" not in code
    (tmp_path / "usage.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert type(runpy.run_path("usage.py")["model"]).__name__ == "LlamaForCausalLM"


def test_deterministic_algorithms_are_on_for_cuda_while_training_and_off_after():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for device, wanted, on in ((cuda, True, True), (cuda, False, False), (cpu, True, False)):
        with deterministic_libraries(device, wanted):
            assert torch.are_deterministic_algorithms_enabled() is on
        assert not torch.are_deterministic_algorithms_enabled()
