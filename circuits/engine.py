"""Attribution of every edge, for every example, in one batched pass.

    score[b, u->v] = sum over positions of <D_u[b, pos], G_v[b, pos]>
    D_u = write_stand-in - write_clean,   G_v = weighted mean over integration points of d metric / d (input of reader v)

so that a score is the change of the metric when the edge's signal is replaced, to first order. One point at the clean
input is EAP (Syed et al. 2023), points between the corrupt and the clean embeddings are EAP-IG (Hanna et al. 2024), and
`attribute_activations` interpolates one site at a time. Samples do not interact, so the batch axis is simply kept.

What makes it quick, in the order of the passes: `passes` (answer positions, common prefix), `writers` (heads from z),
endpoint passes used twice and points stacked into the batch (here), `readers` (head space, the way back through the norm
once per batch, contraction by layer and block of positions).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation import Baseline, Writes, average_writes, subtract_clean
from circuits.graph import Graph
from circuits.hooks import Edit, Tap, frozen, tapping
from circuits.interpolation import PointRule, place_points
from circuits.metrics import find_metric
from circuits.passes import Batch, cache_prefix, run_pass, trim_pairs
from circuits.readers import Readers, SplitReaders, UnsupportedWiringError, contract, prepare_head_readers
from circuits.sites import Sites, find_sites, splitting
from circuits.types import ContrastPairs, HookedModel, Metric
from circuits.writers import Projections, collect_writes, project_writes, read_projections

Path = Literal["auto", "head", "split"]
Stack = Literal["auto"] | bool
Scope = Literal["all", "own"]

STACKED_NUMBERS = 1_250_000  # rows x positions x d_model beyond which a CPU gains nothing from stacking
BLOCK_BYTES = 2**28  # of writes held at once during the contraction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One batch of contrasts, ready for passes with gradients."""

    model: HookedModel
    graph: Graph
    sites: Sites
    tap: Tap
    batch: Batch
    projections: Projections
    readers: Readers
    metric: Metric
    stack: Stack

    @property
    def pairs(self) -> ContrastPairs:
        """The contrasts."""
        return self.batch.pairs

    def fit_points(self) -> int:
        """How many points to run at once: stacking pays while a pass is small."""
        if self.stack is True:
            return 2**31
        numbers = len(self.pairs) * self.batch.n_positions * int(self.model.cfg.d_model)
        room = STACKED_NUMBERS if self.pairs.clean.device.type == "cpu" else 2**28
        return max(1, room // numbers) if self.stack else 1


def attribute_edges(
    model: HookedModel,
    pairs: ContrastPairs,
    graph: Graph | None = None,
    metric: str | Metric = "answer_log_prob",
    *,
    baseline: Baseline | Writes = "patch",
    points: int = 1,
    rule: PointRule = "midpoint",
    path: Path = "auto",
    stack: Stack = "auto",
    share_prefix: bool = True,
    notes: list[str] | None = None,
) -> Float[Tensor, "example edge"]:
    """Scores of every edge for every example: EAP with one point, EAP-IG on the inputs with more.

    Args:
        model: The model, in eval mode; it is left as it was found, whatever happens.
        pairs: The contrasts; padding may be on either side.
        graph: The wiring; made from the model's configuration if not given.
        metric: Name or function; larger means that the answer is held more firmly.
        baseline: What replaces a signal: "patch" (the corrupt run's), "zero", "mean" over the real tokens of these
            pairs, or a `Writes` (see `measure_means`) averaged over others.
        points: Integration points; 1 is the clean input.
        rule: Where they lie, see `circuits.interpolation`.
        path: "head" goes back through the norms analytically, "split" through every reader's own copy of the stream;
            "auto" takes the first wherever the model's wiring allows it.
        stack: Run points together; "auto" while a pass is small.
        share_prefix: Run the positions that clean and corrupt have in common only once.
        notes: Receives a line for each thing worth knowing, such as a fall back to the split path.

    Returns:
        Positive where replacing the edge's signal raises the metric; float32 or wider; `Graph`'s edge order.

    Raises:
        ValueError: The model is in training mode, its wiring cannot be told apart, or an activation is not finite.

    Cost: 2 passes without gradient, `points` forward and backward passes of activations, and a contraction of
    about a tenth of that. Memory: that of the backward pass, and `example pos writer d_model` numbers in blocks.
    """
    weights = dict(zip(*place_points(points, rule), strict=True))

    def work(job: Job) -> Float[Tensor, "example edge"]:
        ends = run_endpoints(job, baseline, weights)
        inner = [(alpha, weight) for alpha, weight in weights.items() if alpha not in ends.used]
        _run_between(job, ends, inner, _name_embeddings(job, ends))
        scores = ends.clean_logits.new_zeros(len(job.pairs), job.graph.n_edges, dtype=job.projections.dtype)
        _contract(job, ends, scores)
        return _check_finite(scores, job, ends)

    return _attribute(work, model, pairs, graph, metric, baseline, path, stack, share_prefix, notes)


def attribute_activations(
    model: HookedModel,
    pairs: ContrastPairs,
    graph: Graph | None = None,
    metric: str | Metric = "answer_log_prob",
    *,
    baseline: Baseline | Writes = "patch",
    points: int = 5,
    rule: PointRule = "midpoint",
    scope: Scope = "own",
    path: Path = "auto",
    stack: Stack = "auto",
    share_prefix: bool = True,
    notes: list[str] | None = None,
) -> Float[Tensor, "example edge"]:
    """EAP-IG on the activations: one site at a time moves from its stand-in to its clean value.

    The sites are the embeddings, the heads of each layer together, and each MLP; each is run with the others clean.

    Args:
        model: See `attribute_edges`.
        pairs: See `attribute_edges`.
        graph: See `attribute_edges`.
        metric: See `attribute_edges`.
        baseline: See `attribute_edges`.
        points: Integration points per site.
        rule: Where they lie; "reference" with `baseline="zero"` and `scope="all"` follows arXiv 2601.09624.
        scope: "own" scores the edges out of the site that moves; "all" adds every run to every edge and divides by the
            number of sites, as the reference does.
        path: See `attribute_edges`.
        stack: See `attribute_edges`.
        share_prefix: See `attribute_edges`.
        notes: See `attribute_edges`.

    Cost: `2 * n_layers + 1` times that of `attribute_edges`.
    """
    weights = dict(zip(*place_points(points, rule), strict=True))

    def work(job: Job) -> Float[Tensor, "example edge"]:
        ends = run_endpoints(job, baseline, {})
        scores = ends.clean_logits.new_zeros(len(job.pairs), job.graph.n_edges, dtype=job.projections.dtype)
        sites = _list_moves(job, ends)
        for move in sites:
            job.readers.clear()
            _run_between(job, ends, list(weights.items()), move.values, cut=True)
            _contract(job, ends, scores, *((move.first, move.last) if scope == "own" else (0, None)))
        return _check_finite(scores if scope == "own" else scores / len(sites), job, ends)

    return _attribute(work, model, pairs, graph, metric, baseline, path, stack, share_prefix, notes)


def measure_means(model: HookedModel, pairs: ContrastPairs, graph: Graph | None = None, batch_size: int = 8) -> Writes:
    """The mean write of every writer over the real tokens of the clean inputs, whatever their position.

    Cost: one pass without gradient per batch.
    """
    graph = graph or Graph.from_cfg(model.cfg)
    sites = find_sites(model, graph)
    projections = read_projections(model, graph, sites)

    def run() -> Iterator[tuple[Writes, Tensor]]:
        for rows in torch.arange(len(pairs)).split(batch_size):
            batch = Batch(trim_pairs(pairs.select(rows)))
            run_pass(model, tap, sites, batch, batch.pairs.clean, reading=sites.writers)
            yield collect_writes(tap.kept, sites, projections), batch.mask

    with frozen(model), torch.no_grad(), tapping(model, _list_hooks(sites, sites.writers)) as tap:
        return average_writes(run())


@dataclass(frozen=True)
class Ends:
    """What the clean and the stand-in run leave behind.

    Attributes:
        clean: The clean run's writes.
        difference: Stand-in minus clean, 0 on padding.
        clean_logits: At the answer's positions.
        used: Integration points whose gradients have been collected on the way.
        attention: Per layer, what attention adds to the stream in the clean run.
    """

    clean: Writes
    difference: Writes
    clean_logits: Float[Tensor, "example answer d_vocab"]
    used: frozenset[float]
    attention: tuple[Float[Tensor, "example pos d_model"], ...]


@dataclass(frozen=True)
class Move:
    """A site that moves: the values its hooks go between, and its writers.

    Attributes:
        values: Hook name to (clean value, stand-in minus clean).
        first: Index of its first writer.
        last: One more than that of its last.
    """

    values: dict[str, tuple[Tensor, Tensor]]
    first: int
    last: int


def run_endpoints(job: Job, baseline: Baseline | Writes, weights: dict[float, float]) -> Ends:
    """The clean run and, for a patch, the corrupt one; either also serves as the integration point it is."""
    names = (*job.sites.writers, *job.sites.attn_out)
    pairs, sites, patch = job.pairs, job.sites, baseline == "patch"
    noise = pairs.embedding_noise
    noisy = None if noise is None else noise[:, job.batch.start :]

    def collect(rows: slice = slice(None)) -> tuple[Writes, tuple[Tensor, ...]]:
        writes = collect_writes(job.tap.kept, sites, job.projections).transform(lambda t: t[rows])
        return writes, tuple(job.tap.kept[name].detach()[rows] for name in sites.attn_out)

    def run(ids: Tensor, noise: Tensor | None, weight: float | None, clean: Tensor | None) -> Tensor:
        edits: dict[str, Edit] = {} if noise is None else {sites.embed: lambda x: x + noise.to(x.dtype)}
        if weight is None:
            with torch.no_grad():
                return run_pass(job.model, job.tap, sites, job.batch, ids, edits, names)
        add = edits.get(sites.embed, lambda x: x)
        edits[sites.embed] = lambda x: add(x).detach().requires_grad_()
        logits = run_pass(
            job.model, job.tap, sites, job.batch, ids, edits, (*names, *job.readers.reading), job.readers.branching
        )
        _differentiate(job, logits, [weight], logits.detach() if clean is None else clean)
        return logits.detach()

    used = frozenset(weights) & ({0.0, 1.0} if patch else {1.0})
    if patch and not used and job.fit_points() > 1:
        both = None if noisy is None else torch.cat([torch.zeros_like(noisy), noisy])
        logits = run(torch.cat([pairs.clean, pairs.corrupt]), both, None, None)[: len(pairs)]
        (clean, attention), (stand_in, _) = collect(slice(len(pairs))), collect(slice(len(pairs), None))
        return Ends(clean, subtract_clean(clean, job.batch.mask, stand_in), logits, used, attention)
    logits = run(pairs.clean, None, weights.get(1.0), None)
    clean, attention = collect()
    stand_in = baseline if isinstance(baseline, Writes) else None
    if patch:
        run(pairs.corrupt, noisy, weights.get(0.0), logits)
        stand_in = collect()[0]
    elif baseline == "mean":
        stand_in = average_writes([(clean, job.batch.mask)])
    return Ends(clean, subtract_clean(clean, job.batch.mask, stand_in), logits, used, attention)


def _run_between(
    job: Job,
    ends: Ends,
    points: Sequence[tuple[float, float]],
    values: dict[str, tuple[Tensor, Tensor]],
    cut: bool = False,
) -> None:
    """Collect gradients at points on the way, as many points at once as fit."""
    step = job.fit_points()
    for begin in range(0, len(points), step):
        alphas, weights = zip(*points[begin : begin + step], strict=True)
        edits: dict[str, Edit] = {} if job.sites.embed in values else {job.sites.embed: _start_graph}
        for name, (clean, difference) in values.items():
            moved = torch.cat([clean + (1 - alpha) * difference for alpha in alphas]).to(clean.dtype).requires_grad_()
            edits[name] = partial(_replace, moved)
        ids = job.pairs.clean.repeat(len(alphas), 1)
        logits = run_pass(
            job.model, job.tap, job.sites, job.batch, ids, edits, job.readers.reading, job.readers.branching
        )
        _differentiate(job, logits, weights, ends.clean_logits, cut)
    job.tap.prepare()


def _differentiate(job: Job, logits: Tensor, weights: Sequence[float], clean: Tensor, cut: bool = False) -> None:
    """Hand the gradients of the weighted metric to the readers; upstream of a cut they may be missing and are 0."""
    times, kept = len(weights), job.tap.kept
    pairs = job.pairs if times == 1 else job.pairs.select(torch.arange(len(job.pairs)).repeat(times))
    value = job.metric(logits, pairs, clean.repeat(times, 1, 1))
    if not value.requires_grad:
        raise ValueError(f"the metric {getattr(job.metric, '__name__', job.metric)} has no gradient")
    total = (value.view(times, -1) * value.new_tensor(weights).unsqueeze(1)).sum()
    names = job.readers.branching
    gradients = torch.autograd.grad(total, [kept[name] for name in names], materialize_grads=cut)
    job.readers.collect(kept, dict(zip(names, gradients, strict=True)), times)


def _contract(job: Job, ends: Ends, scores: Tensor, first: int = 0, last: int | None = None) -> None:
    """Add the scores of the edges out of some writers, in blocks of positions that bound the memory."""
    width = job.graph.n_writers if last is None else last - first
    column = len(job.pairs) * width * int(job.model.cfg.d_model) * scores.element_size()
    step = max(1, BLOCK_BYTES // column)
    with torch.no_grad():
        for begin in range(0, job.batch.n_positions, step):
            positions = slice(begin, begin + step)
            writes = project_writes(ends.difference, job.projections, positions, first, last)
            contract(job.readers, writes, job.graph, positions, scores, first)


def _attribute(
    work: Callable[[Job], Tensor],
    model: HookedModel,
    pairs: ContrastPairs,
    graph: Graph | None,
    metric: str | Metric,
    baseline: Baseline | Writes,
    path: Path,
    stack: Stack,
    share_prefix: bool,
    notes: list[str] | None,
) -> Float[Tensor, "example edge"]:
    graph = graph or Graph.from_cfg(model.cfg)
    if not isinstance(baseline, Writes) and baseline not in get_args(Baseline):
        raise ValueError(f"no baseline {baseline!r}: {', '.join(get_args(Baseline))}, or a Writes")
    share = share_prefix and baseline == "patch"
    if path != "split":
        try:
            with _prepare(model, pairs, graph, find_metric(metric), "head", stack, share) as job:
                return work(job)
        except UnsupportedWiringError as error:
            if path == "head":
                raise
            _note(f"{error}; every reader is given its own copy of the stream instead", notes)
    with _prepare(model, pairs, graph, find_metric(metric), "split", stack, share) as job:
        return work(job)


@contextmanager
def _prepare(
    model: HookedModel,
    pairs: ContrastPairs,
    graph: Graph,
    metric: Metric,
    path: Literal["head", "split"],
    stack: Stack,
    share: bool,
) -> Iterator[Job]:
    """A job whose hooks are attached and whose common prefix has been run; everything is undone afterwards."""
    with ExitStack() as context:
        context.enter_context(frozen(model))
        if path == "split":
            context.enter_context(splitting(model))
        sites = find_sites(model, graph)
        projections = read_projections(model, graph, sites)
        wide = projections.dtype
        readers = (
            SplitReaders(graph, sites, wide) if path == "split" else prepare_head_readers(model, graph, sites, wide)
        )
        hooks = _list_hooks(sites, (*sites.writers, *sites.attn_out, *readers.reading, *readers.branching))
        tap = context.enter_context(tapping(model, hooks))
        context.enter_context(torch.enable_grad())
        trimmed = trim_pairs(pairs)
        batch = cache_prefix(model, tap, sites, trimmed) if share else Batch(trimmed)
        yield Job(model, graph, sites, tap, batch, projections, readers, metric, stack)


def _list_hooks(sites: Sites, names: Sequence[str]) -> list[str]:
    return [*names, *((sites.unembed,) if sites.unembed else ())]


def _name_embeddings(job: Job, ends: Ends) -> dict[str, tuple[Tensor, Tensor]]:
    """The embeddings, between clean and stand-in."""
    pairs = zip(ends.clean.embeddings, ends.difference.embeddings, strict=True)
    return dict(zip(job.sites.embeddings, pairs, strict=True))


def _list_moves(job: Job, ends: Ends) -> list[Move]:
    """The sites of EAP-IG on activations: embeddings, heads of each layer, each MLP."""
    graph, sites = job.graph, job.sites
    moves = [Move(_name_embeddings(job, ends), 0, graph.n_embeddings)]
    for layer in range(graph.n_layers):
        first = graph.count_writers_before(layer)
        mlp = first + graph.n_heads
        heads = project_writes(ends.difference, job.projections, first=first, last=mlp).sum(0)
        moves.append(Move({sites.attn_out[layer]: (ends.attention[layer], heads)}, first, mlp))
        values = (ends.clean.mlps[layer], ends.difference.mlps[layer])
        moves.append(Move({sites.mlp_out[layer]: values}, mlp, mlp + 1))
    return moves


def _check_finite(scores: Float[Tensor, "example edge"], job: Job, ends: Ends) -> Float[Tensor, "example edge"]:
    """Refuse scores that are not finite, naming the examples and the first layer where something went wrong."""
    bad = ~scores.isfinite().all(1)
    if not bad.any():
        return scores
    names = [name for name, is_bad in zip(job.pairs.ids, bad.tolist(), strict=True) if is_bad]
    where = "only in the gradients"
    layers = [ends.difference.embeddings, *zip(ends.difference.heads, ends.difference.mlps, strict=True)]
    for layer, tensors in enumerate(layers, start=-1):
        if not all(bool(t.isfinite().all()) for t in tensors):
            where = "from the embeddings on" if layer < 0 else f"from layer {layer} on"
            break
    raise ValueError(f"activations are not finite {where}; examples {', '.join(names[:8])}")


def _start_graph(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _replace(value: Tensor, x: Tensor) -> Tensor:
    del x
    return value


def _note(line: str, notes: list[str] | None) -> None:
    log.warning(line)
    if notes is not None:
        notes.append(line)
