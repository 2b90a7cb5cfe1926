"""Contrast pairs of a small world: one length, one mask, one answer, and no dependence on the batch."""

import pytest
import torch

from mechun.data.contrasts import NOISE_SCALE, contrast, derive_seed
from mechun.data.encoding import Skipped
from mechun.data.facts import Fact, Facts
from mechun.errors import UsageError
from mechun.models import LoadedModel, load_model
from tests.toy_text import make_capitals, train_tokenizer
from tests.toys import build_hf

CAPITALS = make_capitals()
BARE = Facts([Fact("q1", "of course, France", "Paris"), Fact("q2", "Italy", "Rome", foil="Oslo, of")])


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    tokenizer = train_tokenizer()
    return load_model(build_hf("gpt2", vocab_size=len(tokenizer)), tokenizer=tokenizer, check=False)


def text(model: LoadedModel, ids: torch.Tensor, mask: torch.Tensor) -> str:
    return model.tokenizer.decode(ids[mask])


def test_a_hand_made_swap(model: LoadedModel):
    made = contrast(CAPITALS[:2], model, kind="swap")
    pairs = made.pairs
    assert text(model, pairs.clean[0], pairs.attention_mask[0]) == "<s>The capital of France is Paris"
    assert text(model, pairs.corrupt[0], pairs.attention_mask[0]) == "<s>The capital of Germany is Paris"
    assert text(model, pairs.foil_ids[0], pairs.foil_mask[0]) == " Berlin"
    assert text(model, pairs.answer_ids[0], pairs.answer_mask[0]) == " Paris"
    assert pairs.answer_positions.tolist() == [[5], [5]]
    assert pairs.subject_mask.nonzero().tolist() == [[0, 4], [1, 4]]
    assert pairs.embedding_noise is None
    assert (made.kind, made.partners, made.shifts, made.skipped) == ("swap", ("germany", "france"), (0, 0), ())


@pytest.mark.parametrize("kind", ["swap", "noise", "mean", "zero"])
def test_both_runs_are_read_at_the_same_places(model: LoadedModel, kind: str):
    pairs = contrast(CAPITALS + BARE[1:], model, kind=kind, n_swaps=2).pairs
    assert pairs.clean.shape == pairs.corrupt.shape == pairs.attention_mask.shape
    predicted = pairs.clean.gather(1, pairs.answer_positions + 1)
    assert torch.equal(predicted[pairs.answer_mask], pairs.answer_ids[pairs.answer_mask])
    kept = pairs.corrupt.gather(1, pairs.answer_positions + 1)
    assert torch.equal(kept[pairs.answer_mask], pairs.answer_ids[pairs.answer_mask])
    assert pairs.answer_mask.any(1).all()
    changed = pairs.clean != pairs.corrupt
    assert bool(changed.any()) == (kind == "swap")
    assert not (changed & ~pairs.subject_mask).any()
    assert len(set(pairs.ids)) == len(pairs)


