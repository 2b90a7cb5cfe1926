import pytest
import torch
from scipy import stats

from mechun.difficulty.agreement import (
    average_ranks,
    bootstrap,
    correlate,
    correlate_partial,
    measure_reliability,
    rank_values,
    scale_ranks,
)
from mechun.difficulty.resampling import Trial, average_trials, correlate_weighted, draw_entities, make_interval

NAN = float("nan")


def draw(n: int, seed: int, ties: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator, dtype=torch.float64)
    return (values * 2).round() if ties else values


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_and_spearman_are_those_of_scipy(ties: bool, seed: int):
    first, second = draw(40, seed, ties), draw(40, seed + 10, ties)
    assert torch.equal(rank_values(first), torch.tensor(stats.rankdata(first.numpy())))
    assert correlate(first, second) == pytest.approx(stats.spearmanr(first.numpy(), second.numpy()).statistic)


def test_unknown_values_stay_unknown_and_are_left_out():
    first, second = torch.tensor([1.0, NAN, 3.0, 2.0]), torch.tensor([1.0, 5.0, 3.0, 2.0])
    assert rank_values(first).isnan().tolist() == [False, True, False, False]
    assert correlate(first, second) == pytest.approx(1.0)
    assert correlate(first[:2], second[:2]) != correlate(first[:2], second[:2]), "two pairs say nothing"
    assert correlate(torch.ones(5), torch.arange(5.0)) != 0


def test_scaled_ranks_lie_evenly_inside_the_unit_interval():
    assert scale_ranks(torch.tensor([3.0, 1.0, 2.0, 4.0])).tolist() == [0.625, 0.125, 0.375, 0.875]
    joined = average_ranks([torch.tensor([1.0, 2.0]), torch.tensor([NAN, 5.0])])
    assert joined.tolist() == [0.25, 0.625]


def test_a_partial_correlation_removes_what_the_control_explains():
    cause = draw(400, 0)
    first, second = cause + 0.3 * draw(400, 1), cause + 0.3 * draw(400, 2)
    assert correlate(first, second) > 0.8
    assert abs(correlate_partial(first, second, [cause])) < 0.15
    own = draw(400, 3)
    assert correlate_partial(cause + own, own - cause, [cause]) > 0.8
    unknown = correlate_partial(cause, second, [cause])
    assert unknown != unknown


def test_the_bootstrap_redraws_whole_groups():
    groups = [str(i // 10) for i in range(100)]
    effect = draw(10, 4).repeat_interleave(10)
    first, second = effect + 0.1 * draw(100, 5), effect + 0.1 * draw(100, 6)

    def width(names: list[str]) -> float:
        found = bootstrap(lambda rows: correlate(first[rows], second[rows]), names, torch.Generator().manual_seed(0))
        assert found.low <= found.estimate <= found.high
        return found.high - found.low

    assert width(groups) > 1.5 * width([str(i) for i in range(100)])


def test_reliability_is_the_mean_over_pairs_of_repeats():
    base = torch.arange(6.0)
    assert measure_reliability([base, base, base.flip(0)]) == pytest.approx(-1 / 3)
    one = measure_reliability([base])
    assert one != one


def test_weights_of_one_give_the_plain_correlation_and_equal_guesses_no_gap():
    first, second = draw(30, 7), draw(30, 8)
    plain = correlate_weighted(first, second, torch.ones(1, 30, dtype=torch.float64))
    assert float(plain[0]) == pytest.approx(correlate(first, second))
    names = tuple(str(i) for i in range(30))
    trial = Trial(names, names, {"a": first, "b": first}, {"t": second})
    weights = draw_entities([trial, trial], torch.Generator().manual_seed(0), 200)
    assert torch.equal(weights[0], weights[1])
    assert (weights[0].sum(1) == 30).all()
    (one, draws), (other, more) = (average_trials([trial, trial], key, "t", weights) for key in "ab")
    gap = make_interval(one - other, draws - more)
    assert (gap.estimate, gap.low, gap.high) == (0.0, 0.0, 0.0)
    interval = make_interval(one, draws)
    assert interval.low < one < interval.high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for seed in range(40):
        shared = draw(60, 100 + seed)
        first, second = shared + draw(60, 200 + seed), shared + draw(60, 300 + seed)
        names = tuple(str(i) for i in range(60))
        trial = Trial(names, names, {"a": first}, {"t": second})
        weights = draw_entities([trial], torch.Generator().manual_seed(seed), 200)
        interval = make_interval(*average_trials([trial], "a", "t", weights))
        hits += interval.low <= 0.483 <= interval.high
    assert 32 <= hits <= 40, "Spearman of two normals with correlation one half is 0.483"
