"""A tokenizer's chat template: what it writes before and after an answer, and a conversation rendered by it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .answers import NEXT, STAND_IN, Rendered, note_omissions
from .layout import Layout, Note, end_once
from .records import Record

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
        view = Rendered(self, record, end_once(record.messages or [], self.ends, note))
        marks = self._marks(view)
        answers = []
        for number, turn in enumerate(view.turns):
            answers.append(
                view.answer(turn, marks[number] if marks else None, answers[-1].stop if answers else 0, note)
            )
        note_omissions(view, answers, note)
        return Layout(view.text, answers, ended=not view.open_end)

    def prompt(self, record: Record) -> str:
        """The generation prompt of a record's last answer."""
        view = Rendered(self, record, end_once(record.messages or [], self.ends, lambda _: None))
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
        """Find where the end mark stops that follows an answer's content; None if there is none."""
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
        turns = [("user", "x"), ("assistant", STAND_IN), ("user", "y"), ("assistant", NEXT)]
        messages = [{"role": role, "content": content} for role, content in turns]
        text, prompts = self._example(messages)
        if STAND_IN not in text:
            self.parts = True
            text, prompts = self._example(messages)
        if STAND_IN not in text or NEXT not in text:
            self.parts = False
            return
        for prompt, stand_in in zip(prompts, (STAND_IN, NEXT), strict=True):
            before, _, after = text.partition(stand_in)
            if before.startswith(prompt):
                self.leads = sorted({before[len(prompt) :], *self.leads}, key=len, reverse=True)
            end = self.special.search(after.partition(NEXT)[0])
            if end is None:
                # A turn ends where the next one begins, and the last one ends with the text.
                self.role_ends = bool(self.ends)
                continue
            self.ends += [end.group()] if end.group() not in self.ends else []
            # Between two turns, text before a special token may be the next turn's.
            if stand_in == NEXT and after[: end.start()].strip():
                self.tails.append(after[: end.end()])

    def _example(self, messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
        """Render an example and the generation prompts of its two answers; empty where the template refuses it."""
        try:
            prompts = [self.render(messages[:turn], None, add_generation_prompt=True) for turn in (1, 3)]
            return self.render(messages, None), prompts
        except ValueError:
            return "", []

    def _marks(self, view: Rendered) -> list[tuple[int, int]] | None:
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
