"""Tokenizer files of a base and of adapters: their differences, and the choice of those that the result gets.

A trainer that adds tokens or changes the chat template saves the tokenizer beside the adapter. With the base's own the
merged model then sees other prompts than in training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common import check_choice, listed, parse_json, require
from .shards import Checkpoint
from .sources import Adapter

CHOICES = ("base", "adapter")
_FILES = re.compile(
    r"tokenizer[\w.-]*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab[\w.-]*\.(json|txt)|merges\.txt"
    r"|[\w.-]*\.tiktoken|spiece\.model|sentencepiece[\w.-]*\.model|tekken\.json|chat_template\.(jinja|json)"
    r"|(additional_)?chat_templates/[^/]+"
)
# Beside the files of a tokenizer, or alone: then the template belongs to the base's tokenizer.
_TEMPLATES = re.compile(r"chat_template\.(jinja|json)|(additional_)?chat_templates/[^/]+")
_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder's tokenizer.

    Args:
        files: Name -> place; empty where the folder has none.
        template: Its chat template; empty where it has none.
        special: ``eos_token`` and the like -> text.
        vocabulary: Token -> id, from ``tokenizer.json``; empty where there is none.
    """

    files: Mapping[str, Path]
    template: str
    special: Mapping[str, Any]
    vocabulary: Mapping[str, int]

    @property
    def template_only(self) -> bool:
        """True where there are chat templates and no tokenizer."""
        return bool(self.files) and all(_is_template(name) for name in self.files)

    def same(self, other: TokenizerFiles) -> bool:
        """True where both are the same files, or mean the same."""
        if {n: p.read_bytes() for n, p in self.files.items()} == {n: p.read_bytes() for n, p in other.files.items()}:
            return True
        return bool(self.vocabulary) and not self.differences(other)

    def differences(self, base: TokenizerFiles) -> list[str]:
        """Describe the differences from another tokenizer."""
        found = []
        if self.template != base.template:
            found.append("another chat template" if self.template else "no chat template where the base has one")
        if self.template_only:
            return found
        both = bool(self.vocabulary and base.vocabulary)
        new = [token for token in self.vocabulary if token not in base.vocabulary]
        gone = [token for token in base.vocabulary if token not in self.vocabulary]
        moved = [t for t, number in self.vocabulary.items() if base.vocabulary.get(t, number) != number]
        for kind, tokens in (("more", new), ("fewer", gone), ("renumbered", moved)):
            if tokens and both:
                found.append(f"{len(tokens)} tokens {kind} ({listed(map(repr, tokens), 3)})")
        for name in _SPECIAL:
            mine, theirs = self.special.get(name), base.special.get(name)
            if mine != theirs:
                found.append(f"{name} {mine!r} where the base has {theirs!r}")
        return found


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read a folder's tokenizer files.

    Raises:
        ValueError: If one of them does not hold valid JSON.
    """
    names = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
    files = {name: folder / name for name in names if _FILES.fullmatch(name.replace("\\", "/"))}
    config = _json(files.get("tokenizer_config.json"))
    template = config.get("chat_template") or ""
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].read_text("utf-8", errors="replace")
    elif "chat_template.json" in files:
        template = _json(files["chat_template.json"]).get("chat_template") or template
    special = {**_json(files.get("special_tokens_map.json")), **config}
    texts = {name: _text(special.get(name)) for name in _SPECIAL}
    return TokenizerFiles(files, str(template), texts, _vocabulary(_json(files.get("tokenizer.json"))))


def _json(path: Path | None) -> dict[str, Any]:
    return parse_json(path, path.read_bytes()) if path is not None else {}


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of a ``tokenizer.json``: a table or, for unigrams, a list in order."""
    model = tokenizer.get("model") or {}
    table = model.get("vocab") or {}
    found = dict(table) if isinstance(table, dict) else {str(row[0]): i for i, row in enumerate(table)}
    found.update({one["content"]: one["id"] for one in tokenizer.get("added_tokens") or []})
    return found


