"""A rank regression: what unlearning did to some facts, foretold from everything measured before.

Features are turned into the share of the anchor facts that lie below (an empirical distribution function), centred;
missing values stand in the middle. Ridge regression on the facts' hardness with weights that cannot be negative,

    w = argmin over w >= 0 of |y - X w|^2 + lambda n s |w|^2,   s = mean squared length of a row of X,

since every signal comes with the direction that its paper states: on some sixty facts a free sign mostly fits noise.
Lambda is chosen by the squared error of a cross-validation whose parts share no entity. `EdgeFit` is plain ridge
regression on unit-length edge vectors: CUD with a fitted direction in the place of two anchors.

Trap: features made from labels (CUD, relation ranks) flatter the facts that made them; what is fitted on must be
cross-fitted inside the anchor facts, as `anchors.fit_anchors` does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechun.difficulty.agreement import average, correlate

Values = Float[Tensor, " fact"]
Columns = Float[Tensor, "fact feature"]
Solver = Callable[[Columns, Values, float], Float[Tensor, " feature"]]
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fitted rank regression.

    Attributes:
        keys: Names of the features.
        weights: One per feature, at least 0; of shares of facts below, so that they compare in size.
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
        features: Values of each feature, larger for harder facts; constant or wholly unknown ones are left out.
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
    found = {penalty: _validate(columns, target, groups, solve_ridge, penalty, parts) for penalty in PENALTIES}
    penalty = choose_penalty({key: error for key, (error, _) in found.items()})
    weights = solve_ridge(columns, target - target.mean(), penalty)
    return Calibration(tuple(usable), weights, references, _mean(target), penalty, found[penalty][1])


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
    errors = {penalty: _validate(rows, target, groups, solve_free, penalty, parts)[0] for penalty in PENALTIES}
    penalty = choose_penalty(errors)
    return EdgeFit(solve_free(rows, target - target.mean(), penalty), centre, penalty)


def scale_rows(values: Float[Tensor, "example edge"]) -> Float[Tensor, "example edge"]:
    """Rows at unit length, in float64; a row of zeros stays."""
    values = values.double()
    return values / values.norm(dim=1, keepdim=True).clamp(min=1e-300)


def choose_penalty(errors: Mapping[float, float]) -> float:
    """The largest penalty whose cross-validated squared error is within 1% of the least; of all if none is known."""
    least = min((error for error in errors.values() if error == error), default=float("nan"))
    return max((penalty for penalty, error in errors.items() if error <= 1.01 * least), default=max(errors))


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


def solve_ridge(columns: Columns, target: Values, penalty: float) -> Float[Tensor, " feature"]:
    """Ridge regression with weights that cannot be negative; the penalty is relative to facts and row lengths."""
    import numpy as np
    from scipy.optimize import nnls

    width = columns.shape[1]
    pull = (penalty * len(target) * _measure_scale(columns)) ** 0.5 * np.eye(width)
    sides = (np.vstack([columns.numpy(), pull]), np.concatenate([target.numpy(), np.zeros(width)]))
    return torch.from_numpy(nnls(*sides)[0])


def solve_free(columns: Columns, target: Values, penalty: float) -> Float[Tensor, " feature"]:
    """Ridge regression with free weights, in its dual form: there may be more features than facts."""
    ridge = penalty * len(target) * _measure_scale(columns) * torch.eye(len(target), dtype=columns.dtype)
    return columns.T @ torch.linalg.solve(columns @ columns.T + ridge, target)


def _measure_scale(columns: Columns) -> float:
    return max(float(columns.square().sum(1).mean()), 1e-12)


def _validate(
    columns: Columns, target: Values, groups: Sequence[str], solve: Solver, penalty: float, parts: int
) -> tuple[float, float]:
    """Mean squared error and mean Spearman of predictions for parts that were left out."""
    part = torch.tensor(assign_parts(groups, parts))
    errors, found = [], []
    for number in part.unique().tolist():
        test, train = (part == number).nonzero().flatten(), (part != number).nonzero().flatten()
        if len(train) < 3 or len(test) < 3:
            continue
        mean = target[train].mean()
        guess = columns[test] @ solve(columns[train], target[train] - mean, penalty) + mean
        errors.append(float((guess - target[test]).square().mean()))
        found.append(correlate(guess, target[test]))
    return average(errors), average(found)


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
