"""Sources: rows of every kind of file and of Python objects, each with its place, and errors that name it."""

import gzip
import json
import sys

import pytest

from flora_core.data.sources import data_files, read_rows

A, B = {"text": "ä\u2028x", "n": 1}, {"text": "b", "n": None}


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def fields(source):
    return [row.fields for row in read_rows(source)]


def places(source, folder=None):
    return [row.place.removeprefix(f"{folder}/") for row in read_rows(source)]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", lines(A, B), ["line 1", "line 2"]),
        ("a.txt", b"\xef\xbb\xbf" + lines(A).replace(b"\n", b"\r\n") + b"\r\n \r\n" + lines(B), ["line 1", "line 4"]),
        ("a.jsonl", (b"\xef\xbb\xbf" + lines(A)) + (b"\xef\xbb\xbf" + lines(B)), ["line 1", "line 2"]),
        ("a.jsonl.gz", gzip.compress(lines(A)) + gzip.compress(lines(B)), ["line 1", "line 2"]),
        ("wrong-suffix.jsonl", gzip.compress(lines(A, B)), ["line 1", "line 2"]),
        ("not-packed.jsonl.gz", lines(A, B), ["line 1", "line 2"]),
        ("a.json", json.dumps([A, B]), ["line 1, record 0", "line 1, record 1"]),
        ("a.jsonl", "\n" + json.dumps([A, B], ensure_ascii=False, indent=2), ["line 3, record 0", "line 7, record 1"]),
        (
            "a.json.gz",
            gzip.compress(b"\xef\xbb\xbf" + json.dumps([A, B]).encode()),
            ["line 1, record 0", "line 1, record 1"],
        ),
    ],
)
def test_reads_json_of_every_layout(tmp_path, name, data, expected):
    path = write(tmp_path / name, data)
    assert fields(path) == fields(str(path)) == [A, B]
    assert places(path) == [f"{path}, {place}" for place in expected]


def test_reads_csv_as_text_with_lines(tmp_path):
    text = 'question,answer\r\n"two\r\nlines, one comma",4\r\n\r\nNA,\r\n'
    path = write(tmp_path / "a.csv", "\ufeff" + text)
    assert fields(path) == [{"question": "two\r\nlines, one comma", "answer": "4"}, {"question": "NA", "answer": ""}]
    assert places(path, tmp_path) == ["a.csv, line 2", "a.csv, line 5"]
    packed = write(tmp_path / "b.tsv.gz", gzip.compress(b"a\tb\n1, 2\t3\n"))
    assert fields(packed) == [{"a": "1, 2", "b": "3"}]
    long = write(tmp_path / "long.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(fields(long)[0]["text"]) == 200_000


def test_reads_parquet_and_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet  # pyright: ignore[reportMissingImports]

    table = pyarrow.Table.from_pylist([A, B])
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    feather.write_feather(table, tmp_path / "a.feather")
    with ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=1)
    for name in ("a.parquet", "a.feather", "a.arrow"):
        assert fields(tmp_path / name) == [A, B]
        assert places(tmp_path / name, tmp_path) == [f"{name}, row 1", f"{name}, row 2"]
    parquet.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none\.parquet is empty"):
        fields(tmp_path / "none.parquet")
    assert fields(table) == [A, B]


