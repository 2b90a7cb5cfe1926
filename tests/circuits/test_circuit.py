"""Choosing, pruning, combining and measuring circuits: against graphs small enough to check by hand."""

import math

import networkx as nx
import pytest
import torch

from circuits.circuit import Circuit, measure_paths, random_circuit, select_edges
from circuits.graph import Graph
from circuits.scores import EdgeScores

GRAPH = Graph(3, 4, 2, learned_positions=True)


def draw(seed: int, graph: Graph = GRAPH) -> torch.Tensor:
    return torch.randn(graph.n_edges, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_greedy_circuits_are_nested_connected_and_of_the_asked_size(seed):
    values = draw(seed)
    sizes = (1, 5, 30, 100, GRAPH.n_edges)
    unpruned = [select_edges(values, GRAPH, n=n, prune=False) for n in sizes]
    assert [c.n_edges for c in unpruned] == list(sizes)
    assert all(small <= large for small, large in zip(unpruned, unpruned[1:], strict=False))
    for circuit in unpruned:
        drawn = circuit.to_networkx()
        assert all(nx.has_path(drawn, node, "logits") for node in drawn)
    assert unpruned[-1].prune() == unpruned[-1]


def test_greedy_takes_the_largest_edge_into_the_circuit_at_every_step():
    values = draw(3)
    reached, mask = {GRAPH.n_readers - 1}, torch.zeros(GRAPH.n_edges, dtype=torch.bool)
    for _ in range(40):
        open_edges = torch.tensor([r in reached for r in GRAPH.edge_reader.tolist()]) & ~mask
        edge = int(values.abs().masked_fill(~open_edges, -1).argmax())
        mask[edge] = True
        reached |= set(GRAPH.writer_readers[int(GRAPH.edge_writer[edge])])
    assert select_edges(values, GRAPH, n=40, prune=False) == Circuit(mask, GRAPH)


def test_top_threshold_and_mass_against_their_definitions():
    values = draw(4)
    top = select_edges(values, GRAPH, "top", 20, prune=False)
    assert set(top.mask.nonzero().flatten().tolist()) == set(values.abs().topk(20).indices.tolist())
    signed = select_edges(values, GRAPH, "top", 20, prune=False, absolute=False)
    assert set(signed.mask.nonzero().flatten().tolist()) == set(values.topk(20).indices.tolist())
    assert torch.equal(select_edges(values, GRAPH, "threshold", 1.0, prune=False).mask, values.abs() >= 1)
    for share in (0.1, 0.5, 1.0):
        chosen = select_edges(values, GRAPH, "mass", share, prune=False).mask
        mass = values.abs()[chosen].sum() / values.abs().sum()
        assert mass >= share - 1e-6
        assert mass - values.abs()[chosen].min() / values.abs().sum() < share


@pytest.mark.parametrize(("rule", "n"), [("greedy", -1), ("top", 1.5), ("mass", 0), ("mass", 2)])
def test_sizes_out_of_range_are_refused(rule, n):
    with pytest.raises(ValueError, match="number of edges|share"):
        select_edges(draw(0), GRAPH, rule, n)


def test_scores_that_are_not_numbers_are_refused():
    values = draw(0)
    values[7] = torch.nan
    with pytest.raises(ValueError, match="1 of .* NaN"):
        select_edges(values, GRAPH)


def test_pruning_removes_what_leads_nowhere_and_keeps_the_rest():
    kept = ["input->a0.h1<q>", "pos->a0.kv0<v>", "a0.h1->m2", "m2->logits"]
    loose = ["input->m1", "m0->m1", "a1.h0->logits", "input->a2.h0<q>"]
    pruned = Circuit.from_edges([*kept, *loose], GRAPH).prune()
    assert set(pruned.edges) == set(kept)
    assert Circuit.from_edges(loose, GRAPH).prune().n_edges == 0


@pytest.mark.parametrize("seed", range(3))
def test_pruning_leaves_only_nodes_on_a_path(seed):
    circuit = select_edges(draw(seed), GRAPH, "top", 60)
    drawn = circuit.to_networkx()
    for node in drawn:
        assert nx.has_path(drawn, node, "logits")
        assert node in ("input", "pos") or any(
            nx.has_path(drawn, root, node) for root in ("input", "pos") if root in drawn
        )


def test_set_algebra():
    a, b = (select_edges(draw(i), GRAPH, "top", 50, prune=False) for i in (0, 1))
    assert (a & b) <= a <= (a | b)
    assert (a - b).n_edges == a.n_edges - (a & b).n_edges
    assert (a | b).n_edges == a.n_edges + b.n_edges - (a & b).n_edges
    assert a == Circuit(a.mask.clone(), GRAPH, "another name") and hash(a) == hash(Circuit(a.mask.clone(), GRAPH))
    assert a != b
    with pytest.raises(ValueError, match="two graphs"):
        a & Circuit(torch.zeros(8, dtype=torch.bool), Graph(1, 1, 1))


@pytest.mark.parametrize("seed", range(3))
def test_random_circuits_keep_every_degree_and_are_another_circuit(seed):
    like = select_edges(draw(9), GRAPH, n=40)
    other = random_circuit(like, seed)
    for ends in (GRAPH.edge_writer, GRAPH.edge_reader):
        assert torch.equal(ends[like.mask].bincount(minlength=60), ends[other.mask].bincount(minlength=60))
    assert (like & other).n_edges < 0.8 * like.n_edges
    assert random_circuit(like, seed) == other


def test_paths_of_a_circuit_counted_by_hand():
    edges = ["input->a0.h0<q>", "input->a0.h0<v>", "a0.h0->m1", "m1->logits", "input->logits", "input->m0"]
    stats = measure_paths(Circuit.from_edges(edges, Graph(3, 1, 1)))
    assert (stats.n_edges, stats.n_nodes, stats.n_paths) == (6, 5, 3)
    assert (stats.longest_path, stats.shortest_path) == (3, 1)
    assert math.isclose(stats.mean_path, (3 + 3 + 1) / 3)
    assert math.isclose(stats.mean_source_layer, (-1 * 4 + 0 + 1) / 6)
    assert math.isclose(stats.mean_destination_layer, (0 + 0 + 1 + 3 + 3 + 0) / 6)
    assert (stats.median_source_layer, stats.median_destination_layer) == (-1, 0.5)
    assert math.isclose(stats.share_last_third, 2 / 6)


@pytest.mark.parametrize("seed", range(2))
def test_paths_agree_with_enumeration(seed):
    graph = Graph(2, 2, 1)
    circuit = select_edges(draw(seed, graph), graph, n=25)
    drawn = circuit.to_networkx()
    lengths = [len(path) for path in nx.all_simple_edge_paths(drawn, "input", "logits")]
    stats = measure_paths(circuit)
    assert stats.n_paths == len(lengths)
    assert math.isclose(stats.mean_path, sum(lengths) / len(lengths))
    assert (stats.longest_path, stats.shortest_path) == (max(lengths), min(lengths))


def test_an_empty_circuit_has_nothing_to_measure():
    empty = Circuit(torch.zeros(GRAPH.n_edges, dtype=torch.bool), GRAPH)
    stats = measure_paths(empty)
    assert (stats.n_edges, stats.n_nodes, stats.n_paths, stats.longest_path) == (0, 0, 0, 0)
    assert math.isnan(stats.mean_path) and math.isnan(empty.depth()) and math.isnan(stats.mean_source_layer)


def test_depth_runs_from_the_first_block_to_the_logits():
    assert Circuit.from_edges(["input->logits"], GRAPH).depth() == 1
    assert Circuit.from_edges(["input->m0"], GRAPH).depth() == 0


def test_circuits_survive_a_file_and_show_themselves(tmp_path):
    circuit = select_edges(draw(5), GRAPH, n=30, name="some <facts>")
    back = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert back == circuit and back.name == circuit.name
    assert str(circuit.n_edges) in repr(circuit)
    assert circuit._repr_html_().startswith("<svg") and "<facts>" not in circuit._repr_html_()
    assert len(circuit.to_frame()) == circuit.n_edges
    assert circuit.plot().data
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="no circuit"):
        Circuit.load(tmp_path / "other.json")


