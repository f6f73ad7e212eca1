"""Ids and labels over tokenizer families and chat templates: trained ids, prompts and answers are the template's."""

import re
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizer

from flora_core.data.records import check_records, normalise
from flora_core.data.template import EncodeReport, Example, encode, encode_prompts
from flora_core.data.tokens import check_ids
from tests.support.chat_templates import FAMILIES, SPECIALS, TEMPLATES, make

TURNS = [("say it", "cat"), ("again, and 1", "the dog sat on 2"), ("one", "three  cat."), ("it", "again")]
END_ADDED = ("glm",)


def conversation(count, system=False):
    messages = [{"role": "system", "content": "think"}] if system else []
    for question, answer in TURNS[:count]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def letters(text):
    """The letters and digits of text or of joined tokens, in which families spell blanks in ways of their own."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"<0x..>|\u0120|\u010a", "", text))


def runs(example):
    """The stretches of labels as (start, stop)."""
    marks = [label != -100 for label in example.labels]
    edges = [at for at in range(len(marks) + 1) if (at and marks[at - 1]) != (at < len(marks) and marks[at])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_prompts_and_labels_are_the_templates(family, name):
    tokenizer = make(family, name)
    for count in (1, 2, 3, 4):
        messages = conversation(count, system=name not in ("llama2", "gemma") and count == 2)
        report = EncodeReport()
        (example,) = encode([{"messages": messages}], tokenizer, max_length=999, report=report)
        assert not report, str(report)
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        assert example.input_ids == whole + [tokenizer.eos_token_id] * (name in END_ADDED)
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(runs(example)) == len(answers)
        for turn, (start, stop) in zip(answers, runs(example), strict=True):
            prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
            assert example.input_ids[:start] == prompt
            assert example.input_ids[stop - 1] in tokenizer.all_special_ids
            learned = tokenizer.convert_ids_to_tokens(example.input_ids[start : stop - 1])
            assert letters("".join(learned)).endswith(letters(messages[turn]["content"]))
            # Thoughts that a template writes, and the channel that harmony writes, are the model's own to say.
            assert name in ("qwen3", "harmony") or letters("".join(learned)) == letters(messages[turn]["content"])
        assert encode_prompts([{"messages": messages}], tokenizer) == [prompt]


def encoded(record, tokenizer, **options):
    """One record's example, and the report of what was noticed."""
    report = EncodeReport()
    (example,) = encode([record], tokenizer, max_length=999, report=report, **options)
    return example, report


def learned(tokenizer, example):
    """The texts that carry loss."""
    return [tokenizer.decode(example.input_ids[start:stop]) for start, stop in runs(example)]


def ask(*answers, **fields):
    """A conversation with these answers."""
    turns = [[{"role": "user", "content": "say it"}, {"role": "assistant", "content": answer}] for answer in answers]
    return {"messages": [message for pair in turns for message in pair], **fields}


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "dog"}}}
# Calls as ChatML models write them, and a list of tools; the result comes back in a turn of the tool's.
CALLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + "
    "(c.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Every call between special tokens, and none of them the end of the turn; the next role ends a turn.
CALLS_IN_MARKS = (
    "{% for m in messages %}{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<|start|>' + c.function.name + '<|message|>' + "
    "(c.function.arguments | tojson) + '<|end|>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CALLED = [
    {"role": "user", "content": "say it"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "a dog"},
    {"role": "assistant", "content": "one dog"},
]


def test_tool_calls_are_learned_with_the_end_of_their_turn():
    tokenizer = make("byte-level BPE", CALLS, "<|im_end|>")
    tools = [{"type": "function", "function": {"name": "look"}}]
    for arguments in ({"at": "dog"}, {}, {"at": 3}, '{"at": "dog"}'):
        call = {**CALL, "function": {"name": "look", "arguments": arguments}}
        messages = [CALLED[0], {**CALLED[1], "tool_calls": [call]}, *CALLED[2:]]
        example, report = encoded({"messages": messages, "tools": tools}, tokenizer)
        assert not report
        first, last = learned(tokenizer, example)
        assert first.startswith('\n<tool_call>\n{"name": "look"')
        assert first.endswith("</tool_call><|im_end|>")
        assert last == "one dog<|im_end|>"
        messages[1] = {"role": "assistant", "content": "", "tool_calls": [call]}
        assert example.input_ids == tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
        assert encode_prompts([{"messages": messages[:2], "tools": tools}], tokenizer) == [
            tokenizer.apply_chat_template(messages[:1], tools=tools, add_generation_prompt=True, return_dict=False)
        ]


