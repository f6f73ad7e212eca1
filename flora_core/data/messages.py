"""Conversations: every turn's role, content, tool calls and loss, checked and spelled as chat templates read them.

Roles are system, developer, user, assistant and tool; ShareGPT's from and value, and the names that data sets have for
the roles, are rewritten. Content is text: a list of text parts is joined. Null keys count as absent. Errors here have
no place: ``records.normalise``, which knows it, puts it before them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..common import require

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE_OF = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "function_response", "ipython"), "tool"),
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Spellings of a turn's own loss mask, and one that means the opposite.
_TRAINED = ("train", "trainable", "training", "weight", "loss", "loss_mask")
_LEFT_OUT = ("masked",)
_COPIED = ("name", "tool_call_id", *THOUGHTS)
_READ = frozenset(("role", "from", "content", "value", "tool_calls", "function_call", *_COPIED, *_TRAINED, *_LEFT_OUT))
# Columns, of a record or of a turn, that describe it and are never part of what is trained or seen.
METADATA = frozenset(
    """
    id idx index uid uuid _id record_id example_id sample_id row_id prompt_id message_id parent_id conversation_id
    conv_id session_id dialog_id __index_level_0__ category client client_id user_id site source dataset origin subset
    split domain topic subject task task_id task_name lang language difficulty license url author annotator created_at
    timestamp date version hash meta metadata tags num_tokens num_turns
    """.split()  # noqa: SIM905 - forty names read better as text
)


class Conversation(NamedTuple):
    """Messages, whether each carries loss, and the keys of turns that nothing here reads."""

    messages: list[dict[str, Any]]
    loss: list[bool]
    unknown: list[str]


def absent(value: Any) -> bool:
    """Tell a missing value: null, or the NaN that table readers put for it."""
    return value is None or (isinstance(value, float) and value != value)


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the keys that have a value."""
    return {key: value for key, value in fields.items() if not absent(value)}


def read_conversation(value: Any, name: str) -> Conversation:
    """Check a list of messages, or its JSON text.

    Raises:
        ValueError: If it is no list of messages, or a message cannot be trained on.
    """
    value = parsed(value, name)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name} must be a list of at least one message, got {value!r:.80}")
    turns = [_turn(turn, f"{name}[{number}]") for number, turn in enumerate(_spelled_out(value))]
    unknown = sorted({f"{name}[].{key}" for turn in turns for key in turn[2]})
    return Conversation([turn[0] for turn in turns], [turn[1] for turn in turns], unknown)


def _spelled_out(value: Any) -> list[Any]:
    """The turns of a list that gives only their texts in order (LIMA's), or pairs of input and output (Capybara's)."""
    if len(value) > 1 and all(isinstance(turn, str) for turn in value):
        return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(value)]
    if all(isinstance(turn, Mapping) and turn.keys() == {"input", "output"} for turn in value):
        pairs = [(("user", turn["input"]), ("assistant", turn["output"])) for turn in value]
        return [{"role": role, "content": text} for pair in pairs for role, text in pair]
    return list(value)


def read_tools(value: Any) -> list[Any]:
    """Check a tools column: a list of function schemas, or its JSON text."""
    tools = parsed(value, "tools")
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools must be a list of function schemas (objects), got {tools!r:.80}")
    check_strings(tools, "tools")
    return list(tools)


def parsed(value: Any, name: str) -> Any:
    """Give what a column's JSON text stands for (tables have no lists), or the value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be a list or the JSON text of one, got {value!r:.80} ({error})") from None


def check_text(value: Any, name: str) -> str:
    """Check that a value is text that a tokenizer can take, and return it."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair, which is no text; remove it") from None
    return value


