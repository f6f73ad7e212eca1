"""Records to token ids and labels, through a prompt template or the tokenizer's own chat template.

Prompt and answer are tokenized apart, so the ids before an answer are those that generation starts from.
An answer ends with an end mark that carries loss: the chat template's own, or the tokenizer's eos.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..checks import check_choice, check_number
from .records import Record, normalise

IGNORE = -100
TEMPLATES = ("auto", "prompt", "chat")
LOSS_ON = ("answer", "all")
_HEADINGS = {"system": "### Background", "user": "### Task", "assistant": "### Answer"}
_SENTINEL = "\u241eanswer\u241e"
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]", "[SEP]")


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized record. Labels stand at their own token (unshifted), -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]
    record: int


@dataclass
class EncodeReport:
    """Count over one or more calls of ``encode`` what did not fit into ``max_length``."""

    records: int = 0
    truncated: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        return (
            f"{self.truncated} of {self.records} records were longer than max_length and cut from the right; "
            f"{self.dropped} had no answer token left and were dropped"
        )

    def warn(self, stacklevel: int = 2) -> None:
        """Warn once, and only if something was cut or dropped."""
        if self.truncated or self.dropped:
            warnings.warn(f"{self}; raise max_length to keep them whole", stacklevel=stacklevel + 1)


class Piece(NamedTuple):
    """A text tokenized by itself; ``end`` puts the end mark after it."""

    text: str
    loss: bool
    end: bool = False


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: str = "answer",
    template: str = "auto",
    report: EncodeReport | None = None,
) -> list[Example]:
    """Tokenize records for training.

    Args:
        records: As ``load_records`` gives them; forms may be mixed.
        tokenizer: A transformers tokenizer; it needs an eos token unless its chat template has an end mark.
        max_length: Longer examples lose their right end; without a label left they are dropped.
        loss_on: "answer": every assistant message with its end mark (all of a plain text); "all": every token.
        template: "chat" (the tokenizer's), "prompt" (a plain one), or "auto": chat where there is one.
        report: Counts what was cut and dropped, and leaves the warning to the caller; None: warn here, once.
    Returns:
        One ``Example`` for each record that has something to learn, in the order of the records.
    Raises:
        ValueError: If a record has no known form, the chat template refuses it, or nothing can end an answer.
    """
    check_choice("loss_on", loss_on, LOSS_ON)
    check_number("max_length", max_length, 2, whole=True)
    counts = report if report is not None else EncodeReport()
    examples = []
    for index, parts in enumerate(_tokenize(records, tokenizer, template)):
        ids = [token for tokens, _ in parts for token in tokens]
        labels = [token if loss or loss_on == "all" else IGNORE for tokens, loss in parts for token in tokens]
        counts.records += 1
        counts.truncated += len(ids) > max_length
        # The first token has nothing before it to be predicted from.
        if all(label == IGNORE for label in labels[1:max_length]):
            counts.dropped += 1
        else:
            examples.append(Example(ids[:max_length], labels[:max_length], index))
    if report is None:
        counts.warn(stacklevel=2)
    return examples


def encode_prompts(records: Sequence[Record], tokenizer: Any, *, template: str = "auto") -> list[list[int]]:
    """Tokenize what stands before each record's last answer: where generation starts; ids as in ``encode``."""
    # Every record ends with its answer and the answer's end mark.
    rows = _tokenize(records, tokenizer, template)
    return [[token for tokens, _ in parts[:-2] for token in tokens] for parts in rows]


def require_examples(client: str, examples: Sequence[Example], report: EncodeReport | None = None) -> None:
    """Make sure that a client has something to train on.

    Raises:
        ValueError: If it has not, saying whether there was anything.
    """
    if examples:
        return
    if report is None or not report.records:
        raise ValueError(f"client {client!r} has no examples; give it data or leave it out")
    raise ValueError(
        f"client {client!r} has no examples left after tokenizing ({report}); raise max_length or shorten the prompts"
    )


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


def _tokenize(records: Sequence[Record], tokenizer: Any, template: str) -> list[list[tuple[list[int], bool]]]:
    """Give each record as its parts, each a list of ids with or without loss; all texts go in one batch."""
    if not records:
        return []
    chat = _Chat(tokenizer) if uses_chat(tokenizer, template) else None
    plain = []
    pieces: list[list[Piece]] = []
    for index, raw in enumerate(records):
        record = normalise(raw, f"record {index}")
        plain.append(record.messages is None or chat is None)
        pieces.append(_plain_pieces(record) if plain[-1] or chat is None else chat.pieces(record, record.place))
    texts = [piece.text for row in pieces for piece in row]
    tokens = iter(_ids(tokenizer, texts))
    start, end = (_start_ids(tokenizer), [_eos_id(tokenizer)]) if any(plain) else ([], [])
    rows = []
    for is_plain, row in zip(plain, pieces, strict=True):
        mark = end if is_plain or chat is None else chat.end_ids
        parts = [(start, False)] if is_plain else []
        for piece in row:
            parts += [(next(tokens), piece.loss), *([(mark, True)] if piece.end else [])]
        rows.append(parts)
    return rows


def _plain_pieces(record: Record) -> list[Piece]:
    """Lay out a record in the plain prompt template; a text record is one answer without a prompt."""
    if record.messages is None:
        return [Piece(record.text or "", loss=True, end=True)]
    pieces, before = [], ""
    for message in record.messages:
        before += f"{_HEADINGS[message['role']]}\n"
        if message["role"] == "assistant":
            pieces += [Piece(before, loss=False), Piece(message["content"], loss=True, end=True)]
            before = "\n\n"
        else:
            before += f"{message['content']}\n\n"
    return pieces


class _Chat:
    """The tokenizer's chat template, and the end mark that it puts after an answer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        example = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _SENTINEL}]
        self.tail = self._render(example, "an example").rpartition(_SENTINEL)[2]
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        ends = [
            self.tail.find(token) + len(token)
            for token in special | set(tokenizer.all_special_tokens)
            if token in self.tail
        ]
        # Without a special token in its tail a template marks no end that generation could stop at.
        self.end_text = self.tail[: min(ends)] if ends else ""
        self.end_ids = _ids(tokenizer, [self.end_text])[0] if ends else [_eos_id(tokenizer)]

    def pieces(self, record: Record, place: str) -> list[Piece]:
        """Cut the rendered conversation at every answer's start and end."""
        messages = record.messages or []
        whole, pieces, done = self._render(messages, place), [], 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            last = turn == len(messages) - 1
            prompt = self._render(messages[:turn], place, add_generation_prompt=True)
            after = self.tail if last else self._after(messages, turn, place)
            stop = len(whole) - len(after)
            if not (whole.startswith(prompt) and whole.endswith(after) and done <= len(prompt) <= stop):
                raise ValueError(
                    f"{place}: the chat template does not render message {turn} as the continuation of the messages "
                    "before it, so its answer cannot be found; use template='prompt'"
                )
            ended = last or (bool(self.end_text) and whole.startswith(self.end_text, stop))
            pieces += [Piece(whole[done : len(prompt)], loss=False), Piece(whole[len(prompt) : stop], True, ended)]
            done = stop + len(self.end_text) * ended
        return pieces

    def _after(self, messages: list[dict[str, str]], turn: int, place: str) -> str:
        """Find what follows an answer in the middle of a conversation."""
        marked = [*messages]
        marked[turn] = {**messages[turn], "content": _SENTINEL}
        return self._render(marked, place).rpartition(_SENTINEL)[2]

    def _render(self, messages: list[dict[str, str]], place: str, **options: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:
            raise ValueError(
                f"{place}: the chat template refuses it ({error}); change its messages or use template='prompt'"
            ) from error


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokenize texts in one batch, without special tokens of the tokenizer's own."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _start_ids(tokenizer: Any) -> list[int]:
    """Find what the tokenizer puts before a text (bos, or nothing)."""
    bare, full = _ids(tokenizer, ["a"])[0], list(tokenizer("a")["input_ids"])
    starts = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    return full[: starts[0]] if bare and starts else []


def _eos_id(tokenizer: Any) -> int:
    """Give the eos id, without which a model never learns where an answer ends."""
    if tokenizer.eos_token_id is None:
        known = [name for name in _EOS_NAMES if name in tokenizer.get_vocab()]
        name = known[0] if known else "a token of its vocabulary"
        raise ValueError(
            f"the tokenizer has no eos token, so answers would have no end; set tokenizer.eos_token = {name!r}"
        )
    return tokenizer.eos_token_id


__all__ = ["IGNORE", "EncodeReport", "Example", "encode", "encode_prompts", "require_examples", "uses_chat"]
