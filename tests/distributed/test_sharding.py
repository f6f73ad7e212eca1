"""A base that is sharded over torchrun's processes gives the bytes of one that is whole, whoever has how many steps.

As in ``test_distributed`` one launch of two processes does all jobs.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from flora_core.config.adapter import AdapterConfig
from flora_core.config.training import TrainConfig
from flora_core.distributed import sharding
from flora_core.distributed.sharding import check_training, shard_base, why_shard
from flora_core.distributed.world import World
from flora_core.model.attachment import attach
from flora_core.model.client import ClientSpec
from tests.federation.test_kill_resume import events_of
from tests.support.distributed.jobs import ALONE, Launch, alone, check_weights, launch, without_processes
from tests.support.distributed.worker import arguments
from tests.support.federations import files, make_federation, make_model, stop_after

SHARDED = {**ALONE, "held": "sharded"}
# What each puts to the test: how rows are merged and rounded, what is carried, who runs how many passes of which kind.
SAME = {
    "float32": {"ranks": [4, 2, 3, 8]},
    "low bits": {"base": "bfloat16", "keep_optimizer": True, "dropout": 0.2},
    "stochastic": {
        "base": "bfloat16",
        "rounding": "stochastic",
        "check_rows": None,
        "target_modules": "all-linear",
    },
    "nearest, checkpointing": {
        "base": "bfloat16",
        "rounding": "nearest",
        "check_rows": 3,
        "gradient_checkpointing": True,
        "recompute": ["norms"],
    },
    "global adapter": {"strategy": "fedit", "ranks": [4, 4, 4]},
    "other layers": {"own_targets": ["layers.1.self_attn.q_proj"], "fraction": 0.7, "rounds": 3},
    "poisoned": {"poisoned": "b"},
    "one client": {"ranks": [4]},
}
JOBS = {
    **{name: {"changes": {**SHARDED, **changes}} for name, changes in SAME.items()},
    "packed": {"changes": {"base": "float64", "held": "sharded", "ranks": [4, 2, 3, 8]}},
    "from one": {"changes": {**SHARDED, "rounds": 3, "base": "bfloat16", "keep_optimizer": True}},
    "to one": {"changes": {**SHARDED, "rounds": 3, "base": "bfloat16"}, "fault": "stop_after_round_1"},
    "paused": {"changes": {**SHARDED, "keep_optimizer": True}, "fault": "term_to_process_1"},
    "paused again": {"changes": {**SHARDED, "keep_optimizer": True}, "at": "paused"},
    "missing_data": {"changes": SHARDED, "fault": "missing_data"},
    "alone": {"changes": SHARDED, "fault": "runs_the_model_alone"},
    "no memory": {"changes": {"memory_budget_gb": 1.0, "held": "sharded"}},
    "crowded": {"changes": SHARDED, "fault": "no_memory"},
    "within a pass": {"changes": SHARDED, "fault": "fails_within_a_pass", "ends": True},
}


def whole(out: Path, job: dict) -> None:
    """The job in this process, which holds the whole base."""
    alone(out, {**job, "changes": {name: value for name, value in job["changes"].items() if name != "held"}})


def every_event(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Launch:
    folder = tmp_path_factory.mktemp("sharded")
    changes = arguments({"changes": {**JOBS["from one"]["changes"], "held": "auto"}})
    stop_after(1, folder / "from one", **changes)
    return launch(folder, 2, JOBS)


@pytest.mark.filterwarnings("ignore:client 'b' was:RuntimeWarning", "ignore:rounding='nearest'")
@pytest.mark.parametrize("name", SAME)
def test_a_sharded_base_leaves_the_bytes_of_a_whole_one(name, two, tmp_path):
    assert len({result["digest"] for result in two.of(name)}) == 1, two.said
    whole(tmp_path, JOBS[name])
    assert files(two.out(name), ".safetensors") == files(tmp_path, ".safetensors")
    mine, theirs = (without_processes(events_of(out)) for out in (two.out(name), tmp_path))
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        # Each process adds its own rows' errors up, so that their last bits are others.
        errors = {key: one.pop(key) for key in list(one) if key.startswith("application_error")}
        for key, value in errors.items():
            wanted = other.pop(key)
            assert value == (wanted if wanted is None else pytest.approx(wanted, rel=1e-9))
        assert one == other


def test_each_process_holds_half_of_the_layers(two):
    model = make_model()
    size = sum(parameter.nbytes for parameter in model.parameters())
    layers = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    weight = model.model.layers[0].mlp.up_proj.weight.nbytes
    for result in two.of("float32"):
        assert result["held"] == size - layers / 2
        assert result["gathered"] == [weight, 0], "what was gathered for a pass is let go of"
    (start,) = [event for event in every_event(two.out("float32")) if event["event"] == "run_start"]
    assert start["base"] == {"held": "sharded", "reason": "as asked", "bytes": two.of("float32")[0]["held"]}


def test_packed_cohorts_agree_within_the_budget(two, tmp_path):
    whole(tmp_path, JOBS["packed"])
    check_weights(two.out("packed"), tmp_path)


# Stopped whole, resumed sharded, and the other way round.


def test_a_run_with_a_whole_base_goes_on_with_a_sharded_one(two, tmp_path):
    whole(tmp_path, JOBS["from one"])
    assert files(two.out("from one"), ".safetensors") == files(tmp_path, ".safetensors")


def test_a_run_with_a_sharded_base_goes_on_with_a_whole_one(two, tmp_path):
    first, second = two.of("to one")
    assert (first["error"], second["error"]) == ("Stop", "WorldError")
    for out in (two.out("to one"), tmp_path):
        whole(out, JOBS["to one"])
    assert files(two.out("to one"), ".safetensors") == files(tmp_path, ".safetensors")


def test_a_pause_on_one_process_loses_no_step(two, tmp_path):
    for result in two.of("paused"):
        assert result["error"] == "Stopped"
        # Process 1 stops within b, of a and b; process 0 ends its share.
        assert result["steps"] == {"a": 2, "c": 4}
    assert "digest" in two.of("paused again")[1]
    whole(tmp_path, JOBS["paused"])
    assert files(two.out("paused"), ".safetensors") == files(tmp_path, ".safetensors")


def test_three_processes_with_uneven_rows_and_a_resume_with_two(tmp_path, scale):
    if scale(2, 3, "processes") == 2:
        pytest.skip("two processes are tested above; three in make test-all")
    three = launch(tmp_path / "three", 3, {name: JOBS[name] for name in ("low bits", "stochastic", "to one")})
    (tmp_path / "two").mkdir()
    three.out("to one").rename(tmp_path / "two" / "to one")
    pair = launch(tmp_path / "two", 2, {"to one": {**JOBS["to one"], "fault": None}})
    for name, out in {
        n: (pair if n == "to one" else three).out(n) for n in ("low bits", "stochastic", "to one")
    }.items():
        whole(tmp_path / name, JOBS[name])
        assert files(out, ".safetensors") == files(tmp_path / name, ".safetensors"), name


# Errors.


def test_an_error_on_one_process_ends_all_with_its_words(two):
    first, second = two.of("missing_data")
    assert (first["error"], second["error"]) == ("WorldError", "FileNotFoundError")
    assert "process 1 of 2 failed, and no process goes on without it" in first["text"]
    assert "not-there.jsonl does not exist" in first["text"]


def test_processes_that_run_other_passes_are_told_apart(two):
    first, second = two.of("alone")
    assert (first["error"], second["error"]) == ("WorldError", "WorldError")
    assert "process 0 of 2 is before a pass of the sharded base, processes 1 are between passes" in first["text"]
    assert "process 1 of 2 is between passes of the sharded base, processes 0 are before a pass" in second["text"]
    assert "the others must run along" in first["text"]


def test_memory_that_runs_out_ends_all_and_says_what_to_do(two):
    first, second = two.of("crowded")
    assert (first["error"], second["error"]) == ("WorldError", "MemoryError")
    words = "with a sharded base no process can do a pass again; lower token_budget (no room for the whole step)"
    assert words in second["text"]
    assert words in first["text"]


def test_a_process_that_fails_within_a_pass_ends_all_at_once(two):
    assert two.code != 0
    assert "a pass of the sharded base ended on process 1 of 2, here or because another was lost" in two.said
    assert "this layer is on fire" in two.said
    assert (two.out("within a pass") / "run.json").is_file()


def test_a_budget_that_cannot_be_measured_is_refused(two):
    for result in two.of("no memory"):
        assert result["error"] == "ValueError"
        assert result["text"].startswith("client 'a': memory_budget_gb cannot be kept with a sharded base")
        assert result["text"].endswith("got 1.0; use token_budget")


def marked(model):
    """A model that says of itself that it is sharded."""
    vars(model)["_flora_sharded_base"] = SimpleNamespace()
    return model


def test_recomputed_activations_are_refused():
    with pytest.raises(ValueError, match=r"client 'a': recompute cannot have 'activations' .* use gradient_check"):
        check_training(marked(make_model()), TrainConfig(recompute=("activations",)), "a")


def test_targets_without_rows_of_their_own_are_refused():
    client = ClientSpec("a", [], AdapterConfig(2, 4))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.* is outside the decoder layers, which alone"):
        attach(marked(make_model()), [client], ["q_proj"])
    model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    vars(model.transformer.h[0].attn.c_attn.weight)["device_mesh"] = None
    with pytest.raises(ValueError, match=r"c_attn is a Conv1D, whose weight is stored K x N.* base='replicated'"):
        attach(marked(model), [client], ["c_attn"])


def test_one_process_has_nobody_to_share_with():
    with pytest.raises(ValueError, match=r"base='sharded' needs several processes .*, got 1; start them with torchrun"):
        make_federation(base="sharded").run()
    with pytest.raises(ValueError, match="the model's base is sharded already: load it anew"):
        shard_base(marked(make_model()), World())
    with pytest.raises(ValueError, match="base='replicated', and the model is sharded already"):
        make_federation(model=marked(make_model()), base="replicated").run()


def test_a_base_is_sharded_where_it_does_not_fit_any_rank(monkeypatch):
    model, cpu = make_model(), torch.device("cpu")
    size = sum(parameter.nbytes for parameter in model.parameters())
    world: Any = SimpleNamespace(size=2, barrier=lambda value: [value, False])
    monkeypatch.setattr(sharding, "_memory_bytes", lambda device: 2 * size)
    assert why_shard(model, "auto", world, cpu) is None
    assert why_shard(model, "replicated", world, cpu) is None
    assert why_shard(model, "sharded", world, cpu) == "as asked"
    monkeypatch.setattr(sharding, "_memory_bytes", lambda device: size)
    assert str(why_shard(model, "auto", world, cpu)).endswith("are more than 0.6 of a process's memory, 21.3 kB here")
    assert why_shard(model, "auto", World(), cpu) is None
    monkeypatch.setattr(sharding, "_memory_bytes", lambda device: 2 * size)
    world.barrier = lambda value: [value, True]
    assert why_shard(model, "auto", world, cpu), "another process has no room"