@pytest.mark.parametrize("head", [b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff"])
def test_damaged_parquet_and_arrow_name_the_file(tmp_path, head):
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "a.arrow", head + bytes(range(200)) + head)
    with pytest.raises(ValueError, match=r"a\.arrow: damaged (parquet|arrow file) .*again"):
        fields(path)


@pytest.mark.parametrize(("name", "head"), [("a.parquet", b"PAR1"), ("a.arrow", b"ARROW1\0\0")])
def test_parquet_without_its_package_names_what_to_install(tmp_path, monkeypatch, name, head):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / name, head + bytes(100))
    with pytest.raises(
        ImportError, match=rf"{name} holds \w+ data, which needs pyarrow .*: run .*pip install .*pyarrow>=17', or"
    ):
        fields(path)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b"\xef\xbb\xbf \n", r"a\.jsonl is empty"),
        ("a.json", b"[ ]", r"a\.json is empty: its list has no records"),
        ("a.csv", b"text\n", r"a\.csv is empty: it needs a line of column names and at least one row"),
        ("a.parquet", b"", r"a\.parquet: the file is empty"),
        ("a.jsonl.gz", gzip.compress(lines(A, B))[:-12], r"a\.jsonl\.gz: damaged gzip .*copy the file again"),
        ("a.jsonl.gz", gzip.compress(lines(A))[:12] + b"\xff" * 40, r"a\.jsonl\.gz: damaged gzip"),
        ("a.jsonl.gz", gzip.compress(lines(A)) + b"rest", r"a\.jsonl\.gz: damaged gzip"),
        ("a.jsonl.gz", bytes(range(128, 256)), r"a\.jsonl\.gz: neither gzip, as its name says, nor text; copy"),
        ("a.jsonl", b"PK\x03\x04" + bytes(40), r"a\.jsonl is a zip archive or spreadsheet; unpack or export it"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd" + bytes(40), r"is compressed with zstd"),
        ("a.jsonl", "ab".encode("utf-16"), r"a\.jsonl, line 1: not UTF-8, but UTF-16 .*save the file as UTF-8"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), r"a\.jsonl, line 1: not UTF-8, but UTF-16"),
        ("a.jsonl", lines(B) + b'{"text": "\xff"}', r"a\.jsonl, line 2: not UTF-8 .*at byte 10\); save"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', r"a\.json, line 2: not UTF-8"),
        ("a.csv", b"text\na\n\xff\n", r"a\.csv, line 3: not UTF-8"),
        ("a.jsonl", lines(B) + b'\n{"text": \n', r"a\.jsonl, line 3: malformed JSON: .* at column 10"),
        ("a.jsonl", lines(B) + bytes(8), r"a\.jsonl, line 2: malformed JSON.*holds zero bytes"),
        ("a.jsonl", b'{\n "text": "a"}', r"line 1: malformed JSON.*one object a line"),
        ("a.jsonl", b"text\na\n", r"line 1: malformed JSON.*give JSON lines, a JSON list, CSV"),
        ("a.jsonl", b'{"text": "a"},\n', r"line 1: malformed JSON: Extra data"),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', r"line 2: a record must be a JSON object, got str"),
        ("a.jsonl", b'[{"a": 1}]\n[{"a": 2}]\n', r"something follows the list"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"a\.jsonl, line 1: .*nested too deeply"),
        ("a.jsonl", lines(B) + b'{"id": ' + b"9" * 5000 + b"}", r"a\.jsonl, line 2: a number with more digits"),
        ("a.jsonl", b'{"output": "a", "x": {"y": 1, "y": 2}}', r"a\.jsonl, line 1: the key 'y' is given twice"),
        ("a.json", b'[{"a": 1},\n {"a": 2}', r"a\.json, line 2, record 1: after it .*cut off"),
        ("a.json", b'[{"a": 1},\n {"a":\n x}]', r"a\.json, line 2, record 1: malformed JSON: .* at line 3, column 2"),
        ("a.json", b'[{"a": 1},\n]', r"a\.json, line 1, record 0: malformed JSON: a comma after the last item"),
        ("a.json", b"[{}, 3]", r"a\.json, line 1, record 1: a record must be a JSON object, got int"),
        ("a.json", b"[" * 100_000, r"a\.json, line 1, record 0: .*nested too deeply"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv, line 3: 1 cells, and the first line names 2 columns"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv, line 1: two columns are named 'a'"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv, line 2: malformed CSV"),
        ("a.csv", lines(A), r"a\.csv is named \.csv, but holds JSON"),
        ("a.parquet", lines(A), r"a\.parquet is named \.parquet, but holds something else"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, name, data, words):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=words):
        fields(path)


def test_reads_a_folder_in_the_order_of_its_paths(tmp_path):
    for name in ("b.jsonl", "a.json", "sub/c.jsonl.gz", ".hidden.jsonl", ".git/d.jsonl", "state.json"):
        write(tmp_path / name, lines({"from": name}))
    write(tmp_path / "README.md", "no data")
    expected = ["a.json", "b.jsonl", "sub/c.jsonl.gz"]
    assert [record["from"] for record in fields(tmp_path)] == expected
    assert [record["from"] for record in fields(f"{tmp_path}/")] == expected
    assert [record["from"] for record in fields(f"{tmp_path}/[ab]*")] == expected[:2]
    assert places(tmp_path, tmp_path)[2] == "sub/c.jsonl.gz, line 1"
    listed = [tmp_path / "sub", str(tmp_path / "b*"), tmp_path / "a.json"]
    assert [record["from"] for record in fields(listed)] == ["sub/c.jsonl.gz", "b.jsonl", "a.json"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    path = write(tmp_path / "a[1].jsonl", lines(A))
    write(tmp_path / "a1.jsonl", lines(B))
    assert fields(path) == [A]


def test_paths_that_hold_no_data_are_refused(tmp_path):
    for source, words in [
        (tmp_path / "none.jsonl", r"none\.jsonl does not exist; give a file, a folder or a glob"),
        ([tmp_path / "none.jsonl"], r"none\.jsonl does not exist in a list of files; a list of texts is written"),
        (f"{tmp_path}/*.jsonl", r"no data file matches .*\*\.jsonl"),
        (tmp_path, r"holds no data files; their names end in \.jsonl"),
    ]:
        with pytest.raises(FileNotFoundError, match=words):
            data_files(source)
    path = write(tmp_path / "a.jsonl", lines(A))
    with pytest.raises(ValueError, match=r"a\.jsonl is given twice"):
        data_files([path, tmp_path])
    write(tmp_path / "b.jsonl.zst", "x")
    with pytest.raises(ValueError, match=r"b\.jsonl\.zst cannot be read; unpack it"):
        data_files(tmp_path)
    write(tmp_path / "splits" / "dataset_dict.json", "{}")
    write(tmp_path / "splits" / "train" / "a.jsonl", lines(A))
    with pytest.raises(ValueError, match=r"holds several splits \(train\); give the folder of one"):
        data_files(tmp_path / "splits")


class Items:
    """A data set of items by number."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return [A, B][index]


@pytest.mark.parametrize(
    "source",
    [[A, B], (A, B), iter([A, B]), (record for record in [A, B]), Items(), {"text": [A["text"], "b"], "n": (1, None)}],
    ids=["list", "tuple", "iterator", "generator", "items", "columns"],
)
def test_reads_objects_of_python(source):
    rows = list(read_rows(source, name="client 'a'"))
    assert [row.fields for row in rows] == [A, B]
    assert [row.place for row in rows] == ["client 'a', record 0", "client 'a', record 1"]


def test_reads_datasets_from_python_and_from_their_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([A, B])
    assert fields(made) == fields(made.to_iterable_dataset()) == [A, B]
    made.save_to_disk(tmp_path / "saved")
    assert fields(tmp_path / "saved") == [A, B]
    with pytest.raises(TypeError, match=r"data holds the splits train; pass one of them, such as data\['train'\]"):
        fields(datasets.DatasetDict(train=made))


class Frame:
    """A data frame, whose missing values are numbers and whose iterator gives the names of columns."""

    def iterrows(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        (3, TypeError, "data must be a path, a list of paths, an iterable of dicts.* got int"),
        (None, TypeError, "got NoneType"),
        (b"a.jsonl", TypeError, "got bytes"),
        ([A, "a"], ValueError, "data, record 1: a record must be a dict, got str"),
        ({"instruction": "a"}, TypeError, "'instruction' is a str; put a single record into a list"),
        ({}, TypeError, "it has no columns"),
        ({"a": [1], "b": [1, 2]}, ValueError, "data: columns must be of equal length, but a has 1, b has 2"),
        (Frame(), TypeError, r"data is a data frame; pass datasets\.Dataset\.from_pandas"),
    ],
)
def test_other_objects_of_python_are_refused(source, kind, words):
    with pytest.raises(kind, match=words):
        fields(source)
