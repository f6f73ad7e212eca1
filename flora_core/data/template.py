"""Records to token ids and labels, through the tokenizer's own chat template or a plain prompt template.

A conversation is laid out as one text (``chat``) and tokenised once, so the ids are those of ``apply_chat_template``.
An answer's labels reach from where generation starts to its end mark: the template's own, the next role's token where a
template ends turns so, or the tokenizer's eos. ``docs/data.md`` has the rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common import check_choice, check_number
from .chat import Chat
from .layout import EMPTY, Layout, Plain
from .records import Record, normalise
from .tokens import Tokens, eos_id, ids_of, last_mark, start_ids

IGNORE = -100
TEMPLATES = ("auto", "prompt", "chat")
LOSS_ON = ("answer", "all")
_BATCH = 4096
MERGED = "a token reaches over the start of an answer, so generation starts from other ids"


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized record. Labels stand at their own token (unshifted), -100 where there is no loss.

    Attributes:
        record: Its number in what was encoded.
        place: File and line of the record, if it has one.
    """

    input_ids: list[int]
    labels: list[int]
    record: int
    place: str = field(default="", compare=False)


@dataclass
class EncodeReport:
    """Count over calls of ``encode`` what did not fit into ``max_length``, and note what a template could not do.

    Attributes:
        notes: What was noticed -> the places of the records.
    """

    records: int = 0
    truncated: int = 0
    dropped: int = 0
    notes: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(self._lines()) or "nothing was cut or dropped"

    def __bool__(self) -> bool:
        return bool(self._lines())

    def _lines(self) -> list[str]:
        lines = [f"{text} (records: {len(places)}; {_first(places)})" for text, places in self.notes.items()]
        if self.truncated or self.dropped:
            cut = f"{self.truncated} of {self.records} records were longer than max_length and cut from the right"
            hint = "; raise max_length to keep them" if self.truncated else ""
            lines.insert(0, f"{cut}; {self.dropped} had no answer token left and were dropped{hint}")
        return lines

    def note(self, text: str, place: str) -> None:
        """Note something about the record at a place, once."""
        places = self.notes.setdefault(text, [])
        if place not in places[-1:]:
            places.append(place)

    def warn(self, stacklevel: int = 2) -> None:
        """Warn once, and only if there is something to report."""
        if self:
            warnings.warn(str(self), stacklevel=stacklevel + 1)


def encode(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: str = "answer",
    template: str = "auto",
    report: EncodeReport | None = None,
) -> list[Example]:
    """Tokenize records for training.

    Args:
        records: As ``load_records`` gives them, or plain dicts; forms may be mixed.
        tokenizer: A transformers tokenizer; it needs an eos token unless its chat template has an end mark.
        max_length: Longer examples lose their right end; without a label left they are dropped.
        loss_on: "answer": every assistant turn that is not masked, with its end mark (all of a plain text); "all":
            every token.
        template: "chat" (the tokenizer's), "prompt" (a plain one), or "auto": chat where there is one.
        report: Collects what was cut, dropped and noticed, and leaves the warning to the caller; None: warn once.
    Returns:
        One ``Example`` for each record that has something to learn, in the order of the records.
    Raises:
        ValueError: With the record's place, if it has no known form, the chat template refuses it, or nothing can end
            an answer.

    Example:
        ``encode([{"question": "1+1?", "answer": "2"}], tokenizer, max_length=512)[0].labels``
    """
    check_choice("loss_on", loss_on, LOSS_ON)
    check_number("max_length", max_length, 2, whole=True)
    encoder = _Encoder(tokenizer, template, loss_on, EncodeReport() if report is None else report)
    checked = [normalise(record, f"record {index}") for index, record in enumerate(records)]
    examples: list[Example] = []
    for first in range(0, len(checked), _BATCH):
        for index, (ids, labels) in enumerate(encoder.rows(checked[first : first + _BATCH]), start=first):
            encoder.report.records += 1
            encoder.report.truncated += len(ids) > max_length
            # The first token has nothing before it to be predicted from.
            if all(label == IGNORE for label in labels[1:max_length]):
                encoder.report.dropped += 1
            else:
                examples.append(Example(ids[:max_length], labels[:max_length], index, checked[index].place))
    if report is None:
        encoder.report.warn(stacklevel=2)
    return examples


def encode_prompts(records: Sequence[Mapping[str, Any]], tokenizer: Any, *, template: str = "auto") -> list[list[int]]:
    """Tokenize what generation of each record's last answer starts from; where a template allows, as in ``encode``."""
    checked = [normalise(record, f"record {index}") for index, record in enumerate(records)]
    encoder = _Encoder(tokenizer, template, "answer", EncodeReport())
    return encoder.prompts(checked) if checked else []


def require_examples(client: str, examples: Sequence[Example], report: EncodeReport | None = None) -> None:
    """Make sure that a client has something to train on.

    Raises:
        ValueError: If it has not, saying whether there was anything.
    """
    if examples:
        return
    if report is None or not report.records:
        raise ValueError(f"client {client!r} has no examples; give it data or leave it out")
    raise ValueError(f"client {client!r} has no examples left after tokenizing ({report}); or shorten the prompts")


def uses_chat(tokenizer: Any, template: str) -> bool:
    """Resolve ``template``: whether the tokenizer's chat template is used.

    Raises:
        ValueError: If the template is unknown, or ``chat`` and the tokenizer has none.
    """
    check_choice("template", template, TEMPLATES)
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise ValueError("template='chat' needs a tokenizer with a chat template, and this one has none; use 'prompt'")
    return template != "prompt" and has_chat


