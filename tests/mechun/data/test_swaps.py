"""Partners of the same relation, fitted to one length, drawn by seed and fact alone."""

from typing import Any

import pytest

from mechun.data.facts import Fact, Facts
from mechun.data.swaps import Swap, find_swaps, fit_left, fit_swap, group_partners
from mechun.data.tokens import Question, Tokens, tokenize_questions
from tests.toy_text import make_capitals, train_tokenizer

TOKENIZER = train_tokenizer()
CAPITALS = make_capitals()


def swaps_of(fact: Fact, pool: Facts = CAPITALS, tokenizer: Any = TOKENIZER, **options: Any) -> list[Swap] | str:
    (tokens,) = tokenize_questions([Question(fact.prompt, fact.answer, fact.subject)], tokenizer)
    assert isinstance(tokens, Tokens)
    return find_swaps(fact, tokens, group_partners(pool, tokenizer), tokenizer, **options)


def found(fact: Fact, **options: Any) -> list[Swap]:
    swaps = swaps_of(fact, **options)
    assert not isinstance(swaps, str), swaps
    return swaps


def test_a_hand_made_swap():
    (swap,) = found(CAPITALS[0], pool=CAPITALS[:2])
    assert TOKENIZER.decode(swap.ids) == "<s>The capital of Germany is Paris"
    assert (swap.partner.id, swap.shift) == ("germany", 0)


def test_partners_are_grouped_by_relation_with_all_their_answers():
    pool = Facts(
        [
            Fact("1", "Ann plays the", "harp", subject="Ann", relation="instrument"),
            Fact("2", "Ann also plays the", "Piano", subject="Ann", relation="instrument"),
            Fact("3", "Ann keeps a", "dog", subject="Ann", relation="pet"),
            Fact("4", "no subject", "x", relation="pet"),
            Fact("5", "no relation", "x", subject="Ann"),
        ]
    )
    groups = group_partners(pool, TOKENIZER)
    assert list(groups) == ["instrument", "pet"]
    assert [(p.fact.id, p.answers) for p in groups["instrument"]] == [("1", frozenset({"harp", "piano"}))]


def test_ids_are_fitted_on_the_left():
    assert fit_left((7, 8, 9), 2) == (8, 9)
    assert fit_left((7, 8), 4) == (7, 7, 7, 8)
    assert fit_left((7, 8), 2) == (7, 8)


@pytest.mark.parametrize(
    ("fact", "partner", "text", "shift"),
    [(0, 4, "The capital of Zealand is Paris", 1), (4, 0, "The capital of France France is Wellington", -1)],
)
def test_a_subject_of_another_length_is_realigned(fact: int, partner: int, text: str, shift: int):
    """The relation's tokens and the subject's last tokens stay where they were."""
    pool = Facts([CAPITALS[fact], CAPITALS[partner]])
    (swap,) = found(CAPITALS[fact], pool=pool)
    assert TOKENIZER.decode(swap.ids) == f"<s>{text}"
    assert swap.shift == shift


@pytest.mark.parametrize("seed", range(5))
def test_a_subject_of_equal_length_is_preferred(seed: int):
    assert found(CAPITALS[0], seed=seed)[0].shift == 0
    shifts = [swap.shift for swap in found(CAPITALS[0], seed=seed, n=4)]
    assert shifts == [0, 0, 0, 1]


def test_a_draw_depends_on_seed_and_fact_alone():
    draws = {seed: [s.partner.id for s in found(CAPITALS[0], seed=seed, n=2)] for seed in range(8)}
    assert all(draws[seed] == [s.partner.id for s in found(CAPITALS[0], seed=seed, n=2)] for seed in draws)
    assert len({tuple(draw) for draw in draws.values()}) > 2
    assert len({found(fact)[0].partner.id for fact in CAPITALS}) > 1


def test_more_swaps_than_partners_gives_all_partners():
    partners = [swap.partner.id for swap in found(CAPITALS[0], n=50)]
    assert sorted(partners) == sorted(set(CAPITALS.ids) - {"france"})


def test_a_partner_with_the_same_answer_is_no_contrast():
    same = Fact("x", "The capital of Italy is", "paris", subject="Italy", relation="capital")
    also = Fact("y", "The capital of Norway is", "Lutetia", subject="Norway", relation="capital")
    asked = Fact(
        "f", "The capital of France is", "Paris", subject="France", relation="capital", alternatives=("Lutetia",)
    )
    assert swaps_of(asked, Facts([asked, same, also])) == (
        "the pool has no other subject of relation 'capital' with another answer"
    )


@pytest.mark.parametrize(
    ("fact", "reason"),
    [
        (Fact("1", "The capital is", "Paris", relation="capital"), "it names no subject, so nothing can be swapped"),
        (Fact("1", "The capital is", "Paris", subject="France"), "it names no relation, so nothing can be swapped"),
        (
            Fact("1", "The capital is", "Paris", subject="France", relation="capital"),
            "its subject 'France' does not stand in its prompt",
        ),
    ],
)
def test_what_cannot_be_swapped_is_explained(fact: Fact, reason: str):
    assert swaps_of(fact) == reason


def test_a_subject_that_stands_twice_is_swapped_twice():
    twice = Fact("t", "France: the capital of France is", "Paris", subject="France", relation="capital")
    for swap in found(twice, n=4):
        text = TOKENIZER.decode(swap.ids)
        assert "France" not in text
        assert text.count(str(swap.partner.subject)) == 2
        assert swap.shift == 0


def test_a_swap_that_changes_other_tokens_is_not_used():
    clean = Tokens((0, 5, 6, 7, 8), 1, 4, (2, 3))
    assert fit_swap(clean, Tokens((0, 5, 9, 7, 8), 1, 4, (2, 3))) == (0, 5, 9, 7, 8)
    assert fit_swap(clean, Tokens((0, 5, 9, 4, 8), 1, 4, (2, 3))) is None
    assert fit_swap(clean, Tokens((0, 4, 9, 9, 7, 8), 1, 5, (2, 4))) is None
    assert fit_swap(clean, Tokens((0, 5, 9, 9, 7, 3), 1, 5, (2, 4))) is None
    assert fit_swap(clean, clean) is None


def test_a_longer_name_that_ends_alike_is_not_used():
    clean = Tokens((0, 5, 6, 7, 8), 1, 4, (2, 3))
    assert fit_swap(clean, Tokens((0, 5, 9, 6, 7, 8), 1, 5, (2, 4))) is None
