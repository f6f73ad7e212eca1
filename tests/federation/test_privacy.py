"""Differential privacy of the global model: the clip holds, the noise is the accountant's, every release is paid for.

Letters: K in_features, N out_features.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import signal
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flora_core as flora
from flora_core.adapters.update import ClientUpdate
from flora_core.aggregation.norms import norm_of
from flora_core.common.errors import Stopped
from flora_core.federation import privacy as privacy_module
from flora_core.federation.privacy import Privacy, PrivateSum, calibrated, secret_draw, secret_normals, spent
from flora_core.merge.in_place import new_low_bits
from flora_core.model.targets import target_weights as writable
from flora_core.runs.progress import RunProgress
from flora_kernels.reference import join_master
from tests.aggregation.test_norms import cancelling, dense_norm
from tests.support.federations import make_clients, make_federation, make_model, stop_after, target_weights

HAVE = importlib.util.find_spec("dp_accounting") is not None
needs_accountant = pytest.mark.skipif(
    not HAVE, reason="NOT TESTED: privacy needs dp-accounting (pip install '.[privacy]')"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def sums(names: str = "ab", sigma: float = 1.0, fraction: float = 1.0, clip: float = 1.0, **more: Any) -> PrivateSum:
    privacy = Privacy(clip=clip, noise_multiplier=sigma)
    return PrivateSum(privacy, fraction, 3, dict.fromkeys(names, 1.0), **more)


def update(name: str, size: float, seed: int = 0, K: int = 16) -> ClientUpdate:
    random = torch.Generator().manual_seed(seed)
    pairs = {m: (torch.randn(2, K, generator=random), size * torch.randn(2, K, generator=random)) for m in "xy"}
    return ClientUpdate(name, pairs, {"x": 2.0, "y": 0.5}, 1.0)


def dense(private: PrivateSum, updates: list[ClientUpdate]) -> torch.Tensor:
    """The sum of all modules as one vector."""
    stacks = private.stacks(updates, {update.client: norm_of(update) for update in updates})
    return torch.cat([((B.double().T * c) @ A.double()).flatten() for A, B, c in (stacks[m] for m in sorted(stacks))])


# The clip.


@needs_accountant
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_one_client_more_changes_the_sum_by_the_clip_at_most(size):
    """The sensitivity that the noise is calibrated to, jointly over all modules, before the fixed denominator."""
    for seed in range(20):
        private = sums("abc", clip=0.7, fraction=0.5)
        others = [update("a", 1.0, 100 + seed), update("b", 3.0, 200 + seed)]
        added = dense(private, [*others, update("c", size, seed)]) - dense(private, others)
        norm = float(added.norm()) * private.denominator
        assert norm <= 0.7 * (1 + 1e-9)
        if size > 1e-3:
            assert norm >= 0.7 * (1 - 1e-9), "a large update is scaled to the bound, not below"
        else:
            assert norm == pytest.approx(dense_norm(update("c", size, seed)), rel=1e-9), "a small one stays as it is"


@needs_accountant
def test_a_planted_outlier_and_one_that_hides_its_norm_are_bounded():
    private = sums("ab", clip=1.0)
    base = dense(private, [update("a", 1.0)])
    for bad in (update("b", 1e12), update("b", 1e30)):
        assert float((dense(private, [update("a", 1.0), bad]) - base).norm()) * private.denominator <= 1 + 1e-9
    for seed in range(20):
        hidden = cancelling(seed, 1e12)
        hidden.client = "b"
        assert float(dense(private, [hidden]).norm()) * private.denominator <= 1 + 1e-9


@needs_accountant
def test_weights_are_fixed_and_the_largest_counts_as_one():
    privacy = Privacy(clip=1.0, noise_multiplier=1.0)
    private = PrivateSum(privacy, 0.5, 3, {"a": 2.0, "b": 8.0})
    assert private.denominator == 0.5 * (0.25 + 1)
    one, other = (float(dense(private, [update(name, 1e3)]).norm()) * private.denominator for name in "ab")
    assert (one, other) == (pytest.approx(0.25), pytest.approx(1.0))


# The noise.


def test_secret_normals_are_standard_normals():
    values = secret_normals(400_000)
    deviations = [
        abs(float((values**k).mean()) - m) / math.sqrt(v / 4e5) for k, m, v in ((1, 0, 1), (2, 1, 2), (4, 3, 96))
    ]
    # Six standard deviations of each moment: one run in 500 million fails.
    assert max(deviations) < 6
    assert abs(float((values[1:] * values[:-1]).mean())) < 6 / math.sqrt(4e5)
    inside = float((values.abs() < 1).double().mean())
    assert abs(inside - math.erf(math.sqrt(0.5))) < 6 * math.sqrt(0.25 / 4e5)


def test_noise_and_draws_come_from_the_system_s_own_generator_alone(monkeypatch):
    assert not torch.equal(secret_normals(100), secret_normals(100))
    assert len({tuple(secret_draw("abcdefghijklmnopqrstuvwxyz", 0.5)) for _ in range(20)}) > 10
    monkeypatch.setattr(privacy_module.os, "urandom", lambda count: Random(7).randbytes(count))
    assert torch.equal(secret_normals(100), secret_normals(100))
    assert secret_draw("abcdefghij", 0.5) == secret_draw("abcdefghij", 0.5)


@needs_accountant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_of_every_target_gets_the_noise_that_was_paid_for(dtype):
    model = make_model(dtype, hidden=64)
    weights = writable(model, list(target_weights(model)))
    before = {m: w.double().clone() for m, w in weights.items()}

    low = new_low_bits(weights)
    log = SimpleNamespace(record=lambda *_: None)
    server = SimpleNamespace(model=SimpleNamespace(weights=weights, low_bits=low), log=log)
    private = sums("ab", sigma=2.0, fraction=0.5, clip=0.3)
    result = private.apply(server, [], 1, {})  # type: ignore[arg-type]
    after = {m: (join_master(w, low[m]) if low else w).double() for m, w in weights.items()}
    noise = torch.cat([(after[m] - before[m]).flatten() for m in weights])
    std, count = 2.0 * 0.3 / (0.5 * 2), noise.numel()
    assert count == 4 * 64 * 64
    assert abs(float(noise.square().mean()) / std**2 - 1) < 6 * math.sqrt(2 / count)
    assert abs(float(noise.mean())) < 6 * std / math.sqrt(count)
    assert result.base_delta == {}, "no stack leaves the server"
    assert set(result.forms.values()) == {("dense", 64 * 64 * dtype.itemsize)}


def test_draws_are_poisson_and_secret():
    counts = [len(secret_draw("abcdefghij", 0.3)) for _ in range(4000)]
    mean = sum(counts) / 4000
    assert abs(mean - 3) < 6 * math.sqrt(10 * 0.21 / 4000)
    variance = sum((count - 3) ** 2 for count in counts) / 4000
    assert abs(variance - 2.1) < 0.5, "binomial: by itself each, not a fixed number"
    assert 0 in counts


# The accountant.


@needs_accountant
@pytest.mark.parametrize(("epsilon", "rounds", "fraction"), [(8.0, 3, 1.0), (2.0, 50, 0.1), (0.5, 10, 0.5)])
def test_the_noise_is_calibrated_to_the_library_s_accountant(epsilon, rounds, fraction):
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, rdp

    sigma = calibrated(epsilon, rounds, fraction, 1e-5)
    assert spent(rounds, fraction, sigma, 1e-5) <= epsilon
    assert spent(rounds, fraction, sigma - 2e-4, 1e-5) > epsilon, "no more noise than it takes"
    # Written anew, with the library's own choice of orders: ours is another upper bound of the same thing.
    one = GaussianDpEvent(sigma) if fraction == 1 else PoissonSampledDpEvent(fraction, GaussianDpEvent(sigma))
    theirs = rdp.RdpAccountant().compose(SelfComposedDpEvent(one, rounds)).get_epsilon(1e-5)
    assert spent(rounds, fraction, sigma, 1e-5) == pytest.approx(theirs, rel=0.05)
    assert spent(0, fraction, sigma, 1e-5) == 0


# Whole runs.

PRIVATE: dict[str, Any] = dict(weights="uniform", fraction=0.7, privacy=Privacy(clip=0.5, noise_multiplier=1.0))


@needs_accountant
def test_epsilon_is_told_wherever_the_run_is_told_of(tmp_path):
    stream = io.StringIO()
    result = make_federation(tmp_path, **PRIVATE, callbacks=[RunProgress(stream, 0.0)]).run()
    want = [spent(n, 0.7, 1.0, 1e-5) for n in (1, 2)]
    assert [one["privacy"]["epsilon"] for one in result.history] == want
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["privacy"]["epsilon"] for line in lines if line["event"] in ("aggregated", "run_end")] == [
        *want,
        want[1],
    ]
    assert f"epsilon {want[1]:.3g} at delta 1e-05 after 2 releases" in stream.getvalue()
    from flora_core.runs.report import write_report

    assert f"epsilon {want[1]:.3g} at delta 1e-05 after 2 releases" in write_report(tmp_path).read_text()
    ledger = json.loads((tmp_path / "privacy.json").read_text())
    assert (ledger["releases"], ledger["epsilon"]) == ([1, 2], want[1])


@needs_accountant
def test_nothing_of_a_single_client_is_kept_and_no_seed_of_the_noise(tmp_path):
    make_federation(tmp_path, **PRIVATE).run()
    assert not list((tmp_path / "rounds").rglob("adapter_model.safetensors"))
    facts = (tmp_path / "run.json").read_text()
    assert "federation.privacy.clip" in facts
    again = make_model()
    other = tmp_path / "other"
    make_federation(other, model=again, **PRIVATE).run()
    assert (tmp_path / "rounds/0002/state.safetensors").read_bytes() != (
        other / "rounds/0002/state.safetensors"
    ).read_bytes()
    draws = {tuple(make_federation(None, clients=make_clients([2] * 8), **PRIVATE).sampled(1)) for _ in range(30)}
    assert len(draws) > 5, "a draw that the seed gives could be known"


@needs_accountant
def test_a_round_in_which_nobody_was_drawn_is_released_all_the_same(tmp_path):
    model = make_model()
    result = make_federation(tmp_path, model=model, **{**PRIVATE, "fraction": 1e-9}).run()
    assert [list(one["clients"]) for one in result.history] == [[], []]
    assert all(one["applied"] for one in result.history)
    assert not any(torch.equal(w, target_weights(make_model())[m]) for m, w in target_weights(model).items())
    assert result.events[-1]["privacy"]["releases"] == 2


class CrashError(Exception):
    """How a test ends a run after the noise was drawn."""


@needs_accountant
def test_a_round_that_is_redone_after_a_crash_is_paid_for_twice_and_has_noise_of_its_own(tmp_path):
    seen: list[dict[str, torch.Tensor]] = []

    def crash(event) -> None:
        if event["event"] == "aggregated" and event["round"] == 2 and not seen:
            seen.append(target_weights(model))
            raise CrashError

    model = make_model()
    with pytest.raises(CrashError):
        make_federation(tmp_path, model=model, callbacks=[crash], **PRIVATE).run()
    result = make_federation(tmp_path, **PRIVATE, model=(again := make_model())).run()
    assert json.loads((tmp_path / "privacy.json").read_text())["releases"] == [1, 2, 2]
    assert result.events[-1]["privacy"]["epsilon"] == spent(3, 0.7, 1.0, 1e-5)
    assert not any(torch.equal(seen[0][m], w) for m, w in target_weights(again).items())


@needs_accountant
def test_the_book_is_on_the_disk_before_any_noise_exists(tmp_path, monkeypatch):
    def check(count):
        releases.append(json.loads((tmp_path / "privacy.json").read_text())["releases"])
        raise CrashError

    releases: list[list[int]] = []
    monkeypatch.setattr(privacy_module, "secret_normals", check)
    with pytest.raises(CrashError):
        make_federation(tmp_path, **PRIVATE).run()
    assert releases == [[1]]


@needs_accountant
@pytest.mark.parametrize("text", [None, "", "[]", '{"releases": ["1"]}', '{"releases": []}'])
def test_a_run_whose_book_is_lost_does_not_go_on(text, tmp_path):
    stop_after(1, tmp_path, **PRIVATE)
    (tmp_path / "privacy.json").unlink() if text is None else (tmp_path / "privacy.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"privacy\.json .*(put it back|put the file back|save or copy it again|JSON object)"
    ):
        make_federation(tmp_path, **{**PRIVATE, "rounds": 3}).run()


@needs_accountant
def test_epsilon_is_never_exceeded_whatever_was_redone(tmp_path):
    bounded = {**PRIVATE, "privacy": Privacy(clip=0.5, epsilon=8.0), "rounds": 2}
    calm = make_federation(tmp_path / "calm", **bounded).run()
    assert 7.9 < calm.events[-1]["privacy"]["epsilon"] <= 8.0
    stop_after(1, tmp_path / "out", **bounded)
    ledger = tmp_path / "out" / "privacy.json"
    ledger.write_text(json.dumps({**json.loads(ledger.read_text()), "releases": [1, 1]}))  # a crash, a round redone
    told: list[dict[str, Any]] = []
    result = make_federation(tmp_path / "out", callbacks=[told.append], **bounded).run()
    assert [one["applied"] for one in result.history] == [True, False]
    assert result.events[-1]["privacy"]["epsilon"] <= 8.0
    text = [event["message"] for event in told if event["event"] == "warning"]
    assert "round 2 changes nothing: one more release would cost more than privacy.epsilon" in text
    assert (tmp_path / "out" / "model").is_dir()


@needs_accountant
def test_a_stopped_round_goes_on_with_the_clients_that_were_drawn(tmp_path):
    drawn: list[list[str]] = []

    def callback(event) -> None:
        if event["event"] == "round_start":
            drawn.append(event["clients"])
        if event["event"] == "train_progress" and len(drawn) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    clients = make_clients([2] * 8)
    private = {**PRIVATE, "clients": clients, "rounds": 1, "eval_data": None}
    with pytest.raises(Stopped):
        make_federation(tmp_path, callbacks=[callback], **private).run()
    result = make_federation(tmp_path, callbacks=[callback], **private).run()
    assert drawn[0] == drawn[1]
    assert result.events[-1]["privacy"]["releases"] == 1


# Settings.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(clip=1.0), "privacy needs epsilon or noise_multiplier, and not both"),
        (dict(clip=1.0, epsilon=1.0, noise_multiplier=1.0), "and not both"),
        (dict(clip=0.0, epsilon=1.0), r"privacy\.clip must be above 0, got 0"),
        (dict(clip=1.0, epsilon=-1.0), r"privacy\.epsilon must be at least 0, got -1"),
        (dict(clip=1.0, noise_multiplier=0.0), r"privacy\.noise_multiplier must be above 0"),
        (dict(clip=1.0, epsilon=1.0, delta=1.0), r"privacy\.delta must be below 1, got 1"),
    ],
)
def test_a_privacy_that_is_none(fields, words):
    with pytest.raises(ValueError, match=words):
        Privacy(**fields)


CONTRADICTIONS = {
    "weights by data": (dict(weights="examples"), "privacy does not go with weights='examples'.*use 'uniform'"),
    "min_clients": (dict(min_clients=2), "privacy does not go with min_clients=2.*use 1"),
    "outliers": (dict(outlier_factor=3.0), r"privacy does not go with outlier_factor=3\.0.*use max_norm"),
    "another clip": (dict(clip_update=3.0), r"privacy does not go with clip_update=3\.0.*leave it out"),
    "rounding": (dict(rounding="nearest"), "privacy does not go with rounding='nearest'"),
    "strategy": (dict(strategy="fedit"), "privacy needs strategy 'flora', .* 'fedit' would hand out more"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_settings_that_contradict_privacy(what):
    changes, words = CONTRADICTIONS[what]
    with pytest.raises(ValueError, match=words):
        make_federation(None, **{**PRIVATE, **changes})


def test_privacy_that_is_a_number():
    with pytest.raises(
        TypeError, match=r"privacy must be a Privacy, such as Privacy\(clip=1\.0, epsilon=8\.0\), got 8"
    ):
        flora.FederationConfig(rounds=1, privacy=8)  # type: ignore[arg-type]


def test_without_the_accountant_it_is_said_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match="needs dp-accounting: pip install 'dp-accounting"):
        make_federation(None, **PRIVATE)


def test_a_recipe_has_privacy(tmp_path):
    from flora_core.config.recipe import load

    path = tmp_path / "r.yaml"
    path.write_text("model: m\nfederation: {rounds: 2, weights: uniform, privacy: {clip: 0.5, epsilon: 4}}\n")
    assert load(path).federation.privacy == Privacy(clip=0.5, epsilon=4.0)
    assert load(path, ["federation.privacy.delta=1e-6"]).federation.privacy == Privacy(0.5, 4.0, None, 1e-6)
    with pytest.raises(ValueError, match="privacy needs strategy 'flora'"):
        load(path, ["strategy=zero_pad"])
    with pytest.raises(ValueError, match="privacy does not go with weights='examples'"):
        load(path, ["federation.weights=examples"])
    with pytest.raises(ValueError, match=r"unknown key 'federation\.privacy\.clipp'; did you mean"):
        load(path, ["federation.privacy.clipp=1"])
