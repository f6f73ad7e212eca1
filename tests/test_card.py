"""The model card of a run: the truth about it, no client's name, no time."""

from __future__ import annotations

from dataclasses import replace

import torch
import yaml

from flora_core.repeatable import deterministic_libraries
from tests.federation_cases import make_clients, make_federation


def test_the_card_lies_beside_the_model_and_tells_the_run(tmp_path):
    clients = [replace(spec, name=f"hospital-{i}") for i, spec in enumerate(make_clients((4, 2, 3)))]
    federation = make_federation(tmp_path / "run", clients=clients, rounds=2)
    result = federation.run()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert "Ranks: 4, 3, 2" in body
    assert "2 rounds" in body
    assert result.before is not None
    assert result.after is not None
    for evaluation in (result.before, result.after):
        assert f"{evaluation['loss']:.3f}" in body
    assert "hospital" not in card


def test_a_run_without_held_out_data_says_so(tmp_path):
    federation = make_federation(tmp_path / "run", rounds=1)
    federation.eval_data = None
    federation.run()
    assert "None: the run had no held-out data." in (tmp_path / "run" / "model" / "README.md").read_text()


def test_deterministic_algorithms_are_on_for_cuda_while_training_and_off_after():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for device, wanted, on in ((cuda, True, True), (cuda, False, False), (cpu, True, False)):
        with deterministic_libraries(device, wanted):
            assert torch.are_deterministic_algorithms_enabled() is on
        assert not torch.are_deterministic_algorithms_enabled()
