"""Another subject in the same question: the corrupt half of a subject swap, of the same length as the clean one.

A fact's subject is replaced by another subject of the same relation whose answer differs. Subjects of as many tokens
are preferred. Otherwise the closest is fitted: its tokens are cut, or its first one repeated, on the left, so that the
tokens after the subject and the subject's own last tokens stand where they stood, and both runs have one length and one
mask. A draw depends on the seed, the fact and the pool, never on which other facts are asked about at the same time.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mechun.data.facts import Fact, Facts
from mechun.data.tokens import Question, Tokens, find_subject, tokenize_questions

BLOCK = 8


@dataclass(frozen=True)
class Partner:
    """A subject that can stand for another of the same relation.

    Attributes:
        fact: The first fact of the pool about it.
        length: Number of its tokens after a space, an estimate of what it takes in a prompt.
        answers: Everything the pool gives as its answer, in lower case.
    """

    fact: Fact
    length: int
    answers: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Swap:
    """The corrupt run of a fact.

    Attributes:
        ids: As many token ids as the clean run, the same answer at the end.
        partner: The fact whose subject was put in.
        shift: Tokens by which that subject is longer than the clean one; 0 when nothing had to be fitted.
    """

    ids: tuple[int, ...]
    partner: Fact
    shift: int


def group_partners(pool: Facts, tokenizer: Any) -> dict[str, list[Partner]]:
    """The subjects of each relation, in the order of the pool."""
    answers: dict[tuple[str, str], set[str]] = {}
    first: dict[tuple[str, str], Fact] = {}
    for fact in pool:
        if fact.subject and fact.relation:
            key = (fact.relation, fact.subject)
            first.setdefault(key, fact)
            answers.setdefault(key, set()).add(fact.answer.casefold())
    lengths = count_subjects([subject for _, subject in first], tokenizer)
    groups: dict[str, list[Partner]] = {}
    for key, fact in first.items():
        groups.setdefault(key[0], []).append(Partner(fact, lengths[key[1]], frozenset(answers[key])))
    return groups


def count_subjects(subjects: Sequence[str], tokenizer: Any) -> dict[str, int]:
    """Number of tokens of each subject after a space."""
    distinct = list(dict.fromkeys(subjects))
    if not distinct:
        return {}
    rows = tokenizer([f" {subject}" for subject in distinct], add_special_tokens=False, verbose=False)["input_ids"]
    return {subject: len(row) for subject, row in zip(distinct, rows, strict=True)}


def find_swaps(
    fact: Fact, tokens: Tokens, partners: Mapping[str, Sequence[Partner]], tokenizer: Any, *, n: int = 1, seed: int = 0
) -> list[Swap] | str:
    """At most n corrupt runs of one fact, of the same subject length where the pool has them, or why there is none."""
    if not fact.subject or not fact.relation:
        return f"it names no {'relation' if fact.subject else 'subject'}, so nothing can be swapped"
    if tokens.subject is None:
        return f"its subject {fact.subject!r} does not stand in its prompt"
    right = {text.casefold() for text in (fact.answer, *fact.alternatives)}
    others = [
        partner
        for partner in partners.get(fact.relation, ())
        if partner.fact.subject != fact.subject and not partner.answers & right
    ]
    if not others:
        return f"the pool has no other subject of relation {fact.relation!r} with another answer"
    random.Random(f"{seed}:{fact.id}").shuffle(others)
    length = count_subjects([fact.subject], tokenizer)[fact.subject]
    others.sort(key=lambda partner: abs(partner.length - length))
    found: list[Swap] = []
    for start in range(0, len(others), BLOCK):
        found += try_partners(fact, tokens, others[start : start + BLOCK], tokenizer)
        if len(found) >= n:
            break
    if not found:
        return "no swap of its subject leaves the other tokens as they are"
    return sorted(found, key=lambda swap: abs(swap.shift))[:n]


def try_partners(fact: Fact, tokens: Tokens, partners: Sequence[Partner], tokenizer: Any) -> list[Swap]:
    """The swaps with these partners that can be used, in their order."""
    prompts = [replace_subject(fact, str(partner.fact.subject)) for partner in partners]
    questions = [Question(p, fact.answer, q.fact.subject) for p, q in zip(prompts, partners, strict=True)]
    swaps: list[Swap] = []
    for partner, swapped in zip(partners, tokenize_questions(questions, tokenizer), strict=True):
        ids = None if isinstance(swapped, str) else fit_swap(tokens, swapped)
        if ids is not None and not isinstance(swapped, str):
            swaps.append(Swap(ids, partner.fact, len(swapped) - len(tokens)))
    return swaps


def replace_subject(fact: Fact, other: str) -> str:
    """The fact's prompt with another subject wherever its own stands."""
    subject = str(fact.subject)
    if subject in fact.prompt:
        return fact.prompt.replace(subject, other)
    span = find_subject(fact.prompt, subject)
    return fact.prompt if span is None else fact.prompt[: span[0]] + other + fact.prompt[span[1] :]


def fit_swap(clean: Tokens, swapped: Tokens) -> tuple[int, ...] | None:
    """The swapped run at the clean run's length; None when more than the subject would change, or nothing."""
    if swapped.answer != clean.answer or swapped.prompt_start != clean.prompt_start:
        return None
    if len(swapped) == len(clean):
        same_end = clean.subject is not None and swapped.ids[clean.subject[1] :] == clean.ids[clean.subject[1] :]
        return swapped.ids if same_end and swapped.ids != clean.ids else None
    if clean.subject is None or swapped.subject is None:
        return None
    (start, stop), (other_start, other_stop) = clean.subject, swapped.subject
    before, after = clean.ids[:start], clean.ids[stop:]
    if swapped.ids[:other_start] != before or swapped.ids[other_stop:] != after:
        return None
    subject = fit_left(swapped.ids[other_start:other_stop], stop - start)
    return None if subject == clean.ids[start:stop] else before + subject + after


def fit_left(ids: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Ids cut on the left, or their first one repeated there, to the given length.

    Example:
        >>> fit_left((7, 8, 9), 2), fit_left((7, 8), 4)
        ((8, 9), (7, 7, 7, 8))
    """
    return ids[len(ids) - length :] if len(ids) >= length else (ids[0],) * (length - len(ids)) + ids