def choose_tokenizer(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], choice: str | None
) -> tuple[dict[str, Path], list[str]]:
    """Choose the tokenizer files of the result.

    Args:
        checkpoint: The base.
        adapters: The adapters, each of which may have a tokenizer of its own.
        choice: ``base``, ``adapter``, or None: the base's, and a note for every adapter whose own differs. Of an
            adapter with a chat template alone, ``adapter`` takes that, beside the base's tokenizer.
    Returns:
        File name -> place of every file that the result copies beside its weights; notes.
    Raises:
        ValueError: If ``adapter`` is chosen and no adapter has a tokenizer, those that have one differ, or it has ids
            beyond the base's embeddings.
    """
    require(choice is None or isinstance(choice, str), f"tokenizer must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice is not None:
        check_choice("tokenizer", choice, CHOICES)
    own = {name: checkpoint.folder / name for name in checkpoint.others}
    given = {one.name: read_tokenizer(one.folder) for one in adapters}
    given = {name: tokenizer for name, tokenizer in given.items() if tokenizer.files}
    if choice == "adapter":
        chosen = _agreed(given)
        if chosen.template_only:
            return {n: p for n, p in own.items() if not _is_template(n)} | dict(chosen.files), []
        _check_fits(checkpoint, chosen)
        return {n: p for n, p in own.items() if not _FILES.fullmatch(n)} | dict(chosen.files), []
    if choice == "base" or not given:
        return own, []
    base = read_tokenizer(checkpoint.folder)
    notes = [
        f"adapter {name} has a {_kind(tokenizer)} of its own: {'; '.join(differences)}. The base's is kept (--tokenizer"
        " adapter takes the adapter's)"
        for name, tokenizer in given.items()
        if (differences := tokenizer.differences(base))
    ]
    return own, notes


def _is_template(name: str) -> bool:
    return _TEMPLATES.fullmatch(name.replace("\\", "/")) is not None


def _kind(tokenizer: TokenizerFiles) -> str:
    return "chat template" if tokenizer.template_only else "tokenizer"


def _agreed(given: Mapping[str, TokenizerFiles]) -> TokenizerFiles:
    require(
        bool(given), "tokenizer='adapter': no adapter's folder holds a tokenizer; take the base's (tokenizer='base')"
    )
    (first, chosen), *others = given.items()
    different = [name for name, tokenizer in others if not tokenizer.same(chosen)]
    require(
        not different,
        f"tokenizer='adapter': the tokenizers of adapters {listed([first, *different])} differ; merge adapters of one"
        " tokenizer, or take the base's (tokenizer='base')",
    )
    return chosen


def _check_fits(checkpoint: Checkpoint, tokenizer: TokenizerFiles) -> None:
    """Check that every id has a row in the embeddings."""
    folder = next(iter(tokenizer.files.values())).parent
    if not tokenizer.vocabulary:
        raise ValueError(
            f"tokenizer='adapter': {folder} holds no tokenizer.json to count tokens of; save the tokenizer again with"
            " transformers' fast tokenizer, or take the base's (tokenizer='base')"
        )
    rows = _embedding_rows(checkpoint)
    beyond = [token for token, number in tokenizer.vocabulary.items() if rows is not None and number >= rows]
    require(
        not beyond,
        f"tokenizer='adapter': the tokenizer of {folder} has ids up to {max(tokenizer.vocabulary.values())}, and base"
        f" {checkpoint.folder} has embeddings for {rows} tokens; without one: {listed(map(repr, beyond), 3)}; resize"
        " the base's embeddings first, or take its tokenizer (tokenizer='base')",
    )
    require(
        rows is not None,
        f"tokenizer='adapter': base {checkpoint.folder} says no vocab_size, so that the tokenizer of {folder} cannot be"
        " checked against it; add vocab_size to its config.json",
    )


def _embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the table of embeddings: of the stored tensor, else by the config."""
    tables = (
        one.shape[0] for name, one in checkpoint.tensors.items() if name.endswith(_TABLES) and len(one.shape) == 2
    )
    text = checkpoint.config.get("text_config") or {}
    by_config = checkpoint.config.get("vocab_size", text.get("vocab_size"))
    return _largest(tables) or (by_config if isinstance(by_config, int) else None)


def _largest(sizes: Iterable[int]) -> int:
    return max(sizes, default=0)
