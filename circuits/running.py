"""The forward pass of a circuit: its edges carry the live signal, all others the stand-in's.

    input of reader v  =  live stream  +  sum over writers u before v, u->v not in the circuit, of (stand-in_u - live_u)

where a writer's live signal is what it computes from its own, already mixed, inputs. The full circuit reproduces the
clean logits and the empty one those of the stand-in's run. Every row may have a circuit of its own, so that many
circuits run in one pass. Biases of output projections belong to no writer and stay.

Cost per pass: the model's forward pass with a copy of the stream per head, plus
`example pos reader writer d_model` products for the mixing.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.ablation import Baseline, Writes
from circuits.averages import measure_means
from circuits.graph import Graph, ReaderGroup
from circuits.hooks import Edit, Tap, frozen, tapping
from circuits.passes import Batch, cache_prefix, list_hooks, run_pass, trim_pairs
from circuits.sites import Sites, find_sites, splitting
from circuits.types import ContrastPairs, HookedModel
from circuits.writers import Projections, collect_writes, read_projections

RunMask = Callable[[Bool[Tensor, "row edge"]], Float[Tensor, "row answer d_vocab"]]


def run_circuit(
    model: HookedModel,
    pairs: ContrastPairs,
    mask: Bool[Tensor, "edge"] | Bool[Tensor, "example edge"],
    graph: Graph | None = None,
    *,
    baseline: Baseline | Writes = "patch",
) -> Float[Tensor, "example answer d_vocab"]:
    """Logits at the answer's positions when only the circuit's edges carry the live signal.

    Args:
        model: The model, in eval mode; left as it was found.
        pairs: The contrasts.
        mask: True on the circuit's edges; one circuit for all examples, or one for each.
        graph: The wiring; made from the model's configuration if not given.
        baseline: What the other edges carry: the corrupt run's signal, zero, a mean over these pairs, or a `Writes`.

    Example:
        logits = run_circuit(model, pairs, circuit.mask)
        held = METRICS["answer_log_prob"](logits, pairs, None)
    """
    with patching(model, pairs, graph or Graph.from_cfg(model.cfg), baseline) as run:
        return run(mask.expand(len(pairs), -1) if mask.ndim == 1 else mask)


@contextmanager
def patching(
    model: HookedModel, pairs: ContrastPairs, graph: Graph, baseline: Baseline | Writes = "patch"
) -> Generator[RunMask, None, None]:
    """A function from circuits to logits, for many circuits on the same contrasts.

    It takes one mask per row; rows are the examples, once or several times over: row `i` is example `i % n_examples`.
    """
    if not isinstance(baseline, Writes) and baseline not in get_args(Baseline):
        raise ValueError(f"no baseline {baseline!r}: {', '.join(get_args(Baseline))}, or a Writes")
    if baseline == "mean":
        baseline = measure_means(model, pairs, graph)
    with frozen(model), splitting(model), torch.no_grad():
        sites = find_sites(model, graph)
        projections = read_projections(model, graph, sites)
        split = [name for names in sites.split for name in names]
        names = [*sites.writers, *split, *sites.mlp_in, sites.final]
        with tapping(model, list_hooks(sites, names)) as tap:
            trimmed = trim_pairs(pairs)
            batch = cache_prefix(model, tap, sites, trimmed) if baseline == "patch" else Batch(trimmed)
            stand_in = _find_stand_in(model, tap, sites, projections, batch, baseline)
            yield partial(_run_mask, model, tap, sites, projections, batch, stand_in)


@dataclass
class Mixer:
    """The state of one mixed pass: what each writer's stand-in differs by, as far as the pass has come."""

    sites: Sites
    projections: Projections
    stand_in: Writes | None
    dropped: Float[Tensor, "row edge"]
    real: Bool[Tensor, "row pos"]
    delta: Float[Tensor, "row writer pos d_model"]

    def list_edits(self) -> dict[str, Edit]:
        """A function for every hook that a pass goes through."""
        edits: dict[str, Edit] = {}
        for i, name in enumerate(self.sites.embeddings):
            edits[name] = partial(self._note_write, i, None if self.stand_in is None else self.stand_in.embeddings[i])
        for group in self.projections.graph.reader_groups:
            if group.kind == "logits":
                edits[self.sites.final] = partial(self._mix_branch, group)
            elif group.kind == "mlp":
                edits[self.sites.mlp_in[group.layer]] = partial(self._mix_branch, group)
            else:
                edits |= self._list_layer_edits(group)
        return edits

    def _list_layer_edits(self, group: ReaderGroup) -> dict[str, Edit]:
        layer, graph = group.layer, self.projections.graph
        edits: dict[str, Edit] = {}
        begins = (0, graph.n_heads, graph.n_heads + graph.n_kv_heads, group.n_readers)
        for side, name in enumerate(self.sites.split[layer]):
            edits[name] = partial(self._mix_heads, group, slice(begins[side], begins[side + 1]))
        held: dict[str, Tensor] = {}
        edits[self.sites.z[layer]] = partial(self._note_heads, layer, held)
        if self.projections.post_norms[layer] is not None:
            edits[self.sites.attn_raw[layer]] = partial(self._note_normed_heads, layer, held)
        mlp = None if self.stand_in is None else self.stand_in.mlps[layer]
        edits[self.sites.mlp_out[layer]] = partial(self._note_write, group.n_writers + graph.n_heads, mlp)
        return edits

    def _note_write(self, writer: int, stand_in: Tensor | None, live: Tensor) -> Tensor:
        difference = -live if stand_in is None else stand_in - live
        self.delta[:, writer] = difference.masked_fill(~self.real.unsqueeze(-1), 0)
        return live

    def _note_heads(self, layer: int, held: dict[str, Tensor], z: Tensor) -> Tensor:
        held["z"] = z
        if self.projections.post_norms[layer] is None:
            self._project_heads(layer, z)
        return z

    def _note_normed_heads(self, layer: int, held: dict[str, Tensor], raw: Tensor) -> Tensor:
        norm = self.projections.post_norms[layer]
        assert norm is not None
        self._project_heads(layer, held["z"] * norm.normalise(raw)[1].unsqueeze(-1).to(raw.dtype))
        return raw

    def _project_heads(self, layer: int, z: Float[Tensor, "row pos head d_head"]) -> None:
        difference = (-z if self.stand_in is None else self.stand_in.heads[layer] - z).to(self.delta.dtype)
        writes = torch.einsum("bphe,hed->bhpd", difference, self.projections.read_output(layer))
        first = self.projections.graph.count_writers_before(layer)
        writes = writes.masked_fill(~self.real[:, None, :, None], 0)
        self.delta[:, first : first + writes.shape[1]] = writes

    def _mix(self, group: ReaderGroup, readers: slice) -> Float[Tensor, "row reader pos d_model"]:
        """What the readers of a group have to be given besides the live stream."""
        edges = self.dropped[:, group.first_edge : group.first_edge + group.n_readers * group.n_writers]
        dropped = edges.view(len(edges), group.n_readers, group.n_writers)[:, readers]
        delta = self.delta[:, : group.n_writers]
        return torch.bmm(dropped, delta.flatten(2)).view(len(edges), -1, *delta.shape[2:])

    def _mix_heads(self, group: ReaderGroup, readers: slice, x: Tensor) -> Tensor:
        return x + self._mix(group, readers).transpose(1, 2).to(x.dtype)

    def _mix_branch(self, group: ReaderGroup, x: Tensor) -> Tensor:
        return x + self._mix(group, slice(None)).squeeze(1).to(x.dtype)


