"""Records: forms told apart by their columns, and an error that names file, line and remedy for each bad input."""

import json

import pytest

from flora_core.data.records import Record, check_records, load_records, normalise

ALPACA = {"instruction": "add", "input": "1 2", "output": "3"}
DOLLY = {"instruction": "add", "context": "1 2", "response": "3", "category": "sum", "id": 7}
CHAT = {"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "content": "3"}]}
TEXT = {"text": "one two", "client": "a"}
ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def messages_of(**fields):
    return normalise(fields, "here").messages


def loss_of(**fields):
    return normalise(fields, "here").loss


def test_forms_may_be_mixed_and_columns_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", ALPACA, DOLLY, CHAT, TEXT)
    records = load_records(path)
    assert records == [ALPACA, DOLLY, CHAT, TEXT]
    assert [dict(record) for record in records] == [ALPACA, DOLLY, CHAT, TEXT]
    assert [record.get("category") for record in records] == [None, "sum", None, None]
    assert [record.place for record in records] == [f"{path}, line {line}" for line in (1, 2, 3, 4)]


def test_reads_file_details_that_do_not_matter(tmp_path):
    path = tmp_path / "a.jsonl"
    # A byte order mark, Windows line ends, blank lines, a U+2028 inside a string, no final newline.
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\xe2\x80\xa8c"}\n \n{"text": "d"}')
    assert [record["text"] for record in load_records(path)] == ["a", "b\u2028c", "d"]


def test_a_record_is_normalised_once():
    record = normalise(ALPACA, "a.jsonl, line 3")
    assert normalise(record, "elsewhere") is record
    assert check_records([record], "client 'a'")[0] is record


@pytest.mark.parametrize("question", ["instruction", "question", "prompt", "query"])
@pytest.mark.parametrize("extra", ["input", "context"])
@pytest.mark.parametrize("answer", ["output", "response", "answer", "completion"])
def test_reads_any_mix_of_field_names(question, extra, answer):
    asked = [{"role": "user", "content": "q\n\ne"}, ANSWER]
    assert messages_of(**{question: "q", extra: "e", answer: "a"}) == asked
    assert messages_of(**{question: "q", extra: "", answer: "a"}) == [ASK, ANSWER]
    system = {"role": "system", "content": "s"}
    assert messages_of(**{question: "q", answer: "a", "system": "s"}) == [system, ASK, ANSWER]
    older = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]
    history = {"history": [["q0", "a0"]], "system_prompt": "s"}
    assert messages_of(**{question: "q", answer: "a", **history}) == [system, *older, ASK, ANSWER]
    assert loss_of(**{question: "q", answer: "a", **history}) == [False, False, True, False, True]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [ASK, ANSWER]},
        {"messages": json.dumps([ASK, ANSWER])},
        {"messages": [ASK, ANSWER], "prompt": "q", "prompt_id": "7"},
        {"messages": [{**ASK, "tool_calls": None, "name": None}, ANSWER], "tools": None, "instruction": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "image": None}]}, ANSWER]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [ASK, {"from": "assistant", "value": "a"}]},
        {"prompt": [ASK], "completion": [ANSWER]},
        {"prompt": "q", "completion": [ANSWER]},
        {"prompt": [ASK], "completion": "a"},
        {"input": "q", "output": "a"},
        {"messages": None, "instruction": "q", "output": "a"},
        {"instruction": "q", "output": None, "response": "a", "input": float("nan")},
        {"instruction": "", "question": "q", "output": "a"},
    ],
)
def test_reads_one_conversation_in_many_forms(fields):
    record = normalise(fields, "here")
    assert record.messages == [ASK, ANSWER]
    assert record.loss == [False, True]
    assert record.unknown == ()


def test_null_columns_count_as_absent():
    assert normalise({"instruction": None, "output": None, "text": "x", "other": None}, "here").text == "x"


def test_loss_of_a_prompt_in_turns_is_on_the_completion_alone():
    prompt = [ASK, {"role": "assistant", "content": "old"}, {"role": "user", "content": "again"}]
    assert loss_of(prompt=prompt, completion=[ANSWER]) == [False, False, False, True]


def test_reads_tools_calls_and_template_arguments():
    tools = [{"type": "function", "function": {"name": "f"}}]
    called = [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]
    record = normalise(
        {"messages": [*called, ANSWER], "tools": json.dumps(tools), "chat_template_kwargs": {"enable_thinking": False}},
        "here",
    )
    assert record.tools == tools
    assert record.template_kwargs == {"enable_thinking": False}
    assert record.messages == [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, called[2], ANSWER]
    assert record.loss == [False, True, False, True]
    older = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    shared = {"from": "function_call", "value": json.dumps(CALL["function"])}
    for spelling in (older, shared):
        again = [ASK, spelling, {"from": "observation", "value": "2"}, ANSWER]
        assert messages_of(conversations=again) == record.messages


def test_a_thought_column_goes_to_the_answer():
    assert messages_of(question="q", reasoning="hm", answer="a") == [ASK, {**ANSWER, "reasoning_content": "hm"}]


