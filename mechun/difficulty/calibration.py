"""A rank regression: what unlearning did to some facts, foretold from everything measured before.

Features are turned into the share of the anchor facts that lie below (an empirical distribution function), centred;
missing values stand in the middle. Ridge regression on the facts' hardness,

    w = argmin |y - X w|^2 + lambda n |w|^2,

with lambda chosen by cross-validation whose parts share no entity. `EdgeFit` does the same directly on unit-length
edge vectors, in its dual form since there are more edges than facts: CUD with a fitted direction for two anchors.

Trap: features made from labels (CUD, relation ranks) flatter the facts that made them; what is fitted on must be
cross-fitted inside the anchor facts, as `anchors.fit_anchors` does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechun.difficulty.agreement import average, correlate

Values = Float[Tensor, " fact"]
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fitted rank regression.

    Attributes:
        keys: Names of the features.
        weights: One per feature; of the features' shares of facts below, so that they compare in size.
        references: Sorted values of each feature on the anchor facts.
        intercept: Mean hardness of the anchor facts.
        penalty: The chosen lambda.
        inner: Mean Spearman of the cross-validation at that lambda.
    """

    keys: tuple[str, ...]
    weights: Float[Tensor, " feature"]
    references: Mapping[str, Float[Tensor, " anchor"]]
    intercept: float
    penalty: float
    inner: float

    def predict(self, features: Mapping[str, Values]) -> Values:
        """Foretold hardness: 0 the easiest, 1 the hardest of the anchor facts, in expectation."""
        columns = torch.stack([_place(features[key], self.references[key]) for key in self.keys], dim=1)
        return (columns @ self.weights + self.intercept).clamp(0.0, 1.0)


def fit_calibration(
    features: Mapping[str, Values], hardness: Values, groups: Sequence[str], *, parts: int = 5
) -> Calibration:
    """Fit the rank regression on anchor facts.

    Args:
        features: Values of each feature; constant or wholly unknown ones are left out.
        hardness: Labels in [0, 1], the hardest at 1.
        groups: Entity of each fact.
        parts: Parts of the inner cross-validation.
    """
    known = ~hardness.isnan()
    groups = [group for group, keep in zip(groups, known.tolist(), strict=True) if keep]
    usable = {key: values[known].double() for key, values in features.items() if _varies(values[known])}
    references = {key: values[~values.isnan()].sort().values for key, values in usable.items()}
    target = hardness[known].double()
    if not usable:
        return Calibration((), torch.zeros(0, dtype=torch.float64), {}, _mean(target), 0.0, float("nan"))
    columns = torch.stack([_place(values, references[key]) for key, values in usable.items()], dim=1)
    scores = {penalty: _validate(columns, target, groups, penalty, parts) for penalty in PENALTIES}
    penalty = choose_penalty(scores)
    weights = solve_ridge(columns, target - target.mean(), penalty)
    return Calibration(tuple(usable), weights, references, _mean(target), penalty, scores[penalty])


@dataclass(frozen=True, eq=False)
class EdgeFit:
    """A direction in edge space fitted to hardness.

    Attributes:
        direction: Added up over a fact's unit-length edge vector.
        centre: Mean unit-length edge vector of the anchor facts.
        penalty: The chosen lambda.
    """

    direction: Float[Tensor, " edge"]
    centre: Float[Tensor, " edge"]
    penalty: float

    def predict(self, values: Float[Tensor, "example edge"]) -> Float[Tensor, " example"]:
        """Foretold hardness, up to a constant."""
        return (scale_rows(values) - self.centre) @ self.direction


