"""How far two orders of the same facts agree, and how sure one may be of it.

Spearman: rho(x, y) = Pearson(rank x, rank y), ties at their mean rank. Partial Spearman: the ranks of the controls are
regressed out of both sides first. Intervals are percentile bootstraps that redraw whole groups (entities): facts about
one entity are not independent, and redrawing single facts makes intervals too narrow. Reliability of a label is the
mean Spearman of its repeats; no signal can be expected to agree with a label better than about its square root.

Pairs with a NaN on either side are left out. Everything is computed in float64. Randomness comes from an explicit
generator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Values = Float[Tensor, " fact"]


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its interval; NaN where too few facts allow none."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def rank_values(values: Values) -> Values:
    """Ranks from 1 upwards, ties at their mean rank, NaN kept as NaN.

    Example:
        >>> rank_values(torch.tensor([3.0, 1.0, 3.0])).tolist()
        [2.5, 1.0, 2.5]
    """
    ranks = torch.full_like(values, float("nan"), dtype=torch.float64)
    known = ~values.isnan()
    _, inverse, counts = torch.unique(values[known], return_inverse=True, return_counts=True)
    ranks[known] = (counts.cumsum(0) - (counts - 1) / 2).to(torch.float64)[inverse]
    return ranks


def scale_ranks(values: Values) -> Values:
    """Ranks spread evenly over the open interval from 0 to 1: (rank - 1/2) / n; NaN kept as NaN."""
    return (rank_values(values) - 0.5) / max(int((~values.isnan()).sum()), 1)


def correlate(first: Values, second: Values) -> float:
    """Spearman's rank correlation of the pairs known on both sides; NaN for fewer than 3 pairs or a constant side."""
    known = ~(first.isnan() | second.isnan())
    return _pearson(rank_values(first[known]), rank_values(second[known]))


def correlate_partial(first: Values, second: Values, controls: Sequence[Values]) -> float:
    """Spearman's correlation after the ranks of the controls are regressed out of both sides by least squares.

    NaN when fewer than 3 pairs more than controls are known, or when the controls explain one side wholly.
    """
    known = ~torch.stack([first, second, *controls]).isnan().any(0)
    if int(known.sum()) < 3 + len(controls):
        return float("nan")
    ranks = [rank_values(values[known]) for values in (first, second, *controls)]
    design = torch.stack([torch.ones_like(ranks[0]), *ranks[2:]], dim=1)
    residuals = [target - design @ torch.linalg.lstsq(design, target, driver="gelsd").solution for target in ranks[:2]]
    if any(residual.norm() < 1e-6 * target.norm() for residual, target in zip(residuals, ranks, strict=False)):
        return float("nan")
    return _pearson(*residuals)


def bootstrap(
    statistic: Callable[[Int[Tensor, " draw"]], float],
    groups: Sequence[str],
    generator: torch.Generator,
    *,
    n_draws: int = 500,
    level: float = 0.95,
) -> Interval:
    """Interval of a statistic under redrawing whole groups with replacement.

    Args:
        statistic: A number from the rows of a sample; it is also evaluated once on every row in order.
        groups: The group of every row, usually its entity.
        generator: Where the draws come from.
        n_draws: Number of redrawn samples.
        level: Share of the redrawn statistics between the bounds.

    Example:
        >>> x = torch.arange(20.0)
        >>> rows = [str(i) for i in range(20)]
        >>> str(bootstrap(lambda s: correlate(x[s], x[s]), rows, torch.Generator().manual_seed(0)))
        '+1.00 [+1.00, +1.00]'
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    blocks = [torch.tensor(rows) for rows in members.values()]
    estimate = statistic(torch.arange(len(groups)))
    draws = torch.randint(len(blocks), (n_draws, len(blocks)), generator=generator).tolist() if blocks else []
    values = torch.tensor([statistic(torch.cat([blocks[i] for i in draw])) for draw in draws], dtype=torch.float64)
    values = values[~values.isnan()]
    if len(values) < 2:
        return Interval(estimate, float("nan"), float("nan"))
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high)


def measure_reliability(repeats: Sequence[Values]) -> float:
    """Mean Spearman over all pairs of repeats of one label (same facts, other seeds); NaN for fewer than two."""
    return average([correlate(first, second) for first, second in combinations(repeats, 2)])


def average(values: Sequence[float]) -> float:
    """Mean of the known numbers; NaN when none is known."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def average_ranks(labels: Sequence[Values]) -> Values:
    """Mean over labels of the evenly spread ranks of each; a fact unknown to one is averaged over the others."""
    return torch.stack([scale_ranks(label) for label in labels]).nanmean(0)


def _pearson(first: Values, second: Values) -> float:
    if len(first) < 3:
        return float("nan")
    first, second = first - first.mean(), second - second.mean()
    scale = float(first.norm() * second.norm())
    return float("nan") if scale < 1e-12 else max(-1.0, min(1.0, float(first @ second) / scale))
