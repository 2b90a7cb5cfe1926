"""Rows of a file, each with the place it stands at, so that a fault can be shown where it is.

Read are jsonl, json (a list of objects, or lists of objects by name), csv, tsv and parquet. A `.json` file that holds
one object per line is read as jsonl. Trap: only a line feed ends a line of jsonl; Unicode knows more line separators,
and they may stand inside a text.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechun.errors import DataError


@dataclass(frozen=True)
class Row:
    """One record of a table.

    Attributes:
        place: Where it stands, such as "line 3".
        values: Its columns.
        part: Name of the list it stands in, for files that hold several.
    """

    place: str
    values: Mapping[str, Any]
    part: str | None = None


def read_table(path: Path) -> list[Row]:
    """All rows of a file, by its ending.

    Raises:
        DataError: On an unknown ending, or a file that is empty or malformed; the place is named.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} has no ending that can be read", f"endings: {', '.join(READERS)}")
    rows = reader(path)
    if not rows:
        raise DataError(f"{path} is empty: it holds no rows")
    return rows


def read_text(path: Path) -> str:
    """The whole text of a file in UTF-8; a byte order mark is dropped."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = raw[: fault.start].count(b"\n") + 1
        raise DataError(f"{path} is not UTF-8: byte {fault.start}, line {line}", "save it as UTF-8") from fault
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object per line; blank lines are passed over."""
    return parse_lines(path, read_text(path))


def parse_lines(path: Path, text: str) -> list[Row]:
    """The rows of a text with one JSON object per line."""
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as fault:
            raise DataError(f"{path}, line {number} is not JSON: {fault.msg} at column {fault.colno}") from fault
        rows.append(Row(f"line {number}", require_object(path, f"line {number}", value)))
    return rows


def read_json(path: Path) -> list[Row]:
    """A list of objects, or several lists of objects by name."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as fault:
        if fault.msg == "Extra data":
            return parse_lines(path, text)
        raise DataError(f"{path}, line {fault.lineno} is not JSON: {fault.msg} at column {fault.colno}") from fault
    if isinstance(content, list):
        return list_rows(path, content, None)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} holds no records", "a list of objects is needed, or one by name")
    lists = {key: value for key, value in content.items() if is_records(value)}
    if not lists:
        return [Row("record 1", content)]
    parts: list[str | None] = [None] if len(lists) == 1 else [*lists]
    return [row for part, rows in zip(parts, lists.values(), strict=True) for row in list_rows(path, rows, part)]


def is_records(value: Any) -> bool:
    """Whether the value is a list of JSON objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def list_rows(path: Path, records: list[Any], part: str | None) -> list[Row]:
    """The rows of a JSON list."""
    where = f"{part}, " if part else ""
    places = [f"{where}record {number}" for number in range(1, len(records) + 1)]
    return [Row(p, require_object(path, p, record), part) for p, record in zip(places, records, strict=True)]


def require_object(path: Path, place: str, value: Any) -> Mapping[str, Any]:
    """The value itself when it is a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f"{path}, {place} holds a {type(value).__name__}, not an object with named columns")
    return value


def read_csv(path: Path) -> list[Row]:
    """A header and comma-separated rows (tab-separated in a .tsv file); quoted fields may run over several lines."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    read = 0
    try:
        for values in reader:
            read = reader.line_num
            place = f"line {read}"
            if None in values or None in values.values():
                count = "more" if None in values else "fewer"
                raise DataError(f"{path}, {place} has {count} columns than the header", "quote fields with separators")
            rows.append(Row(place, values))
    except csv.Error as fault:
        raise DataError(f"{path}, line {max(read, 1) + 1} is malformed: {fault}") from fault
    return rows


def read_parquet(path: Path) -> list[Row]:
    """The rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as fault:
        raise DataError(f"{path} is not a parquet file: {str(fault).splitlines()[0]}") from fault
    return [Row(f"row {number}", values) for number, values in enumerate(table.to_pylist(), start=1)]


READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
"""How a file is read, by its ending."""
