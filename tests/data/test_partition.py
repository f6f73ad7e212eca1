"""Partitions: every scheme covers the data exactly once, the same way for the same seed, and is what it claims."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_core.data.partition import partition, partition_file
from flora_core.data.records import load_records

SPLITS = [("iid", {}), ("shard", {"shards_per_client": 1}), ("dirichlet", {"min_examples": 0})]


def records_of(*sizes):
    """As many records of each category as asked for, in turn."""
    return [{"id": f"{label}-{n}", "category": f"c{label}"} for label, size in enumerate(sizes) for n in range(size)]


def counts(records, part):
    return Counter(records[index]["category"] for index in part)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    share=st.floats(0.01, 1.0),
    alpha=st.sampled_from([1e-6, 0.1, 0.5, 100.0]),
    split=st.sampled_from(SPLITS),
    seed=st.integers(0, 2**40),
)
def test_cover_disjoint_deterministic(sizes, share, alpha, split, seed):
    records, (scheme, options) = records_of(*sizes), split
    clients = max(1, int(share * len(records)))
    parts = partition(records, clients, scheme, seed=seed, alpha=alpha, **options)
    assert len(parts) == clients
    assert list(parts) == sorted(parts)
    assert sorted(index for part in parts.values() for index in part) == list(range(len(records)))
    assert parts == partition(records, clients, scheme, seed=seed, alpha=alpha, **options)


@pytest.mark.parametrize(("scheme", "options"), SPLITS)
def test_seed_changes_the_split(scheme, options):
    records = records_of(20, 20, 20)
    splits = [partition(records, 6, scheme, seed=seed, **options) for seed in range(4)]
    assert all(one != other for at, one in enumerate(splits) for other in splits[:at])


def test_iid_is_equal_and_mixed():
    records = records_of(500, 500)
    parts = partition(records, 3, "iid", seed=0)
    assert sorted(map(len, parts.values())) == [333, 333, 334]
    assert all(125 < counts(records, part)["c0"] < 208 for part in parts.values())


def test_shard_gives_few_labels():
    records = records_of(30, 30, 30, 30)
    parts = partition(records, 6, "shard", seed=0)
    # Twelve shards of ten: each holds one label, so a client has at most two.
    assert all(len(part) == 20 and len(counts(records, part)) <= 2 for part in parts.values())
    assert max(len(counts(records, part)) for part in partition(records, 12, "shard", seed=0).values()) <= 2


def test_dirichlet_alpha_sets_the_skew():
    records = records_of(300, 300, 300)

    def largest_share(alpha):
        parts = partition(records, 5, "dirichlet", seed=1, alpha=alpha)
        return sum(max(counts(records, part).values()) / len(part) for part in parts.values()) / 5

    assert largest_share(1000.0) < 0.38
    assert largest_share(0.05) > 0.8


def test_dirichlet_keeps_min_examples():
    parts = partition(records_of(60, 60), 8, "dirichlet", seed=0, alpha=0.5, min_examples=5)
    assert min(map(len, parts.values())) >= 5
    with pytest.raises(
        ValueError, match=r"none of 100 Dirichlet draws with alpha=0\.01 gave each of 8 clients at least"
    ):
        partition(records_of(20), 8, "dirichlet", seed=0, alpha=0.01)


def test_natural_follows_the_column():
    records = [{"text": "a", "client": name} for name in ("bob", "ann", "bob", 3)]
    assert partition(records, None, "natural", seed=0) == {"3": [3], "ann": [1], "bob": [0, 2]}
    assert partition(records, 3, "natural", seed=0) == partition(records, None, "natural", seed=9)
    with pytest.raises(ValueError, match="column 'client' names 3 clients, got num_clients=2; leave it out"):
        partition(records, 2, "natural", seed=0)
    with pytest.raises(ValueError, match=r"clients with fewer than min_examples=2 examples: 3 \(1\), ann \(1\)"):
        partition(records, None, "natural", seed=0, min_examples=2)


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (
            ValueError,
            "scheme must be one of iid, shard, dirichlet, natural, got 'dirichlett'",
            {"scheme": "dirichlett"},
        ),
        (ValueError, r"9 clients need at least 9 examples \(1 each\), got 6", {"num_clients": 9}),
        (ValueError, r"3 clients need at least 9 examples \(3 each\), got 6", {"min_examples": 3}),
        (ValueError, "num_clients must be at least 1, got 0", {"num_clients": 0}),
        (TypeError, "scheme='iid' needs num_clients, got None", {"num_clients": None}),
        (
            ValueError,
            "record 0 has no column 'topic'; its columns: id, category",
            {"scheme": "shard", "label": "topic"},
        ),
        (ValueError, "record 0 has no column 'client'; its columns: id, category", {"scheme": "natural"}),
        (ValueError, "alpha must be at least", {"scheme": "dirichlet", "alpha": 0.0}),
        (ValueError, "need at least 9 examples, got 6", {"scheme": "shard", "shards_per_client": 3}),
    ],
)
def test_bad_arguments(error, words, options):
    with pytest.raises(error, match=words):
        partition(records_of(3, 3), **{"num_clients": 3, "scheme": "iid", "seed": 0, **options})


def write(tmp_path, value):
    path = tmp_path / "partitions.json"
    path.write_text(json.dumps(value), "utf-8")
    return path


def test_partition_file(tmp_path):
    records = [{"id": number} for number in (5, 6, 7, 8)]
    path = write(tmp_path, {"even": {"a": [8, 6], "b": [], "test": [5]}})
    assert partition_file(path, records, "even") == ({"a": [3, 1], "b": []}, [0])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"s1": {"a": [5]}}, "has no split 's'; did you mean 's1'"),
        ({"s": {"a": [5, 9]}}, r"s, a: no record has id=9"),
        ({"s": {"a": [5], "test": [5]}}, "id=5 is given to a and to test"),
        ({"s": {"a": [5, 5]}}, "id=5 is given to a and to a"),
        ({"s": [5]}, "must be {split: {client:"),
    ],
)
def test_bad_partition_file(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        partition_file(write(tmp_path, content), [{"id": 5}, {"id": 6}], "s")


def test_partition_file_needs_ids_that_differ(tmp_path):
    path = write(tmp_path, {"s": {"a": [5]}})
    with pytest.raises(ValueError, match="record 0 and record 1 have the same id='5'"):
        partition_file(path, [{"id": 5}, {"id": 5}], "s")
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        partition_file(tmp_path / "none.json", [{"id": 5}], "s")
    path.write_text("{", "utf-8")
    with pytest.raises(ValueError, match=r"partitions\.json: malformed JSON"):
        partition_file(path, [{"id": 5}], "s")


def test_dolly_partitions(shared_data):
    records = load_records(shared_data / "dolly" / "dolly15k.jsonl")
    for split in ("dirichlet05_10", "stratified_10"):
        parts, test = partition_file(shared_data / "dolly" / "partitions.json", records, split)
        used = [index for part in [*parts.values(), test] for index in part]
        assert (len(parts), len(test)) == (10, 80)
        assert len(used) == len(set(used)) == len(records)
