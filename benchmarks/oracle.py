"""How well the quick edge scores agree with brute-force patching, and what a circuit explains, on a bundled organism.

    python benchmarks/oracle.py [--model organism] [--facts 24] [--edges 400]

First table: for each method, the mean over facts of the Spearman correlation between its scores and the exact effects
of patching a sample of edges one at a time. Second table: normalised faithfulness, (circuit - corrupt) / (clean -
corrupt) of the mean answer log-probability, of the circuit grown greedily from the mean scores, beside random circuits
of the same size (drawn freely, and with the degrees of its nodes kept), at 75 edges and at the smallest size tried that
recovers 80 %.
"""

import argparse
import warnings

import torch
from scipy.stats import spearmanr

from circuits.circuit import random_circuit, select_edges
from circuits.discovery import discover
from circuits.graph import Graph
from circuits.metrics import METRICS
from circuits.running import run_circuit
from mechun.data.contrasts import contrast
from mechun.data.sources import load_facts
from mechun.models import load_model

METHODS = ("eap_ig_inputs", "eap", "eap_ig_activations", "random")
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def draw_mask(n_edges: int, size: int, seed: int) -> torch.Tensor:
    """Membership of so many edges, drawn freely."""
    chosen = torch.randperm(n_edges, generator=torch.Generator().manual_seed(seed))[:size]
    return torch.zeros(n_edges, dtype=torch.bool).index_fill(0, chosen, True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="organism")
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--edges", type=int, default=400)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    model = load_model(asked.model)
    facts = load_facts("organism:forget")
    made = contrast(facts.sample(asked.facts, seed=0), model, kind="swap", pool=facts, seed=0)
    bridge, pairs = model.bridge, made.pairs
    graph = Graph.from_cfg(bridge.cfg)
    scores = {method: discover(bridge, pairs, method, graph=graph) for method in METHODS}
    drawn = torch.randperm(graph.n_edges, generator=torch.Generator().manual_seed(0))[: asked.edges]
    exact = discover(bridge, pairs, "exact", graph=graph, edges=drawn.tolist()).values[:, drawn]
    print(f"{asked.model}: {len(pairs)} facts, {len(drawn)} of {graph.n_edges} edges patched one at a time")
    for method, found in scores.items():
        rows = zip(found.values[:, drawn], exact, strict=True)
        rhos = torch.tensor([float(spearmanr(guess, truth).statistic) for guess, truth in rows])
        print(f"  {method:20s} Spearman with exact effects {rhos.mean():+.3f} (sd over facts {rhos.std():.3f})")
    metric = METRICS["answer_log_prob"]

    def measure(mask: torch.Tensor) -> float:
        return float(metric(run_circuit(bridge, pairs, mask, graph), pairs, None).mean())

    corrupt, clean = (measure(torch.full((graph.n_edges,), keep)) for keep in (False, True))
    mean = scores["eap_ig_inputs"].mean().values
    sizes = [75, *(round(share * graph.n_edges) for share in SHARES)]
    for size in sizes:
        circuit = select_edges(mean, graph, rule="greedy", n=float(size))
        free = [draw_mask(graph.n_edges, circuit.n_edges, seed) for seed in range(3)]
        matched = [random_circuit(circuit, seed=seed).mask for seed in range(3)]
        held, chance, kin = (
            sum((measure(mask) - corrupt) / (clean - corrupt) for mask in masks) / len(masks)
            for masks in ([circuit.mask], free, matched)
        )
        print(f"  {circuit.n_edges:5d} edges: faithfulness {held:+.2f}, random {chance:+.2f}, degrees kept {kin:+.2f}")
        if held >= 0.8 and size > sizes[0]:
            break


if __name__ == "__main__":
    main()
