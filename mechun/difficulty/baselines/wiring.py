"""What a fact's wiring looks like: how strong, how spread, how deep, and by how long a path.

Weighted measures read all edges with weights |score|; path measures read the circuit of the largest edges. The paper
finds easy facts to run through shorter and earlier paths (arXiv 2601.09624), without defining the statistics; these are
`circuits.circuit.measure_paths`.

Trap: growing a circuit greedily from the logits favours late edges by construction, so compare facts with one another,
never a circuit's depth with a bare number.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.circuit import measure_paths, select_edges
from circuits.graph import Graph

Values = Float[Tensor, " example"]


@dataclass(frozen=True)
class Wiring:
    """Measures of each fact's circuit.

    Attributes:
        strength: Sum of |score| over all edges.
        spread: Effective number of edges, (sum |s|)^2 / sum s^2.
        depth: Mean layer of the reading end, weighted by |score|; the logits count as layer L.
        reach: Mean number of layers that an edge spans, weighted by |score|.
        late: Share of |score| on edges into the last third of the layers.
        balance: Signed sum over the sum of |score|: 1 where every edge supports the answer.
    """

    strength: Values
    spread: Values
    depth: Values
    reach: Values
    late: Values
    balance: Values


def measure_wiring(values: Float[Tensor, "example edge"], graph: Graph) -> Wiring:
    """Weighted measures of signed edge scores."""
    weights = values.double().abs()
    total = weights.sum(1)
    share = weights / total.clamp(min=1e-300)[:, None]
    reader = graph.reader_layer[graph.edge_reader].double()
    writer = graph.writer_layer[graph.edge_writer].double()
    last = (reader >= graph.n_layers * 2 / 3).double()
    spread = total.square() / weights.square().sum(1).clamp(min=1e-300)
    balance = -values.double().sum(1) / total.clamp(min=1e-300)
    return Wiring(total, spread, share @ reader, share @ (reader - writer), share @ last, balance)


def measure_path_lengths(
    values: Float[Tensor, "example edge"], graph: Graph, *, n_edges: int = 75
) -> dict[str, Values]:
    """Mean and longest input-to-logits path, and number of edges, of each row's greedy circuit; NaN without a path."""
    keys = ("mean_path", "longest_path", "n_edges")
    found: dict[str, list[float]] = {key: [] for key in keys}
    for row in values:
        circuit = select_edges(row, graph, rule="greedy", n=float(min(n_edges, graph.n_edges)))
        paths = measure_paths(circuit)
        for key in keys:
            value = getattr(paths, key)
            found[key].append(float("nan") if value is None else float(value))
    return {key: torch.tensor(numbers, dtype=torch.float64) for key, numbers in found.items()}
