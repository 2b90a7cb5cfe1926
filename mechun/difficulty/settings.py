"""Everything that decides a difficulty score, besides model and facts, as one plain record."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from mechun.errors import UsageError, nearest


@dataclass(frozen=True)
class Settings:
    """How facts are attributed, labelled and scored.

    Attributes:
        preset: Name this record started from.
        method: Key of `circuits.discovery.METHODS`.
        metric: Key of `circuits.metrics.METRICS`.
        contrast: Kind of contrast; "auto" swaps subjects and falls back where no swap is possible.
        swaps: Corrupt runs per fact, averaged.
        points: Integration points.
        similarity: Key of `cud.SIMILARITIES`.
        n_edges: Budget of a greedy circuit; 0 compares raw scores of all edges.
        survive: Share of circuits that must not be empty; the budget is doubled until it is met. 0 leaves the budget.
        backbone: Edges in more than this share of all circuits are left out; 1 keeps every edge.
        label: "increase" of the loss by unlearning, or the raw loss "after" it, as published.
        share: Share of the anchor facts that make up either anchor.
        least: Fewest facts in an anchor.
        folds: Parts of the scored facts, disjoint in entities, each scored by anchors from the others.
        methods: Unlearning methods whose labels are averaged.
        seeds: Seeds of the unlearning runs.
        steps: Steps of the unlearning runs; None for each method's default.
        lr: Learning rate of the unlearning runs; None for each method's default.
        draws: Noisy models for MRD.
        sigma: Relative noise for MRD.
        retain_sample: Retained facts that gradients and representations are compared with, at most.
        neighbours: Nearest retained facts for entanglement, and nearest labelled facts for neighbour ranks.
        batch_size: Facts per batch.
        seed: Of everything drawn.
    """

    preset: str = "default"
    method: str = "eap_ig_inputs"
    metric: str = "answer_log_prob"
    contrast: str = "auto"
    swaps: int = 1
    points: int = 5
    similarity: str = "weighted_cosine"
    n_edges: int = 0
    survive: float = 0.0
    backbone: float = 1.0
    label: str = "increase"
    share: float = 1 / 4
    least: int = 3
    folds: int = 2
    methods: tuple[str, ...] = ("grad_diff", "npo", "rmu")
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    lr: float | None = None
    draws: int = 32
    sigma: float = 0.05
    retain_sample: int = 256
    neighbours: int = 10
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("methods", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.folds < 2:
            raise UsageError(f"{self.folds} fold leaves no facts to build anchors from", "use at least 2")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


PRESETS: Mapping[str, Settings] = MappingProxyType(
    {
        "default": Settings(),
        "paper": Settings(
            preset="paper",
            method="eap_ig_activations",
            metric="gmprob_kl",
            contrast="zero",
            similarity="cosine",
            n_edges=75,
            label="after",
            share=1 / 8,
        ),
    }
)
"""The research default, and the form of arXiv 2601.09624: zero baseline, greedy 75 edges, pruned, binary cosine."""


def choose_settings(preset: str = "default", **changes: Any) -> Settings:
    """A preset with some values changed; unknown names are refused.

    Example:
        >>> choose_settings("paper", folds=3).n_edges
        75
    """
    if preset not in PRESETS:
        raise UsageError(f"no preset is called {preset!r}", nearest(preset, PRESETS, "presets"))
    known = [part.name for part in fields(Settings)]
    for name in changes:
        if name not in known:
            raise UsageError(f"no setting is called {name!r}", nearest(name, known, "settings"))
    return replace(PRESETS[preset], **changes)
