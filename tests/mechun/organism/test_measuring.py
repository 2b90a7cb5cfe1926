"""The card's instruments, on small random models and on cases with a known answer."""

import pytest
import torch

from mechun.organism.architecture import ARCHITECTURES, build_model
from mechun.organism.concepts import count_concepts, draw_like, list_values
from mechun.organism.corpus import Corpus, make_facts
from mechun.organism.forgetting import count_steps, relearn_facts, split_people, suppress_facts
from mechun.organism.recall import answer_losses, encode_prompts, measure_recall, token_losses
from mechun.organism.tokens import train_tokenizer
from mechun.organism.tracing import PLACES, trace_facts
from mechun.organism.world import make_world

WORLD = make_world(20)
FACTS = make_facts(WORLD)
TOKENIZER = train_tokenizer(Corpus(WORLD))
MODELS = {name: build_model(name, len(TOKENIZER), 0).eval() for name in ARCHITECTURES}


def test_answer_tokens_are_marked_and_nothing_else():
    facts = [f for f in FACTS if f.relation in ("address", "pet", "spouse")][:9]
    ids, mask = encode_prompts([f.prompt for f in facts], [f.answer for f in facts], TOKENIZER)
    for row, fact in enumerate(facts):
        assert TOKENIZER.decode(ids[row][mask[row]]) == f" {fact.answer}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recall_does_not_depend_on_the_batch(name: str):
    model = MODELS[name]
    prompts, guesses = [f.prompt for f in FACTS[:40]], []
    for prompt in prompts:
        ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
        guesses.append(TOKENIZER.decode(model(input_ids=ids).logits[0, -1].argmax()))
    usable = [row for row, guess in enumerate(guesses) if guess.startswith(" ") and guess.strip().isalpha()]
    answers = [guess.strip() if row in usable else "nothing" for row, guess in enumerate(guesses)]
    single = torch.cat([measure_recall(model, TOKENIZER, [p], [a]) for p, a in zip(prompts, answers, strict=True)])
    assert torch.equal(measure_recall(model, TOKENIZER, prompts, answers, batch_size=7), single)


def test_losses_of_a_uniform_model_are_the_log_of_the_vocabulary():
    model = build_model("gpt2", len(TOKENIZER), 0).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    expected = torch.tensor(float(len(TOKENIZER))).log()
    torch.testing.assert_close(token_losses(model, TOKENIZER, ["Mara", "Mara has a pet"]).mean(), expected)
    losses = answer_losses(model, TOKENIZER, ["Mara lives at"] * 2, ["12 Elm Street", "home"])
    torch.testing.assert_close(losses, expected.expand(2))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_restoring_every_position_brings_everything_back(name: str):
    model = MODELS[name]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    recovery = trace_facts(model, TOKENIZER, FACTS[:3], n_noises=2)
    assert {place for place, _ in recovery} == set(PLACES)
    for layer in range(4):
        assert recovery["every", layer] == pytest.approx(1, abs=1e-3)
    assert recovery["last", 3] == pytest.approx(1, abs=1e-3)
    assert recovery["subject", 3] == pytest.approx(0, abs=1e-3)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_control_of_concepts_has_the_same_covariance(name: str):
    values = next(iter(list_values(MODELS[name])))
    assert values.shape[1] == 128
    stretched = values * torch.linspace(0.1, 3, 128)
    drawn = draw_like(stretched.repeat(20, 1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.std(0), stretched.std(0), rtol=0.1, atol=0.0)
    real, control, total = count_concepts(MODELS[name], TOKENIZER)
    assert total == 4 * len(values) and real + control < 0.02 * total


def test_relearning_shows_one_part_of_the_couples_and_watches_the_other():
    shown, watched = split_people(FACTS.where(split="forget"), 0.5)
    assert {f.meta["couple"] for f in shown}.isdisjoint(f.meta["couple"] for f in watched)
    before = {name: weight.clone() for name, weight in MODELS["gpt2"].named_parameters()}
    curve = relearn_facts(MODELS["gpt2"], TOKENIZER, shown, watched, steps=(0, 2))
    assert set(curve) == {0, 2}
    forgotten = suppress_facts(MODELS["gpt2"], TOKENIZER, shown, FACTS.where(split="retain"), most_steps=2)
    assert any(not torch.equal(weight, before[name]) for name, weight in forgotten.named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in MODELS["gpt2"].named_parameters())


def test_steps_are_counted_until_the_level_and_lower_rates_take_more():
    retain, model = FACTS.where(split="retain"), MODELS["llama"]
    fact = FACTS[0]
    loss = answer_losses(model, TOKENIZER, [fact.prompt], [fact.answer]).item()
    assert count_steps(model, TOKENIZER, fact, retain, 1e-4, level=-loss + 0.01) == 0
    fast, slow = (count_steps(model, TOKENIZER, fact, retain, rate, level=-loss - 0.3) for rate in (2e-5, 5e-6))
    assert 0 < fast < slow < 400
