"""Where in a rendered conversation each answer stands, and what the template left out.

An answer begins where the generation prompt ends and stops after its end mark. A chat template only gives text, so the
answer is found in it: by the template's own ``{% generation %}`` marks where it has them, else behind the generation
prompt by the message's content, else by rendering the conversation again with a stand-in for the content. What a
template makes impossible (a generation prompt that the conversation does not repeat, a part of a message that it leaves
out) is noted with the record's place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from .layout import Answer, Note
from .messages import THOUGHTS, strings
from .records import Record

STAND_IN, NEXT = "\u241eanswer\u241e", "\u241enext\u241e"
_THOUGHT = re.compile(r"</?think(?:ing)?>")
_ESCAPED = re.compile(r"""[\n\t"'\\<>&]|[^\x00-\x7f]""")
DIFFERS = "what stands before an answer is not what generation starts from (the chat template renders them differently)"
SPEAKS_FIRST = "the assistant speaks first; that turn has no loss, for nothing stands before it"


class Template(Protocol):
    """A chat template, and what it writes around answers."""

    tokenizer: Any
    special: re.Pattern[str]
    leads: list[str]
    ends: list[str]
    role_ends: bool

    def render(self, messages: Sequence[dict[str, Any]], record: Record | None, **options: Any) -> str:
        """Render messages with a record's tools, documents and template arguments."""
        ...

    def end_after(self, text: str, at: int) -> int | None:
        """Find where the end mark stops that follows an answer's content; None if there is none."""
        ...


