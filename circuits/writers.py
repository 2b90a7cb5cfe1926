"""Collecting what every writer adds to the stream, and projecting differences into it.

    head u:  D_u = (z_stand-in - z_clean) W_O^u          MLP, embeddings: D_u = out_stand-in - out_clean

No hook on per-head results is needed: two passes keep `hook_z` and `hook_mlp_out`, and one product per layer and batch
makes the heads' writes. Behind a post-norm (Gemma-2) a head's share of what is added is `gain * C(z W_O) / sigma`,
with the sigma of its own run, so z is divided by sigma when it is collected. Layout: `writer example pos d_model`, so
that the writers below a layer are a leading slice.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation import Writes
from circuits.graph import Graph
from circuits.norms import NormMap, measure_norm
from circuits.sites import Sites, get_attention
from circuits.types import HookedModel


@dataclass(frozen=True)
class Projections:
    """The linear maps from heads to the stream.

    Attributes:
        model: Whose output projections are read when they are needed.
        graph: The wiring.
        post_norms: Per layer, the norm between attention and stream, or None.
        dtype: Float32 or wider: what sums are made in.
    """

    model: Any
    graph: Graph
    post_norms: tuple[NormMap | None, ...]
    dtype: torch.dtype

    def read_output(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """`W_O` of a layer, with the gain of a post-norm folded in."""
        weight = get_attention(self.model, layer).W_O.detach()
        norm = self.post_norms[layer]
        return weight.to(self.dtype) if norm is None else norm.fold_after(weight)


def read_projections(model: HookedModel, graph: Graph, sites: Sites) -> Projections:
    """The output projections of a model, and its post-norms measured.

    Raises:
        ValueError: A post-norm is not of a known form.
    """
    blocks, weight = getattr(model, "blocks", ()), get_attention(model, 0).W_O
    norms = tuple(
        measure_norm(getattr(blocks[i], name), weight.shape[-1], weight.dtype, weight.device) if name else None
        for i, name in enumerate(sites.post_norm)
    )
    return Projections(model, graph, norms, torch.promote_types(weight.dtype, torch.float32))


def collect_writes(kept: dict[str, Tensor], sites: Sites, projections: Projections) -> Writes:
    """The writes of a pass from its activations, off the graph."""
    heads: list[Tensor] = []
    for layer, name in enumerate(sites.z):
        z = kept[name].detach()
        norm = projections.post_norms[layer]
        if norm is not None:
            inverse = norm.normalise(kept[sites.attn_raw[layer]].detach())[1]
            z = z * inverse.unsqueeze(-1).to(z.dtype)
        heads.append(z)
    rows = len(heads[0])
    # a position table may be handed out once for the whole batch
    embeddings = tuple(kept[name].detach().expand(rows, -1, -1) for name in sites.embeddings)
    return Writes(embeddings, tuple(heads), tuple(kept[name].detach() for name in sites.mlp_out))


def project_writes(
    difference: Writes,
    projections: Projections,
    positions: slice = slice(None),
    first: int = 0,
    last: int | None = None,
) -> Float[Tensor, "writer example pos d_model"]:
    """The differences of writers `first` to `last` in the stream, at some positions.

    Cost: `n_heads * d_head * d_model` products per layer, example and position.
    """
    graph = projections.graph
    last = graph.n_writers if last is None else last
    sample = difference.embeddings[0][:, positions]
    out = sample.new_empty(last - first, *sample.shape, dtype=projections.dtype)
    for index, embedding in enumerate(difference.embeddings):
        if first <= index < last:
            out[index - first] = embedding[:, positions]
    for layer in range(graph.n_layers):
        begin = graph.count_writers_before(layer) - first
        low, high = max(begin, 0), min(begin + graph.n_heads, last - first)
        if low < high:
            z = difference.heads[layer][:, positions, low - begin : high - begin].to(projections.dtype)
            flat = z.permute(2, 0, 1, 3).reshape(high - low, -1, z.shape[-1])
            weight = projections.read_output(layer)[low - begin : high - begin]
            torch.bmm(flat, weight, out=out[low:high].view(high - low, flat.shape[1], -1))
        if 0 <= begin + graph.n_heads < last - first:
            out[begin + graph.n_heads] = difference.mlps[layer][:, positions]
    return out
