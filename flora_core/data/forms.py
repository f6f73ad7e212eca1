"""Forms of a record: which columns hold the conversation, and what each of them becomes.

    chat        messages | conversations                 a list of turns, ShareGPT's too
    question    `QUESTION` with input | context, system, history, and one of `ANSWER`
    prompt      prompt and completion as lists of turns  loss on the completion alone
    choices     question, choices, answer (an index)     for evaluation; or choices {text, label} and answerKey (ARC)
    text        text                                     all of it is learned

A column's meaning is its name's, whatever its case, so forms and field names may be mixed. Two columns that claim the
same part and differ are refused: one of them would be lost. Errors have no place here, as in ``messages``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common import require
from .messages import (
    THOUGHTS,
    check_strings,
    check_text,
    parsed,
    present,
    read_conversation,
    read_tools,
)

CHAT = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt", "system_message")
QUESTION = ("instruction", "question", "prompt", "query", "problem", "inputs")
EXTRA = ("input", "context")
ANSWER = ("output", "response", "answer", "completion", "solution", "generated_solution", "target", "targets")
TEMPLATE_KWARGS = ("chat_template_kwargs", "template_kwargs")
ACCEPTED = (
    "messages | conversations | instruction, output (and input) | instruction, response (and context) | "
    "question, answer | prompt, completion | text"
)
_CONTENT = (*CHAT, *QUESTION, *EXTRA, *ANSWER, *SYSTEM, "text", "history", "choices", "tools")
_LETTERS = 10
# Columns that change what is trained or seen and that the engine has no use for: never dropped.
_REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is trained on"),
    **dict.fromkeys(("chosen", "rejected"), "preference pairs are not trained on; name the good answer completion"),
}


@dataclass
class Parts:
    """Meaning of a record's columns; the fields are those of ``records.Record``."""

    messages: list[dict[str, Any]] | None = None
    loss: list[bool] = field(default_factory=list)
    text: str | None = None
    choices: list[str] | None = None
    correct: int = 0
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