def test_a_turn_of_calls_ends_with_the_next_role_where_a_template_ends_turns_so():
    tokenizer = make("byte-level BPE", CALLS_IN_MARKS, "<|endoftext|>")
    example, _ = encoded({"messages": CALLED}, tokenizer)
    first, last = learned(tokenizer, example)
    assert first == '<|start|>look<|message|>{"at": "dog"}<|end|><|observation|>'
    assert last == "one dog<|endoftext|>"


# Arguments between special tokens, no end mark behind calls; one of two ways to end a conversation.
QUOTED_CALLS = (
    "{% for m in messages %}{{ '<|turn>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<|call>call:' + c.function.name + '{' }}{% for key, value in c.function.arguments | dictsort %}"
    "{{ key + ':<|q|>' + value + '<|q|>' }}{% endfor %}{{ '}<call|>' }}{% endfor %}"
    "{% if not m.tool_calls %}{{ '<turn|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
)
CLOSED = "{% if not add_generation_prompt and messages[-1].tool_calls %}{{ '<turn|>' }}{% endif %}"


@pytest.mark.parametrize("closing", ["", CLOSED], ids=["as it goes on", "closed at the end"])
@pytest.mark.parametrize("count", [1, 2])
def test_calls_with_arguments_between_special_tokens_are_learned_whole(closing, count):
    tokenizer = make("byte-level BPE", QUOTED_CALLS + closing, "<turn|>")
    marks = ["<|turn>", "<turn|>", "<|call>", "<call|>", "<|q|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    messages = [CALLED[0], {**CALLED[1], "tool_calls": [CALL] * count}, *CALLED[2:]]
    example, report = encoded({"messages": messages}, tokenizer)
    assert not report
    first, last = learned(tokenizer, example)
    assert first == "<|call>call:look{at:<|q|>dog<|q|>}<call|>" * count
    assert last == "one dog<turn|>"


def test_call_that_a_template_drops_is_refused_though_a_tool_has_its_name():
    without = CALLS.replace("m.tool_calls or []", "[]")
    tokenizer = make("byte-level BPE", without, "<|im_end|>")
    tools = [{"type": "function", "function": {"name": "look"}}]
    with pytest.raises(
        ValueError, match=r"record 0: the chat template leaves out the tool calls of message 1 \(look\)"
    ):
        encoded({"messages": CALLED, "tools": tools}, tokenizer)


# The generation prompt closes an empty thought that the conversation does not repeat.
THINKS = CALLS.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}")
REFUSES_A_PREFIX = "{% if messages | length < 4 %}{{ raise_exception('no turn of the tool') }}{% endif %}" + CALLS


@pytest.mark.parametrize("template", [THINKS, REFUSES_A_PREFIX], ids=["another prompt", "no prompt"])
@pytest.mark.parametrize("content", [None, "let me see"])
def test_a_turn_of_calls_without_its_prompt_leaves_the_turn_before_it_alone(template, content):
    tokenizer = make("byte-level BPE", template, "<|im_end|>")
    example, report = encoded({"messages": [CALLED[0], {**CALLED[1], "content": content}, *CALLED[2:]]}, tokenizer)
    first, last = learned(tokenizer, example)
    call = '\n<tool_call>\n{"name": "look", "arguments": {"at": "dog"}}\n</tool_call><|im_end|>'
    assert (first, last) == ((content or "") + call, "one dog<|im_end|>")
    assert "is not what generation starts from" in str(report)


