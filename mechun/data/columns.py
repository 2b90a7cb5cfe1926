"""Rows of any table as facts: which column is the prompt, which the answer, and what becomes of the others.

Columns named like the fields of a `Fact` are those fields. Otherwise the prompt and the answer are looked for under the
names that published sets use, and the guess is said aloud; `columns` overrides it. All other columns go into `meta`.
TOFU (Maini et al. 2024) has 20 questions for each invented author, in order, so its facts are grouped by that.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from mechun.data.facts import LISTS, Fact, Facts
from mechun.data.tables import Row
from mechun.errors import DataError, UsageError, nearest

GUESSES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "query", "instruction", "input"),
    "answer": ("answer", "target", "completion", "output", "response"),
    "id": ("id", "idx", "case_id", "uuid"),
    "paraphrases": ("paraphrases", "paraphrased_question"),
}
"""Names under which published sets have a field, the likeliest first."""
FIELDS = tuple(f.name for f in fields(Fact))
TOFU_ENTITIES = frozenset({"idx", "question", "answer", "prefix", "entity"})
TOFU_QUESTIONS = 20


def build_facts(
    rows: Sequence[Row],
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    tofu: bool = False,
    notes: list[str] | None = None,
) -> Facts:
    """The facts that the rows of one source hold.

    Args:
        rows: The table.
        source: What to call it in messages.
        columns: For a field of a fact, the column that holds it, such as `{"prompt": "question"}`.
        tofu: Whether it is a part of TOFU, so that 20 rows in order are about one author.
        notes: What a user should be told is appended here.

    Raises:
        UsageError: When `columns` names no field of a fact.
        DataError: When a column is missing, a value is no text, or an id stands twice; the places are named.
    """
    notes = [] if notes is None else notes
    found = match_columns(rows, source, columns or {}, notes)
    annotated = set(list_columns(rows)) >= TOFU_ENTITIES
    if tofu or annotated:
        notes.append(f"{source}: grouped by author, {TOFU_QUESTIONS} questions each, as in TOFU")
    facts: list[Fact] = []
    places: dict[str, str] = {}
    for number, row in enumerate(rows):
        try:
            fact = build_fact(row, number, found)
        except ValueError as fault:
            raise DataError(f"{source}, {row.place}: {fault}") from fault
        if fact.id in places:
            first = places[fact.id]
            raise DataError(f"{source}: the id {fact.id!r} stands at {first} and at {row.place}", "ids must differ")
        places[fact.id] = row.place
        facts.append(group_author(fact, number, annotated) if tofu or annotated else fact)
    return Facts(facts)


def list_columns(rows: Iterable[Row]) -> Mapping[str, None]:
    """The columns of all rows in the order of their first appearance."""
    return dict.fromkeys(name for row in rows for name in row.values)


def match_columns(rows: Sequence[Row], source: str, columns: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """For each field of a fact that the table has, the column it is read from."""
    present = list_columns(rows)
    for name, column in columns.items():
        if name not in FIELDS:
            raise UsageError(f"a fact has no field {name!r}", nearest(name, FIELDS, "fields"))
        if column not in present:
            close = nearest(column, present, "columns")
            listed = "" if close.startswith("columns") else f"{close}; "
            raise DataError(f"{source} has no column {column!r}", f"{listed}columns: {', '.join(present)}")
    found = dict(columns)
    for name in FIELDS:
        names = GUESSES.get(name, (name,))
        column = next((column for column in names if column in present and column not in found.values()), None)
        if name not in found and column is not None:
            found[name] = column
    missing = [name for name in ("prompt", "answer") if name not in found]
    if missing:
        hint = f"columns: {', '.join(present)}; name them with --columns prompt=...,answer=..."
        raise DataError(f"{source} has no column for the {' and the '.join(missing)}", hint)
    guessed = {name: found[name] for name in ("prompt", "answer") if found[name] != name and name not in columns}
    if guessed:
        reading = " and ".join(f"{column!r} as the {name}" for name, column in guessed.items())
        notes.append(f"{source}: reading {reading}; --columns overrides this")
    return found


def build_fact(row: Row, number: int, found: Mapping[str, str]) -> Fact:
    """The fact that one row holds; a `ValueError` says what is wrong with it."""
    values = {name: row.values.get(column) for name, column in found.items()}
    read: dict[str, Any] = {name: read_required(values.get(name), found[name]) for name in ("prompt", "answer")}
    for name in ("subject", "relation", "foil", "split"):
        read[name] = read_optional(values.get(name), found.get(name, name))
    for name in LISTS:
        read[name] = read_list(values.get(name), found.get(name, name))
    read["id"] = read_id(values.get("id"), f"{row.part}-{number}" if row.part else str(number))
    read["prompt"], read["answer"] = read["prompt"].rstrip(" "), read["answer"].strip()
    read["split"] = read["split"] or row.part
    return Fact(**read, meta=gather_meta(row, values.get("meta"), found))


def gather_meta(row: Row, own: Any, found: Mapping[str, str]) -> dict[str, Any]:
    """The row's own `meta` when it is an object, and every column that is no field of a fact."""
    meta = dict(own) if isinstance(own, Mapping) else {}
    used = {column for name, column in found.items() if name != "meta" or isinstance(own, Mapping)}
    rest = {name: value for name, value in row.values.items() if name not in used and value is not None}
    return meta | {name: plain_value(value) for name, value in rest.items()}


def read_required(value: Any, column: str) -> str:
    """A text that must be there."""
    if value is None:
        raise ValueError(f"it has no {column!r}")
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is a {type(value).__name__}, not a text: {str(value)[:60]}")
    if not value.strip():
        raise ValueError(f"{column!r} is empty")
    return value


def read_optional(value: Any, name: str) -> str | None:
    """A text that may be missing."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return read_required(value, name)


def read_list(value: Any, name: str) -> tuple[str, ...]:
    """Several texts, or one."""
    if value is None or value == "":
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{name!r} is not a list of texts")
    return tuple(items)


def plain_value(value: Any) -> Any:
    """The value as JSON can hold it; dates and the like become texts."""
    if isinstance(value, str | int | float):
        return value
    return json.loads(json.dumps(value, default=str))


def read_id(value: Any, default: str) -> str:
    """The id as a text; a number counts."""
    if value is None or value == "":
        return default
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"its id is a {type(value).__name__}, not a text or a whole number")
    return str(value)


def group_author(fact: Fact, number: int, annotated: bool) -> Fact:
    """The fact with its author's number as `meta["entity"]`; an annotated answer entity moves to its own name."""
    meta = dict(fact.meta)
    if annotated:
        meta["answer_entity"] = meta.pop("entity", None)
        number = int(fact.id) if fact.id.isdecimal() else number
    return replace(fact, meta=meta | {"entity": f"author {number // TOFU_QUESTIONS}"})
