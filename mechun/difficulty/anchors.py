"""Anchors: what unlearning runs on some facts teach about the difficulty of others.

From attributed facts and the labels of runs on them: the two poles of CUD, a direction fitted in edge space, the mean
hardness of each relation, and a rank regression on all signals together. What carries labels (CUD, the fitted
direction, relation ranks) is cross-fitted by entity inside the anchor facts before the regression sees it, because
facts score 0.1 to 0.2 too well against anchors that they helped to make.

Anchors belong to one model and one graph, and are refused elsewhere. They say nothing about their own facts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.graph import Graph
from mechun.data.facts import Facts
from mechun.difficulty.agreement import average, correlate, measure_reliability
from mechun.difficulty.attribution import Attributed
from mechun.difficulty.calibration import Calibration, EdgeFit, assign_parts, fit_calibration, fit_edges
from mechun.difficulty.labels import Labels, join_labels
from mechun.difficulty.poles import Poles, find_poles
from mechun.difficulty.settings import Settings
from mechun.difficulty.signals import SIGNALS
from mechun.errors import DataError, ModelError

Values = Float[Tensor, " fact"]
INNER_PARTS = 5
CARRIED = ("cud", "circuit_fit", "relation_rank")
READ = ("loss", "grad_norm", "mrd", "forget_alignment", "entanglement", "answer_length", "circuit_balance")


@dataclass(frozen=True, eq=False)
class Lessons:
    """What carries labels from labelled facts to others.

    Attributes:
        poles: Easy and hard circuit.
        edge_fit: Direction in edge space.
        relations: Mean hardness by relation.
    """

    poles: Poles
    edge_fit: EdgeFit
    relations: Mapping[str, float]

    def tell(self, attributed: Attributed, facts: Facts) -> dict[str, Values]:
        """`cud`, `circuit_fit` and `relation_rank` of other facts; NaN where unknown."""
        values, graph = attributed.edges.values, attributed.edges.graph
        names = [fact.relation or "" for fact in facts]
        relation = torch.tensor([self.relations.get(name, float("nan")) for name in names], dtype=torch.float64)
        cud = self.poles.place(values, graph).double()
        return {"cud": cud, "circuit_fit": self.edge_fit.predict(values), "relation_rank": relation}


@dataclass(frozen=True, eq=False)
class Anchors:
    """Everything learnt from runs on some facts that the scoring of other facts needs.

    Attributes:
        lessons: Poles, fitted direction and relation ranks.
        calibration: The rank regression.
        graph: The wiring that edge scores must belong to.
        ids: The anchor facts.
        entities: Their entities; scored facts must be about others.
        hardness: Their joined labels, 1 the hardest.
        settings: How they were made.
        model: Fingerprint of the model.
        facts: Fingerprint of the anchor facts.
        reliability: Mean seed-to-seed Spearman of the labels of one method; NaN for one seed.
        agreement: Mean Spearman between the labels of different methods; NaN for one method.
        notes: What a user should be told.
    """

    lessons: Lessons
    calibration: Calibration
    graph: Graph
    ids: tuple[str, ...]
    entities: frozenset[str]
    hardness: Values
    settings: Settings
    model: str
    facts: str
    reliability: float
    agreement: float
    notes: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        poles = self.lessons.poles
        return (
            f"Anchors({len(poles.easy_ids)} easy and {len(poles.hard_ids)} hard of {len(self.ids)} facts, "
            f"sim(easy, hard) {poles.likeness:.2f}, {self.settings.preset})"
        )

    def check(self, model: str, graph: Graph, *, force: bool = False) -> None:
        """Refuse scores of another model or graph.

        Raises:
            ModelError: Another graph, always; another model, unless forced.
        """
        if graph != self.graph:
            raise ModelError(f"the anchors belong to {self.graph}, the scores to {graph}")
        if model != self.model and not force:
            hint = "make anchors on this model, or force their use"
            raise ModelError(f"the anchors were made on model {self.model}, this one is {model}", hint)

    def tell(self, attributed: Attributed, facts: Facts, *, force: bool = False) -> dict[str, Values]:
        """`cud`, `circuit_fit`, `relation_rank` and `calibrated` of other facts, in the order of the rows.

        Args:
            attributed: The other facts, attributed with the anchors' settings.
            facts: Their records, row by row.
            force: Allow another model.

        Raises:
            ModelError: See `check`.
            DataError: A fact is about an entity that the anchors were made with.
        """
        self.check(attributed.model, attributed.edges.graph, force=force)
        shared = sorted({fact.entity for fact in facts} & self.entities)
        if shared:
            hint = "score facts about other entities, or leave those out"
            raise DataError(
                f"the anchors have seen {len(shared)} of the scored entities, {shared[0]!r} among them", hint
            )
        told = self.lessons.tell(attributed, facts)
        return told | {"calibrated": self.calibration.predict({**orient(attributed.raw), **centre(told)})}

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file whose header holds the rest as JSON."""
        from mechun.difficulty.storage import write_anchors

        return write_anchors(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Anchors":
        """Read what `save` wrote."""
        from mechun.difficulty.storage import read_anchors

        return read_anchors(Path(path))


def fit_anchors(
    attributed: Attributed, facts: Facts, runs: Sequence[Labels], settings: Settings | None = None
) -> Anchors:
    """Anchors from attributed facts and the labels of runs on them; pure, no model needed.

    Args:
        attributed: Edge scores and signals of the anchor facts.
        facts: Records of at least these facts.
        runs: Labels of unlearning runs; facts that no run had are left out.
        settings: How anchors are made.

    Raises:
        DataError: Fewer than two labelled facts.
    """
    settings = settings or Settings()
    seen = {name for run in runs for name in run.ids}
    attributed = attributed.pick([name for name in attributed.ids if name in seen])
    facts = facts.pick(attributed.ids)
    hardness = join_labels(runs, attributed.ids, settings.label)
    entities = [fact.entity for fact in facts]
    lessons = learn(attributed, facts, hardness, settings)
    told = cross_tell(attributed, facts, hardness, settings)
    calibration = fit_calibration({**orient(attributed.raw), **told}, hardness, entities)
    return Anchors(
        lessons,
        calibration,
        attributed.edges.graph,
        attributed.ids,
        frozenset(entities),
        hardness,
        settings,
        attributed.model,
        facts.fingerprint,
        *measure_runs(runs, attributed.ids, settings.label),
        notes=_note_runs(runs),
    )


def learn(attributed: Attributed, facts: Facts, hardness: Values, settings: Settings) -> Lessons:
    """Poles, fitted direction and relation ranks of labelled facts."""
    values, graph = attributed.edges.values, attributed.edges.graph
    poles = find_poles(values, graph, attributed.ids, hardness, settings)
    groups: dict[str, list[float]] = {}
    for fact, value in zip(facts, hardness.tolist(), strict=True):
        if fact.relation and value == value:
            groups.setdefault(fact.relation, []).append(value)
    edge_fit = fit_edges(values, hardness, [fact.entity for fact in facts])
    return Lessons(poles, edge_fit, {name: sum(found) / len(found) for name, found in groups.items()})


def cross_tell(attributed: Attributed, facts: Facts, hardness: Values, settings: Settings) -> dict[str, Values]:
    """What `Lessons.tell` says of the anchor facts themselves, each told by facts about other entities."""
    part = torch.tensor(assign_parts([fact.entity for fact in facts], INNER_PARTS))
    found = {key: torch.full((len(facts),), float("nan"), dtype=torch.float64) for key in CARRIED}
    for number in part.unique().tolist():
        test, train = (part == number).nonzero().flatten().tolist(), (part != number).nonzero().flatten().tolist()
        ids = attributed.ids
        taught, asked = ([ids[row] for row in rows] for rows in (train, test))
        if len(taught) < 2:
            continue
        lessons = learn(attributed.pick(taught), facts.pick(taught), hardness[train], settings)
        for key, values in centre(lessons.tell(attributed.pick(asked), facts.pick(asked))).items():
            found[key][test] = values
    return found


def orient(raw: Mapping[str, Values]) -> dict[str, Values]:
    """The measured signals that the rank regression reads, turned so that larger means harder.

    How often a fact was seen is left out: it is known of made worlds only, and a claim should not rest on it. Circuit
    ingredients without an agreed direction are left out too, since the regression trusts directions.
    """
    return {key: SIGNALS[key].sign * raw[key] for key in READ if key in raw}


def centre(told: Mapping[str, Values]) -> dict[str, Values]:
    """Each signal less its mean over the facts told of together.

    Facts left out together are told of from the others' labels, whose mean is low where their own is high; without
    centring, that alone turns a cross-fitted signal against the labels.
    """
    return {key: values - values.nanmean() for key, values in told.items()}


def measure_runs(runs: Sequence[Labels], ids: Sequence[str], kind: str) -> tuple[float, float]:
    """Mean Spearman between seeds of one method, and between methods (averaged over their seeds)."""
    by_method: dict[str, dict[int, list[Labels]]] = {}
    for run in runs:
        by_method.setdefault(run.recipe.method, {}).setdefault(run.recipe.seed, []).append(run)
    seeds = [[join_labels(part, ids, kind) for part in parts.values()] for parts in by_method.values()]
    joined = [torch.stack(labels).nanmean(0) for labels in seeds]
    pairs = [correlate(joined[i], joined[j]) for i in range(len(joined)) for j in range(i)]
    return average([measure_reliability(labels) for labels in seeds]), average(pairs)


def _note_runs(runs: Sequence[Labels]) -> tuple[str, ...]:
    notes = []
    for run in runs:
        before, after = run.kept
        if before - after > 0.2:
            lost = f"{before:.0%} to {after:.0%}"
            notes.append(f"{run.recipe.method} took retained facts from {lost}: its labels say less about difficulty")
    return tuple(dict.fromkeys(notes))
