"""Layouts: a conversation as one text, and where in it each answer stands.

An answer begins where the generation prompt ends and stops after its end mark. A chat template only gives text, so the
answer is found in it: by the template's own ``{% generation %}`` marks where it has them, else behind the generation
prompt by the message's content, else by rendering the conversation again with a stand-in for the content. What a
template makes impossible (a generation prompt that the conversation does not repeat, a part of a message that it leaves
out) is noted with the record's place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .messages import THOUGHTS, strings
from .records import Record

Note = Callable[[str], None]
_STAND_IN, _NEXT = "\u241eanswer\u241e", "\u241enext\u241e"
_HEADINGS = {"system": "### Background", "developer": "### Background", "user": "### Task", "assistant": "### Answer"}
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT = re.compile(r"</?think(?:ing)?>")
_ESCAPED = re.compile(r"""[\n\t"'\\<>&]|[^\x00-\x7f]""")
DIFFERS = "what stands before an answer is not what generation starts from (the chat template renders them differently)"
SPEAKS_FIRST = "the assistant speaks first; that turn has no loss, for nothing stands before it"
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
        """What stands before the last answer."""
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
        return _end_once(messages, [self.eos], note)


class Chat:
    """The tokenizer's chat template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self.parts = False
        self.leads: list[str] = [""]
        self.ends: list[str] = []
        self.tails: list[str] = []
        self.role_ends = False
        self._learn()

    def layout(self, record: Record, note: Note) -> Layout:
        """Render a conversation and find its answers."""
        view = _View(self, record, _end_once(record.messages or [], self.ends, note))
        marks = self._marks(view)
        answers = []
        for number, turn in enumerate(view.turns):
            answers.append(
                view.answer(turn, marks[number] if marks else None, answers[-1].stop if answers else 0, note)
            )
        _note_omissions(view, note)
        return Layout(view.text, answers, ended=not view.open_end)

    def prompt(self, record: Record) -> str:
        """The generation prompt of a record's last answer."""
        view = _View(self, record, _end_once(record.messages or [], self.ends, lambda _: None))
        return view.prompt(view.turns[-1]) if view.turns[-1] else ""

    def render(self, messages: Sequence[dict[str, Any]], record: Record | None, **options: Any) -> str:
        """Render messages with a record's tools, documents and template arguments.

        Raises:
            ValueError: With the record's place, if the template fails.
        """
        messages, extra = self._as_read(messages), {}
        if record is not None:
            extra = {"tools": record.tools, "documents": record.documents, **record.template_kwargs}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **extra, **options)
        except Exception as error:  # A template is a program of the model's: it may raise anything.
            place = "an example" if record is None else record.place
            raise ValueError(
                f"{place}: the chat template refuses it ({str(error) or type(error).__name__}); change its messages or "
                "use template='prompt'"
            ) from error

    def end_after(self, text: str, at: int) -> int | None:
        """Where the end mark stops that follows an answer's content; None if there is none."""
        found = self.special.match(text, at + len(text[at:]) - len(text[at:].lstrip()))
        if found:
            return found.end()
        # Some templates write text between an answer and its end mark.
        lead = next((mark for mark in self.tails if text.startswith(mark, at)), None)
        return None if lead is None else at + len(lead)

    def _as_read(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with their content as text, or as parts where the template asks for parts."""
        if not self.parts:
            return list(messages)
        return [{**m, "content": [{"type": "text", "text": m["content"]}] if m["content"] else []} for m in messages]

    def _learn(self) -> None:
        """Learn from an example what the template writes before and after an answer."""
        turns = [("user", "x"), ("assistant", _STAND_IN), ("user", "y"), ("assistant", _NEXT)]
        messages = [{"role": role, "content": content} for role, content in turns]
        text, prompts = self._example(messages)
        if _STAND_IN not in text:
            self.parts = True
            text, prompts = self._example(messages)
        if _STAND_IN not in text or _NEXT not in text:
            self.parts = False
            return
        for prompt, stand_in in zip(prompts, (_STAND_IN, _NEXT), strict=True):
            before, _, after = text.partition(stand_in)
            if before.startswith(prompt):
                self.leads = sorted({before[len(prompt) :], *self.leads}, key=len, reverse=True)
            end = self.special.search(after.partition(_NEXT)[0])
            if end is None:
                # A turn ends where the next one begins, and the last one ends with the text.
                self.role_ends = bool(self.ends)
                continue
            self.ends += [end.group()] if end.group() not in self.ends else []
            # Between two turns, text before a special token may be the next turn's.
            if stand_in == _NEXT and after[: end.start()].strip():
                self.tails.append(after[: end.end()])

    def _example(self, messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
        """Render an example and the generation prompts of its two answers; empty where the template refuses it."""
        try:
            prompts = [self.render(messages[:turn], None, add_generation_prompt=True) for turn in (1, 3)]
            return self.render(messages, None), prompts
        except ValueError:
            return "", []

    def _marks(self, view: _View) -> list[tuple[int, int]] | None:
        """The characters that the template marks as generated, one stretch for each answer; None without marks."""
        template = self.tokenizer.get_chat_template(None, view.record.tools)
        if not _MARKED.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        record = view.record
        rendered: Any = render_jinja_template(
            conversations=[self._as_read(view.messages)],
            tools=record.tools,
            documents=record.documents,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **record.template_kwargs},
        )
        texts, spans = rendered
        fits = texts[0] == view.text and len(spans[0]) == len(view.turns)
        good = fits and all(start < stop for start, stop in spans[0])
        return list(spans[0]) if good else None


class _View:
    """One conversation on its way through a chat template."""

    def __init__(self, chat: Chat, record: Record, messages: list[dict[str, Any]]):
        self.chat, self.record, self.messages = chat, record, messages
        self.turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        self.text = chat.render(messages, record)
        self.open_end = False

    def prompt(self, turn: int) -> str:
        """What generation of this turn starts from."""
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

    def _start(self, turn: int, prompt: str | None, begins: int) -> int:
        """Where an answer starts whose generation prompt the text does not repeat: where the two part."""
        if prompt is None:
            return begins
        history = self.chat.render(self.messages[:turn], self.record)
        pairs = zip(prompt, self.text, strict=False)
        same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(prompt), len(self.text)))
        return min(same, begins) if self.text.startswith(history) and same >= len(history) else begins

    def _stop(self, turn: int, start: int | None, mark: tuple[int, int] | None) -> tuple[int, int]:
        """Where a turn's content begins and where its end mark stops."""
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
        marked[turn] = {**marked[turn], "content": _STAND_IN}
        before, found, after = self.chat.render(marked, self.record).rpartition(_STAND_IN)
        at = len(self.text) - len(after)
        if not found or not self.text.endswith(after) or at < start:
            raise ValueError(
                f"{self.record.place}: the chat template does not render message {turn} so that its answer can be "
                "found; use template='prompt'"
            )
        begins = len(before) if self.text.startswith(before) and start <= len(before) <= at else max(start, 0)
        return begins, self._or_open(turn, self.chat.end_after(self.text, at), at)

    def _stop_of_calls(self, turn: int, start: int | None) -> tuple[int, int]:
        """Find the end of a turn that calls tools: the end mark between its last call and the next message."""
        begins, stop = self._stop_of_turn(turn, start) or self._stop_behind_calls(turn, start)
        names = [call["function"]["name"] for call in self.messages[turn]["tool_calls"]]
        lost = next((name for name in names if name not in self.text[begins:stop]), None)
        if lost is not None:
            raise ValueError(
                f"{self.record.place}: the chat template leaves out the tool calls of message {turn} ({lost}), so "
                "its answer would be empty; use a template with tools, or remove the turn"
            )
        return begins, stop

    def _stop_of_turn(self, turn: int, start: int | None) -> tuple[int, int] | None:
        """Find the end of a turn in a conversation that ends with it; None where the template ends it otherwise."""
        if start is None or self.chat.role_ends:
            return None
        until = self.chat.render(self.messages[: turn + 1], self.record)
        ends = list(self.chat.special.finditer(until, start))
        if not self.text.startswith(until) or not ends or until[ends[-1].end() :].strip():
            return None
        return start, ends[-1].end()

    def _stop_behind_calls(self, turn: int, start: int | None) -> tuple[int, int]:
        """Find the end of a turn by a stand-in for the arguments of its last call."""
        between = self._after_calls(turn)
        ends = list(self.chat.special.finditer(between))
        end = next((end for end in ends if end.group() in self.chat.ends), ends[0] if ends else None)
        if self.chat.role_ends:
            end = ends[-1] if ends and turn < len(self.messages) - 1 else None
        if end is None:
            at = len(self.text) if turn == len(self.messages) - 1 else self.text.find(between, start or 0)
            return start or 0, self._or_open(turn, None, max(at, 0))
        tail, at = between[: end.end()], start or 0
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
        return start or 0, at + len(tail)

    def _after_calls(self, turn: int) -> str:
        """What the template writes between the arguments of a turn's last call and the next message's content."""
        *others, last = self.messages[turn]["tool_calls"]
        arguments: Any = {_STAND_IN: _STAND_IN}
        if isinstance(last["function"].get("arguments"), str):
            arguments = f'{{"{_STAND_IN}": "{_STAND_IN}"}}'
        last = {**last, "function": {**last["function"], "arguments": arguments}}
        marked = [*self.messages]
        marked[turn] = {**marked[turn], "tool_calls": [*others, last]}
        if turn + 1 < len(marked):
            marked[turn + 1] = {**marked[turn + 1], "content": _NEXT}
        before, _, after = self.chat.render(marked, self.record).rpartition(_STAND_IN)
        quote = self.chat.special.match(after)
        if quote is not None and before.endswith(quote.group()):
            after = after[quote.end() :]
        return after.partition(_NEXT)[0].lstrip("\"'")

    def _or_open(self, turn: int, stop: int | None, at: int) -> int:
        """Where an answer stops; one that ends the text without an end mark is remembered."""
        if stop is None and turn == len(self.messages) - 1:
            self.open_end = True
            return len(self.text)
        return at if stop is None else stop


def _end_once(messages: Sequence[dict[str, Any]], ends: Sequence[str], note: Note) -> list[dict[str, Any]]:
    """Take the end mark off answers that spell it, for the template writes it."""
    found = []
    for message in messages:
        content = message["content"].rstrip()
        end = next((end for end in ends if content.endswith(end)), None) if message["role"] == "assistant" else None
        if end is not None:
            note(ENDS_TWICE)
        found.append(message if end is None else {**message, "content": content.removesuffix(end)})
    return found


def _note_omissions(view: _View, note: Note) -> None:
    """Note what the template did not write: a part of a message, tools, arguments that it does not read."""
    text, record = view.text, view.record
    for message in view.messages:
        for key in ("content", *THOUGHTS, "name"):
            if message.get(key) and not _is_written(message[key], text):
                note(f"the chat template leaves out the {key}, or a part of it, of turns of the {message['role']}")
        for call in message.get("tool_calls", ()):
            if any(not _is_written(word, text) for word in strings(call["function"].get("arguments", ""))):
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