class _Columns:
    """A record's columns, of which each is taken once."""

    def __init__(self, fields: Mapping[str, Any]):
        given = present(fields)
        # Some data sets write Question and Answer.
        small = {name: name.lower() for name in given if name.lower() in _CONTENT and name.lower() not in given}
        self.given = {small.get(name, name): value for name, value in given.items()}
        self.left = dict(self.given)

    def has(self, names: tuple[str, ...]) -> bool:
        """Tell whether one of the columns has a value that is not empty."""
        return any(self.left.get(name) not in (None, "", [], {}) for name in names)

    def take(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """Take the column of these names, filled ones first: its name (the first, if there is none) and value."""
        found = {name: self.left.pop(name) for name in names if name in self.left}
        filled = {name: value for name, value in found.items() if value not in ("", [], {})} or found
        name, value = next(iter(filled.items()), (names[0], None))
        other = next((name for name, another in filled.items() if another != value), None)
        require(other is None, f"{name} and {other} both hold the same part of the record, and differ; keep one")
        return name, value

    def text(self, names: tuple[str, ...]) -> str:
        """Take a column of text; empty if there is none."""
        name, value = self.take(names)
        return "" if value is None else check_text(value, name)


def read_form(fields: Mapping[str, Any]) -> Parts:
    """Read a record's columns by its form.

    Raises:
        ValueError: If it has no known form, two that disagree, or a column cannot be read.
    """
    columns = _Columns(fields)
    for name, why in _REFUSED.items():
        require(not columns.has((name,)), f"{name} is not supported: {why}")
    parts = Parts()
    if columns.has(CHAT):
        _read_chat(columns, parts)
    elif columns.has(("choices",)):
        _read_choices(columns, parts)
    elif _is_question(columns):
        _read_question(columns, parts)
    elif "text" in columns.left:
        tree = columns.has(("text",)) and columns.has(("role",)) and "parent_id" in fields
        require(not tree, "the record is one message of a tree (text, role, parent_id); join each path into messages")
        parts.text = columns.text(("text",))
    elif empty := [name for name in CHAT if name in columns.given]:
        raise ValueError(f"{empty[0]} must be a list of at least one message, got {columns.given[empty[0]]!r:.80}")
    else:
        raise ValueError(
            f"the record lacks the needed fields; found: {_found(fields)}; accepted: {ACCEPTED}; rename the columns "
            "that hold question and answer"
        )
    if parts.messages is not None:
        _read_settings(columns, parts)
        columns.left = {name: value for name, value in columns.left.items() if not _repeats(name, value, parts)}
        if _renders(columns.left.get("text"), parts):
            # Alpaca's and others' data sets bring each record a second time, laid out for some template.
            parts.unknown.append("text")
            del columns.left["text"]
    for name in _CONTENT:
        if columns.has((name,)):
            used = next(name for name in columns.given if name not in columns.left)
            raise ValueError(f"{name} stands beside {used}, and only one can be the record's form; remove one of them")
    # Empty columns of content say nothing; all others that are left were not read.
    parts.unknown += [name for name in columns.left if name not in (*_CONTENT, *_REFUSED)]
    return parts


def _is_question(columns: _Columns) -> bool:
    asks = any(name in columns.left for name in QUESTION) or columns.has(("input",))
    return asks and any(name in columns.left for name in ANSWER)


def _read_chat(columns: _Columns, parts: Parts) -> None:
    name, value = columns.take(CHAT)
    conversation = read_conversation(value, name)
    parts.messages, parts.loss, parts.unknown = conversation
    system = columns.text(SYSTEM)
    if system:
        first = parts.messages[0]
        if first["role"] not in ("system", "developer"):
            _put_before(parts, [{"role": "system", "content": system}])
        require(
            parts.messages[0]["content"] == system,
            f"the record has a system column and {name} begins with another system message; keep one",
        )


def _read_question(columns: _Columns, parts: Parts) -> None:
    """Question and answer, each a text or, as trl has them, a list of turns."""
    if _renders_columns(columns):
        parts.unknown.append("prompt")
        del columns.left["prompt"]
    asked, answered = columns.take(QUESTION), columns.take(ANSWER)
    extra_name, extra = columns.take(EXTRA)
    if asked[1] in (None, "") and extra_name == "input" and extra:
        asked, extra = ("input", extra), None
    require(asked[1] is not None and answered[1] is not None, f"{asked[0]} and {answered[0]} must both have a value")
    prompt = _turns(*asked, "user")
    if extra not in (None, ""):
        require(isinstance(asked[1], str), f"{extra_name} stands beside {asked[0]}, a list of turns; put it into them")
        prompt[0]["content"] += ("\n\n" if prompt[0]["content"] else "") + check_text(extra, extra_name)
    parts.messages, parts.loss = prompt, [False] * len(prompt)
    _add_answer(answered, columns, parts)
    _put_before(parts, _history(columns))
    if system := columns.text(SYSTEM):
        require(parts.messages[0]["role"] != "system", f"the record has a system column and {asked[0]} begins with one")
        _put_before(parts, [{"role": "system", "content": system}])


def _add_answer(answered: tuple[str, Any], columns: _Columns, parts: Parts) -> None:
    name, value = answered
    if isinstance(value, (list, tuple)):
        conversation = read_conversation(value, name)
        parts.messages = [*(parts.messages or []), *conversation.messages]
        parts.loss += conversation.loss
        parts.unknown += conversation.unknown
        return
    answer = _turns(name, value, "assistant")
    if thought := columns.text(THOUGHTS):
        answer[0]["reasoning_content"] = thought
    parts.messages = [*(parts.messages or []), *answer]
    parts.loss += [True]


def _turns(name: str, value: Any, role: str) -> list[dict[str, Any]]:
    """The turns that a column holds: one of text, or a list."""
    if isinstance(value, (list, tuple)):
        return read_conversation(value, name).messages
    return [{"role": role, "content": check_text(value, name)}]


def _history(columns: _Columns) -> list[dict[str, Any]]:
    """Earlier turns: pairs of question and answer, or messages."""
    _, value = columns.take(("history",))
    pairs = parsed(value, "history") if value else []
    if isinstance(pairs, (list, tuple)) and pairs and all(isinstance(turn, Mapping) for turn in pairs):
        return read_conversation(pairs, "history").messages
    turns = []
    for number, pair in enumerate(pairs if isinstance(pairs, (list, tuple)) else [pairs]):
        good = isinstance(pair, (list, tuple)) and len(pair) == 2
        require(good, f"history[{number}] must be a pair [question, answer], got {pair!r:.80}")
        names = zip(("user", "assistant"), pair, strict=True)
        turns += [{"role": role, "content": check_text(text, f"history[{number}]")} for role, text in names]
    return turns


def _put_before(parts: Parts, turns: list[dict[str, Any]]) -> None:
    parts.messages = [*turns, *(parts.messages or [])]
    parts.loss = [turn["role"] == "assistant" for turn in turns] + parts.loss


def _read_choices(columns: _Columns, parts: Parts) -> None:
    """A multiple-choice question."""
    choices: Any = columns.take(("choices",))[1]
    answer: Any = columns.take(("answer", "answerKey"))[1]
    given = answer
    if isinstance(choices, Mapping):
        labels = list(choices.get("label") or ())
        choices, answer = choices.get("text"), labels.index(given) if labels.count(given) == 1 else None
    count = len(choices) if isinstance(choices, (list, tuple)) else 0
    fits = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count and 2 <= count <= _LETTERS
    question = columns.take(("question",))[1]
    require(
        fits and question is not None,
        f"multiple choice needs question, choices (2 to {_LETTERS}) and answer (an index), or choices {{text, label}} "
        f"and answerKey (a label), got answer {given!r:.40}",
    )
    texts = [check_text(text, f"choices[{number}]") for number, text in enumerate(choices)]
    parts.text, parts.choices, parts.correct = check_text(question, "question"), texts, answer


def _read_settings(columns: _Columns, parts: Parts) -> None:
    """Tools, documents and the template's own arguments."""
    tools, documents = columns.take(("tools",))[1], columns.take(("documents",))[1]
    parts.tools = read_tools(tools) or None if tools else None
    if documents:
        parts.documents = parsed(documents, "documents")
        good = isinstance(parts.documents, list) and all(isinstance(one, Mapping) for one in parts.documents)
        require(good, "documents must be a list of objects with title and text")
        check_strings(parts.documents, "documents")
    name, kwargs = columns.take(TEMPLATE_KWARGS)
    kwargs = parsed(kwargs, name) if kwargs else {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"{name} must be an object, got {kwargs!r:.80}")
    parts.template_kwargs = present(kwargs)
    if columns.has(("enable_thinking",)):
        parts.template_kwargs["enable_thinking"] = columns.take(("enable_thinking",))[1]
    ours = {"messages", "tools", "documents", "add_generation_prompt", "tokenize", "chat_template", "conversation"}
    taken = sorted(ours & parts.template_kwargs.keys())
    require(not taken, f"{name} must not set {', '.join(taken)}; the record's own columns do")


def _repeats(name: str, value: Any, parts: Parts) -> bool:
    """Tell a column whose text is one of the messages anyway (a data set's prompt beside its messages)."""
    if name not in (*QUESTION, *ANSWER) or not isinstance(value, str):
        return False
    return any(message["content"].strip() == value.strip() for message in parts.messages or [])


def _renders_columns(columns: _Columns) -> bool:
    """Tell a prompt that repeats the question beside it and the answer, laid out for some template."""
    names = [name for name in (*QUESTION, *EXTRA, *ANSWER) if name != "prompt"]
    given = [value for name in names if isinstance(value := columns.left.get(name), str) and value.strip()]
    prompt, asks = columns.left.get("prompt"), any(name in columns.left for name in QUESTION if name != "prompt")
    return isinstance(prompt, str) and asks and len(given) > 1 and all(value.strip() in prompt for value in given)


def _renders(text: Any, parts: Parts) -> bool:
    """Tell a text that repeats the whole record: every paragraph of every turn stands in it."""
    contents = [message["content"] for message in parts.messages or [] if isinstance(message["content"], str)]
    paragraphs = [part.strip() for content in contents for part in content.split("\n\n")]
    return isinstance(text, str) and any(paragraphs) and all(part in text for part in paragraphs)


def _found(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, present(fields))) or "none"
