import pytest
import torch

from mechun.difficulty.agreement import correlate, scale_ranks
from mechun.difficulty.calibration import assign_parts, choose_penalty, fit_calibration, fit_edges

NAN = float("nan")


def draw(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_several_weak_signals_together_beat_each_alone(seed: int):
    truth = draw(240, 10 * seed)
    features = {f"s{k}": (truth + 1.5 * draw(240, 10 * seed + k + 1)).exp() for k in range(4)}
    train, test = slice(0, 120), slice(120, 240)
    groups = [str(i // 6) for i in range(120)]
    fitted = fit_calibration({k: v[train] for k, v in features.items()}, scale_ranks(truth[train]), groups)
    found = correlate(fitted.predict({k: v[test] for k, v in features.items()}), truth[test])
    assert found > max(correlate(v[test], truth[test]) for v in features.values()) + 0.02
    assert ((fitted.predict(features) >= 0) & (fitted.predict(features) <= 1)).all()


def test_signals_of_nothing_are_shrunk_away():
    features = {f"s{k}": draw(60, k) for k in range(12)}
    hardness = scale_ranks(draw(60, 99))
    fitted = fit_calibration(features, hardness, [str(i // 5) for i in range(60)])
    known = fit_calibration({"truth": hardness}, hardness, [str(i // 5) for i in range(60)])
    assert float(fitted.weights.norm()) < 0.5 * float(known.weights.norm())


def test_unknown_and_constant_features_do_no_harm():
    truth = draw(60, 0)
    holes = truth.clone()
    holes[::7] = NAN
    features = {"known": holes, "constant": torch.ones(60), "nothing": torch.full((60,), NAN)}
    fitted = fit_calibration(features, scale_ranks(truth), [str(i) for i in range(60)])
    assert fitted.keys == ("known",)
    assert not fitted.predict(features).isnan().any()
    assert correlate(fitted.predict(features), truth) > 0.8


def test_unlabelled_facts_are_left_out_and_no_feature_means_the_mean():
    hardness = torch.tensor([0.2, 0.4, NAN, 0.6], dtype=torch.float64)
    fitted = fit_calibration({}, hardness, list("abcd"))
    assert fitted.intercept == pytest.approx(0.4)


@pytest.mark.parametrize("seed", range(3))
def test_a_direction_in_edge_space_is_found(seed: int):
    direction = draw(300, 500 + seed)
    values = torch.stack([draw(300, 1000 * (seed + 1) + i) for i in range(160)])
    truth = values @ direction
    fitted = fit_edges(values[:120], scale_ranks(truth[:120]), [str(i) for i in range(120)])
    assert correlate(fitted.predict(values[120:]), truth[120:]) > 0.3
    shuffled = truth[:120][torch.randperm(120, generator=torch.Generator().manual_seed(seed))]
    empty = fit_edges(values[:120], scale_ranks(shuffled), [str(i) for i in range(120)])
    assert abs(correlate(empty.predict(values[120:]), truth[120:])) < 0.4


def test_parts_keep_groups_together():
    groups = [str(i // 4) for i in range(40)]
    parts = assign_parts(groups, 5)
    assert all(len({p for p, g in zip(parts, groups, strict=True) if g == name}) == 1 for name in set(groups))
    assert {parts.count(p) for p in range(5)} == {8}
    assert assign_parts(["a", "a"], 5) == [0, 0]


def test_the_largest_penalty_that_does_no_harm_wins():
    assert choose_penalty({0.1: 0.5, 1.0: 0.5049, 10.0: 0.7}) == 1.0
    assert choose_penalty({0.1: NAN, 1.0: NAN}) == 1.0


def test_a_single_true_signal_is_followed_closely():
    hardness = scale_ranks(draw(60, 3))
    fitted = fit_calibration({"truth": hardness}, hardness, [str(i) for i in range(60)])
    assert float((fitted.predict({"truth": hardness}) - hardness).abs().max()) < 0.05
