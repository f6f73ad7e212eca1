"""The demo's data: the same bytes for a seed, exact answers, no question twice, another mix of skills per client."""

import re
from collections import Counter

import pytest

from flora_core.data.demo import _COLOURS, _ORDERS, SKILLS, make_demo
from flora_core.data.records import load_records

ANIMALS = {"cat", "frog", "owl", "wolf", "bee", "horse"}
THINGS = {"bell", "cup", "wheel", "salt", "road", "piano"}


def solve(skill, question):
    """Answer a question from its words alone; None where the answer is a fact of the skill's own."""
    words = question.split()
    match skill:
        case "last":
            return words[-1]
        case "first":
            return words[2]
        case "swap":
            return f"{words[2]} {words[1]}"
        case "letter":
            return words[2][0]
        case "add":
            return str(int(words[0]) + int(words[2]))
        case "larger":
            return max(words[2], words[4], key=int)
        case "next":
            following = [order[order.index(words[-1]) + 1] for order in _ORDERS if words[-1] in order[:-1]]
            return following[0]
        case "plural":
            return f"{words[-1]} {words[-1]}"
        case "colour":
            return _COLOURS[words[-1]]
        case "kind":
            return "animal" if words[-1] in ANIMALS else "thing" if words[-1] in THINGS else None


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    made = make_demo(tmp_path_factory.mktemp("demo"), clients=10, train_per_client=60, test_items=105, seed=3)
    clients = {name: load_records(path) for name, path in made.clients.items()}
    return clients, load_records(made.test)


def everything(demo):
    clients, test = demo
    return [record for part in [*clients.values(), test] for record in part]


def test_same_seed_same_bytes(tmp_path):
    made = [make_demo(tmp_path / name, clients=3, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    one, same, other = ([path.read_bytes() for path in (*m.clients.values(), m.test)] for m in made)
    assert one == same
    assert all(mine != theirs for mine, theirs in zip(one, other, strict=True))


def test_sizes_and_names(demo):
    clients, test = demo
    assert list(clients) == [f"client-{number}" for number in range(10)]
    assert {len(part) for part in clients.values()} == {60}
    assert sorted(Counter(record["category"] for record in test).values()) == [10] * 5 + [11] * 5


def test_no_question_stands_twice(demo):
    questions = [record["instruction"] for record in everything(demo)]
    assert len(set(questions)) == len(questions) == 705
    assert len({record["id"] for record in everything(demo)}) == 705


def test_answers_are_exact(demo):
    checked = Counter()
    for record in everything(demo):
        answer = solve(record["category"], record["instruction"])
        assert answer in (record["output"], None), record
        checked[record["category"]] += answer is not None
    assert set(checked) == set(SKILLS)
    assert min(checked.values()) > 10


def test_questions_are_short_and_answers_bare(demo):
    for record in everything(demo):
        assert len(record["instruction"].split()) <= 6
        assert re.fullmatch(r"[a-z]+( [a-z]+)?|\d+", record["output"]), record
        assert record["system"]


def test_clients_differ_in_their_mix(demo):
    mixes = [Counter(record["category"] for record in part) for part in demo[0].values()]
    assert {mix.most_common(1)[0][0] for mix in mixes} == set(SKILLS)
    assert all(len(mix) == 8 and mix.most_common(1)[0][1] == 18 for mix in mixes)
    assert len({tuple(sorted(mix.items())) for mix in mixes}) == 10
    # No file is sorted by skill: a batch would hold one skill alone.
    assert all(len({record["category"] for record in part[:10]}) > 2 for part in demo[0].values())


@pytest.mark.parametrize("train_per_client", [1, 7, 19])
def test_any_size(tmp_path, train_per_client):
    made = make_demo(tmp_path, clients=2, train_per_client=train_per_client, test_items=0)
    assert [len(load_records(path)) for path in made.clients.values()] == [train_per_client] * 2


def test_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "demo"
    make_demo(folder, clients=2, seed=0)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"skill '\w+' ran out of new questions after \d+; lower clients, train_per_"):
        make_demo(folder, clients=2, train_per_client=20_000, seed=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    make_demo(folder, clients=2, seed=1)
    assert {path.name for path in folder.iterdir()} == set(before)
    assert all((folder / name).read_bytes() != content for name, content in before.items())
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt: choose a new or an empty folder"):
        make_demo(folder, clients=2)
    assert (folder / "notes.txt").read_text() == "mine"


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="clients must be at least 1, got 0"):
        make_demo(tmp_path, clients=0)
