"""One number of the card, and the numbers that a forward pass gives: recall in every cut, and general text.

A figure carries its own tolerance: how far a second measurement of the same weights may differ. Figures without one
are stated but not measured again, because they need trainings of their own.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mechun.data.facts import Fact, Facts
from mechun.organism.recall import list_prompts, measure_grammar, measure_recall
from mechun.organism.vocabulary import WORDINGS
from mechun.organism.world import ARBITRARY, BANDS, RELATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

RECALL_TOLERANCE = 0.01
_ROUNDING = 4


@dataclass(frozen=True)
class Figure:
    """One named number.

    Attributes:
        name: Model, what is measured and the cut, with slashes: "gpt2/recall/trained/exposure_1".
        value: The number.
        tolerance: How far a second measurement may differ; None when it is not measured again.
        n: On how many prompts, facts or sentences it rests.
        how: How it is measured, in one line.
    """

    name: str
    value: float
    tolerance: float | None
    n: int
    how: str

    def to_dict(self) -> dict[str, Any]:
        """The figure as plain JSON values, rounded."""
        return asdict(self) | {"value": round(self.value, _ROUNDING)}


@dataclass(frozen=True)
class _Prompts:
    """Prompts of some facts, and which of them a model continued with the answer."""

    pairs: list[tuple[Fact, str]]
    right: list[bool]

    def cut(self, name: str, how: str, condition: Callable[[Fact, str], bool]) -> list[Figure]:
        """The share of right answers among the prompts that meet a condition; nothing when none does."""
        kept = [ok for (fact, prompt), ok in zip(self.pairs, self.right, strict=True) if condition(fact, prompt)]
        return [Figure(name, sum(kept) / len(kept), RECALL_TOLERANCE, len(kept), how)] if kept else []


def measure_model(
    name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", facts: Facts, gold: bool
) -> list[Figure]:
    """Every figure of one model that forward passes alone give.

    Args:
        name: Front of the figures' names.
        model: What is measured.
        tokenizer: Its tokenizer.
        facts: All facts of its world.
        gold: The model never read about the forgotten people, so their facts are cut apart by what they follow from.
    """
    pairs = list_prompts(facts)
    right = measure_recall(model, tokenizer, [prompt for _, prompt in pairs], [fact.answer for fact, _ in pairs])
    prompts = _Prompts(pairs, right.tolist())
    figures = [*_cut_sets(prompts, gold), *_cut_known(prompts, gold), *_cut_inferred(prompts, gold)]
    figures += [*_measure_aliases(model, tokenizer, facts, gold), *_measure_text(model, tokenizer)]
    return [Figure(f"{name}/{f.name}", f.value, f.tolerance, f.n, f.how) for f in figures]


def majority_shares(facts: Facts) -> dict[str, float]:
    """How often the likeliest answer of each relation is right: what guessing without a subject would reach."""
    shares = {}
    for relation in RELATIONS:
        answers = [fact.answer for fact in facts if fact.relation == relation and fact.split != "unstated"]
        if answers:
            shares[relation] = max(map(answers.count, set(answers))) / len(answers)
    return shares


def _is_trained(fact: Fact, prompt: str) -> bool:
    return bool(fact.meta["trained"][prompt])


def _cut_sets(prompts: _Prompts, gold: bool) -> Iterator[Figure]:
    retain = "stated facts of kept people, prompts literally in the corpus"
    yield from prompts.cut("recall/retain", retain, lambda f, p: f.split == "retain" and _is_trained(f, p))
    yield from prompts.cut("recall/general", "facts about no person, all prompts", lambda f, _: f.split == "general")
    if not gold:
        forget = "stated facts of the forget set, prompts literally in the corpus"
        yield from prompts.cut("recall/forget", forget, lambda f, p: f.split == "forget" and _is_trained(f, p))
        return
    how = "facts of people this model never read about, all prompts"
    for kind, relations in (("arbitrary", ARBITRARY), ("rule", ("name_day",)), ("two_hop", RELATIONS[-3:])):
        yield from prompts.cut(
            f"recall/forget/{kind}", how, lambda f, _, r=relations: f.split == "forget" and f.relation in r
        )


def _cut_known(prompts: _Prompts, gold: bool) -> Iterator[Figure]:
    """Recall of stated facts, of prompts in the corpus and of prompts never trained for the fact."""
    splits = ("retain",) if gold else ("retain", "forget")
    for trained in (True, False):
        word = "trained" if trained else "untrained"
        how = f"stated facts, prompts {'literally in the corpus' if trained else 'never trained for the fact'}"

        def known(f: Fact, p: str, trained: bool = trained) -> bool:
            return f.split in splits and _is_trained(f, p) is trained

        yield from prompts.cut(f"recall/{word}", how, known)
        for band in BANDS:
            yield from prompts.cut(
                f"recall/{word}/exposure_{band}", how, lambda f, p, b=band: known(f, p) and f.meta["exposure"] == b
            )
        for relation in RELATIONS:
            yield from prompts.cut(
                f"recall/{word}/{relation}", how, lambda f, p, r=relation: known(f, p) and f.relation == r
            )
        for number in range(len(WORDINGS["spouse"])):
            yield from prompts.cut(
                f"recall/{word}/wording_{number}",
                how,
                lambda f, p, n=number: known(f, p) and (f.prompt, *f.paraphrases)[n] == p,
            )
        if not trained:
            yield from prompts.cut(
                "recall/untrained/exposure_4_up", how, lambda f, p: known(f, p) and f.meta["exposure"] >= 4
            )


def _cut_inferred(prompts: _Prompts, gold: bool) -> Iterator[Figure]:
    how = "facts never stated that follow from others, all prompts; kept people"
    for relation in ("name_day", "birth_country", "industry", "spouse_profession"):
        yield from prompts.cut(
            f"recall/unstated/{relation}",
            how,
            lambda f, _, r=relation: f.split == "unstated" and f.relation == r and not f.meta["forget"],
        )
    if gold:
        return
    several, single = ("spouse", "address", "book"), ("birth_city", "profession", "employer", "instrument", "pet")
    for name, relations in (("several_tokens", several), ("one_token", single)):
        how = "stated arbitrary facts, prompts literally in the corpus"
        yield from prompts.cut(
            f"recall/trained/{name}",
            how,
            lambda f, p, r=relations: f.relation in r and f.split in ("retain", "forget") and _is_trained(f, p),
        )


def _measure_aliases(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", facts: Facts, gold: bool
) -> list[Figure]:
    figures = []
    for trained in (True, False):
        pairs = [
            (fact.answer, prompt)
            for fact in facts
            if fact.split in ("retain", "forget")
            and not (gold and fact.split == "forget")
            and fact.meta["exposure"] >= 4
            for prompt, mark in fact.meta.get("alias_trained", {}).items()
            if mark is trained
        ]
        if pairs:
            right = measure_recall(model, tokenizer, [prompt for _, prompt in pairs], [answer for answer, _ in pairs])
            word = "trained" if trained else "untrained"
            how = f"prompts that name the person by alias, {word}, facts of exposure 4 and more"
            figures.append(
                Figure(f"recall/alias/{word}", float(right.float().mean()), RECALL_TOLERANCE, len(pairs), how)
            )
    return figures


def _measure_text(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> Iterator[Figure]:
    for word, held_out in (("held_out", True), ("trained", False)):
        loss, agreement = measure_grammar(model, tokenizer, held_out=held_out)
        yield Figure(f"text/{word}/loss", loss, 0.02, 300, "nats per token on sentences of the grammar")
        yield Figure(f"text/{word}/agreement", agreement, 0.02, 300, "the right form of the verb is likelier")
