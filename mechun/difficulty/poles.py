"""The two poles that CUD stands between: the mean circuit of the easiest facts and that of the hardest.

A pole is made from the mean signed edge scores of its facts, as the authors' code does, not from a union or a vote of
their circuits: the mean itself where raw scores are compared, or the circuit grown from the mean where circuits are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph import Graph
from mechun.difficulty.cud import cut_circuits, cut_surviving, find_backbone, find_similarity, place_between
from mechun.difficulty.settings import Settings
from mechun.errors import DataError

EdgeValues = Float[Tensor, "example edge"]


@dataclass(frozen=True, eq=False)
class Poles:
    """An easy and a hard circuit as vectors that can be compared with facts.

    Attributes:
        easy: Vector of the easy pole.
        hard: Vector of the hard pole.
        kept: True on the edges that are compared; False on a dropped backbone.
        n_edges: Edge budget of a fact's circuit; 0 where raw scores are compared.
        easy_ids: Facts of the easy pole.
        hard_ids: Facts of the hard pole.
        similarity: How vectors are compared.
    """

    easy: Float[Tensor, " edge"]
    hard: Float[Tensor, " edge"]
    kept: Bool[Tensor, " edge"]
    n_edges: int
    easy_ids: tuple[str, ...]
    hard_ids: tuple[str, ...]
    similarity: str

    @property
    def likeness(self) -> float:
        """Similarity of the two poles; near 1 means that CUD can hardly tell facts apart."""
        return float(find_similarity(self.similarity)(self.easy[None], self.hard)[0])

    def place(self, values: EdgeValues, graph: Graph) -> Float[Tensor, " example"]:
        """CUD of facts from their signed edge scores; NaN where a circuit comes out empty."""
        vectors = make_vectors(values, graph, self.n_edges, self.similarity) * self.kept
        return place_between(vectors, self.easy, self.hard, self.similarity)


def make_vectors(values: EdgeValues, graph: Graph, n_edges: int, similarity: str) -> EdgeValues:
    """What is compared: raw scores (budget 0), or a circuit's membership, signed where the similarity weighs edges."""
    if not n_edges:
        return values
    masks = cut_circuits(values, graph, n_edges=n_edges)
    return values * masks if similarity == "weighted_cosine" else masks.to(values.dtype)


def find_poles(
    values: EdgeValues, graph: Graph, ids: Sequence[str], hardness: Float[Tensor, " example"], settings: Settings
) -> Poles:
    """The poles of labelled facts: the `settings.share` easiest and the `settings.share` hardest.

    Raises:
        DataError: Fewer than two labelled facts.
    """
    known = (~hardness.isnan()).nonzero().flatten()
    if len(known) < 2:
        raise DataError(f"{len(known)} labelled facts cannot make an easy and a hard anchor")
    size = min(max(math.ceil(settings.share * len(known)), settings.least), len(known) // 2)
    order = known[hardness[known].argsort(stable=True)]
    n_edges, kept = _fit_budget(values[known], graph, settings)
    poles = []
    for rows in (order[:size], order[-size:]):
        mean = values[rows].double().mean(0).to(values.dtype)
        poles.append(make_vectors(mean[None], graph, n_edges, settings.similarity)[0] * kept)
    easy_ids, hard_ids = (tuple(ids[int(row)] for row in rows) for rows in (order[:size], order[-size:]))
    return Poles(poles[0], poles[1], kept, n_edges, easy_ids, hard_ids, settings.similarity)


def _fit_budget(values: EdgeValues, graph: Graph, settings: Settings) -> tuple[int, Bool[Tensor, " edge"]]:
    everything = torch.ones(graph.n_edges, dtype=torch.bool)
    n_edges = settings.n_edges
    if not n_edges or (settings.survive <= 0 and settings.backbone >= 1):
        return n_edges, everything
    if settings.survive > 0:
        masks, n_edges = cut_surviving(values, graph, n_edges=n_edges, survive=settings.survive)
    else:
        masks = cut_circuits(values, graph, n_edges=n_edges)
    if settings.backbone < 1:
        everything = ~find_backbone(masks.to(values.dtype), settings.backbone)
    return n_edges, everything