class _Encoder:
    """Records to ids and labels, with one tokenizer and one template."""

    def __init__(self, tokenizer: Any, template: str, loss_on: str, report: EncodeReport):
        self.tokenizer, self.loss_on, self.report = tokenizer, loss_on, report
        self.chat = uses_chat(tokenizer, template)
        self._template: Chat | Plain | None = None
        self._start: list[int] | None = None

    @property
    def template(self) -> Chat | Plain:
        """The template, made when a conversation first asks for it: texts need none."""
        if self._template is None:
            if not self.chat:
                eos_id(self.tokenizer)
            self._template = Chat(self.tokenizer) if self.chat else Plain(self.tokenizer)
        return self._template

    def start(self, record: Record) -> list[int]:
        """The ids that the tokenizer puts before a text; a chat template writes its own."""
        if self.chat and record.messages is not None:
            return []
        if self._start is None:
            self._start = start_ids(self.tokenizer)
        return self._start

    def rows(self, records: Sequence[Record]) -> list[tuple[list[int], list[int]]]:
        """The ids and labels of records, tokenized in one batch."""
        layouts = [self._layout(record) for record in records]
        tokens = Tokens(self.tokenizer, [layout.text for layout in layouts])
        spans = [[tokens.span(row, answer) for answer in layout.answers] for row, layout in enumerate(layouts)]
        self._note_merged(records, layouts, tokens, spans)
        return [
            self._text_row(record, tokens.ids[row])
            if record.messages is None
            else self._row(record, layouts[row], tokens.ids[row], spans[row])
            for row, record in enumerate(records)
        ]

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """The ids that generation of each record's last answer starts from."""
        for record in records:
            self._check_trains(record)
        texts = ["" if record.messages is None else self.template.prompt(record) for record in records]
        ids = ids_of(self.tokenizer, texts)
        return [self.start(record) + row for record, row in zip(records, ids, strict=True)]

    def _check_trains(self, record: Record) -> None:
        if record.choices is not None:
            raise ValueError(f"{record.place}: a multiple-choice question (choices) is for evaluation only")

    def _layout(self, record: Record) -> Layout:
        """Lay a record out as text, with its answers."""
        self._check_trains(record)
        if record.messages is None:
            return Layout(record.text or "", [])
        roles = [message["role"] == "assistant" for message in record.messages]
        masked = roles != record.loss
        if masked and self.loss_on == "all":
            raise ValueError(
                f"{record.place}: loss_on='all' trains every token, and the record leaves turns out; use 'answer'"
            )
        answers = [message for message, loss in zip(record.messages, record.loss, strict=True) if loss]
        if not any(map(_says, answers)):
            self.report.note(EMPTY, record.place)
        return self.template.layout(record, lambda text: self.report.note(text, record.place))

    def _row(
        self, record: Record, layout: Layout, ids: list[int], spans: list[tuple[int, int]]
    ) -> tuple[list[int], list[int]]:
        """Labels for a conversation."""
        ids = ids if layout.ended else [*ids, eos_id(self.tokenizer)]
        if self.loss_on == "all":
            ids = self.start(record) + ids
            return ids, list(ids)
        labels = [IGNORE] * len(ids)
        for answer, (start, stop) in zip(layout.answers, spans, strict=True):
            # Where the text ends without an end mark, the one that was added is the last answer's.
            stop = len(ids) if not layout.ended and answer is layout.answers[-1] else stop
            if answer.loss:
                labels[start:stop] = ids[start:stop]
        before = self.start(record)
        return before + ids, [IGNORE] * len(before) + labels

    def _text_row(self, record: Record, ids: list[int]) -> tuple[list[int], list[int]]:
        """Labels for a plain text, all of which is learned; one that was rendered keeps its own marks."""
        start = self.start(record)
        whole = ids if ids[: len(start)] == start else start + ids
        end = last_mark(self.tokenizer, record.text or "", whole)
        if end is None:
            whole = [*whole, eos_id(self.tokenizer)]
        learned = len(whole) if end is None else end + 1
        if self.loss_on == "all":
            return whole, list(whole)
        return whole, [IGNORE] * len(start) + whole[len(start) : learned] + [IGNORE] * (len(whole) - learned)

    def _note_merged(
        self, records: Sequence[Record], layouts: Sequence[Layout], tokens: Tokens, spans: list[list[tuple[int, int]]]
    ) -> None:
        """Note answers before which the ids are not the generation prompt's, for the tokenizer joins both."""
        found: dict[str, list[tuple[int, list[int]]]] = {}
        for row, layout in enumerate(layouts):
            for answer, (start, _) in zip(layout.answers, spans[row], strict=True):
                if answer.agrees and answer.loss:
                    text, first = tokens.before(row, answer, start)
                    found.setdefault(text, []).append((row, tokens.ids[row][first:start]))
        for ids, places in zip(ids_of(self.tokenizer, list(found)), found.values(), strict=True):
            for row, got in places:
                if got != ids:
                    self.report.note(MERGED, records[row].place)


def _says(message: Mapping[str, Any]) -> bool:
    """Tell whether an answer has content, thoughts or tool calls."""
    return any(str(value).strip() for key, value in message.items() if key != "role" and value)


def _first(places: Sequence[str], most: int = 3) -> str:
    return ", ".join(places[:most]) + (", ..." if len(places) > most else "")
