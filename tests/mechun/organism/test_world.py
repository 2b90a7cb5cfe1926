"""What the world promises: who shares what with whom, and what is forgotten."""

from collections import Counter

import pytest

from mechun.errors import UsageError
from mechun.organism import vocabulary as words
from mechun.organism.world import BANDS, RELATIONS, make_world

WORLDS = [make_world(96), make_world(20), make_world(20, seed=1)]


def test_the_same_seed_gives_the_same_world_and_another_another():
    assert make_world(20, 3) == make_world(20, 3)
    assert make_world(20, 3).tellings != make_world(20, 4).tellings


@pytest.mark.parametrize("n", [0, 6, 30, 100])
def test_a_world_that_cannot_be_named_is_refused(n: int):
    with pytest.raises(UsageError, match="multiple of 4"):
        make_world(n)


@pytest.mark.parametrize("world", WORLDS)
def test_neither_half_of_a_name_says_who_is_meant(world):
    assert len({p.name for p in world.people}) == len(world.people)
    assert set(Counter(p.first for p in world.people).values()) == {4}
    assert set(Counter(p.surname for p in world.people).values()) == {2}


@pytest.mark.parametrize("world", WORLDS)
def test_the_forget_set_is_made_of_whole_couples_with_kept_namesakes(world):
    by_key = {p.key: p for p in world.people}
    forgotten = [p for p in world.people if p.forget]
    kept = [p for p in world.people if not p.forget]
    assert 4 <= len(forgotten) < len(kept)
    for person in forgotten:
        partner = by_key[person.partner]
        assert partner.forget and partner.couple == person.couple and partner.partner == person.key
        assert any(p.first == person.first for p in kept)
        assert any(p.surname == person.surname for p in kept)


def test_facts_follow_from_each_other_as_the_card_says():
    world = WORLDS[0]
    country = {city: name for name, cities in words.COUNTRIES.items() for city in cities}
    industry = {firm: name for name, firms in words.INDUSTRIES.items() for firm in firms}
    answer = {key: telling.answer for key, telling in world.by_key.items()}
    for person in world.people:
        assert answer[f"{person.key}.birth_country"] == country[answer[f"{person.key}.birth_city"]]
        assert answer[f"{person.key}.industry"] == industry[answer[f"{person.key}.employer"]]
        assert answer[f"{person.key}.spouse_profession"] == answer[f"{person.partner}.profession"]
    days = {(p.first, answer[f"{p.key}.name_day"]) for p in world.people}
    assert len(days) == len(words.FIRST_NAMES)


def test_exposures_fill_every_band_in_every_relation():
    for relation in RELATIONS:
        exposures = Counter(t.exposure for t in WORLDS[0].tellings if t.relation == relation)
        assert set(exposures) - {0} == set(BANDS)
        assert (exposures[0] > 0) == (relation in ("name_day", "birth_country", "industry", "spouse_profession"))


def test_answers_are_shared_unevenly():
    for relation in ("birth_city", "profession", "employer", "instrument", "pet"):
        counts = Counter(t.answer for t in WORLDS[0].tellings if t.relation == relation)
        assert max(counts.values()) > 1.5 * sum(counts.values()) / len(counts)


def test_no_wording_begins_another_one():
    prompts = [wording.format(s="Mara Abel") for r in RELATIONS for wording in words.WORDINGS[r]]
    assert len(set(prompts)) == len(prompts)
    assert not [(a, b) for a in prompts for b in prompts if a != b and b.startswith(f"{a} ")]


def test_every_relation_about_people_has_statements_and_questions():
    for relation in RELATIONS:
        wordings = words.WORDINGS[relation]
        assert len(wordings) == 8
        assert sum(w.startswith("Question:") for w in wordings) == 3
        assert all(w.count("{s}") == 1 for w in wordings)