# What is said beside calls stands in a turn of its own, which the template does not mark as generated.
ASIDE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% if m.tool_calls %}{{ '<|im_start|>note\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("loss", [True, False])
def test_text_that_a_template_writes_outside_the_answer_is_reported(loss):
    tokenizer = make("byte-level BPE", ASIDE, "<|im_end|>")
    said = {**CALLED[1], "content": "let me see", "train": loss}
    example, report = encoded({"messages": [CALLED[0], said, *CALLED[2:]]}, tokenizer)
    assert "let me see" in tokenizer.decode(example.input_ids)
    assert "let me see" not in "".join(learned(tokenizer, example))
    noted = "writes the content of turns of the assistant outside the answer, without loss (records: 1; record 0)"
    assert (noted in str(report)) == loss


def test_masked_turns_have_no_loss():
    tokenizer = make("byte-level BPE", "chatml")
    record = ask("cat", "dog")
    record["messages"][1]["train"] = False
    example, _ = encoded(record, tokenizer)
    assert learned(tokenizer, example) == ["dog<|im_end|>"]
    with pytest.raises(ValueError, match="record 0: loss_on='all' trains every token, and the record leaves turns out"):
        encoded(record, tokenizer, loss_on="all")


def test_thoughts_are_learned_and_those_that_a_template_drops_are_reported():
    tokenizer = make("byte-level BPE", "qwen3")
    thought = {"reasoning_content": "so it is"}
    record = ask("cat", "dog")
    record["messages"][3] |= thought
    example, report = encoded(record, tokenizer)
    assert not report
    assert learned(tokenizer, example) == ["cat<|im_end|>", "<think>\nso it is\n</think>\n\ndog<|im_end|>"]
    record["messages"][1] |= {"reasoning_content": "three dogs"}
    assert "leaves out the reasoning_content, or a part of it, of turns of the assistant" in str(
        encoded(record, tokenizer)[1]
    )
    written = ask("<think>\nhm\n</think>\n\ncat", "<think>\nso\n</think>\n\ndog")
    example, report = encoded(written, tokenizer)
    assert learned(tokenizer, example) == ["cat<|im_end|>", "<think>\nso\n</think>\n\ndog<|im_end|>"]
    assert "leaves out the content, or a part of it, of turns of the assistant (records: 1; record 0)" in str(report)


def test_template_arguments_reach_the_template():
    tokenizer = make("byte-level BPE", "qwen3")
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    example, report = encoded(ask("cat", **quiet), tokenizer)
    assert not report
    assert learned(tokenizer, example) == ["cat<|im_end|>"]
    (prompt,) = encode_prompts([ask("cat", **quiet)], tokenizer)
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    # The template writes no empty thought into earlier turns, and generation would start from one.
    assert "what generation starts from" in str(encoded(ask("cat", "dog", **quiet), tokenizer)[1])
    _, report = encoded(ask("cat", chat_template_kwargs={"mood": 1}), tokenizer)
    assert "chat_template_kwargs: the chat template does not read mood" in str(report)


def test_a_generation_prompt_that_opens_a_thought_is_reported():
    opens = TEMPLATES["chatml"][0].replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
    )
    tokenizer = make("byte-level BPE", opens, "<|im_end|>")
    for answers in (("cat",), ("<b>cat", "dog")):
        example, report = encoded(ask(*answers), tokenizer)
        assert "what generation starts from" in str(report)
        assert learned(tokenizer, example) == [f"{answer}<|im_end|>" for answer in answers]
    example, report = encoded(ask("<think>\nhm\n</think>\n\ncat"), tokenizer)
    assert not report
    assert learned(tokenizer, example) == ["hm\n</think>\n\ncat<|im_end|>"]


def test_an_answer_that_a_template_cuts_away_is_refused():
    last_two = "{% for m in messages[-2:] %}{{ '[' + m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer = make("byte-level BPE", last_two, "<|im_end|>")
    assert not encoded(ask("cat"), tokenizer)[1]
    with pytest.raises(ValueError, match="record 0: the chat template does not render message 1 so that its answer"):
        encoded(ask("cat", "dog"), tokenizer)


def test_an_assistant_that_speaks_first_is_reported_and_has_no_loss_there():
    tokenizer = make("byte-level BPE", "chatml")
    record = {"messages": [{"role": "assistant", "content": "say"}, *ask("cat")["messages"]]}
    example, report = encoded(record, tokenizer)
    assert learned(tokenizer, example) == ["cat<|im_end|>"]
    assert "the assistant speaks first" in str(report)
    assert "record 0" in str(report)


def test_answers_that_are_all_empty_are_reported():
    tokenizer = make("byte-level BPE", "chatml")
    assert "all answers are empty" in str(encoded(ask(" ", ""), tokenizer)[1])
    assert not encoded(ask("", "cat"), tokenizer)[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("say it", "<s> ... </s>"),
        ("<s>say it</s>", "<s> ... </s>"),
        ("<s>say it", "<s> ... </s>"),
        ("it</s>\n", "<s> ..."),
    ],
)
def test_rendered_text_has_one_bos_and_one_eos(family, text, tokens):
    tokenizer = make(family, None, "</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    example, _ = encoded({"text": text}, tokenizer)
    assert [example.input_ids.count(tokenizer.convert_tokens_to_ids(mark)) for mark in ("<s>", "</s>")] == [1, 1]
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.labels[0] == -100
    end = example.input_ids.index(tokenizer.eos_token_id)
    assert example.labels[1 : end + 1] == example.input_ids[1 : end + 1]
    assert {*example.labels[end + 1 :]} <= {-100}


@pytest.mark.parametrize("template", [None, "llama2", "chatml"])
def test_an_answer_that_spells_its_end_mark_has_it_once(template):
    tokenizer = make("byte-level BPE", template)
    example, report = encoded(ask(f"cat{tokenizer.eos_token}"), tokenizer)
    assert example.labels.count(tokenizer.eos_token_id) == 1
    assert "spells its own end mark" in str(report)


def test_tokens_that_join_prompt_and_answer_are_reported():
    spaced = TEMPLATES["chatml"][0].replace("'\n' +", "': ' +").replace("assistant\n", "assistant: ")
    example, report = encoded(ask("cat"), make("byte-level BPE", spaced, "<|im_end|>"))
    assert "a token reaches over the start of an answer" in str(report)
    assert learned(make("byte-level BPE", spaced, "<|im_end|>"), example) == [" cat<|im_end|>"]


def test_templates_that_ask_for_parts_get_parts():
    parts = TEMPLATES["chatml"][0].replace("m.content", "m.content[0]['text']")
    tokenizer = make("byte-level BPE", parts, "<|im_end|>")
    example, report = encoded(ask("cat", "dog"), tokenizer)
    assert not report
    assert learned(tokenizer, example) == ["cat<|im_end|>", "dog<|im_end|>"]


class Letters(PreTrainedTokenizer):
    """A slow tokenizer: a token a letter."""

    def __init__(self, **options):
        self.letters = sorted(set("".join(chr(code) for code in range(32, 127)) + "\n"))
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: at for at, letter in enumerate(self.letters)} | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.index(token)

    def _convert_id_to_token(self, index):
        return self.letters[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "glm", "harmony", "phi"])
