"""Running circuits, the brute-force oracle, and discovery over many examples."""

from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.circuit import select_edges
from circuits.discovery import METHODS, discover, guess_batch_size
from circuits.graph import Graph
from circuits.metrics import METRICS
from circuits.running import run_circuit
from circuits.scores import EdgeScores
from circuits.types import ContrastPairs
from tests.toys import FAMILIES, LinearToy, boot_toy, draw_pairs


def read_answers(model: Any, ids: Tensor, pairs: ContrastPairs) -> Tensor:
    with torch.no_grad():
        logits = model(ids, attention_mask=pairs.attention_mask.long())
    return logits.gather(1, pairs.answer_positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


def read_logit(logits: Tensor, pairs: ContrastPairs, clean: Tensor | None) -> Tensor:
    return logits.gather(-1, pairs.answer_ids.unsqueeze(-1)).squeeze(-1).sum(-1)


@pytest.mark.parametrize("family", (*FAMILIES, "olmo2"))
def test_the_full_circuit_is_the_clean_run_and_the_empty_one_the_corrupt_run(family):
    model = boot_toy(family)
    for pad in (None, "left", "right"):
        pairs = draw_pairs(3, pad=pad)
        every = torch.ones(Graph.from_cfg(model.cfg).n_edges, dtype=torch.bool)
        clean, corrupt = (read_answers(model, ids, pairs) for ids in (pairs.clean, pairs.corrupt))
        assert torch.allclose(run_circuit(model, pairs, every), clean, atol=1e-5)
        assert torch.allclose(run_circuit(model, pairs, ~every), corrupt, atol=1e-5)
        assert (clean - corrupt).abs().max() > 0.1


def test_every_example_may_have_a_circuit_of_its_own():
    model, pairs = boot_toy("llama"), draw_pairs(3, pad="left")
    graph = Graph.from_cfg(model.cfg)
    masks = torch.rand(3, graph.n_edges, generator=torch.Generator().manual_seed(0)) < 0.5
    together = run_circuit(model, pairs, masks)
    for i in range(3):
        for baseline in ("patch", "zero"):
            alone = run_circuit(model, pairs.select([i]), masks[i], baseline=baseline)
            whole = together if baseline == "patch" else run_circuit(model, pairs, masks, baseline=baseline)
            assert torch.allclose(alone, whole[i : i + 1], atol=1e-5)


def test_cutting_every_edge_out_of_a_node_replaces_the_node():
    model, pairs = boot_toy("gpt2"), draw_pairs(3)
    graph, kept = Graph.from_cfg(model.cfg), {}
    name = "blocks.0.hook_mlp_out"
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda x, hook: kept.update(x=x))]):
        model(pairs.corrupt, attention_mask=pairs.attention_mask.long())
    with model.hooks(fwd_hooks=[(name, lambda x, hook: kept["x"])]):
        expected = read_answers(model, pairs.clean, pairs)
    mask = graph.edge_writer != graph.writers.index("m0")
    assert torch.allclose(run_circuit(model, pairs, mask), expected, atol=1e-5)


@pytest.mark.parametrize("baseline", ["patch", "zero"])
def test_attribution_equals_exact_patching_on_the_linear_toy(baseline):
    model, pairs = LinearToy(), draw_pairs(3, pad="right")
    fast = discover(model, pairs, "eap", metric=read_logit, baseline=baseline)
    slow = discover(model, pairs, "exact", metric=read_logit, baseline=baseline)
    assert torch.allclose(fast.values, slow.values, atol=1e-12)
    assert fast.values.abs().max() > 0.01


def test_exact_patching_of_some_edges():
    model, pairs = boot_toy("llama"), draw_pairs(3)
    every = discover(model, pairs, "exact", rows=32)
    some = discover(model, pairs, "exact", edges=[3, 70], rows=2)
    assert torch.allclose(some.values[:, [3, 70]], every.values[:, [3, 70]], atol=1e-5)
    assert int(some.values.isnan().sum()) == 3 * (every.graph.n_edges - 2)
    assert not every.values.isnan().any()


def test_small_changes_are_attributed_as_exactly_as_they_are_patched():
    # close to the clean input the first-order effect is the effect
    from dataclasses import replace

    model, pairs = boot_toy("gpt2", double=True), draw_pairs(2)
    noise = 1e-4 * torch.randn(*pairs.clean.shape, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = replace(pairs, corrupt=pairs.clean, embedding_noise=noise)
    fast, slow = (discover(model, near, method).values for method in ("eap", "exact"))
    assert (fast - slow).norm() / slow.norm() < 0.01


def test_a_circuit_that_explains_more_holds_the_answer_better():
    model, pairs = boot_toy("llama"), draw_pairs(4, seed=2)
    scores = discover(model, pairs, points=10)
    clean = METRICS["kl_to_clean"](
        read_answers(model, pairs.corrupt, pairs), pairs, read_answers(model, pairs.clean, pairs)
    )
    held = []
    for n in (0, 20, 60, scores.graph.n_edges):
        masks = [select_edges(row, scores.graph, "top", n, prune=False).mask for row in scores.values]
        logits = run_circuit(model, pairs, torch.stack(masks))
        held.append(float(METRICS["kl_to_clean"](logits, pairs, read_answers(model, pairs.clean, pairs)).mean()))
    assert abs(held[0] - float(clean.mean())) < 1e-4 and abs(held[-1]) < 1e-4
    assert held[2] > held[0]


@pytest.mark.parametrize("method", [key for key in METHODS if key != "exact"])
def test_discovery_keeps_the_order_of_the_pairs_whatever_the_batches(method):
    model, pairs = boot_toy("llama"), draw_pairs(7, pad="right")
    calls: list[tuple[int, int]] = []
    whole = discover(model, pairs, method, batch_size=7)
    parts = discover(model, pairs, method, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    assert parts.ids == whole.ids == pairs.ids and parts.method == method
    assert (parts.values - whole.values).norm() / whole.values.norm() < 1e-5
    assert calls == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert METHODS[method].key == method and METHODS[method].title and METHODS[method].line


def test_a_mean_baseline_is_measured_over_all_pairs():
    model, pairs = boot_toy("llama"), draw_pairs(5, pad="left")
    whole, parts = (discover(model, pairs, "eap", baseline="mean", batch_size=size).values for size in (5, 2))
    assert (parts - whole).norm() / whole.norm() < 1e-5


def test_a_batch_that_does_not_fit_is_halved():
    model, pairs, sizes = boot_toy("llama"), draw_pairs(5), []

    def greedy(model: Any, pairs: ContrastPairs, *, graph: Graph, notes: list[str]) -> EdgeScores:
        sizes.append(len(pairs))
        if len(pairs) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate everything")
        return EdgeScores(torch.zeros(len(pairs), graph.n_edges), graph, "greedy", pairs.ids)

    scores = discover(model, pairs, greedy, batch_size=8)
    assert sizes == [5, 2, 2, 1] and len(scores.meta["notes"]) == 1 and "memory" in scores.meta["notes"][0]


def test_other_faults_are_not_taken_for_a_lack_of_memory():
    def fail(model: Any, pairs: ContrastPairs, *, graph: Graph, notes: list[str]) -> EdgeScores:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        discover(boot_toy("llama"), draw_pairs(4), fail)
    with pytest.raises(KeyError, match="eap_ig_inputs"):
        discover(boot_toy("llama"), draw_pairs(4), "nonsense")
    with pytest.raises(ValueError, match="no contrasts"):
        discover(boot_toy("llama"), draw_pairs(4).select([]))
    assert 8 <= guess_batch_size(boot_toy("llama"), draw_pairs(4)) <= 64