@pytest.mark.parametrize(
    "mask", [{"train": False}, {"weight": 0}, {"loss": 0.0}, {"trainable": False}, {"loss_mask": 0}, {"masked": True}]
)
def test_reads_loss_masks_of_turns(mask):
    turns = [{**ASK, "weight": None}, {**ANSWER, **mask}, ASK, ANSWER]
    assert loss_of(messages=turns) == [False, False, False, True]
    opposite = {key: not value for key, value in mask.items()}
    assert loss_of(messages=[ASK, {**ANSWER, **opposite}, ASK, ANSWER]) == [False, True, False, True]
    assert messages_of(messages=turns) == [ASK, ANSWER, ASK, ANSWER]


def test_reports_unknown_fields_once_a_file(tmp_path):
    path = write(tmp_path / "a.jsonl", {**ALPACA, "note": "x", "id": 1}, {**ALPACA, "note": "y", "hint": None}, ALPACA)
    with pytest.warns(UserWarning, match=r"a\.jsonl: fields that nothing reads.*: note \(in 2 of 3\)$") as caught:
        records = load_records(path)
    assert len(caught) == 1
    assert load_records(path, known=["note"]) == records
    assert check_records(records, "client 'a'") == records
    reported = []
    load_records(path, warn=reported.append)
    assert len(reported) == 1
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: unknown fields: note; remove them"):
        load_records(path, unknown="refuse")
    with pytest.raises(ValueError, match="unknown must be one of warn, refuse"):
        load_records(path, unknown="ignore")


def test_reports_unknown_keys_of_turns():
    assert normalise({"messages": [{**ASK, "mood": "x", "id": 3}, ANSWER]}, "here").unknown == ("messages[].mood",)


def test_columns_with_capitals_and_arc_choices_are_read():
    record = normalise({"Question": "q", "Input": "more", "Response": "r", "Level": "1"}, "here")
    assert [turn["content"] for turn in record.messages or []] == ["q\n\nmore", "r"]
    assert record.unknown == ("Level",)
    choices = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}
    record = normalise({"question": "?", "choices": choices, "answerKey": "B"}, "here")
    assert (record.text, record.choices, record.correct) == ("?", ["x", "y", "z"], 1)
    for wrong in ("D", "a", 1):
        with pytest.raises(
            ValueError, match=r"here: multiple choice needs .* or choices \{text, label\} and answerKey"
        ):
            normalise({"question": "?", "choices": choices, "answerKey": wrong}, "here")


def test_reads_multiple_choice():
    record = normalise({"question": "?", "choices": ["a", "b"], "answer": 1, "subject": "law"}, "here")
    assert (record.text, record.choices, record.correct, record.messages) == ("?", ["a", "b"], 1, None)


def turn(**fields):
    return {"messages": [ASK, {**ANSWER, **fields}]}


@pytest.mark.parametrize(
    ("asked", "answered"),
    [("problem", "solution"), ("problem", "generated_solution"), ("inputs", "targets"), ("input", "target")],
)
def test_question_and_answer_by_the_names_of_public_data(asked, answered):
    messages = normalise({asked: "1+1?", answered: "2", "id": 1}, "here").messages or []
    assert [message["content"] for message in messages] == ["1+1?", "2"]
    with pytest.raises(ValueError, match="both hold the same part"):
        normalise({asked: "1+1?", answered: "because ... 2", "answer": "2"}, "here")


def test_prompt_that_repeats_question_and_answer_is_reported_and_another_is_refused():
    rendered = (
        f"### Instruction: {ALPACA['instruction']} ### Input: {ALPACA.get('input', '')} ### Output: {ALPACA['output']}"
    )
    assert normalise({**ALPACA, "prompt": rendered}, "here").unknown == ("prompt",)
    with pytest.raises(ValueError, match="instruction and prompt both hold"):
        normalise({**ALPACA, "prompt": "another question"}, "here")