def test_slow_tokenizers_give_the_same_spans(name):
    template, eos = TEMPLATES[name]
    tokenizer: Any = Letters(eos_token=eos, additional_special_tokens=SPECIALS)
    tokenizer.chat_template = template
    messages = conversation(4)
    example, report = encoded({"messages": messages}, tokenizer)
    assert not report
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert example.input_ids == whole + [tokenizer.eos_token_id] * (name in END_ADDED)
    fast = encoded({"messages": messages}, make("byte-level BPE", name))[0]
    mine, theirs = learned(tokenizer, example), learned(make("byte-level BPE", name), fast)
    assert mine == theirs


def test_tokens_beyond_the_embedding_are_refused():
    tokenizer = make("byte-level BPE", "chatml")
    example, _ = encoded(normalise(ask("cat"), "a.jsonl, line 3"), tokenizer)
    check_ids([example], len(tokenizer), tokenizer, "client 'a'")
    wrong = max(example.input_ids)
    name = re.escape(tokenizer.convert_ids_to_tokens(wrong))
    with pytest.raises(
        ValueError, match=rf"client 'a': token id {wrong} \('{name}'\) of a\.jsonl, line 3 is beyond .* {wrong} rows"
    ):
        check_ids([example], wrong, tokenizer, "client 'a'")
    with pytest.raises(ValueError, match="token id -1 of example 4 is beyond"):
        check_ids([Example([-1, 2], [-1, 2], 4)], 9, None, "client 'a'")


