"""Texts to token ids, and characters to tokens: one tokenisation of the whole text, never of its pieces.

Fast tokenizers give the characters of every token. With slow ones the tokens before a character are those of the text
up to it, where the tokenizer splits there.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from .layout import Answer

_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]", "[SEP]")


class Tokens:
    """The ids of a batch of texts, without special tokens of the tokenizer's own."""

    def __init__(self, tokenizer: Any, texts: list[str]):
        self.tokenizer, self.texts = tokenizer, texts
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        batch = _call(tokenizer, texts, return_offsets_mapping=True) if self.fast else _call(tokenizer, texts)
        self.ids: list[list[int]] = batch["input_ids"]
        self.offsets: list[list[tuple[int, int]]] = batch["offset_mapping"] if self.fast else []
        self._special = frozenset(tokenizer.all_special_ids)

    def span(self, text: int, answer: Answer) -> tuple[int, int]:
        """The tokens start..stop of an answer; a token that reaches into it belongs to it."""
        if not self.fast:
            return self._split(text, answer.start), self._split(text, answer.stop)
        offsets = self.offsets[text]
        start = bisect_right(offsets, answer.start, key=_end)
        return start, max(start, bisect_left(offsets, answer.stop, key=_start))

    def before(self, text: int, answer: Answer, start: int) -> tuple[str, int]:
        """The end of the text before an answer, and where its tokens begin: nothing before changes them.

        It begins with the last special token, since tokenizers cut a text there before anything else.
        """
        if not self.fast:
            return self.texts[text][: answer.start], 0
        ids = self.ids[text]
        first = next((at for at in range(start - 1, -1, -1) if ids[at] in self._special), 0)
        begins = self.offsets[text][first][0] if first else 0
        return self.texts[text][begins : answer.start], first

    def _split(self, text: int, at: int) -> int:
        """The number of tokens before a character, by a slow tokenizer."""
        ids, part = self.ids[text], _call(self.tokenizer, [self.texts[text][:at]])["input_ids"][0]
        return next((n for n, (one, other) in enumerate(zip(ids, part, strict=False)) if one != other), len(part))


def _start(offset: tuple[int, int]) -> int:
    return offset[0]


def _end(offset: tuple[int, int]) -> int:
    return offset[1]


def _call(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts in one batch, without special tokens of the tokenizer's own."""
    return _call(tokenizer, list(texts))["input_ids"] if texts else []


def start_ids(tokenizer: Any) -> list[int]:
    """Find what the tokenizer puts before a text (bos, or nothing)."""
    bare, full = ids_of(tokenizer, ["a"])[0], list(tokenizer("a")["input_ids"])
    starts = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    return full[: starts[0]] if bare and starts else []


def eos_id(tokenizer: Any) -> int:
    """Give the eos id, without which a model never learns where an answer ends.

    Raises:
        ValueError: If the tokenizer has none, with a token of its vocabulary that could be it.
    """
    if tokenizer.eos_token_id is None:
        known = [name for name in _EOS_NAMES if name in tokenizer.get_vocab()]
        name = known[0] if known else "a token of its vocabulary"
        raise ValueError(
            f"the tokenizer has no eos token, so answers would have no end; set tokenizer.eos_token = {name!r}"
        )
    return tokenizer.eos_token_id


def last_mark(tokenizer: Any, text: str, ids: Sequence[int]) -> int | None:
    """The place among the ids of the special token that ends a text (blanks aside); None if it ends without one."""
    end = text.rstrip()
    mark = next((mark for mark in tokenizer.all_special_tokens if end.endswith(mark)), None)
    token = None if mark is None else tokenizer.convert_tokens_to_ids(mark)
    return next((at for at in range(len(ids) - 1, -1, -1) if ids[at] == token), None)


def check_ids(rows: Iterable[Any], size: int, tokenizer: Any, owner: str) -> None:
    """Check that a model has an embedding for every token of its examples.

    Args:
        rows: Examples with ``input_ids``.
        size: The number of the embedding's rows.
        tokenizer: Names the token; None if there is none.
        owner: Whose examples they are, for the error.
    Raises:
        ValueError: With the token, its id, the embedding's size and the record's place.
    """
    for row in rows:
        highest = max(row.input_ids)
        if highest >= size or min(row.input_ids) < 0:
            wrong = highest if highest >= size else min(row.input_ids)
            name = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens([max(wrong, 0)])[0]!r})"
            place = row.place or f"example {row.record}"
            raise ValueError(
                f"{owner}: token id {wrong}{name} of {place} is beyond the model's embedding of {size} rows; use the "
                "model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) first"
            )