@pytest.mark.parametrize("fields", [{**ALPACA, "input": "more"}, CHAT], ids=["alpaca", "chat"])
def test_text_that_repeats_the_record_is_reported_and_another_is_refused(fields):
    turns = normalise(fields, "here").messages or []
    rendered = "Below is an instruction." + "".join(f"\n### {turn['content']}" for turn in turns)
    record = normalise({**fields, "text": rendered}, "here")
    assert (record.messages, record.unknown) == (turns, ("text",))
    with pytest.raises(ValueError, match="text stands beside"):
        normalise({**fields, "text": rendered.replace(turns[-1]["content"], "")}, "here")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "found: none"),
        ({"prompt": "a", "id": 1}, r"lacks the needed fields; found: prompt, id; accepted: messages \|"),
        ({"instruction": "a"}, "found: instruction; accepted"),
        ({"instruction": "a", "output": None}, "found: instruction; accepted"),
        ({"text": 3}, "text must be a string, got int"),
        ({"text": "\ud800"}, "text holds half of a surrogate pair"),
        ({"instruction": "a", "output": 4}, "output must be a string, got int"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, "input must be a string, got list"),
        ({**ALPACA, "context": "other"}, "input and context both hold the same part of the record, and differ"),
        ({**ALPACA, "response": "other"}, "output and response both hold the same part"),
        ({**ALPACA, "question": "other"}, "instruction and question both hold the same part"),
        ({**ALPACA, "text": "other"}, "text stands beside instruction"),
        ({**CHAT, "prompt": "other"}, "prompt stands beside messages"),
        ({**CHAT, "history": [["a", "b"]]}, "history stands beside messages"),
        ({**CHAT, "text": "other"}, "text stands beside messages"),
        ({**TEXT, "system": "s"}, "system stands beside text"),
        ({**TEXT, "tools": [{"name": "f"}]}, "tools stands beside text"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}, ASK, ANSWER]}, "begins with another system"),
        ({**ALPACA, "images": ["a.png"]}, "images is not supported: only text is trained on"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen is not supported: preference pairs"),
        ({**ALPACA, "history": [["a"]]}, r"history\[0\] must be a pair \[question, answer\]"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": "not json"}, "messages must be a list or the JSON text of one"),
        ({"messages": ["a"]}, r"messages\[0\] must have role and content"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, r"messages\[0\] must be one of system, developer, user"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\] must have role and content"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content must be a string, got int"),
        ({"messages": [ASK]}, "the conversation has no answer: its roles are user; add the assistant's turn"),
        (turn(content=[{"type": "image", "image": "a"}]), r"messages\[1\]\.content\[0\] must be a text part"),
        (turn(value="b"), r"messages\[1\] has content and value, and they differ"),
        (turn(tool_calls=[{"x": 1}]), r"messages\[1\]\.tool_calls\[0\] must have a function with name and arguments"),
        ({"messages": [{**ASK, "tool_calls": [CALL]}, ANSWER]}, r"messages\[0\] has tool_calls, and its role is user"),
        (turn(train=False), "every answer of the conversation is masked, so nothing is learned"),
        (turn(mask=1), r"messages\[1\]\.mask can mean either; write train"),
        (turn(weight=0.5), r"messages\[1\]\.weight must be true or false, or 1 or 0"),
        (turn(train=True, weight=0), r"messages\[1\]: train, weight contradict one another"),
        ({"messages": [{**ASK, "train": True}, ANSWER]}, r"messages\[0\] asks for loss on a turn of the user"),
        ({**CHAT, "tools": "x"}, "tools must be a list or the JSON text of one"),
        ({**CHAT, "tools": ["f"]}, "tools must be a list of function schemas"),
        ({**CHAT, "chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
        ({**CHAT, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs must not set tools"),
        ({"question": "?", "choices": ["a", "b"], "answer": "a"}, "multiple choice needs question, choices"),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, "multiple choice needs question, choices"),
    ],
)
def test_refuses_bad_records(fields, words):
    with pytest.raises(ValueError, match=r"^a\.jsonl, line 7: .*" + words):
        normalise(fields, "a.jsonl, line 7")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"a\.jsonl is empty"),
        (" \n\n", r"a\.jsonl is empty"),
        ('{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: malformed JSON: .* at column 10"),
        ('{"text": "a"}\n"b"\n', "line 2: .* must be a JSON object, got str"),
        ('{"text": "a"}\n{"text": 3}\n', "line 2: text must be a string, got int"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=words):
        load_records(path)


def test_check_records_names_the_source():
    assert all(isinstance(record, Record) for record in check_records([ALPACA, TEXT], "client 'a'"))
    with pytest.raises(ValueError, match="client 'a', record 1: the record lacks"):
        check_records([ALPACA, {"x": 1}], "client 'a'")
    with pytest.raises(ValueError, match="client 'a' has no records"):
        check_records([], "client 'a'")
    with pytest.raises(ValueError, match="record 1: a record must be a dict, got str"):
        check_records([ALPACA, "text"], "here")


@pytest.mark.parametrize(
    "fields",
    [
        {"conversations": ["q", "a"], "source": "s"},
        {"conversation": [{"input": "q", "output": "a"}]},
        {"conversations": [{"from": "user", "value": "q"}, {"from": "bing", "value": "a"}]},
        {"prompt": "q ", "messages": [ASK, ANSWER]},
    ],
    ids=["texts", "pairs", "bing", "trimmed-prompt"],
)
def test_reads_shapes_of_public_data_sets(fields):
    assert messages_of(**fields) == [ASK, ANSWER]
    assert loss_of(**fields) == [False, True]


def test_a_list_of_texts_may_end_with_a_question():
    assert loss_of(conversations=["q", "a", "q"]) == [False, True, False]


def test_refuses_a_message_of_a_tree_and_a_mask_of_parts():
    with pytest.raises(ValueError, match="one message of a tree"):
        normalise({"text": "t", "role": "prompter", "parent_id": None}, "here")
    with pytest.raises(ValueError, match="train_detail masks parts"):
        normalise({"messages": [ASK, {**ANSWER, "train_detail": []}]}, "here")
