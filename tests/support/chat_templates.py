"""Tokenizer families, trained in a moment on a few words, and chat templates of model families in short own form."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# ruff: noqa: ISC004, SIM905 - templates are read as one text each
WORDS = "the cat sat on one dog, and three say it again. user assistant system tool think final analysis 1 2 3 4 5 6 7"
SPECIALS = (
    "<unk> <s> </s> <|im_start|> <|im_end|> <|endoftext|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> "
    "<|eot_id|> [INST] [/INST] <bos> <start_of_turn> <end_of_turn> <|user|> <|assistant|> <|system|> <|observation|> "
    "<|end|> <|start|> <|message|> <|channel|> <|return|> <|call|> [gMASK] <sop> <pad>"
).split()
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
GEMMA_ROLES = "{% set role = 'model' if m.role == 'assistant' else m.role %}"

# Name -> (template, eos). The loops write one turn; what differs is how an answer begins and ends.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "gemma": (
        "{{ '<bos>' }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}"
        + GEMMA_ROLES
        + "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>"
        "\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "</s>",
    ),
    "harmony": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        "<|return|>",
    ),
    "glm": (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|endoftext|>",
    ),
    "qwen3": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content %}"
        "{% set thought = m.reasoning_content or '' %}{% if '</think>' in said %}"
        "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
        "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
        "{{ said.lstrip('\n') + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and "
        "enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        "<|im_end|>",
    ),
    "marked": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "marked without its end": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
}
FAMILIES = (
    "byte-level BPE",
    "byte-level BPE, offsets trimmed",
    "metaspace always",
    "metaspace first",
    "metaspace never",
    "byte fallback",
    "legacy prepend",
    "wordpiece",
)


@cache
def _trained(family: str) -> str:
    """The tokenizer of a family as JSON, so that each test has a copy of its own."""
    extra: dict[str, Any] = {}
    if family.startswith("byte-level BPE"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets="trimmed" in family)
        extra = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif family == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        fallback = family in ("byte fallback", "legacy prepend")
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
        if family == "legacy prepend":
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=[^\u2581])(?=\u2581)"), "isolated")
        else:
            scheme: Any = family.split()[-1] if family.startswith("metaspace") else "first"
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        extra = {"initial_alphabet": list("abcdefghijklmnopqrstuvwxyz.\u2581" + ("" if fallback else "\n"))}
    kind = trainers.WordPieceTrainer if family == "wordpiece" else trainers.BpeTrainer
    specials = [
        *SPECIALS,
        *(_BYTES if "initial_alphabet" in extra and family in ("byte fallback", "legacy prepend") else []),
    ]
    trainer = kind(vocab_size=len(specials) + 400, special_tokens=specials, show_progress=False, **extra)
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return tokenizer.to_str()


def make(family: str, template: str | None, eos: str = "</s>", bos: str = "<s>") -> Any:
    """A tokenizer of a family with a chat template of ``TEMPLATES``, or one of its own."""
    if template in TEMPLATES:
        template, eos = TEMPLATES[template]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(family)), eos_token=eos, bos_token=bos, unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIALS})
    fast.chat_template = template
    return fast