class Rendered:
    """One conversation as a chat template renders it, in which answers are found."""

    def __init__(self, chat: Template, record: Record, messages: list[dict[str, Any]]):
        self.chat, self.record, self.messages = chat, record, messages
        self.turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        self.text = chat.render(messages, record)
        self.open_end = False

    def prompt(self, turn: int) -> str:
        """Render the prompt that generation of this turn starts from."""
        return self.chat.render(self.messages[:turn], self.record, add_generation_prompt=True)

    def answer(self, turn: int, mark: tuple[int, int] | None, done: int, note: Note) -> Answer:
        """Find a turn of the assistant's in the text, behind the answer that stops at ``done``."""
        loss = self.record.loss[turn]
        if turn == 0:
            note(SPEAKS_FIRST)
            return Answer(0, self._stop(turn, 0, mark)[1], False)
        prompt = self._prompt_or_none(turn)
        agrees = prompt is not None and self.text.startswith(prompt) and len(prompt) >= done
        if agrees:
            start = len(prompt or "")
            return Answer(start, self._stop(turn, start, mark)[1], loss)
        note(DIFFERS)
        begins, stop = self._stop(turn, None, mark)
        return Answer(max(done, self._start(turn, prompt, begins)), stop, loss, agrees=False)

    def _prompt_or_none(self, turn: int) -> str | None:
        try:
            return self.prompt(turn)
        except ValueError:
            return None

    def _start(self, turn: int, prompt: str | None, begins: int | None) -> int:
        """Find the start of an answer whose generation prompt the text does not repeat: the first difference.

        ``begins`` is where its content begins; None where that is not known.
        """
        differs = None if prompt is None else self._first_difference(turn, prompt)
        known = [at for at in (differs, begins) if at is not None]
        if not known:
            raise ValueError(
                f"{self.record.place}: the start of message {turn} cannot be found in what the chat template renders; "
                "use a template that repeats its generation prompt, or remove the turn"
            )
        return min(known)

    def _first_difference(self, turn: int, prompt: str) -> int | None:
        """Find where a generation prompt and the text part, if that is behind the messages before the turn."""
        pairs = zip(prompt, self.text, strict=False)
        same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(prompt), len(self.text)))
        history = self.chat.render(self.messages[:turn], self.record)
        return same if self.text.startswith(history) and same >= len(history) else None

    def _stop(self, turn: int, start: int | None, mark: tuple[int, int] | None) -> tuple[int | None, int]:
        """Find where a turn's content begins, None if that is not known, and where its end mark stops."""
        message = self.messages[turn]
        if mark is not None:
            found = [
                end
                for end in self.chat.special.finditer(self.text, *mark)
                if not self.text[end.end() : mark[1]].strip()
            ]
            stop = found[-1].end() if found else self.chat.end_after(self.text, mark[1])
            return mark[0], self._or_open(turn, stop, mark[1])
        if message.get("tool_calls"):
            return self._stop_of_calls(turn, start)
        if start is not None:
            for lead in self.chat.leads:
                for content in dict.fromkeys((message["content"], message["content"].strip())):
                    if self.text.startswith(lead + content, start):
                        at = start + len(lead) + len(content)
                        stop = self.chat.end_after(self.text, at)
                        if stop is not None or not self.text[at:].strip():
                            return at - len(content), self._or_open(turn, stop, at)
        return self._stop_by_stand_in(turn, start or 0)

    def _stop_by_stand_in(self, turn: int, start: int) -> tuple[int, int]:
        """Find a turn's content by rendering a stand-in for it."""
        marked = [*self.messages]
        marked[turn] = {**marked[turn], "content": STAND_IN}
        before, found, after = self.chat.render(marked, self.record).rpartition(STAND_IN)
        at = len(self.text) - len(after)
        if not found or not self.text.endswith(after) or at < start:
            raise ValueError(
                f"{self.record.place}: the chat template does not render message {turn} so that its answer can be "
                "found; use template='prompt'"
            )
        begins = len(before) if self.text.startswith(before) and start <= len(before) <= at else max(start, 0)
        return begins, self._or_open(turn, self.chat.end_after(self.text, at), at)

    def _stop_of_calls(self, turn: int, start: int | None) -> tuple[int | None, int]:
        """Find the end of a turn that calls tools: the end mark between its last call and the next message."""
        begins = self._begin_by_stand_in(turn) if start is None else start
        stop = self._stop_of_turn(turn, start) or self._stop_behind_calls(turn, begins or 0)
        names = [call["function"]["name"] for call in self.messages[turn]["tool_calls"]]
        lost = next((name for name in names if name not in self.text[begins:stop]), None)
        if lost is not None:
            raise ValueError(
                f"{self.record.place}: the chat template leaves out the tool calls of message {turn} ({lost}), so "
                "its answer would be empty; use a template with tools, or remove the turn"
            )
        return begins, stop

    def _begin_by_stand_in(self, turn: int) -> int | None:
        """Find where a turn's content begins, or would if it had any, by rendering a stand-in for it."""
        marked = [*self.messages]
        marked[turn] = {**marked[turn], "content": STAND_IN}
        before, found, _ = self.chat.render(marked, self.record).partition(STAND_IN)
        return len(before) if found and self.text.startswith(before) else None

    def _stop_of_turn(self, turn: int, start: int | None) -> int | None:
        """Find the end of a turn in a conversation that ends with it; None where the template ends it otherwise."""
        if start is None or self.chat.role_ends:
            return None
        until = self.chat.render(self.messages[: turn + 1], self.record)
        ends = list(self.chat.special.finditer(until, start))
        if not self.text.startswith(until) or not ends or until[ends[-1].end() :].strip():
            return None
        return ends[-1].end()

    def _stop_behind_calls(self, turn: int, start: int) -> int:
        """Find the end of a turn by a stand-in for the arguments of its last call."""
        between = self._after_calls(turn)
        ends = list(self.chat.special.finditer(between))
        end = next((end for end in ends if end.group() in self.chat.ends), ends[0] if ends else None)
        if self.chat.role_ends:
            end = ends[-1] if ends and turn < len(self.messages) - 1 else None
        if end is None:
            at = len(self.text) if turn == len(self.messages) - 1 else self.text.find(between, start)
            return self._or_open(turn, None, max(at, 0))
        tail, at = between[: end.end()], start
        for call in self.messages[turn]["tool_calls"]:
            name = call["function"]["name"]
            found = self.text.find(name, at)
            at = at if found < 0 else found + len(name)
        at = self.text.find(tail, at)
        if at < 0:
            raise ValueError(
                f"{self.record.place}: the end of the tool calls of message {turn} cannot be found in what the chat "
                "template renders; remove the turn"
            )
        return at + len(tail)

    def _after_calls(self, turn: int) -> str:
        """Render the text between the arguments of a turn's last call and the next message's content."""
        *others, last = self.messages[turn]["tool_calls"]
        arguments: Any = {STAND_IN: STAND_IN}
        if isinstance(last["function"].get("arguments"), str):
            arguments = f'{{"{STAND_IN}": "{STAND_IN}"}}'
        last = {**last, "function": {**last["function"], "arguments": arguments}}
        marked = [*self.messages]
        marked[turn] = {**marked[turn], "tool_calls": [*others, last]}
        if turn + 1 < len(marked):
            marked[turn + 1] = {**marked[turn + 1], "content": NEXT}
        before, _, after = self.chat.render(marked, self.record).rpartition(STAND_IN)
        quote = self.chat.special.match(after)
        if quote is not None and before.endswith(quote.group()):
            after = after[quote.end() :]
        return after.partition(NEXT)[0].lstrip("\"'")

    def _or_open(self, turn: int, stop: int | None, at: int) -> int:
        """Return where an answer stops; remember one that ends the text without an end mark."""
        if stop is None and turn == len(self.messages) - 1:
            self.open_end = True
            return len(self.text)
        return at if stop is None else stop


