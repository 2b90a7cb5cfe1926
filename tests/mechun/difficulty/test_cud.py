import pytest
import torch

from circuits.graph import Graph
from mechun.difficulty.cud import (
    SIMILARITIES,
    cut_circuits,
    cut_surviving,
    find_backbone,
    find_similarity,
    place_between,
)
from mechun.difficulty.poles import find_poles
from mechun.difficulty.settings import choose_settings
from mechun.errors import UsageError

GRAPH = Graph(2, 2, 2)
KINDS = tuple(SIMILARITIES)


def draw(rows: int, seed: int, kept: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, GRAPH.n_edges, generator=generator)
    return values * (torch.rand(rows, GRAPH.n_edges, generator=generator) < kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_anchors_are_the_ends_of_the_scale(kind: str, seed: int):
    easy, hard = draw(2, seed)
    values = torch.stack([easy, hard, *draw(20, seed + 50)])
    scores = place_between(values, easy, hard, kind)
    assert scores[0] == pytest.approx(0.0, abs=1e-9)
    assert scores[1] == pytest.approx(1.0, abs=1e-9)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert float(scores[2:].std()) > 0
    assert torch.allclose(place_between(values, hard, easy, kind), 1 - scores, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_that_coincide_tell_nothing(kind: str):
    pole = draw(1, 0)[0]
    values = torch.stack([pole, *draw(5, 1)])
    assert torch.allclose(place_between(values, pole, pole, kind), torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fact_without_circuit_has_no_score(kind: str):
    easy, hard = draw(2, 3)
    assert place_between(torch.zeros(1, GRAPH.n_edges), easy, hard, kind).isnan().all()
    assert place_between(draw(4, 4), torch.zeros(GRAPH.n_edges), hard, kind).isnan().all()


def test_the_scale_of_a_fact_does_not_matter_to_a_cosine():
    easy, hard = draw(2, 5)
    values, scale = draw(8, 6), torch.logspace(-3, 3, 8)[:, None]
    assert torch.allclose(place_between(values, easy, hard), place_between(values * scale, easy, hard), atol=1e-6)


def test_similarities_on_circuits_worked_out_by_hand():
    first = torch.tensor([[1.0, -2.0, 0.0, 0.0]])
    second = torch.tensor([3.0, 0.0, 4.0, 0.0])
    found = {kind: float(SIMILARITIES[kind](first, second)[0]) for kind in KINDS}
    assert found["cosine"] == pytest.approx(0.5)
    assert found["jaccard"] == pytest.approx(1 / 3)
    assert found["hamming"] == pytest.approx(0.5)
    assert found["weighted_cosine"] == pytest.approx(3 / (5**0.5 * 5))


def test_an_unknown_similarity_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="cosine"):
        find_similarity("cosinus")


def test_rows_do_not_interact_and_their_order_is_irrelevant():
    easy, hard = draw(2, 7)
    values = draw(9, 8)
    together = place_between(values, easy, hard)
    alone = torch.cat([place_between(row[None], easy, hard) for row in values])
    assert torch.allclose(together, alone)
    assert torch.equal(place_between(values.flip(0), easy, hard), together.flip(0))


def test_circuits_keep_within_their_budget_and_grow_until_enough_survive():
    values = draw(12, 9, kept=1.0)
    small = cut_circuits(values, GRAPH, n_edges=6)
    assert (small.sum(1) <= 6).all()
    assert cut_circuits(values, GRAPH, n_edges=10**6).all()
    masks, budget = cut_surviving(values, GRAPH, n_edges=1, survive=0.9)
    assert float(masks.any(1).double().mean()) >= 0.9
    assert budget >= 1
    before, _ = cut_surviving(values, GRAPH, n_edges=1, survive=0.0)
    assert before.sum() <= masks.sum()


def test_the_backbone_is_what_nearly_every_circuit_shares():
    values = torch.tensor([[1.0, 1, 0], [2.0, 0, 0], [3.0, 1, 1]])
    assert find_backbone(values, 0.9).tolist() == [True, False, False]


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_poles_are_the_mean_scores_of_the_extreme_facts(preset: str):
    settings = choose_settings(preset, share=0.25, least=1)
    values, hardness = draw(8, 10, kept=1.0), torch.arange(8.0, dtype=torch.float64) / 8
    ids = [str(row) for row in range(8)]
    poles = find_poles(values, GRAPH, ids, hardness, settings)
    assert poles.easy_ids == ("0", "1")
    assert poles.hard_ids == ("6", "7")
    mean = values[:2].mean(0)
    if preset == "default":
        assert torch.allclose(poles.easy, mean)
    else:
        assert torch.equal(poles.easy, cut_circuits(mean[None], GRAPH, n_edges=75)[0].float())
    assert -1 <= poles.likeness <= 1


def test_a_dropped_backbone_is_not_compared():
    settings = choose_settings("paper", n_edges=12, backbone=0.5, share=0.25)
    values = draw(8, 11, kept=1.0)
    poles = find_poles(values, GRAPH, [str(i) for i in range(8)], torch.arange(8.0, dtype=torch.float64), settings)
    common = find_backbone(cut_circuits(values, GRAPH, n_edges=12).float(), 0.5)
    assert common.any()
    assert torch.equal(poles.kept, ~common)
    assert not (poles.easy.bool() & common).any()
