"""Records: four forms read from JSONL, and an error that names file, line and remedy for each bad input."""

import json

import pytest

from flora_core.data.records import check_records, load_records, read_jsonl, record_form, to_messages

ALPACA = {"instruction": "add", "input": "1 2", "output": "3"}
DOLLY = {"instruction": "add", "context": "1 2", "response": "3", "category": "sum", "id": 7}
CHAT = {"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "content": "3"}]}
TEXT = {"text": "one two", "client": "a"}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def test_forms_may_be_mixed_and_keys_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", ALPACA, DOLLY, CHAT, TEXT)
    assert load_records(path) == [ALPACA, DOLLY, CHAT, TEXT]
    assert [record_form(record) for record in load_records(path)] == ["alpaca", "dolly", "chat", "text"]


def test_file_details_that_do_not_matter(tmp_path):
    path = tmp_path / "a.jsonl"
    # A byte order mark, Windows line ends, blank lines, a U+2028 inside a string, no final newline.
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\xe2\x80\xa8c"}\n \n{"text": "d"}')
    assert [record["text"] for record in load_records(path)] == ["a", "b\u2028c", "d"]


def test_optional_fields_may_be_null_or_missing(tmp_path):
    records = [{"instruction": "a", "input": None, "output": "b"}, {"instruction": "a", "response": "b"}]
    assert load_records(write(tmp_path / "a.jsonl", *records)) == records


def test_to_messages():
    question = {"role": "user", "content": "add\n\n1 2"}
    answer = {"role": "assistant", "content": "3"}
    assert to_messages(ALPACA) == to_messages(DOLLY) == [question, answer]
    assert to_messages({**ALPACA, "input": "", "system": "Be brief."}) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "add"},
        answer,
    ]
    assert to_messages(CHAT) == CHAT["messages"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"a\.jsonl is empty"),
        (" \n\n", r"a\.jsonl is empty"),
        ('{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: malformed JSON: .* at column 10"),
        ("[\n", "line 1: malformed JSON.*one object a line"),
        ('[{"text": "a"}]\n', "line 1: each line must be a JSON object, got list; write the list's items one a line"),
        ('{"text": "a"}\n"b"\n', "line 2: each line must be a JSON object, got str"),
        ('{"prompt": "a", "id": 1}\n', r"line 1: .*lacks the needed fields; found: prompt, id; accepted: messages \|"),
        ("{}\n", "found: none"),
        ('{"instruction": "a"}\n', "found: instruction; accepted"),
        ('{"text": 3}\n', "line 1: text must be a string, got int"),
        ('{"instruction": "a", "output": null}\n', "output must be a string, got NoneType"),
        ('{"instruction": "a", "output": "b", "input": ["c"]}\n', "input must be a string, got list"),
        ('{"text": "\\ud800"}\n', "line 1: text holds half of a surrogate pair"),
        ('{"messages": []}\n', "messages must be a list of at least one message"),
        ('{"messages": ["a"]}\n', r"messages\[0\] must have role and content"),
        ('{"messages": [{"role": "bot", "content": "a"}]}\n', r"messages\[0\] must be one of system, user, assistant"),
        ('{"messages": [{"role": "user", "content": null}]}\n', r"messages\[0\]\.content must be a string"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "the last message must be the assistant's, got 'user'"),
    ],
)
def test_bad_content(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=words):
        load_records(path)


def test_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 2: not UTF-8 .*save the file as UTF-8"):
        load_records(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        load_records(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        load_records(tmp_path)


def test_check_records_names_the_source():
    check_records([ALPACA, TEXT], "client 'a'")
    with pytest.raises(ValueError, match="client 'a', record 1: the record lacks"):
        check_records([ALPACA, {"x": 1}], "client 'a'")
    with pytest.raises(ValueError, match="client 'a' has no records"):
        check_records([], "client 'a'")
    with pytest.raises(ValueError, match="record 0: a record must be a JSON object, got str"):
        check_records(["text"], "here")  # pyright: ignore[reportArgumentType]


def test_read_jsonl_takes_any_object(tmp_path):
    question = {"question": "?", "choices": ["a", "b"], "answer": 1}
    assert read_jsonl(write(tmp_path / "a.jsonl", question)) == [question]