def note_omissions(view: Rendered, answers: Sequence[Answer], note: Note) -> None:
    """Note what the template did not write: a part of a message, tools, arguments that it does not read."""
    text, record = view.text, view.record
    learned = {turn: text[at.start : at.stop] for turn, at in zip(view.turns, answers, strict=True) if at.loss}
    for turn, message in enumerate(view.messages):
        for key in ("content", *THOUGHTS, "name"):
            if message.get(key) and not _is_written(message[key], text):
                note(f"the chat template leaves out the {key}, or a part of it, of turns of the {message['role']}")
            elif message.get(key) and key != "name" and not _is_written(message[key], learned.get(turn, text)):
                note(f"the chat template writes the {key} of turns of the assistant outside the answer, without loss")
        for call in message.get("tool_calls", ()):
            words = strings(call["function"].get("arguments", ""))
            if any(not _is_written(word, learned.get(turn, text)) for word in words):
                note("the chat template leaves out arguments of tool calls")
    for tool in record.tools or ():
        schema = tool.get("function", tool)
        if not all(_is_written(schema.get(key) or "", text) for key in ("name", "description")):
            note("the chat template leaves out tools, or their descriptions")
    for document in record.documents or ():
        if not all(_is_written(word, text) for word in document.values() if isinstance(word, str)):
            note("the chat template leaves out documents")
    if record.template_kwargs:
        template = view.chat.tokenizer.get_chat_template(None, record.tools)
        for name in record.template_kwargs:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                note(f"chat_template_kwargs: the chat template does not read {name}")


def _is_written(value: str, text: str) -> bool:
    """Tell whether all of a text was written, if perhaps trimmed, cut at thoughts, or escaped."""
    if value.strip() in text:
        return True
    pieces = [piece.strip() for piece in _THOUGHT.split(value)]
    return all(piece in text or _is_quoted(piece, text) for piece in pieces)


def _is_quoted(piece: str, text: str) -> bool:
    """Tell whether a template wrote a text with escapes, which keep its words."""
    return bool(_ESCAPED.search(piece)) and all(word in text for word in re.findall(r"\w+", piece))