NEEDLE = "dog cat"
PLAIN = {"instruction": "say", "output": "it"}
FORMS = {
    "alpaca": PLAIN,
    "chat": ask("it"),
    "sharegpt": {"conversations": [{"from": "human", "value": "say"}, {"from": "gpt", "value": "it"}]},
    "prompt and completion": {"prompt": "say", "completion": "it"},
    "prompt and completion in turns": {"prompt": ask("it")["messages"][:1], "completion": ask("it")["messages"][1:]},
    "question and answer": {"question": "say", "answer": "it"},
    "text": {"text": "say it"},
}
KEYS = {
    **dict.fromkeys(
        ("system", "system_prompt", "input", "context", "instruction", "question", "prompt", "query"), NEEDLE
    ),
    **dict.fromkeys(("output", "response", "answer", "completion", "text", "thinking", "reasoning", "note"), NEEDLE),
    **dict.fromkeys(("chosen", "rejected", "title", "passage", "enable_thinking"), NEEDLE),
    "history": [[NEEDLE, "it"]],
    "messages": ask(NEEDLE)["messages"],
    "conversations": ask(NEEDLE)["messages"],
    "tools": [{"type": "function", "function": {"name": "look", "description": NEEDLE}}],
    "documents": [{"title": "one", "text": NEEDLE}],
    "chat_template_kwargs": {"mood": NEEDLE},
    "images": [NEEDLE],
    "choices": [NEEDLE, "it"],
}


def outcome(record, template):
    """Outcome of a record: the text of its ids, and what was reported; or the refusal."""
    tokenizer, reported = make("byte-level BPE", template, "<|im_end|>"), []
    try:
        records = check_records([record], "data", warn=reported.append)
        example, report = encoded(records[0], tokenizer)
    except ValueError as error:
        return "refused", str(error)
    return tokenizer.decode(example.input_ids), " ".join([*reported, str(report)])


@pytest.mark.parametrize("template", [None, "chatml", CALLS], ids=["prompt", "chatml", "calls"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", KEYS)
def test_no_field_is_dropped_in_silence(template, form, key):
    text, reported = outcome({**FORMS[form], key: KEYS[key]}, template)
    # A column of thoughts becomes the reasoning_content of the answer.
    names = ("reasoning", key) if key == "thinking" else (key,)
    refused = text == "refused" and "data, record 0" in reported
    assert NEEDLE in text or refused or any(name in reported for name in names)


@pytest.mark.parametrize(
    "key", ["name", "tool_calls", "function_call", "reasoning_content", "thinking", "mood", "content", "value", "train"]
)
@pytest.mark.parametrize("template", [None, "chatml", CALLS], ids=["prompt", "chatml", "calls"])
def test_no_key_of_a_turn_is_dropped_in_silence(template, key):
    call = {"name": "look", "arguments": {"at": NEEDLE}}
    record = ask("it")
    record["messages"][1][key] = {"tool_calls": [{"function": call}], "function_call": call}.get(key, NEEDLE)
    text, reported = outcome(record, template)
    assert NEEDLE in text or key in reported or (text == "refused" and "data, record 0" in reported)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "mistral", "phi", "qwen3", "marked"])
def test_odd_answers_have_the_prompt_of_generation_or_are_reported(family, name):
    tokenizer = make(family, name)
    for answer in (
        "\u4e2d\u6587 cat",
        "\n\ncat",
        "  cat",
        "\u00e9t\u00e9",
        "\U0001f600",
        "cat \n",
        "'cat'",
        "\u00a0cat",
        "<b>",
    ):
        messages = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": answer}]
        example, report = encoded({"messages": messages}, tokenizer)
        assert example.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
        ((start, stop),) = runs(example)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert example.input_ids[stop - 1] in tokenizer.all_special_ids
        assert (example.input_ids[:start] == prompt) != bool(report), (answer, str(report))
