"""Seeds are hashes of what they are for, the same in every release, process and cohort."""

from __future__ import annotations

import hashlib
import inspect
import itertools

import torch

from flora_core.common import seeds


def test_derive_gives_the_committed_values():
    """A run that is resumed with a later release must draw the same numbers."""
    assert seeds.derive(0) == 8781590593397825911
    assert seeds.derive(0, "init", "clinic-a", "model.layers.0.q_proj") == 2226482724089227064
    assert seeds.derive(2**70, "round", 3) == 6848411644919599827
    assert seeds.derive(-1, "größe", 0) == 196508817028071991
    assert seeds.dropout_seed(7, "clinic-a", 12, "q_proj", 2) == 5895525977619894297


def test_derive_is_blake2b_of_a_plain_text():
    text = "int:1:7\x1fstr:5:a b:c\x1fint:2:12"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    assert seeds.derive(7, "a b:c", 12) == int.from_bytes(digest, "little") >> 1


def test_what_differs_gives_another_seed():
    parts = [
        (),
        ("1",),
        (1,),
        ("a", "bc"),
        ("ab", "c"),
        ("abc",),
        ("a\x1fb",),
        ("a", "b"),
        ("", "a"),
        ("a", ""),
        (1, 2),
    ]
    found = [seeds.derive(seed, *part) for seed in (0, 1) for part in parts]
    assert len(set(found)) == len(found)


def test_seeds_have_63_bits_and_use_them_all():
    found = [seeds.derive(0, number) for number in range(400)]
    assert all(0 <= seed < 2**63 for seed in found)
    assert all(100 < sum(seed >> bit & 1 for seed in found) < 300 for bit in range(63))


def test_a_dropout_seed_depends_on_all_that_it_is_for():
    base = dict(run_seed=0, client="a", step=1, module="q", round=0)
    others = [dict(run_seed=1), dict(client="b"), dict(step=2), dict(module="k"), dict(round=1)]
    found = [seeds.dropout_seed(**{**base, **other}) for other in ({}, *others)]
    assert len(set(found)) == len(found)
    # Nothing else goes in: not the cohort, not the order of calls.
    assert set(inspect.signature(seeds.dropout_seed).parameters) == set(base)


def test_a_generator_repeats_and_is_nobody_else_s():
    def draw(*parts) -> list[float]:
        return torch.rand(4, generator=seeds.generator(*parts)).tolist()

    assert draw(0, "a") == draw(0, "a")
    assert all(one != two for one, two in itertools.combinations([draw(0, "a"), draw(0, "b"), draw(1, "a")], 2))
    before = torch.get_rng_state()
    draw(0, "a")
    assert torch.equal(torch.get_rng_state(), before), "the global generator must not be touched"
    assert seeds.generator(0, "a").initial_seed() == seeds.derive(0, "a")
