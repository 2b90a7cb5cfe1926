"""Circuit-guided unlearning difficulty: where a fact's circuit stands between an easy and a hard one.

With d(z, A) = 1 - sim(C_z, C_A), clamped at zero,

    CUD(z) = d(z, easy) / (d(z, easy) + d(z, hard))

so that the easy anchor itself scores 0, the hard anchor 1, and a fact equally far from both 0.5.
Cheng, Chen, Agarwal, Amiri, "Toward Understanding Unlearning Difficulty", arXiv 2601.09624.

`weighted_cosine` compares raw signed edge scores and is the default; `cosine`, `jaccard` and `hamming` compare which
edges belong to the circuit (non-zero entries), as the paper does. Trap: cutting circuits to a few edges throws away
most of the signal and can leave a circuit without any edge; such a fact has no similarity and scores NaN, never 0.5.
A second trap: circuits share a backbone, so scores crowd around 0.5; report their spread, and read ranks.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.circuit import select_edges
from circuits.graph import Graph
from circuits.selection import Rule
from mechun.errors import UsageError, nearest

EdgeValues = Float[Tensor, "example edge"]
EdgeVector = Float[Tensor, " edge"]
Similarity = Callable[[EdgeValues, EdgeVector], Float[Tensor, " example"]]


def compare_weighted(values: EdgeValues, anchor: EdgeVector) -> Float[Tensor, " example"]:
    """Cosine of raw signed scores, in [-1, 1]; NaN where either vector is all zero."""
    values, anchor = values.to(torch.float64), anchor.to(torch.float64)
    norms = values.norm(dim=1) * anchor.norm()
    return (values @ anchor / norms).masked_fill(norms == 0, float("nan"))


def compare_cosine(values: EdgeValues, anchor: EdgeVector) -> Float[Tensor, " example"]:
    """Cosine of edge membership: shared edges over the geometric mean of the sizes; NaN for an empty circuit."""
    return compare_weighted((values != 0).to(torch.float64), (anchor != 0).to(torch.float64))


def compare_jaccard(values: EdgeValues, anchor: EdgeVector) -> Float[Tensor, " example"]:
    """Shared edges over the edges of either; NaN for an empty circuit."""
    members, other = values != 0, anchor != 0
    shared, union = (members & other).sum(1), (members | other).sum(1)
    return (shared / union).to(torch.float64).masked_fill(_empty(members, other), float("nan"))


def compare_hamming(values: EdgeValues, anchor: EdgeVector) -> Float[Tensor, " example"]:
    """Share of all edges on whose membership both agree; NaN for an empty circuit."""
    members, other = values != 0, anchor != 0
    return (members == other).to(torch.float64).mean(1).masked_fill(_empty(members, other), float("nan"))


SIMILARITIES: Mapping[str, Similarity] = MappingProxyType(
    {
        "weighted_cosine": compare_weighted,
        "cosine": compare_cosine,
        "jaccard": compare_jaccard,
        "hamming": compare_hamming,
    }
)


def find_similarity(key: str) -> Similarity:
    """The similarity function of that name; an unknown name is refused with the nearest ones."""
    if key not in SIMILARITIES:
        raise UsageError(f"no similarity is called {key!r}", nearest(key, SIMILARITIES, "similarities"))
    return SIMILARITIES[key]


def place_between(
    values: EdgeValues, easy: EdgeVector, hard: EdgeVector, similarity: str = "weighted_cosine"
) -> Float[Tensor, " example"]:
    """CUD of every row: 0 at the easy anchor, 1 at the hard one, 0.5 where both distances vanish, NaN without circuit.

    Rows do not interact, and with a cosine the scale of a row does not matter. Cost: two products of the matrix with a
    vector.

    Example:
        >>> easy, hard = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> place_between(torch.stack([easy, hard, easy + hard]), easy, hard).tolist()
        [0.0, 1.0, 0.5]
    """
    compare = find_similarity(similarity)
    to_easy = (1 - compare(values, easy)).clamp(min=0)
    to_hard = (1 - compare(values, hard)).clamp(min=0)
    total = to_easy + to_hard
    # Rounding leaves about 1e-16 where both anchors are the row itself; a ratio of such remainders would be noise.
    return (to_easy / total).masked_fill(total < 1e-12, 0.5)


def find_backbone(values: EdgeValues, share: float = 0.9) -> Bool[Tensor, " edge"]:
    """True on the edges that stand (non-zero) in more than this share of the circuits: they tell facts apart least."""
    return (values != 0).to(torch.float64).mean(0) > share


def cut_circuits(
    values: EdgeValues, graph: Graph, *, n_edges: int = 75, rule: Rule = "greedy", prune: bool = True
) -> Bool[Tensor, "example edge"]:
    """The circuit of every row as edge membership, by the given rule of `circuits.circuit.select_edges`.

    The paper grows greedily from the logits by absolute score (n_edges = 75) and prunes what hangs loose. A row can
    come out empty.
    """
    rows = [
        select_edges(row, graph, rule=rule, n=float(min(n_edges, graph.n_edges)), prune=prune).mask for row in values
    ]
    return torch.stack(rows) if rows else torch.zeros(0, graph.n_edges, dtype=torch.bool)


def cut_surviving(
    values: EdgeValues, graph: Graph, *, n_edges: int = 75, survive: float = 0.9, prune: bool = True
) -> tuple[Bool[Tensor, "example edge"], int]:
    """Greedy circuits with the edge budget doubled until this share of them is not empty; also the budget reached."""
    masks = cut_circuits(values, graph, n_edges=n_edges, prune=prune)
    while n_edges < graph.n_edges and len(masks) and float(masks.any(1).double().mean()) < survive:
        n_edges = min(2 * n_edges, graph.n_edges)
        masks = cut_circuits(values, graph, n_edges=n_edges, prune=prune)
    return masks, n_edges


def _empty(members: Bool[Tensor, "example edge"], other: Bool[Tensor, " edge"]) -> Bool[Tensor, " example"]:
    return ~members.any(1) | ~other.any()
