"""Which column is what: guesses said aloud, overrides, and one line for every value that is no text."""

from typing import Any

import pytest

from mechun.data.columns import build_facts
from mechun.data.facts import Fact, Facts
from mechun.data.tables import Row
from mechun.errors import DataError, UsageError


def rows(*records: dict[str, Any], part: str | None = None) -> list[Row]:
    return [Row(f"line {number}", record, part) for number, record in enumerate(records, start=1)]


def fault(*records: dict[str, Any], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        build_facts(rows(*records), "FILE", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("question", "answer"),
        ("prompt", "target"),
        ("query", "response"),
        ("instruction", "output"),
        ("input", "output"),
    ],
)
def test_published_names_are_guessed_and_said_aloud(prompt: str, answer: str):
    notes: list[str] = []
    facts = build_facts(rows({prompt: "Q?", answer: "A"}), "FILE", notes=notes)
    assert facts == Facts([Fact("0", "Q?", "A")])
    assert len(notes) == 1
    assert "--columns overrides this" in notes[0]
    for name, column in (("prompt", prompt), ("answer", answer)):
        assert (f"{column!r} as the {name}" in notes[0]) == (name != column)


def test_native_names_are_no_guess():
    notes: list[str] = []
    build_facts(rows({"prompt": "Q?", "answer": "A", "question": "other"}), "FILE", notes=notes)
    assert notes == []


def test_columns_override_the_guess():
    record = {"prompt": "not this", "question": "Q?", "answer": "A", "who": "Ann"}
    (fact,) = build_facts(rows(record), "FILE", columns={"prompt": "question", "subject": "who"})
    assert (fact.prompt, fact.subject, fact.meta) == ("Q?", "Ann", {"prompt": "not this"})


def test_columns_that_do_not_exist_are_refused_with_those_that_do():
    record = {"question": "Q?", "answer": "A", "uid": "7"}
    assert fault(record, columns={"prompt": "questoin"}) == (
        "FILE has no column 'questoin' (did you mean question?; columns: question, answer, uid)"
    )
    assert fault(record, columns={"prompt": "zzz"}) == "FILE has no column 'zzz' (columns: question, answer, uid)"
    with pytest.raises(UsageError, match="a fact has no field 'promt' .did you mean prompt"):
        build_facts(rows(record), "FILE", columns={"promt": "question"})


def test_tables_without_prompt_or_answer_are_refused_with_their_columns():
    hint = "name them with --columns prompt=...,answer=..."
    assert fault({"text": "x", "answer": "A"}) == f"FILE has no column for the prompt (columns: text, answer; {hint})"
    nested = {"requested_rewrite": {"prompt": "{} is", "target": "A"}, "uid": 1}
    assert fault(nested) == (
        f"FILE has no column for the prompt and the answer (columns: requested_rewrite, uid; {hint})"
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": 3, "answer": "A"}, "FILE, line 2: 'prompt' is a int, not a text: 3"),
        ({"prompt": "Q", "answer": 1993}, "FILE, line 2: 'answer' is a int, not a text: 1993"),
        ({"prompt": "Q", "answer": ["A"]}, "FILE, line 2: 'answer' is a list, not a text: ['A']"),
        ({"prompt": "Q", "answer": " "}, "FILE, line 2: 'answer' is empty"),
        ({"prompt": "", "answer": "A"}, "FILE, line 2: 'prompt' is empty"),
        ({"prompt": "Q", "answer": None}, "FILE, line 2: it has no 'answer'"),
        ({"answer": "A"}, "FILE, line 2: it has no 'prompt'"),
        ({"prompt": "Q", "answer": "A", "subject": 5}, "FILE, line 2: 'subject' is a int, not a text: 5"),
        ({"prompt": "Q", "answer": "A", "paraphrases": [1]}, "FILE, line 2: 'paraphrases' is not a list of texts"),
        ({"prompt": "Q", "answer": "A", "id": 1.5}, "FILE, line 2: its id is a float, not a text or a whole number"),
    ],
)
def test_a_value_that_is_no_text_is_shown_with_its_line(record: dict[str, Any], message: str):
    assert fault({"prompt": "ok", "answer": "ok"}, record) == message


def test_an_id_that_stands_twice_is_shown_with_both_lines():
    records = [{"id": name, "prompt": "Q", "answer": "A"} for name in ("a", 7, "b", "7")]
    assert fault(*records) == "FILE: the id '7' stands at line 2 and at line 4 (ids must differ)"


def test_spaces_at_the_border_are_cut():
    (fact,) = build_facts(rows({"prompt": "Answer:\n ", "answer": " Paris \n"}), "FILE")
    assert (fact.prompt, fact.answer) == ("Answer:\n", "Paris")


def test_other_columns_are_kept_in_meta():
    record = {"prompt": "Q", "answer": "A", "n": 3, "tags": ["x", {"y": None}], "none": None, "when": range(2)}
    (fact,) = build_facts(rows(record), "FILE")
    assert fact.meta == {"n": 3, "tags": ["x", {"y": None}], "when": "range(0, 2)"}
    assert fact.to_dict()["meta"]["n"] == 3


def test_a_list_by_name_becomes_the_split_and_the_id():
    facts = build_facts(rows({"prompt": "Q", "answer": "A"}, part="forget"), "FILE")
    assert (facts[0].split, facts[0].id) == ("forget", "forget-0")


def test_facts_are_read_back_from_their_own_records():
    fact = Fact(
        "f1",
        "Q",
        "A",
        "Ann",
        "pet",
        ("P1", "P2"),
        "B",
        ("AA",),
        ("f2",),
        "forget",
        {"exposure": 3, "trained": {"Q": True}},
    )
    notes: list[str] = []
    assert build_facts(rows(fact.to_dict()), "FILE", notes=notes) == Facts([fact])
    assert notes == []


def test_annotated_tofu_is_grouped_by_author():
    base = {"question": "Q?", "answer": "It is Ann.", "prefix": "It is", "entity": "Ann"}
    notes: list[str] = []
    facts = build_facts(rows({"idx": 3, **base}, {"idx": 19, **base}, {"idx": 20, **base}), "FILE", notes=notes)
    assert facts.ids == ("3", "19", "20")
    assert [fact.entity for fact in facts] == ["author 0", "author 0", "author 1"]
    assert facts[0].meta == {"prefix": "It is", "answer_entity": "Ann", "entity": "author 0"}
    assert "FILE: grouped by author, 20 questions each, as in TOFU" in notes


def test_plain_tofu_is_grouped_by_order():
    records = [{"question": f"Q{number}", "answer": "A"} for number in range(41)]
    facts = build_facts(rows(*records), "FILE", tofu=True)
    assert [facts[row].entity for row in (0, 19, 20, 40)] == ["author 0", "author 0", "author 1", "author 2"]
