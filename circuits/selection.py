"""Rules that choose edges from scores, and the pruning of what leads nowhere.

    greedy      grow from the logits: repeatedly add the largest edge into a node already in the circuit
    top         the n largest edges
    threshold   every edge of at least n
    mass        the fewest edges whose magnitudes make up the share n of the whole

Greedy growth is the rule of the EAP literature; circuits of growing n are nested before pruning. It starts at the
logits and so favours late edges by construction.
"""

import heapq
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.graph import Graph

Rule = Literal["greedy", "top", "threshold", "mass"]


def choose_top(ranked: Float[Tensor, "edge"], graph: Graph, n: float | int) -> Bool[Tensor, "edge"]:
    """The n largest edges; ties go to the earlier edge."""
    mask = torch.zeros(graph.n_edges, dtype=torch.bool)
    mask[ranked.sort(descending=True, stable=True).indices[: _check_count(n, graph)]] = True
    return mask


def choose_above(ranked: Float[Tensor, "edge"], graph: Graph, n: float | int) -> Bool[Tensor, "edge"]:
    """Every edge of at least n."""
    del graph
    return ranked >= n


def choose_mass(ranked: Float[Tensor, "edge"], graph: Graph, n: float | int) -> Bool[Tensor, "edge"]:
    """The fewest edges whose positive ranks make up the share n of their sum."""
    if not 0 < n <= 1:
        raise ValueError(f"the share of the mass lies in (0, 1], not {n}")
    order = ranked.sort(descending=True, stable=True)
    mass = order.values.clamp(min=0).double().cumsum(0)
    needed = int((mass < n * mass[-1] * (1 - 1e-12)).sum()) + 1
    return choose_top(ranked, graph, needed if float(mass[-1]) > 0 else 0)


def choose_greedy(ranked: Float[Tensor, "edge"], graph: Graph, n: float | int) -> Bool[Tensor, "edge"]:
    """Grow from the logits: n times, add the largest edge into a node already in the circuit."""
    # each open reader offers its largest edge that is left; ties go to the earlier edge
    count, start = _check_count(n, graph), graph.reader_start.tolist()
    chosen: list[int] = []
    offers: list[tuple[float, int, int, int]] = []
    queues: dict[int, tuple[list[float], list[int]]] = {}

    def offer(reader: int, rank: int) -> None:
        values, writers = queues[reader]
        if rank < len(values):
            heapq.heappush(offers, (-values[rank], start[reader] + writers[rank], reader, rank))

    def open_reader(reader: int) -> None:
        if reader not in queues:
            order = ranked[start[reader] : start[reader + 1]].sort(descending=True, stable=True)
            queues[reader] = (order.values.tolist(), order.indices.tolist())
            offer(reader, 0)

    open_reader(graph.n_readers - 1)
    while offers and len(chosen) < count:
        _, edge, reader, rank = heapq.heappop(offers)
        chosen.append(edge)
        offer(reader, rank + 1)
        for opened in graph.writer_readers[edge - start[reader]]:
            open_reader(opened)
    return torch.zeros(graph.n_edges, dtype=torch.bool).index_fill(0, torch.tensor(chosen, dtype=torch.long), True)


def prune_edges(mask: Bool[Tensor, "edge"], graph: Graph) -> Bool[Tensor, "edge"]:
    """The edges left when nodes without an input or an output side are removed again and again."""
    feeds = torch.zeros(graph.n_readers, graph.n_writers)
    for reader, fed in enumerate(graph.reader_feeds):
        feeds[reader, list(fed)] = 1
    embeddings = torch.arange(graph.n_writers) < graph.n_embeddings
    while True:
        sends = torch.zeros(graph.n_writers).index_fill(0, graph.edge_writer[mask], 1)
        hears = torch.zeros(graph.n_readers).index_fill(0, graph.edge_reader[mask], 1)
        writer_ok = (hears @ feeds > 0) | embeddings
        reader_ok = feeds @ sends > 0
        reader_ok[-1] = True
        kept = mask & writer_ok[graph.edge_writer] & reader_ok[graph.edge_reader]
        if torch.equal(kept, mask):
            return kept
        mask = kept


def _check_count(n: float | int, graph: Graph) -> int:
    if n < 0 or n != int(n):
        raise ValueError(f"the number of edges is a whole number of at least 0, not {n}")
    return min(int(n), graph.n_edges)


RULES: Mapping[str, Callable[[Float[Tensor, "edge"], Graph, float | int], Bool[Tensor, "edge"]]] = MappingProxyType(
    {"greedy": choose_greedy, "top": choose_top, "threshold": choose_above, "mass": choose_mass}
)
