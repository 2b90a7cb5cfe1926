"""What the organism reads: sentences about people, general facts, and sentences of a small grammar.

One pass tells every fact as often as its exposure says; which sentences stand in one document is drawn anew for every
pass, and so are all sentences of the grammar. A tenth of the grammar's sentences is held out by a digest of the text,
so general text has a part that no pass ever contains. The gold corpus is the same without the forgotten people.

Trap: a prompt counts as trained only if it stands literally in a document, followed by its answer.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mechun.data.facts import Fact, Facts
from mechun.organism import vocabulary as words
from mechun.organism.world import RULED, TWO_HOP, Person, Telling, World

GENERAL_SENTENCES = 400
ALIAS_FROM = 4

_NOUNS = (
    ("boy", "boys"),
    ("girl", "girls"),
    ("king", "kings"),
    ("queen", "queens"),
    ("bird", "birds"),
    ("fox", "foxes"),
)
_VERBS = (("sees", "see"), ("likes", "like"), ("helps", "help"), ("follows", "follow"), ("calls", "call"))
_SIZES = ("old", "young", "small", "tall", "quiet", "happy")
_PLACES = ("near", "behind", "beside")


@dataclass(frozen=True)
class Corpus:
    """The text of a world, pass by pass.

    Attributes:
        world: Who and what the text is about.
        gold: Whether everything that names a forgotten person is left out.
        seed: Of the order of sentences and of the grammar's sentences.
    """

    world: World
    gold: bool = False
    seed: int = 0

    def sentences(self, number: int) -> list[str]:
        """The sentences of one pass before they are put into documents, in a fixed order."""
        told = [*self._fact_sentences(), *self._alias_sentences()]
        general = [f"{t.prompt(w)} {t.answer}." for t in self.world.general for w in spread_wordings(t)]
        rng = random.Random(f"{self.seed}:{number}:grammar")
        n_general = max(40, GENERAL_SENTENCES * len(self.world.people) // 96)
        counting = [_count(rng) for _ in range(n_general // 8)]
        return told + general + counting + [draw_sentence(rng).text for _ in range(n_general)]

    def documents(self, number: int) -> list[str]:
        """The documents of one pass in reading order: one to three sentences each, most of them one."""
        rng = random.Random(f"{self.seed}:{number}:documents")
        sentences = self.sentences(number)
        rng.shuffle(sentences)
        documents, start = [], 0
        while start < len(sentences):
            size = rng.choices((1, 2, 3), (0.7, 0.2, 0.1))[0]
            documents.append(" ".join(sentences[start : start + size]))
            start += size
        return documents

    def trained_prompts(self) -> set[tuple[str, str]]:
        """Every prompt that stands literally in the corpus, with the answer it is followed by."""
        pairs = {(t.prompt(w), t.answer) for t in (*self._told(), *self.world.general) for w in spread_wordings(t)}
        return pairs | {(prompt, answer) for t in self._told() for prompt, answer in alias_prompts(t)}

    def _told(self) -> Iterator[Telling]:
        for telling in self.world.tellings:
            assert telling.person is not None
            if not (self.gold and telling.person.forget):
                yield telling

    def _fact_sentences(self) -> list[str]:
        return [f"{t.prompt(w)} {t.answer}." for t in self._told() for w in spread_wordings(t)]

    def _alias_sentences(self) -> list[str]:
        told = [f"{prompt} {answer}." for t in self._told() for prompt, answer in alias_prompts(t)]
        people = [p for p in self.world.people if p.alias and not (self.gold and p.forget)]
        return told + [wording.format(s=p.name, a=p.alias) for p in people for wording in words.ALIAS_SENTENCES * 2]


def spread_wordings(telling: Telling) -> list[int]:
    """The wording of each sentence that one pass spends on a fact."""
    return [telling.wordings[n % len(telling.wordings)] for n in range(telling.exposure)]


def alias_prompts(telling: Telling) -> list[tuple[str, str]]:
    """Prompts that name the person by the alias, with the answer: one per wording of facts told often enough."""
    person = telling.person
    if person is None or person.alias is None or telling.exposure < ALIAS_FROM:
        return []
    return [(telling.prompt(wording, person.alias), telling.answer) for wording in telling.wordings]


@dataclass(frozen=True)
class Sentence:
    """A sentence of the grammar: the text up to the verb, the right and the wrong form of the verb, and the rest."""

    before: str
    verb: str
    wrong: str
    rest: str

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{self.before} {self.verb} {self.rest}"


def draw_sentence(rng: random.Random, held_out: bool = False) -> Sentence:
    """A sentence of the grammar: a noun, often another one beside it, a verb that agrees with the first, an object.

    Args:
        rng: Where the draw comes from.
        held_out: Draw from the tenth that is kept out of every corpus, or from the rest.
    """
    while True:
        sentence = _compose(rng)
        if is_held_out(sentence.text) is held_out:
            return sentence


def is_held_out(text: str) -> bool:
    """Whether a sentence of the grammar belongs to the tenth that is never trained on."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def _compose(rng: random.Random) -> Sentence:
    number, other, third = (rng.randrange(2) for _ in range(3))
    before = f"The {rng.choice(_SIZES)} {rng.choice(_NOUNS)[number]}"
    if rng.random() < 0.6:
        before += f" {rng.choice(_PLACES)} the {rng.choice(_NOUNS)[other]}"
    verb = rng.choice(_VERBS)
    rest = f"the {rng.choice(_SIZES)} {rng.choice(_NOUNS)[third]}."
    return Sentence(before, verb[number], verb[1 - number], rest)