@pytest.mark.parametrize("kind", ["swap", "noise"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_contrast_does_not_depend_on_the_chunk(model: LoadedModel, kind: str, seed: int):
    whole = contrast(CAPITALS, model, kind=kind, seed=seed, n_swaps=2)
    for row, fact in enumerate(CAPITALS):
        alone = contrast(Facts([fact]), model, kind=kind, pool=CAPITALS, seed=seed, n_swaps=2).pairs
        mine = whole.pairs.select((whole.fact_rows == row).nonzero()[:, 0])
        width = alone.clean.shape[1]
        assert alone.ids == mine.ids
        assert torch.equal(alone.corrupt, mine.corrupt[:, :width])
        if kind == "noise":
            assert torch.equal(alone.embedding_noise, mine.embedding_noise[:, :width])


def test_the_seed_decides_the_noise(model: LoadedModel):
    noise = [contrast(CAPITALS, model, kind="noise", seed=seed).pairs.embedding_noise for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_noise_is_on_the_subject_at_three_deviations(model: LoadedModel):
    made = contrast(CAPITALS, model, kind="noise", n_swaps=200)
    noise = made.pairs.embedding_noise
    assert torch.equal(noise.abs().sum(-1) > 0, made.pairs.subject_mask)
    drawn = noise[made.pairs.subject_mask]
    deviation = model.hf.get_input_embeddings().weight.std().item()
    assert drawn.std().item() == pytest.approx(NOISE_SCALE * deviation, rel=0.02)
    assert abs(drawn.mean().item()) < 0.02 * NOISE_SCALE * deviation
    assert not torch.equal(noise[0], noise[1])


def test_without_a_subject_noise_is_on_the_prompt_and_said_aloud(model: LoadedModel):
    made = contrast(BARE, model, kind="noise")
    noisy = made.pairs.embedding_noise.abs().sum(-1) > 0
    first_answer = made.pairs.answer_positions[:, :1] + 1
    places = torch.arange(noisy.shape[1])
    assert torch.equal(noisy, (places > 0) & (places < first_answer))
    assert "2 of 2 facts have no known subject: noise on all tokens of their prompts" in made.notes


def test_auto_goes_by_what_the_pool_names(model: LoadedModel):
    assert contrast(CAPITALS, model).kind == "swap"
    assert contrast(BARE, model).kind == "noise"
    assert contrast(BARE, model, pool=CAPITALS).kind == "swap"
    assert contrast(CAPITALS[:2] + BARE, model).kind == "swap"
    assert contrast(CAPITALS[:1] + BARE, model).kind == "noise"
    assert "contrast: noise" in contrast(BARE, model).notes
    assert contrast(Facts([]), model).pairs.clean.shape == (0, 0)


def test_facts_without_a_swap_are_returned_with_the_reason(model: LoadedModel):
    facts = Facts([BARE[0], *CAPITALS, Fact("long", "The " * 80, "Paris"), BARE[1]])
    made = contrast(facts, model, kind="swap")
    assert made.facts.ids == CAPITALS.ids
    assert [skip.id for skip in made.skipped] == ["q1", "long", "q2"]
    assert made.skipped[0] == Skipped("q1", "it names no subject, so nothing can be swapped")
    assert "longer than the model's context of 64" in made.skipped[1].reason


def test_realigned_subjects_are_counted_in_the_notes(model: LoadedModel):
    made = contrast(CAPITALS[3:], model, kind="swap")
    assert made.shifts == (1, -1)
    assert "2 of 2 swapped subjects have another number of tokens and were realigned" in made.notes


def test_a_facts_own_foil_serves_when_nothing_is_swapped(model: LoadedModel):
    pairs = contrast(BARE, model, kind="zero").pairs
    assert pairs.foil_mask.tolist() == [[False] * 3, [True] * 3]
    assert text(model, pairs.foil_ids[1], pairs.foil_mask[1]) == " Oslo, of"


def test_values_are_averaged_by_fact(model: LoadedModel):
    made = contrast(CAPITALS[:3], model, kind="swap", n_swaps=2)
    values = torch.arange(12.0).reshape(6, 2)
    assert made.fact_rows.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.pairs.ids == ("france", "france#2", "germany", "germany#2", "italy", "italy#2")
    assert made.mean_by_fact(values).tolist() == [[1, 2], [5, 6], [9, 10]]
    assert made.mean_by_fact(values[:, 0]).tolist() == [1, 5, 9]


def test_unknown_kinds_and_counts_are_refused(model: LoadedModel):
    with pytest.raises(UsageError, match="no contrast 'swop' .did you mean swap"):
        contrast(CAPITALS, model, kind="swop")
    with pytest.raises(UsageError, match="at least one is needed"):
        contrast(CAPITALS, model, n_swaps=0)


def test_seeds_are_the_same_on_every_machine():
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1) != derive_seed(0, "a", 2)
    assert derive_seed(0, "france", 0) == 53541506092220889
