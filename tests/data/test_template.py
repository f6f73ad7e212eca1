"""Encoding: answers carry the loss up to their end mark, and training starts an answer where generation does."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flora_core.data.records import load_records
from flora_core.data.template import EncodeReport, encode, encode_prompts, require_examples

ALPACA = {"instruction": "add them", "input": "one two", "output": "three"}
SHORT = {"instruction": "say it", "output": "cat"}
TEXT = {"text": "the cat sat"}
SYSTEM = {"role": "system", "content": "be brief"}
TURNS = [
    {"role": "user", "content": "say it"},
    {"role": "assistant", "content": "cat"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "dog cat"},
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Llama 2: bos inside the template, no generation prompt, a space before the end mark.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Like Qwen 3 and Llama 3: contents are trimmed, and only the last answer gets an empty thought before it.
THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No special token after an answer.
PLAIN_CHAT = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
# Like Phi 3: a turn's end, then the end of the text.
TWO_ENDS = (
    "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% else %}{{ '</s>' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
# Rewrites history, so no prefix of the rendered text is what generation would have seen.
LAST_ONLY = "{% for m in messages[-2:] %}{{ '[' + m['content'] + ']' }}{% endfor %}{{ messages | length }}"


def make_tokenizer(chat_template: str | None = None, eos: str | None = "<|im_end|>", bos: str | None = None) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on one dog, and three say it again\n\n\n"] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    # The marks are special whether or not they are eos or bos.
    fast.add_special_tokens({"additional_special_tokens": specials})
    fast.chat_template = chat_template
    return fast


def learned(tokenizer, example):
    """Decode the labels, with one | for every gap between them."""
    runs, previous = [], False
    for label in example.labels:
        if label != -100 and not previous:
            runs.append([])
        if label != -100:
            runs[-1].append(label)
        previous = label != -100
    return "|".join(tokenizer.decode(run) for run in runs)


def test_prompt_template():
    tokenizer = make_tokenizer()
    alpaca, chat = encode([ALPACA, {"messages": [SYSTEM, *TURNS]}], tokenizer, max_length=200)
    assert tokenizer.decode(alpaca.input_ids) == "### Task\nadd them\n\none two\n\n### Answer\nthree<|im_end|>"
    assert learned(tokenizer, alpaca) == "three<|im_end|>"
    assert tokenizer.decode(chat.input_ids) == (
        "### Background\nbe brief\n\n### Task\nsay it\n\n### Answer\ncat<|im_end|>\n\n"
        "### Task\nagain\n\n### Answer\ndog cat<|im_end|>"
    )
    assert learned(tokenizer, chat) == "cat<|im_end|>|dog cat<|im_end|>"


@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        (CHATML, "<|im_start|>user\nsay it<|im_end|>\n<|im_start|>assistant\ncat<|im_end|>\n", "cat<|im_end|>"),
        (LLAMA2, "<s>[INST] say it [/INST] cat </s>", " cat </s>"),
        (
            THINK,
            "<|im_start|>user\nsay it<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\ncat<|im_end|>\n",
            "<think>\n\n</think>\n\ncat<|im_end|>",
        ),
        (PLAIN_CHAT, "user:\nsay it\nassistant:\ncat\n<|im_end|>", "cat\n<|im_end|>"),
        (TWO_ENDS, "user\nsay it<|im_end|>\nassistant\ncat<|im_end|>\n</s>", "cat<|im_end|>"),
    ],
    ids=["chatml", "llama2", "think", "plain", "two-ends"],
)
def test_chat_template(template, text, answers):
    tokenizer = make_tokenizer(template, eos="</s>" if template == LLAMA2 else "<|im_end|>", bos="<s>")
    (example,) = encode([SHORT], tokenizer, max_length=200)
    assert tokenizer.decode(example.input_ids) == text
    assert learned(tokenizer, example) == answers


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, "cat<|im_end|>|dog cat<|im_end|>"),
        (LLAMA2, " cat </s>| dog cat </s>"),
        (THINK, "cat<|im_end|>|<think>\n\n</think>\n\ndog cat<|im_end|>"),
        (PLAIN_CHAT, "cat|dog cat\n<|im_end|>"),
        (TWO_ENDS, "cat<|im_end|>|dog cat<|im_end|>"),
    ],
    ids=["chatml", "llama2", "think", "plain", "two-ends"],
)
def test_every_answer_of_a_chat_carries_loss(template, answers):
    tokenizer = make_tokenizer(template, eos="</s>" if template == LLAMA2 else "<|im_end|>", bos="<s>")
    (example,) = encode([{"messages": TURNS}], tokenizer, max_length=200)
    assert learned(tokenizer, example) == answers
    rendered = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(example.input_ids) == rendered + "<|im_end|>" * (template == PLAIN_CHAT)


def test_answer_that_looks_like_its_surroundings():
    # "think" stands inside the thought, "im_end" inside the end mark, "assistant" inside the prompt.
    tokenizer = make_tokenizer(THINK)
    for answer in ("think", "im_end", "assistant", "", "\n\n"):
        (example,) = encode([{**SHORT, "output": answer}], tokenizer, max_length=200, report=EncodeReport())
        assert learned(tokenizer, example) == f"<think>\n\n</think>\n\n{answer.strip()}<|im_end|>"


@pytest.mark.parametrize("template", [None, CHATML, LLAMA2, THINK, PLAIN_CHAT])
def test_training_and_generation_share_the_prompt(template):
    tokenizer = make_tokenizer(template, bos="<s>")
    records = [ALPACA, SHORT, {"messages": TURNS}, {**SHORT, "output": " cat"}]
    prompts = encode_prompts(records, tokenizer)
    for prompt, example in zip(prompts, encode(records, tokenizer, max_length=200), strict=True):
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels[len(prompt) - 1] == -100
        assert example.labels[len(prompt)] != -100
    if template:
        question = [{"role": "user", "content": "say it"}]
        rendered = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        assert prompts[1] == tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [None, CHATML, LLAMA2])
def test_one_bos(template):
    tokenizer = make_tokenizer(template, bos="<s>")
    for example in encode([ALPACA, TEXT], tokenizer, max_length=200):
        wanted = 0 if template == CHATML and example.record == 0 else 1
        assert example.input_ids.count(tokenizer.bos_token_id) == wanted
        assert (example.input_ids[0] == tokenizer.bos_token_id) == bool(wanted)


@pytest.mark.parametrize("template", [None, CHATML])
def test_text_is_all_answer(template):
    tokenizer = make_tokenizer(template, bos="<s>")
    (example,) = encode([TEXT], tokenizer, max_length=200)
    assert learned(tokenizer, example) == "the cat sat<|im_end|>"
    assert encode_prompts([TEXT], tokenizer) == [[tokenizer.bos_token_id]]


@pytest.mark.parametrize("template", [None, CHATML])
def test_loss_on_all(template):
    for example in encode([ALPACA, TEXT, {"messages": TURNS}], make_tokenizer(template), max_length=200, loss_on="all"):
        assert example.labels == example.input_ids


def test_template_choice():
    plain, chat = make_tokenizer(), make_tokenizer(CHATML)
    assert encode([SHORT], chat, max_length=99) == encode([SHORT], chat, max_length=99, template="chat")
    assert encode([SHORT], chat, max_length=99, template="prompt") == encode([SHORT], plain, max_length=99)
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template, and this one has none; use 'prompt'"):
        encode([SHORT], plain, max_length=99, template="chat")


def test_truncation_is_counted_and_warned_of_once():
    tokenizer = make_tokenizer()
    long = {**SHORT, "output": "cat dog " * 30}
    lost = {**SHORT, "instruction": "say it " * 30}
    with pytest.warns(UserWarning, match="2 of 3 records were longer than max_length.*1 had no answer token") as caught:
        examples = encode([SHORT, long, lost], tokenizer, max_length=40)
    assert len(caught) == 1
    assert Path(caught[0].filename) == Path(__file__)
    assert [example.record for example in examples] == [0, 1]
    assert len(examples[1].input_ids) == len(examples[1].labels) == 40
    assert tokenizer.eos_token_id not in examples[1].input_ids


def test_report_collects_over_calls():
    tokenizer, report = make_tokenizer(), EncodeReport()
    for _ in range(2):
        encode([SHORT, TEXT], tokenizer, max_length=3, report=report)
    assert report == EncodeReport(records=4, truncated=4, dropped=2)
    with pytest.warns(UserWarning, match="4 of 4 records"):
        report.warn()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EncodeReport(records=3).warn()


def test_a_first_token_alone_teaches_nothing():
    report = EncodeReport()
    assert encode([{"text": ""}], make_tokenizer(), max_length=9, report=report) == []
    assert report.dropped == 1


def test_require_examples():
    report = EncodeReport()
    examples = encode([SHORT], make_tokenizer(), max_length=3, report=report)
    with pytest.raises(ValueError, match=r"client 'ann' has no examples left after tokenizing \(1 of 1 .* max_length"):
        require_examples("ann", examples, report)
    with pytest.raises(ValueError, match="client 'bob' has no examples; give it data or leave it out"):
        require_examples("bob", [], EncodeReport())
    require_examples("cat", encode([SHORT], make_tokenizer(), max_length=99), report)


def test_no_end_mark():
    tokenizer = make_tokenizer(eos=None)
    with pytest.raises(ValueError, match=r"no eos token, so answers .* set tokenizer\.eos_token = '</s>'"):
        encode([SHORT], tokenizer, max_length=99)
    with pytest.raises(ValueError, match="no eos token"):
        encode([SHORT], make_tokenizer(PLAIN_CHAT, eos=None), max_length=99)
    # A chat template with an end mark of its own needs no eos.
    (example,) = encode([SHORT], make_tokenizer(CHATML, eos=None), max_length=99)
    assert learned(make_tokenizer(), example) == "cat<|im_end|>"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"loss_on": "answers"}, "loss_on must be one of answer, all, got 'answers'"),
        ({"template": "alpaca"}, "template must be one of auto, prompt, chat, got 'alpaca'"),
        ({"records": [SHORT, {"question": "?"}]}, "record 1: the record lacks the needed fields; found: question"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        encode(**{"records": [SHORT], "tokenizer": make_tokenizer(), "max_length": 99, **options})


def test_chat_template_that_refuses_or_rewrites():
    refused = [SHORT, {**SHORT, "system": "be brief"}]
    with pytest.raises(ValueError, match=r"record 1: the chat template refuses it \(no system role\).*use template="):
        encode(refused, make_tokenizer(NO_SYSTEM), max_length=99)
    with pytest.raises(
        ValueError, match="record 0: the chat template does not render message 1 so that its answer can be found"
    ):
        encode([{"messages": TURNS}], make_tokenizer(LAST_ONLY), max_length=99)


def each_turn(text: str) -> str:
    """A chat template that writes ``text`` for every message m."""
    prompt = "{% if add_generation_prompt %}assistant:\n{% endif %}"
    return "{% for m in messages %}{{ m.role + ':\\n' + " + text + " }}{% endfor %}" + prompt


def test_an_answer_is_found_by_its_content_where_its_end_depends_on_that():
    tokenizer = make_tokenizer(each_turn("m.content + ('' if m.content == 'cat' else '.') + '<|im_end|>'"))
    (example,) = encode([SHORT], tokenizer, max_length=99)
    assert learned(tokenizer, example) == "cat<|im_end|>"


def test_content_that_a_template_rewrites_is_refused_where_its_end_differs_too():
    rewritten = "m.content.replace('cat', 'dog') + ('!' if 'cat' in m.content else '?') + '<|im_end|>'"
    with pytest.raises(ValueError, match="record 0: the chat template does not render message 1 so that its answer"):
        encode([SHORT], make_tokenizer(each_turn(rewritten)), max_length=99)


def test_an_empty_answer_without_an_end_mark_has_no_token():
    tokenizer = make_tokenizer(each_turn("m.content + '\\n'"))
    turns = [TURNS[0], {"role": "assistant", "content": ""}, *TURNS[2:]]
    (example,) = encode([{"messages": turns}], tokenizer, max_length=99, report=EncodeReport())
    assert learned(tokenizer, example).strip() == "dog cat\n<|im_end|>"


def test_no_records():
    assert encode([], make_tokenizer(), max_length=9) == []
    assert encode_prompts([], make_tokenizer(CHATML)) == []


@pytest.mark.parametrize("template", [None, CHATML])
def test_texts_are_tokenized_in_one_batch(template, monkeypatch):
    tokenizer, calls = make_tokenizer(template), []
    original = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    encode([ALPACA] * 2, tokenizer, max_length=99)
    few = len(calls)
    encode([ALPACA] * 50, tokenizer, max_length=99)
    assert 0 < few == len(calls) - few


@pytest.mark.parametrize("template", [None, CHATML])
def test_dolly_answers_come_back_whole(template, shared_data, scale):
    records = load_records(shared_data / "dolly" / "dolly15k.jsonl")
    records = records[: scale(150, len(records), "records")]
    tokenizer = make_tokenizer(template)
    for record, example in zip(records, encode(records, tokenizer, max_length=10**6), strict=True):
        assert learned(tokenizer, example) == record["response"] + "<|im_end|>"