def _run_mask(
    model: HookedModel,
    tap: Tap,
    sites: Sites,
    projections: Projections,
    batch: Batch,
    stand_in: Writes | None,
    mask: Bool[Tensor, "row edge"],
) -> Float[Tensor, "row answer d_vocab"]:
    times = len(mask) // len(batch.pairs)
    size = (len(mask), projections.graph.n_writers, batch.n_positions, int(model.cfg.d_model))
    repeated = (
        None
        if stand_in is None
        else stand_in.transform(lambda t: t if len(t) == 1 else t.repeat(times, *(1,) * (t.ndim - 1)))
    )
    device = batch.pairs.clean.device
    dropped = (~mask).to(device, projections.dtype)
    delta = torch.zeros(size, device=device, dtype=projections.dtype)
    mixer = Mixer(sites, projections, repeated, dropped, batch.mask.repeat(times, 1), delta)
    with torch.no_grad():
        return run_pass(model, tap, sites, batch, batch.pairs.clean.repeat(times, 1), mixer.list_edits())


def _find_stand_in(
    model: HookedModel, tap: Tap, sites: Sites, projections: Projections, batch: Batch, baseline: Baseline | Writes
) -> Writes | None:
    """The writes that stand in; None for zero."""
    if baseline != "patch":
        return baseline if isinstance(baseline, Writes) else None
    edits: dict[str, Edit] = {}
    noise = batch.pairs.embedding_noise
    if noise is not None:
        edits[sites.embed] = lambda x: x + noise[:, batch.start :].to(x.dtype)
    run_pass(model, tap, sites, batch, batch.pairs.corrupt, edits, sites.writers)
    return collect_writes(tap.kept, sites, projections)