def test_scores_survive_a_file_and_show_themselves(tmp_path):
    values = torch.stack([draw(1), draw(2)])
    scores = EdgeScores(values, GRAPH, "eap", ("a", "b"), {"points": 5, "notes": ["x"]})
    assert EdgeScores.load(scores.save(tmp_path / "edges.safetensors")) == scores
    assert torch.equal(scores.select([1]).values[0], values[1]) and scores.select([1]).ids == ("b",)
    assert torch.allclose(scores.mean().values, values.mean(0)) and not scores.mean().per_example
    name, value = scores.top(1)[0]
    assert value == values.mean(0)[GRAPH.index(name)] and abs(value) == values.mean(0).abs().max()
    frame = scores.to_frame()
    assert len(frame) == 2 * GRAPH.n_edges and list(frame.example.unique()) == ["a", "b"]
    assert len(scores.mean().to_frame()) == GRAPH.n_edges
    assert math.isclose(float(scores.sum_by_layer().sum()), float(values.mean(0).abs().sum()), rel_tol=1e-5)
    assert "2 examples" in repr(scores) and scores._repr_html_().startswith("<svg") and scores.plot().data


def test_scores_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="edges"):
        EdgeScores(torch.zeros(2, 3), GRAPH, "eap", ("a", "b"))
    with pytest.raises(ValueError, match="ids"):
        EdgeScores(torch.zeros(2, GRAPH.n_edges), GRAPH, "eap", ("a",))
