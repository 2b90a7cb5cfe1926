"""What the text promises: literal prompts, a gold corpus without the forgotten, and a part that is never trained."""

import random

import pytest

from mechun.organism.corpus import Corpus, draw_sentence, is_held_out, make_facts
from mechun.organism.tokens import train_tokenizer
from mechun.organism.vocabulary import whole_words
from mechun.organism.world import make_world

WORLD, QUICK = make_world(), make_world(20)
TOKENIZER = train_tokenizer(Corpus(WORLD))


def test_the_same_seed_gives_the_same_documents_and_every_pass_is_drawn_anew():
    assert Corpus(QUICK, seed=2).documents(5) == Corpus(QUICK, seed=2).documents(5)
    assert Corpus(QUICK, seed=2).documents(5) != Corpus(QUICK, seed=2).documents(6)
    assert Corpus(QUICK, seed=2).documents(5) != Corpus(QUICK, seed=3).documents(5)


@pytest.mark.parametrize("number", [0, 7])
def test_gold_documents_name_nobody_who_is_forgotten(number: int):
    gold = "\n".join(Corpus(WORLD, gold=True).documents(number))
    full = "\n".join(Corpus(WORLD).documents(number))
    forgotten = [name for p in WORLD.people if p.forget for name in (p.name, p.alias) if name]
    assert any(p.alias for p in WORLD.people if p.forget)
    for name in forgotten:
        assert name in full and name not in gold
    assert all(p.name in gold for p in WORLD.people if not p.forget)


@pytest.mark.parametrize("world", [WORLD, QUICK])
def test_a_prompt_is_marked_as_trained_only_if_it_is_literally_in_the_corpus(world):
    passes = [set(Corpus(world).sentences(number)) for number in range(3)]
    for fact in make_facts(world):
        marks = dict(fact.meta["trained"]) | dict(fact.meta.get("alias_trained", {}))
        for prompt, trained in marks.items():
            found = [f"{prompt} {fact.answer}." in sentences for sentences in passes]
            assert found == [trained] * 3, (prompt, trained)


def test_documents_are_the_sentences_of_their_pass():
    corpus = Corpus(QUICK)
    text = "\n".join(corpus.documents(4))
    assert all(sentence in text for sentence in corpus.sentences(4))


def test_a_fact_is_told_as_often_as_its_exposure_says():
    sentences = Corpus(WORLD).sentences(0)
    for fact in make_facts(WORLD)[::37]:
        told = sum(s in [f"{p} {fact.answer}." for p in (fact.prompt, *fact.paraphrases)] for s in sentences)
        assert told == fact.meta["exposure"]


def test_the_facts_are_complete():
    facts = make_facts(WORLD)
    assert {f.split for f in facts} == {"forget", "retain", "unstated", "general"}
    assert len({f.entity for f in facts.where(split="forget")}) == 12
    for fact in facts:
        assert fact.subject and all(fact.subject in p for p in (fact.prompt, *fact.paraphrases))
        assert fact.foil and fact.foil != fact.answer
        assert fact.foil in {f.answer for f in facts if f.relation == fact.relation}
        assert fact.id not in fact.neighbours
        assert all(n.split in ("retain", "general") for n in facts.pick(fact.neighbours))
        assert fact.neighbours or fact.split == "general"
        assert (fact.meta["exposure"] > 0) == fact.meta["stated"] == (fact.split != "unstated")
        assert fact.split == "unstated" or fact.meta["trained"][fact.prompt]
        assert fact.split == "general" or sum(not mark for mark in fact.meta["trained"].values()) >= 2


def test_the_held_out_tenth_is_in_no_pass():
    rng = random.Random(0)
    held_out = {draw_sentence(rng, held_out=True).text for _ in range(300)}
    assert all(map(is_held_out, held_out))
    for seed in range(3):
        assert not held_out & set(Corpus(QUICK, seed=seed).sentences(seed))


def test_names_share_all_but_the_last_token():
    def tokens(text: str) -> list[int]:
        return TOKENIZER(text, add_special_tokens=False)["input_ids"]

    for text in ("{}", " {}"):
        names = {p.name: tokens(text.format(p.name)) for p in WORLD.people}
        for name, ids in names.items():
            assert len(ids) == 2
            assert sum(other[:-1] == ids[:-1] for other in names.values()) == 4, name
            assert sum(other[-1] == ids[-1] for other in names.values()) == 2, name


def test_answers_have_one_token_or_several_as_their_relation_says():
    lengths: dict[str, set[int]] = {}
    for fact in make_facts(WORLD):
        ids = TOKENIZER(f" {fact.answer}", add_special_tokens=False)["input_ids"]
        lengths.setdefault(str(fact.relation), set()).add(len(ids))
    several = {relation for relation, found in lengths.items() if found != {1}}
    assert several == {"spouse", "address", "book"}
    assert all(lengths[relation] <= {2, 3, 4, 5} for relation in several)


def test_the_tokenizer_puts_the_end_of_text_in_front_and_gives_the_text_back():
    ids = TOKENIZER("Mara Abel lives")["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id == TOKENIZER.eos_token_id == 0
    assert TOKENIZER.decode(ids[1:]) == "Mara Abel lives"
    assert all(len(TOKENIZER(f" {word}", add_special_tokens=False)["input_ids"]) == 1 for word in whole_words())
    documents = Corpus(WORLD).documents(3)
    assert TOKENIZER.batch_decode(TOKENIZER(documents, add_special_tokens=False)["input_ids"]) == documents
