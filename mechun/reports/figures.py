"""From the frames of a run to what a page shows: the charts, and the small tables and sentences beside them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mechun import charts

if TYPE_CHECKING:
    from circuits.scores import EdgeScores

Frame = Any
"""A pandas frame; pandas' own annotations lose track at the first selection."""
BANDS = ("easy", "medium", "hard")
TITLES = {
    "rank": "Rank",
    "prompt": "Fact",
    "answer": "Answer",
    "subject": "Subject",
    "relation": "Relation",
    "band": "Band",
    "score": "Score",
    "circuit_depth": "Mean reading layer",
    "circuit_reach": "Layers spanned by an edge",
    "circuit_late": "Share into the last third",
    "circuit_path": "Mean path length",
    "circuit_longest": "Longest path",
    "circuit_edges": "Edges after pruning",
    "circuit_strength": "Sum of |edge score|",
    "circuit_spread": "Effective number of edges",
    "circuit_balance": "Net over absolute support",
    "facts": "Facts",
    "cud": "CUD",
    "mrd": "MRD",
    "rho": "Spearman",
    "partial": "Given loss and length",
    "seconds_per_fact": "Seconds per fact",
    "median_rise": "Median rise of the loss",
    "retained": "Retained facts still right",
    "reliability": "Repeats from seed to seed",
}
"""Titles of the columns that need another than their own name."""
SHOWN_SIGNALS = ("cud", "calibrated", "loss", "mrd", "exposure", "circuit_depth", "circuit_path")
ALIKE = 0.2
"""Means closer than this share of the spread over all facts are called alike."""
POOLED = "pooled"
COMBINED = ("calibrated", "circuit_fit", "cud_shuffled", "entity_rank")
"""Rows of a validation that are no single signal known before unlearning the facts themselves."""
CIRCUIT_COLUMNS = tuple(name for name in TITLES if name.startswith("circuit_"))
"""Columns of the scores that describe a fact's circuit rather than its score."""


def name_column(name: str) -> str:
    """The title of a column."""
    return TITLES.get(name, name.replace("_", " ").capitalize())


def name_columns(scores: Frame) -> dict[str, str]:
    """Titles of the columns that the fact table shows, the text first; the page's data hold the others too."""
    shown = ("rank", "prompt", "answer", "relation", "band", "score", *SHOWN_SIGNALS)
    known = [name for name in shown if name in scores.columns and scores[name].notna().any()]
    twice = [name for name in SHOWN_SIGNALS if name in known and scores[name].equals(scores["score"])]
    return {name: name_column(name) for name in known if name not in twice}


def name_fact(row: Frame) -> str:
    """A fact in a sentence."""
    text = f"{row['prompt']} {row['answer']}" if {"prompt", "answer"} <= set(row.index) else str(row["id"])
    return f"“{text if len(text) <= 120 else text[:119] + '…'}”"


def draw_scores(scores: Frame) -> str:
    """Histogram of the score."""
    values = scores["score"].dropna()
    inside = bool(((values >= 0) & (values <= 1)).all())
    return charts.draw_distribution(
        scores,
        "score",
        title="Difficulty of the facts",
        unit="score (higher is harder)",
        span=(0.0, 1.0) if inside else None,
    )


def draw_layers(layers: Frame) -> str:
    """Share of the edge scores by layer, easy beside hard."""
    return charts.draw_groups(
        layers,
        x="layer",
        value="share",
        group="band",
        title="Where the circuits start",
        unit="share of |edge score|",
        x_unit="source layer",
    )


def draw_signals(validation: Frame) -> str:
    """Spearman of every signal with its interval, best first."""
    return charts.draw_intervals(
        validation[validation["target"] == POOLED].sort_values("rho", ascending=False),
        label="title",
        value="rho",
        low="low",
        high="high",
        title="Agreement with realised difficulty",
        unit="Spearman correlation, held out",
    )


def tabulate_targets(validation: Frame) -> Frame:
    """One row per signal, best first: its Spearman with the pooled label and its interval, then with each method's."""
    pooled = validation[validation["target"] == POOLED].sort_values("rho", ascending=False)
    kept = [name for name in ("signal", "title", "rho", "low", "high", "partial", "seconds_per_fact") if name in pooled]
    table = pooled[kept].copy()
    for target, part in validation.groupby("target", sort=False):
        if target != POOLED:
            table[str(target)] = table["signal"].map(part.set_index("signal")["rho"])
    return table.reset_index(drop=True)


def measure_layers(edges: "EdgeScores", bands: Mapping[str, str]) -> Frame:
    """Mean share of a fact's absolute edge scores that leaves each layer, for the easy and the hard facts.

    Args:
        edges: Scores per example.
        bands: Band of each example by id.

    Returns:
        Columns band, layer (the embedding is -1) and share; shares of a band sum to one.
    """
    import pandas as pd
    import torch

    layer_of_edge = edges.graph.writer_layer[edges.graph.edge_writer] + 1
    weights = edges.values.abs().to(torch.float64).cpu()
    shares = torch.zeros(len(weights), edges.graph.n_layers + 1, dtype=torch.float64)
    shares.index_add_(1, layer_of_edge.cpu(), weights)
    shares /= weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    rows = []
    for band in ("easy", "hard"):
        members = [row for row, name in enumerate(edges.ids) if bands.get(name) == band]
        if members:
            means = shares[members].mean(0).tolist()
            rows += [{"band": band, "layer": layer - 1, "share": share} for layer, share in enumerate(means)]
    return pd.DataFrame(rows, columns=["band", "layer", "share"])


def summarise_bands(scores: Frame) -> Frame:
    """Means of the circuit measures by band; without rows when there are none."""
    import pandas as pd

    columns = [name for name in CIRCUIT_COLUMNS if name in scores.columns and scores[name].notna().any()]
    if not columns or "band" not in scores.columns:
        return pd.DataFrame()
    rows: list[dict[str, Any]] = []
    for band in BANDS:
        part = scores[scores["band"] == band]
        if len(part):
            rows.append({"band": band, "facts": len(part), **{name: float(part[name].mean()) for name in columns}})
    return pd.DataFrame(rows)


def word_contrast(scores: Frame) -> list[str]:
    """The sentence that says how circuits of hard facts differ from those of easy ones."""
    means = summarise_bands(scores)
    if not len(means) or not {"easy", "hard"} <= set(means["band"]):
        return []
    table = means.set_index("band")
    words = {
        "circuit_depth": ("deeper", "shallower", "as deep"),
        "circuit_path": ("along longer paths", "along shorter paths", "along paths as long"),
    }
    told = []
    for name, (more, less, alike) in words.items():
        if name in table.columns:
            easy, hard = float(table.loc["easy", name]), float(table.loc["hard", name])
            spread = float(scores[name].std()) or 1.0
            word = alike if abs(hard - easy) < ALIKE * spread else more if hard > easy else less
            told.append(f"{word} ({name_column(name).lower()} {hard:.2f} against {easy:.2f}, spread {spread:.2f})")
    return [f"Compared with easy facts, the circuits of hard ones work {' and '.join(told)}."] if told else []


def list_settings(spec: Mapping[str, Any], prefix: str = "") -> Frame:
    """The spec as rows of setting and value, dotted where it is nested."""
    import pandas as pd

    return pd.DataFrame(list(_flatten(spec, prefix)), columns=["setting", "value"])


def _flatten(value: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{prefix}{key}"
        rows += _flatten(inner, f"{name}.") if isinstance(inner, Mapping) else [(name, str(inner))]
    return rows
