"""A record as one text with its answers; the plain layout under headings, for tokenizers without a chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .messages import THOUGHTS
from .records import Record

Note = Callable[[str], None]
_HEADINGS = {"system": "### Background", "developer": "### Background", "user": "### Task", "assistant": "### Answer"}
EMPTY = "all answers are empty, so only their end marks are learned"
ENDS_TWICE = "an answer spells its own end mark, which is kept once"


class Answer(NamedTuple):
    """The characters start..stop of an answer with its end mark; ``agrees``: generation starts from what is before."""

    start: int
    stop: int
    loss: bool
    agrees: bool = True


class Layout(NamedTuple):
    """A record as text, with its answers; ``ended`` is False where an end mark must follow the text."""

    text: str
    answers: list[Answer]
    ended: bool = True


class Plain:
    """The plain prompt template: headings, and the tokenizer's eos after each answer."""

    def __init__(self, tokenizer: Any):
        self.eos = str(tokenizer.eos_token)

    def layout(self, record: Record, note: Note) -> Layout:
        """Lay a conversation out under headings."""
        text, answers = "", []
        for message, loss in zip(self._messages(record, note), record.loss, strict=True):
            text += ("\n\n" if text else "") + f"{_HEADINGS[message['role']]}\n"
            start = len(text)
            text += message["content"]
            if message["role"] == "assistant":
                text += self.eos
                answers.append(Answer(start, len(text), loss))
        return Layout(text, answers)

    def prompt(self, record: Record) -> str:
        """Return the text before the last answer."""
        whole = self.layout(record, lambda _: None)
        return whole.text[: whole.answers[-1].start]

    def _messages(self, record: Record, note: Note) -> list[dict[str, Any]]:
        """The messages, of which nothing may be lost."""
        messages = record.messages or []
        parts = {key for message in messages for key in ("tool_calls", *THOUGHTS) if message.get(key)}
        parts |= {name for name in ("tools", "documents", "template_kwargs") if getattr(record, name)}
        parts |= {f"the role {message['role']}" for message in messages if message["role"] not in _HEADINGS}
        if parts:
            raise ValueError(
                f"{record.place}: the plain prompt template has no place for {', '.join(sorted(parts))}; use a "
                "tokenizer with a chat template, or remove it"
            )
        if any("name" in message for message in messages):
            note("the plain prompt template leaves out the name of turns")
        return end_once(messages, [self.eos], note)


def end_once(messages: Sequence[dict[str, Any]], ends: Sequence[str], note: Note) -> list[dict[str, Any]]:
    """Take the end mark off answers that spell it, for the template writes it."""
    found = []
    for message in messages:
        content = message["content"].rstrip()
        end = next((end for end in ends if content.endswith(end)), None) if message["role"] == "assistant" else None
        if end is not None:
            note(ENDS_TWICE)
        found.append(message if end is None else {**message, "content": content.removesuffix(end)})
    return found