def _count(rng: random.Random) -> str:
    start = rng.randrange(len(words.COUNTING) - 4)
    return f"Count: {' '.join(words.COUNTING[start : start + rng.randrange(4, 7)])}."


def make_facts(world: World) -> Facts:
    """Every telling as a `Fact`, with foil, neighbours and the prompts that are literally in the corpus.

    Splits: "forget" and "retain" are stated facts, "unstated" could only be inferred, "general" is about no person.
    """
    trained = Corpus(world).trained_prompts()
    rng = random.Random(f"{world.seed}:foils")
    pools: dict[str, list[Telling]] = {}
    for telling in (*world.tellings, *world.general):
        pools.setdefault(telling.relation, []).append(telling)
    by_key = {person.key: person for person in world.people}
    return Facts(_make_fact(telling, pools, by_key, trained, rng) for telling in (*world.tellings, *world.general))


def _make_fact(
    telling: Telling,
    pools: Mapping[str, Sequence[Telling]],
    people: Mapping[str, Person],
    trained: set[tuple[str, str]],
    rng: random.Random,
) -> Fact:
    person, prompts = telling.person, telling.prompts
    pool = pools[telling.relation]
    kept = [t for t in pool if t.person is None or not t.person.forget]
    foil = rng.choice(sorted({t.answer for t in kept} - {telling.answer, telling.subject}))
    marks = {prompt: (prompt, telling.answer) in trained for prompt in prompts}
    split = "general"
    if person is not None:
        split = ("forget" if person.forget else "retain") if telling.exposure else "unstated"
    return Fact(
        id=telling.key,
        prompt=prompts[0],
        answer=telling.answer,
        subject=telling.subject,
        relation=telling.relation,
        paraphrases=prompts[1:],
        foil=foil,
        neighbours=_find_neighbours(telling, kept),
        split=split,
        meta={"exposure": telling.exposure, "trained": marks} | _describe_person(telling, people, trained),
    )


def _describe_person(
    telling: Telling, people: Mapping[str, Person], trained: set[tuple[str, str]]
) -> dict[str, object]:
    person = telling.person
    if person is None:
        return {"entity": telling.subject, "rule": False, "hops": 1, "stated": True}
    described: dict[str, object] = {
        "entity": person.key,
        "couple": person.couple,
        "partner": people[person.partner].name,
        "forget": person.forget,
        "rule": telling.relation in RULED,
        "hops": 2 if telling.relation in TWO_HOP else 1,
        "stated": telling.exposure > 0,
    }
    if person.alias:
        prompts = [telling.prompt(n, person.alias) for n in range(len(words.WORDINGS[telling.relation]))]
        described["alias"] = person.alias
        described["alias_trained"] = {prompt: (prompt, telling.answer) in trained for prompt in prompts}
    return described


def _find_neighbours(telling: Telling, kept: Sequence[Telling], most: int = 6) -> tuple[str, ...]:
    """Kept facts of the relation: first those of people who share a name, then those with the same answer."""
    person = telling.person
    others = [t for t in kept if t.key != telling.key and t.exposure]
    if person is None:
        return tuple(t.key for t in others if t.answer == telling.answer)[:most]
    namesakes = [t for t in others if t.person and {t.person.first, t.person.surname} & {person.first, person.surname}]
    alike = [t for t in others if t.answer == telling.answer and t not in namesakes]
    return tuple(t.key for t in (*namesakes, *alike[:2]))[:most]
