"""The order and number of edges: against the closed form, and against a graph written out by hand."""

from types import SimpleNamespace

import pytest
import torch

from circuits.graph import Graph


def count_plain(layers: int, heads: int) -> int:
    return (
        sum(3 * heads * (1 + i * (heads + 1)) + 1 + i * (heads + 1) + heads for i in range(layers))
        + 1
        + layers * (heads + 1)
    )


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 3), (12, 12), (16, 32)])
def test_number_of_edges_is_the_closed_form(layers, heads):
    assert Graph(layers, heads, heads).n_edges == count_plain(layers, heads)


def test_number_of_edges_of_a_model_of_16_layers_and_32_heads():
    assert Graph(16, 32, 32).n_edges == 386_713


def test_grouped_parallel_and_learned_positions_change_the_count_as_they_should():
    plain = Graph(2, 4, 4)
    grouped = Graph(2, 4, 2)
    assert plain.n_edges - grouped.n_edges == 2 * 2 * (1 + 6)  # two fewer keys and values, seeing 1 and 6 writers
    assert plain.n_edges - Graph(2, 4, 4, parallel=True).n_edges == 2 * 4
    assert Graph(2, 4, 4, learned_positions=True).n_edges - plain.n_edges == plain.n_readers


def test_a_small_graph_written_out():
    graph = Graph(1, 2, 1, learned_positions=True)
    assert graph.writers == ("input", "pos", "a0.h0", "a0.h1", "m0")
    assert graph.readers == ("a0.h0<q>", "a0.h1<q>", "a0.kv0<k>", "a0.kv0<v>", "m0", "logits")
    assert graph.edge_names[:2] == ("input->a0.h0<q>", "pos->a0.h0<q>")
    assert graph.edge_names[-9:-5] == ("input->m0", "pos->m0", "a0.h0->m0", "a0.h1->m0")
    assert graph.writer_layer.tolist() == [-1, -1, 0, 0, 0]
    assert graph.reader_layer.tolist() == [0, 0, 0, 0, 0, 1]
    assert graph.reader_feeds == ((2,), (3,), (2, 3), (2, 3), (4,), ())


@pytest.mark.parametrize("graph", [Graph(2, 4, 2), Graph(3, 2, 2, parallel=True, learned_positions=True)])
def test_every_name_finds_its_edge_and_groups_tile_the_edges(graph):
    assert [graph.index(name) for name in graph.edge_names] == list(range(graph.n_edges))
    sizes = [group.n_readers * group.n_writers for group in graph.reader_groups]
    assert [group.first_edge for group in graph.reader_groups] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert sum(sizes) == graph.n_edges
    assert bool((graph.writer_layer[graph.edge_writer] <= graph.reader_layer[graph.edge_reader]).all())
    assert Graph.from_dict(graph.to_dict()) == graph


def test_a_head_of_a_group_finds_the_shared_key():
    graph = Graph(2, 4, 2)
    assert graph.index("m0->a1.h3<k>") == graph.index("m0->a1.kv1<k>")


@pytest.mark.parametrize("name", ["m1->a0.h0<q>", "input", "m7->logits", "input->a0.h9<q>", "m0->m0"])
def test_edges_that_are_not_real_are_refused(name):
    with pytest.raises(KeyError, match="no edge"):
        Graph(2, 4, 4).index(name)


def test_configurations_are_read_as_a_bridge_writes_them():
    cfg = SimpleNamespace(n_layers=2, n_heads=4, n_key_value_heads=None, positional_embedding_type="rotary")
    assert Graph.from_cfg(cfg) == Graph(2, 4, 4)
    cfg.n_key_value_heads, cfg.parallel_attn_mlp, cfg.positional_embedding_type = 2, True, "standard"
    assert Graph.from_cfg(cfg) == Graph(2, 4, 2, parallel=True, learned_positions=True)
    with pytest.raises(ValueError, match="cannot share"):
        Graph(2, 4, 3)


def test_edge_vectors_agree_with_each_other():
    graph = Graph(3, 2, 1)
    counts = torch.bincount(graph.edge_reader, minlength=graph.n_readers)
    assert counts.tolist() == graph.reader_start.diff().tolist()
    assert graph.edge(5).name == graph.edge_names[5]