def fit_edges(
    values: Float[Tensor, "example edge"], hardness: Float[Tensor, " example"], groups: Sequence[str], *, parts: int = 5
) -> EdgeFit:
    """Fit hardness on unit-length edge vectors by ridge regression in its dual form."""
    known = ~hardness.isnan()
    groups = [group for group, keep in zip(groups, known.tolist(), strict=True) if keep]
    units, target = scale_rows(values[known]), hardness[known].double()
    centre = units.mean(0)
    rows = units - centre
    gram = rows @ rows.T
    scores = {}
    for penalty in PENALTIES:
        scores[penalty] = _validate_dual(gram, target, groups, penalty, parts)
    penalty = choose_penalty(scores)
    dual = _solve_dual(gram, target - target.mean(), penalty)
    return EdgeFit(rows.T @ dual, centre, penalty)


def scale_rows(values: Float[Tensor, "example edge"]) -> Float[Tensor, "example edge"]:
    """Rows at unit length, in float64; a row of zeros stays."""
    values = values.double()
    return values / values.norm(dim=1, keepdim=True).clamp(min=1e-300)


def solve_ridge(columns: Float[Tensor, "fact feature"], target: Values, penalty: float) -> Float[Tensor, " feature"]:
    """Minimiser of |target - columns w|^2 + penalty n |w|^2."""
    ridge = penalty * len(target) * torch.eye(columns.shape[1], dtype=columns.dtype)
    return torch.linalg.solve(columns.T @ columns + ridge, columns.T @ target)


def choose_penalty(scores: Mapping[float, float]) -> float:
    """The largest penalty within 0.01 of the best cross-validated Spearman; the largest of all when none is known."""
    best = max((score for score in scores.values() if score == score), default=float("nan"))
    good = [penalty for penalty, score in scores.items() if score >= best - 0.01]
    return max(good, default=max(scores))


def assign_parts(groups: Sequence[str], parts: int) -> list[int]:
    """Part of every row, whole groups together, parts of about equal size; the same for the same groups."""
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    filled, place = [0] * max(min(parts, len(sizes)), 1), dict[str, int]()
    for group in sorted(sizes, key=lambda name: (-sizes[name], name)):
        place[group] = filled.index(min(filled))
        filled[place[group]] += sizes[group]
    return [place[group] for group in groups]


def _validate(
    columns: Float[Tensor, "fact feature"], target: Values, groups: Sequence[str], penalty: float, parts: int
) -> float:
    # A linear kernel gives the same predictions as the primal form when the penalty is the same multiple of n.
    return _validate_dual(columns @ columns.T, target, groups, penalty, parts, relative=False)


def _validate_dual(
    gram: Float[Tensor, "fact fact"],
    target: Values,
    groups: Sequence[str],
    penalty: float,
    parts: int,
    relative: bool = True,
) -> float:
    part = torch.tensor(assign_parts(groups, parts))
    found = []
    for number in part.unique().tolist():
        test, train = (part == number).nonzero().flatten(), (part != number).nonzero().flatten()
        if len(train) < 3 or len(test) < 3:
            continue
        mean = target[train].mean()
        dual = _solve_dual(gram[train][:, train], target[train] - mean, penalty, relative=relative)
        found.append(correlate(gram[test][:, train] @ dual, target[test]))
    return average(found)


def _solve_dual(gram: Float[Tensor, "fact fact"], target: Values, penalty: float, *, relative: bool = True) -> Values:
    scale = float(gram.diagonal().mean()) if relative else 1.0
    ridge = penalty * len(target) * max(scale, 1e-12) * torch.eye(len(target), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, target)


def _place(values: Values, reference: Float[Tensor, " anchor"]) -> Values:
    """Share of the reference below each value, ties halved, centred at 0; 0 where unknown."""
    values = values.double().contiguous()
    below = torch.searchsorted(reference, values, right=False) + torch.searchsorted(reference, values, right=True)
    return (below.double() / (2 * max(len(reference), 1)) - 0.5).masked_fill(values.isnan(), 0.0)


def _varies(values: Values) -> bool:
    known = values[~values.isnan()]
    return len(known) > 2 and float(known.max()) > float(known.min())


def _mean(values: Values) -> float:
    return float(values.mean()) if len(values) else 0.5