def check_strings(value: Any, name: str) -> None:
    """Check every string of a JSON value."""
    for text in strings(value):
        check_text(text, name)


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys too; without recursion, for values may be deep."""
    todo = [value]
    while todo:
        here = todo.pop()
        if isinstance(here, str):
            yield here
        elif isinstance(here, Mapping):
            todo += [*here, *here.values()]
        elif isinstance(here, (list, tuple)):
            todo += here


def _turn(turn: Any, name: str) -> tuple[dict[str, Any], bool, list[str]]:
    """Check one message; return it, whether it carries loss, and its unknown keys."""
    given = present(turn) if isinstance(turn, Mapping) else {}
    if not ("role" in given or "from" in given):
        raise ValueError(f"{name} must have role and content (or from and value), got {turn!r:.80}")
    spelled = _either(given, "role", "from", name)
    if not isinstance(spelled, str) or spelled not in _ROLE_OF:
        raise ValueError(f"the role of {name} must be one of {', '.join(ROLES)}, got {spelled!r:.80}")
    role, calls = _ROLE_OF[spelled], _calls(given, spelled, name)
    if not calls and "content" not in given and "value" not in given:
        raise ValueError(f"{name} must have role and content, got {turn!r:.80}")
    message: dict[str, Any] = {"role": role, "content": "" if spelled == "function_call" else _content(given, name)}
    if calls:
        require(role == "assistant", f"{name} has tool_calls, and its role is {role}; only the assistant calls tools")
        message["tool_calls"] = calls
    message |= {key: check_text(given[key], f"{name}.{key}") for key in _COPIED if key in given}
    # A template may read keys of its own, so the rest is passed on; it is reported all the same.
    unknown = [key for key in given if key not in _READ and key not in METADATA]
    message |= {key: given[key] for key in unknown}
    return message, _loss(given, role, name), unknown


def _either(given: Mapping[str, Any], one: str, other: str, name: str) -> Any:
    """The value of a key that has two spellings."""
    if one in given and other in given and given[one] != given[other]:
        raise ValueError(f"{name} has {one} and {other}, and they differ; keep one")
    return given.get(one, given.get(other))


def _content(given: Mapping[str, Any], name: str) -> str:
    """The text of a message: a string, or text parts, joined; a turn that calls tools may have none."""
    content = _either(given, "content", "value", name)
    if content is None:
        return ""
    if isinstance(content, (list, tuple)):
        return "".join(_part(part, f"{name}.content[{number}]") for number, part in enumerate(content))
    return check_text(content, f"{name}.content")


def _part(part: Any, name: str) -> str:
    """The text of one content part."""
    if isinstance(part, str):
        return check_text(part, name)
    given = present(part) if isinstance(part, Mapping) else {}
    known = given.get("type", "text") in ("text", "input_text", "output_text") and "text" in given
    if not known or given.keys() - {"type", "text", "cache_control", "annotations"}:
        raise ValueError(
            f"{name} must be a text part {{'type': 'text', 'text': ...}}, got {part!r:.80}; only text is trained on: "
            "remove images, audio and other parts"
        )
    return check_text(given["text"], f"{name}.text")


def _calls(given: Mapping[str, Any], spelled: str, name: str) -> list[dict[str, Any]]:
    """The calls of a turn: tool_calls, the older function_call, or ShareGPT's turn of that name."""
    if spelled == "function_call":
        calls = parsed(_either(given, "content", "value", name), f"{name}.value")
        calls = calls if isinstance(calls, list) else [calls]
    else:
        calls = parsed(given.get("tool_calls", []), f"{name}.tool_calls")
        older = given.get("function_call")
        require(not (calls and older), f"{name} has tool_calls and function_call; keep one")
        calls = [older] if older else calls
    if not isinstance(calls, (list, tuple)):
        raise ValueError(f"{name}.tool_calls must be a list, got {calls!r:.80}")
    return [_call(call, f"{name}.tool_calls[{number}]") for number, call in enumerate(calls)]


def _call(call: Any, name: str) -> dict[str, Any]:
    """One call as {type: function, function: {name, arguments}}, with the other keys that it has."""
    given = present(call) if isinstance(call, Mapping) else {}
    function = given.get("function", given)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name} must have a function with name and arguments, got {call!r:.80}")
    check_strings(given, name)
    return {"type": "function", **(given if "function" in given else {"function": given})}


def _loss(given: Mapping[str, Any], role: str, name: str) -> bool:
    """Read the loss mask of a turn; without one the assistant's turns carry loss, and no others."""
    require("mask" not in given, f"{name}.mask can mean either; write train: true or false, or weight: 1 or 0")
    require("train_detail" not in given, f"{name}.train_detail masks parts of a turn, which cannot be; split the turn")
    asked = {key: _flag(given[key], f"{name}.{key}") for key in _TRAINED if key in given}
    asked |= {key: not _flag(given[key], f"{name}.{key}") for key in _LEFT_OUT if key in given}
    require(len({*asked.values()}) < 2, f"{name}: {', '.join(asked)} contradict one another; keep one")
    trained = next(iter(asked.values()), role == "assistant")
    require(
        role == "assistant" or not trained,
        f"{name} asks for loss on a turn of the {role}, and only the assistant's turns can have it; remove "
        f"{next(iter(asked), '')}",
    )
    return trained


def _flag(value: Any, name: str) -> bool:
    """A yes or no, as a bool or as 0 or 1."""
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise ValueError(f"{name} must be true or false, or 1 or 0 (no weights between), got {value!r:.40}")
    return bool(value)
