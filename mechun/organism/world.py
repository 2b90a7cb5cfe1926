"""The invented people and everything that is true of them.

People come in couples. Four share a first name and two share a surname, so neither half of a name says who is meant:
the last token of the name is necessary. Each person has eight arbitrary facts (drawn with skewed frequencies, so that
answers are shared), one that follows a rule (`name_day`: the first name fixes the month) and three that follow from
two others (`birth_country`, `industry`, `spouse_profession`). Every fact has its own exposure: how many sentences of
one pass through the corpus tell it. A quarter of the facts that could be worked out is never stated.

Trap: the forget set is made of whole couples, or the partner's spouse fact would name a forgotten person.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mechun.errors import UsageError
from mechun.organism import vocabulary as words

ARBITRARY = ("birth_city", "profession", "employer", "instrument", "pet", "spouse", "address", "book")
RULED = ("name_day",)
TWO_HOP = ("birth_country", "industry", "spouse_profession")
RELATIONS = (*ARBITRARY, *RULED, *TWO_HOP)
BANDS = {1: 0.28, 2: 0.25, 4: 0.23, 8: 0.15, 16: 0.09}
STATED_SHARE = 0.75
GENERAL_EXPOSURE = 6


@dataclass(frozen=True)
class Person:
    """One invented person.

    Attributes:
        key: Name of the entity in ids, such as "p012".
        first: First name, shared by four people.
        surname: Surname, shared by two people who are no couple.
        couple: Name of the couple, such as "c03".
        partner: Key of the spouse.
        alias: Another name, or None.
        forget: Whether the person belongs to the forget set.
    """

    key: str
    first: str
    surname: str
    couple: str
    partner: str
    alias: str | None
    forget: bool

    @property
    def name(self) -> str:
        """The full name."""
        return f"{self.first} {self.surname}"


@dataclass(frozen=True)
class Telling:
    """One thing that is true, and how often and in which wordings one pass of the corpus says so.

    Attributes:
        key: Id of the fact.
        subject: The words that stand for the subject in a prompt.
        relation: Key of the wordings.
        answer: What completes the prompt.
        exposure: Sentences per pass; 0 when the fact is never stated.
        wordings: Numbers of the wordings that are used for this fact, in the order of use.
        person: The person the fact is about; None for general facts.
    """

    key: str
    subject: str
    relation: str
    answer: str
    exposure: int
    wordings: tuple[int, ...]
    person: Person | None = None

    def prompt(self, wording: int, subject: str | None = None) -> str:
        """The text before the answer in one wording."""
        return words.WORDINGS[self.relation][wording].format(s=subject or self.subject)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt in every wording of the relation."""
        return tuple(self.prompt(number) for number in range(len(words.WORDINGS[self.relation])))


@dataclass(frozen=True)
class World:
    """Everyone in the world, and every telling: about people, and general."""

    people: tuple[Person, ...]
    tellings: tuple[Telling, ...]
    general: tuple[Telling, ...]
    seed: int

    @cached_property
    def by_key(self) -> Mapping[str, Telling]:
        """Every telling by its id."""
        return {telling.key: telling for telling in (*self.tellings, *self.general)}


