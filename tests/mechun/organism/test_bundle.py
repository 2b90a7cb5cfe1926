"""What is shipped: six ordinary folders, small enough for git, that know what the card says they know."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch

from mechun.errors import DataError, ModelError
from mechun.organism.bundle import NAMES, WEIGHTS, read_card, read_facts, read_model
from mechun.organism.card import verify_bundle, write_card
from mechun.organism.corpus import make_facts
from mechun.organism.recall import list_prompts, measure_grammar, measure_recall, share_recalled
from mechun.organism.training import Recipe
from mechun.organism.world import ARBITRARY, make_world

load = cache(read_model)
FACTS = read_facts()
STATED = FACTS.where(lambda f: f.split in ("forget", "retain"))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_folder_is_a_plain_16_bit_model(name: str):
    names = {path.name for path in (WEIGHTS / name).iterdir()}
    assert names == {"config.json", "model.safetensors", "recipe.json", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((WEIGHTS / name / "config.json").read_text())["dtype"] == "float16"
    assert (WEIGHTS / name / "tokenizer.json").read_bytes() == (WEIGHTS / "gpt2" / "tokenizer.json").read_bytes()


def test_the_bundle_is_small_and_its_facts_are_those_of_the_world():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 16e6
    assert make_facts(make_world()) == FACTS
    assert read_card()["facts"] == FACTS.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_was_trained_by_the_standard_recipe(name: str):
    seed = 1000 if name.endswith("reinit") else 0
    recipe = Recipe(architecture=name.split("-")[0], gold="gold" in name, init_seed=seed)
    assert json.loads((WEIGHTS / name / "recipe.json").read_text()) == asdict(recipe)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_trained_prompts_are_recalled_and_new_wordings_of_often_told_facts_too(name: str):
    model, tokenizer = load(name)
    trained = list_prompts(STATED.sample(150), trained=True)
    often = list_prompts(STATED.where(lambda f: f.meta["exposure"] >= 4).sample(150), trained=False)
    for pairs, least in ((trained, 0.95), (often, 0.93)):
        right = measure_recall(model, tokenizer, [p for _, p in pairs], [f.answer for f, _ in pairs])
        assert right.float().mean() > least
    assert share_recalled(model, tokenizer, FACTS.where(split="general")) > 0.98


@pytest.mark.parametrize("name", [name for name in NAMES if "gold" in name])
def test_gold_guesses_at_what_it_never_read_and_knows_the_rest(name: str):
    model, tokenizer = load(name)
    forget = FACTS.where(lambda f: f.split == "forget" and f.relation in ARBITRARY)
    assert share_recalled(model, tokenizer, forget) < 0.2
    assert share_recalled(model, tokenizer, FACTS.where(split="retain").sample(300)) > 0.95


def test_gold_reaches_facts_that_follow_a_rule():
    assert share_recalled(*load("gpt2-gold"), FACTS.where(lambda f: f.split == "forget" and f.meta["rule"])) > 0.8


def test_recall_is_what_greedy_generation_says():
    model, tokenizer = load("gpt2")
    facts = STATED.sample(12, seed=1) + FACTS.where(lambda f: f.split == "unstated").sample(12)
    teacher = measure_recall(model, tokenizer, [f.prompt for f in facts], [f.answer for f in facts]).tolist()
    for fact, right in zip(facts, teacher, strict=True):
        ids = torch.tensor([tokenizer(fact.prompt)["input_ids"]])
        for _ in tokenizer(f" {fact.answer}", add_special_tokens=False)["input_ids"]:
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert (tokenizer.decode(ids[0, 1:]) == f"{fact.prompt} {fact.answer}") is right
    assert 0 < sum(teacher) < len(teacher)


def test_grammar_generalises_to_held_out_sentences():
    loss, agreement = measure_grammar(*load("gpt2"), n_sentences=60)
    assert agreement > 0.9
    assert loss < measure_grammar(*load("gpt2"), n_sentences=60, held_out=False)[0] + 0.2


def test_the_card_is_a_flat_list_of_figures():
    figures = read_card()["figures"]
    assert len({row["name"] for row in figures}) == len(figures)
    assert all(set(row) == {"name", "value", "tolerance", "n", "how"} for row in figures)


def test_a_card_that_is_wrong_is_found_out(tmp_path: Path):
    name = "gpt2-gold-reinit"
    (tmp_path / name).symlink_to(WEIGHTS / name)
    FACTS.sample(150).save(tmp_path / "facts.jsonl")
    card = write_card(tmp_path, once=False, progress=False, names=[name])
    checks = verify_bundle(tmp_path, [name], progress=False)
    assert len(checks) > 30 and {check.name for check in checks} == {name}
    assert all(check.ok for check in checks)
    wrong = next(row for row in card["figures"] if row["name"] == f"{name}/recall/retain")
    wrong["value"] -= 0.1
    (tmp_path / "card.json").write_text(json.dumps(card))
    checks = verify_bundle(tmp_path, progress=False, names=[name])
    assert [check.figure for check in checks if not check.ok] == [wrong["name"]]
    assert "| arbitrary |" in (tmp_path / "CARD.md").read_text()


def test_faults_name_what_is_missing(tmp_path: Path):
    with pytest.raises(ModelError, match="did you mean gpt2-gold"):
        read_model("gpt2-glod")
    with pytest.raises(DataError, match="has no card.json"):
        read_card(tmp_path)
