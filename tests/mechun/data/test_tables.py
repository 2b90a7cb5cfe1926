"""Files become rows, and every fault of a file is one line that names the place."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechun.data.tables import READERS, read_table
from mechun.errors import DataError

RECORDS = [{"prompt": "a, b", "answer": "c"}, {"prompt": 'd "e"\nf', "answer": "ü"}]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def fault(path: Path, text: str | bytes) -> str:
    with pytest.raises(DataError) as caught:
        read_table(write(path, text))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def write_records(path: Path, records: list[dict[str, str]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str):
    rows = read_table(write_records(tmp_path / f"facts{suffix}", RECORDS))
    assert [dict(row.values) for row in rows] == RECORDS


def test_places_are_where_a_reader_would_look(tmp_path: Path):
    jsonl = write(tmp_path / "a.jsonl", '{"a": 1}\n\n  \n{"a": 2}\n')
    assert [row.place for row in read_table(jsonl)] == ["line 1", "line 4"]
    table = write_records(tmp_path / "a.csv", RECORDS)
    assert [row.place for row in read_table(table)] == ["line 2", "line 4"]
    listed = write(tmp_path / "a.json", '[{"a": 1}, {"a": 2}]')
    assert [row.place for row in read_table(listed)] == ["record 1", "record 2"]


def test_lists_by_name_are_parts(tmp_path: Path):
    path = write(tmp_path / "a.json", '{"forget": [{"a": 1}], "note": "x", "retain": [{"a": 2}]}')
    assert [(row.part, row.place) for row in read_table(path)] == [
        ("forget", "forget, record 1"),
        ("retain", "retain, record 1"),
    ]
    one = write(tmp_path / "b.json", '{"version": 1, "data": [{"a": 1}]}')
    assert [(row.part, row.values) for row in read_table(one)] == [(None, {"a": 1})]


def test_json_that_is_really_jsonl(tmp_path: Path):
    path = write(tmp_path / "forget01.json", '{"a": 1}\n{"a": 2}\n')
    assert [(row.place, row.values["a"]) for row in read_table(path)] == [("line 1", 1), ("line 2", 2)]
    single = write(tmp_path / "one.json", '{"a": 1, "b": ["x"]}\n')
    assert [row.values for row in read_table(single)] == [{"a": 1, "b": ["x"]}]


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    assert read_table(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}'))[0].values == {"a": 1}


def test_unicode_line_separators_end_no_line(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"a": "x\u2028y\x85z"}\r\n{"a": 2}')
    assert [row.values["a"] for row in read_table(path)] == ["x\u2028y\x85z", 2]


@pytest.mark.parametrize("suffix", READERS)
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, suffix: str):
    assert fault(tmp_path / f"a{suffix}", "") == "FILE is empty"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", " \n\n", "FILE is empty"),
        ("a.csv", "prompt,answer\n", "FILE is empty: it holds no rows"),
        ("a.json", "[]", "FILE is empty: it holds no rows"),
        ("a.json", '{"facts": []}', "FILE is empty: it holds no rows"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "FILE, line 2 is not JSON: Expecting value at column 7"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "FILE, line 2 holds a list, not an object with named columns"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "FILE, line 2 is not JSON: Expecting ':' delimiter at column 7"),
        ("a.json", '[{"a": 1}, "x"]', "FILE, record 2 holds a str, not an object with named columns"),
        ("a.json", '"x"', "FILE holds no records (a list of objects is needed, or one by name)"),
        ("a.json", '{"a": 1}\n{"a": \n', "FILE, line 2 is not JSON: Expecting value at column 7"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "FILE, line 3 has more columns than the header (quote fields with separators)"),
        ("a.csv", "a,b\n1\n", "FILE, line 2 has fewer columns than the header (quote fields with separators)"),
        ("a.csv", 'a,b\n"1"x,2\n', "FILE, line 2 is malformed: ',' expected after '\"'"),
        ("a.csv", 'a,b\n1,2\n"1,2\n3,4\n', "FILE, line 3 is malformed: unexpected end of data"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', "FILE is not UTF-8: byte 16, line 2 (save it as UTF-8)"),
        ("a.csv", "a,b\nZürich,2\n".encode("latin-1"), "FILE is not UTF-8: byte 5, line 2 (save it as UTF-8)"),
        ("a.txt", "x", "FILE has no ending that can be read (endings: .jsonl, .ndjson, .json, .csv, .tsv, .parquet)"),
    ],
)
def test_a_fault_names_its_place(tmp_path: Path, name: str, text: str | bytes, message: str):
    assert fault(tmp_path / name, text) == message


def test_what_is_no_parquet_is_said_to_be_none(tmp_path: Path):
    assert fault(tmp_path / "a.parquet", "PAR0").startswith("FILE is not a parquet file: ")


lines = st.dictionaries(st.text(min_size=1), st.text() | st.integers() | st.none(), min_size=1)


@given(st.lists(lines, min_size=1, max_size=5))
def test_what_json_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, object]]):
    path = tmp_path_factory.mktemp("round") / "a.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=True) + "\n" for r in records), encoding="utf-8")
    assert [dict(row.values) for row in read_table(path)] == records
