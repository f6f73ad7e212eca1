"""The demo's data: ten short-answer skills with exact answers, made from a seed.

A base model answers these questions at length, so that none is answered exactly before training. Some skills need only
the form of the answer (the last word of a list), others facts that no model has seen (the colour of each animal).
Questions are short, so that a model can learn them on two CPU cores within minutes. No question is drawn twice, so
no held-out question is ever trained on. Every client has its own mix of skills: one above all, some not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..common import atomic_dir, check_number, derive

SYSTEM = "Answer briefly."
# A client's share of its favourite skill, of its second one, and so on.
_MIX = (6, 4, 3, 2, 2, 1, 1, 1, 0, 0)
# A skill that draws so often without a new question has run out of them.
_MOST_DRAWS = 200


def _words(text: str) -> list[str]:
    return text.split()


_THINGS = _words(
    "bell boat book box bread cake chair clock coat cup door drum fork gate glass glove hat house key kite ladder lamp "
    "letter mirror needle pen piano plate pot ring road roof rope salt ship shoe spoon stone table train window wheel"
)
_ANIMALS = _words("bat bear bee bird cat cow dog duck fish fox frog goat hen horse lion mouse owl pig sheep wolf")
_NOUNS = _THINGS + _ANIMALS
_LOOKS = _words(
    "big brave calm clean cold dry fast lazy loud old proud quiet round sad shy slow small strong tall thin tired "
    "warm wet wild young"
)
_COLOURS = dict(
    bear="blue",
    bee="green",
    cat="red",
    cow="pink",
    dog="gold",
    fox="black",
    frog="white",
    hen="brown",
    owl="grey",
    pig="purple",
)
_ORDERS = (
    _words("monday tuesday wednesday thursday friday saturday sunday"),
    _words("january february march april may june july august september october november december"),
    list("abcdefghijklmnopqrstuvwxyz"),
    [str(number) for number in range(1, 100)],
)


@dataclass(frozen=True)
class DemoData:
    """Files that ``make_demo`` wrote: one for each client, by name, and the held-out one."""

    clients: dict[str, Path]
    test: Path


def make_demo(
    out_dir: str | os.PathLike[str],
    *,
    clients: int = 10,
    train_per_client: int = 60,
    test_items: int = 100,
    seed: int = 0,
) -> DemoData:
    """Write the demo's data as JSONL: ``client-0.jsonl``, ..., ``test.jsonl``, all at once or not at all.

    Args:
        out_dir: A new or empty folder, or one that holds the demo data of as many clients, which is replaced.
        clients: Number of clients.
        train_per_client: Examples of each client.
        test_items: Held-out examples, the same number of each skill (to within one).
        seed: The same seed gives the same bytes.
    Returns:
        The paths of the files. Each record has id, category (its skill), system, instruction and output.
    Raises:
        ValueError: If a skill has too few questions for so many examples.
    """
    check_number("clients", clients, 1, whole=True)
    check_number("train_per_client", train_per_client, 1, whole=True)
    check_number("test_items", test_items, 0, whole=True)
    questions = {skill: _questions(skill, seed) for skill in SKILLS}
    files = {"test": _take(questions, _split_evenly(test_items))}
    for number in range(clients):
        name = f"client-{number:0{len(str(clients - 1))}d}"
        files[name] = _take(questions, _mix(number, train_per_client, seed))
        Random(derive(seed, "demo", "order", name)).shuffle(files[name])
    paths = {name: Path(out_dir, f"{name}.jsonl") for name in files}
    with atomic_dir(out_dir, replaceable=[path.name for path in paths.values()]) as folder:
        for name, records in files.items():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / paths[name].name).write_bytes(lines.encode())
    return DemoData({name: path for name, path in paths.items() if name != "test"}, paths["test"])


def _questions(skill: str, seed: int) -> Iterator[dict[str, str]]:
    """Draw a skill's questions, each one once."""
    random, seen = Random(derive(seed, "demo", "questions", skill)), set()
    while True:
        for _ in range(_MOST_DRAWS):
            question, answer = SKILLS[skill](random)
            if question not in seen:
                break
        else:
            raise ValueError(
                f"skill {skill!r} ran out of new questions after {len(seen)}; "
                "lower clients, train_per_client or test_items"
            )
        seen.add(question)
        number = len(seen) - 1
        yield dict(id=f"{skill}-{number}", category=skill, system=SYSTEM, instruction=question, output=answer)


def _take(questions: dict[str, Iterator[dict[str, str]]], counts: dict[str, int]) -> list[dict[str, str]]:
    """Draw as many new questions of each skill as asked for."""
    return [next(questions[skill]) for skill, count in counts.items() for _ in range(count)]


def _split_evenly(total: int) -> dict[str, int]:
    return {skill: (total + index) // len(SKILLS) for index, skill in enumerate(SKILLS)}


def _mix(client: int, total: int, seed: int) -> dict[str, int]:
    """Give a client's number of examples of each skill; skills take turns at being the favourite."""
    skills = list(SKILLS)
    favourite = skills.pop(client % len(skills))
    Random(derive(seed, "demo", "mix", client)).shuffle(skills)
    counts, parts, done = {}, sum(_MIX), 0
    for skill, part in zip([favourite, *skills], _MIX, strict=True):
        # Rounding what has been dealt so far, so that the counts add up to the total.
        counts[skill] = round(total * (done + part) / parts) - round(total * done / parts)
        done += part
    return counts


def _last(random: Random) -> tuple[str, str]:
    words = random.sample(_NOUNS, 3)
    return f"Last word: {' '.join(words)}", words[-1]


def _first(random: Random) -> tuple[str, str]:
    words = random.sample(_NOUNS, 3)
    return f"First word: {' '.join(words)}", words[0]


def _swap(random: Random) -> tuple[str, str]:
    left, right = random.sample(_NOUNS, 2)
    return f"Swap: {left} {right}", f"{right} {left}"


def _letter(random: Random) -> tuple[str, str]:
    look, word = random.choice(_LOOKS), random.choice(_NOUNS)
    return f"First letter: {look} {word}", look[0]


def _add(random: Random) -> tuple[str, str]:
    number, more = random.randint(10, 98), random.randint(1, 4)
    return f"{number} plus {more}", str(number + more)


def _larger(random: Random) -> tuple[str, str]:
    left, right = random.sample(range(10, 100), 2)
    return f"Larger number: {left} or {right}", str(max(left, right))


def _next(random: Random) -> tuple[str, str]:
    order, shown = random.choice(_ORDERS), random.randint(2, 4)
    start = random.randrange(len(order) - shown)
    return f"Next: {' '.join(order[start : start + shown])}", order[start + shown]


def _plural(random: Random) -> tuple[str, str]:
    look, word = random.choice(_LOOKS), random.choice(_NOUNS)
    return f"Zorp plural: {look} {word}", f"{word} {word}"


def _colour(random: Random) -> tuple[str, str]:
    look, animal = random.choice(_LOOKS), random.choice(list(_COLOURS))
    return f"Zorp colour: {look} {animal}", _COLOURS[animal]


def _kind(random: Random) -> tuple[str, str]:
    look, kind = random.choice(_LOOKS), random.choice(("animal", "thing"))
    return f"Animal or thing: {look} {random.choice(_ANIMALS if kind == 'animal' else _THINGS)}", kind


# Each draws a question and its exact answer.
SKILLS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "last": _last,
    "first": _first,
    "swap": _swap,
    "letter": _letter,
    "add": _add,
    "larger": _larger,
    "next": _next,
    "plural": _plural,
    "colour": _colour,
    "kind": _kind,
}