def make_world(n_people: int = 96, seed: int = 0, n_forget_couples: int | None = None) -> World:
    """Invent a world; the same arguments always give the same one.

    Args:
        n_people: A multiple of four, at most 96.
        seed: Of the draw of couples, answers and exposures.
        n_forget_couples: Couples in the forget set; an eighth of all couples, and at least two, when None.

    Raises:
        UsageError: The number of people cannot be named with four to a first name and two to a surname.

    Example:
        >>> make_world(20).people[0].key
        'p000'
    """
    if n_people % 4 or not 8 <= n_people <= 4 * len(words.FIRST_NAMES):
        raise UsageError(f"a world of {n_people} people cannot be named", "give a multiple of 4 from 8 to 96")
    n_forget = n_forget_couples or max(2, n_people // 16)
    people = _invent_people(n_people, n_forget, random.Random(f"{seed}:people"))
    answers = _invent_answers(people, random.Random(f"{seed}:answers"))
    tellings = _tell(people, answers, random.Random(f"{seed}:exposure"))
    return World(people, tellings, tuple(_tell_general()), seed)


def _invent_people(n_people: int, n_forget: int, rng: random.Random) -> tuple[Person, ...]:
    surnames = list(words.SURNAMES[: n_people // 2])
    rng.shuffle(surnames)
    named = [(words.FIRST_NAMES[number // 4], surnames[number % len(surnames)]) for number in range(n_people)]
    rng.shuffle(named)
    couples = _pair(named, rng)
    forgotten = _choose_forgotten(couples, named, n_forget)
    aliased = _choose_aliased(n_people, [n for c in forgotten for n in couples[c]], rng)
    partner = {one: other for a, b in couples for one, other in ((a, b), (b, a))}
    couple = {number: row for row, pair in enumerate(couples) for number in pair}
    return tuple(
        Person(
            key=f"p{number:03d}",
            first=first,
            surname=surname,
            couple=f"c{couple[number]:02d}",
            partner=f"p{partner[number]:03d}",
            alias=aliased.get(number),
            forget=couple[number] in forgotten,
        )
        for number, (first, surname) in enumerate(named)
    )


def _pair(named: Sequence[tuple[str, str]], rng: random.Random) -> list[tuple[int, int]]:
    """Couples in which nobody shares a name with the partner."""
    order = list(range(len(named)))
    while True:
        rng.shuffle(order)
        pairs = list(zip(order[::2], order[1::2], strict=True))
        if all(named[a][0] != named[b][0] and named[a][1] != named[b][1] for a, b in pairs):
            return pairs


def _choose_forgotten(couples: Sequence[tuple[int, int]], named: Sequence[tuple[str, str]], n_forget: int) -> list[int]:
    """Couples such that everyone who is forgotten shares each name with somebody who is kept."""
    chosen: list[int] = []
    firsts: list[str] = []
    surnames: list[str] = []
    for row, pair in enumerate(couples):
        new_firsts, new_surnames = [named[n][0] for n in pair], [named[n][1] for n in pair]
        crowded = any(firsts.count(first) >= 2 for first in new_firsts)
        if len(chosen) < n_forget and not crowded and not set(new_surnames) & set(surnames):
            chosen.append(row)
            firsts += new_firsts
            surnames += new_surnames
    return chosen


def _choose_aliased(n_people: int, forgotten: Sequence[int], rng: random.Random) -> dict[int, str]:
    """An eighth of the people, a third of them among the forgotten, go by an alias too."""
    n_aliases = min(len(words.ALIASES), max(3, n_people // 8))
    kept = [number for number in range(n_people) if number not in forgotten]
    n_forgotten = min(len(forgotten), n_aliases // 3)
    chosen = rng.sample(list(forgotten), n_forgotten) + rng.sample(kept, n_aliases - n_forgotten)
    return dict(zip(chosen, words.ALIASES, strict=False))


def _draw(options: Sequence[str], rng: random.Random) -> str:
    """One option; earlier ones are likelier, so that answers are shared unevenly."""
    return rng.choices(options, [1 / (rank + 3) for rank in range(len(options))])[0]


def _invent_answers(people: Sequence[Person], rng: random.Random) -> dict[str, dict[str, str]]:
    cities = sum(words.COUNTRIES.values(), ())
    country = {city: name for name, places in words.COUNTRIES.items() for city in places}
    employers = sum(words.INDUSTRIES.values(), ())
    industry = {firm: name for name, firms in words.INDUSTRIES.items() for firm in firms}
    by_key = {person.key: person for person in people}
    answers: dict[str, dict[str, str]] = {}
    for person in people:
        city, firm = _draw(cities, rng), _draw(employers, rng)
        answers[person.key] = {
            "birth_city": city,
            "profession": _draw(tuple(words.TOOLS), rng),
            "employer": firm,
            "instrument": _draw(words.INSTRUMENTS, rng),
            "pet": _draw(words.PETS, rng),
            "spouse": by_key[person.partner].name,
            "address": f"{rng.choice(words.NUMBERS)} {rng.choice(words.STREETS)} {rng.choice(words.ROADS)}",
            "book": f"The {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}",
            "name_day": words.MONTHS[words.FIRST_NAMES.index(person.first) * 7 % len(words.MONTHS)],
            "birth_country": country[city],
            "industry": industry[firm],
        }
    for person in people:
        answers[person.key]["spouse_profession"] = answers[person.partner]["profession"]
    return answers


def _tell(
    people: Sequence[Person], answers: Mapping[str, Mapping[str, str]], rng: random.Random
) -> tuple[Telling, ...]:
    exposures = {relation: _spread_exposures(relation, people, rng) for relation in RELATIONS}
    tellings = []
    for person in people:
        for relation in RELATIONS:
            exposure = exposures[relation][person.key]
            wordings = _choose_wordings(exposure, len(words.WORDINGS[relation]), rng)
            key, answer = f"{person.key}.{relation}", answers[person.key][relation]
            tellings.append(Telling(key, person.name, relation, answer, exposure, wordings, person))
    return tuple(tellings)


def _spread_exposures(relation: str, people: Sequence[Person], rng: random.Random) -> dict[str, int]:
    """Exposures in the shares of the bands, among the forgotten and the kept alike; 0 for facts left to be inferred."""
    spread: dict[str, int] = {}
    for forgotten in (True, False):
        keys = [person.key for person in people if person.forget is forgotten]
        rng.shuffle(keys)
        n_stated = round(len(keys) * STATED_SHARE) if relation in (*RULED, *TWO_HOP) else len(keys)
        edges, bands = 0.0, []
        for band, share in BANDS.items():
            edges += share
            bands += [band] * (round(edges * n_stated) - len(bands))
        spread |= dict(zip(keys, bands + [0] * (len(keys) - n_stated), strict=True))
    return spread


def _choose_wordings(exposure: int, n_wordings: int, rng: random.Random) -> tuple[int, ...]:
    """The default wording and others, never more than all but two: those two are never trained for the fact."""
    others = rng.sample(range(1, n_wordings), n_wordings - 3)
    return (0, *others)[:exposure]


def _tell_general() -> list[Telling]:
    facts = [("city_country", c, country) for country, cities in words.COUNTRIES.items() for c in cities]
    facts += [("employer_industry", f, name) for name, firms in words.INDUSTRIES.items() for f in firms]
    facts += [("profession_tool", job, tool) for job, tool in words.TOOLS.items()]
    facts += [("thing_colour", thing, colour) for thing, colour in words.COLOURS.items()]
    return [
        Telling(
            f"{relation}.{subject.replace(' ', '_')}",
            subject,
            relation,
            answer,
            GENERAL_EXPOSURE,
            tuple(range(len(words.WORDINGS[relation]))),
        )
        for relation, subject, answer in facts
    ]
