"""Tests of `aps_jax.scores.estimates`."""

import numpy as np
import pytest
import references_statistics
import scipy.stats

from aps_jax.scores import estimates as estimates_lib

AGGREGATES = (
    "mean",
    "median",
    "interquartile_mean",
    "optimality_gap",
    "superhuman_count",
)

# Five runs of four games, and three of a rival.
RUNS = np.array(
    [
        [0.12, 0.45, -0.05, 0.60],
        [0.25, 0.90, 0.00, 0.75],
        [0.08, 2.10, 0.33, 0.55],
        [0.31, 1.10, -0.02, 0.80],
        [0.17, 1.70, 0.04, 0.60],
    ]
)
RIVAL = np.array(
    [
        [0.10, 1.20, 0.01, 0.40],
        [0.20, 1.10, -0.05, 0.60],
        [0.12, 0.80, 0.00, 0.50],
    ]
)
# What rliable 1.2.0 gives for them: value, low, high (50,000 resamples; 20,000 for the
# last).
RLIABLE = {
    "mean": (0.539, 0.408, 0.6745),
    "median": (0.423, 0.369, 0.481),
    "interquartile_mean": (0.413, 0.341, 0.493),
    "optimality_gap": (0.556, 0.4965, 0.6215),
}
RLIABLE_IMPROVEMENT = (0.66666667, 0.475, 0.84166667)


def by_game(matrix):
    """Turns a matrix of runs times games into the groups that the module takes."""
    return list(matrix.T)


def make_scores(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(0.5, 0.6, size=size) for size in sizes]


@pytest.mark.parametrize("name", AGGREGATES)
@pytest.mark.parametrize(
    "sizes", [(1,), (2,), (3, 3), (1, 4, 2), (5,) * 7, (2, 9, 3, 1, 4, 6)]
)
def test_matches_slow_reference(name, sizes):
    scores = make_scores(sizes, seed=len(sizes))
    np.testing.assert_allclose(
        getattr(estimates_lib, name)(scores),
        getattr(references_statistics, name)(scores),
        rtol=1e-12,
        atol=1e-12,
    )


def test_hand_computed():
    # Means of the games: (0 + 2) / 2 = 1, 0.5, (0.1 + 0.2 + 0.6) / 3 = 0.3.
    scores = [np.array([0.0, 2.0]), np.array([0.5]), np.array([0.6, 0.1, 0.2])]
    assert estimates_lib.mean(scores) == pytest.approx((1.0 + 0.5 + 0.3) / 3)
    assert estimates_lib.median(scores) == pytest.approx(0.5)
    # Sorted runs 0, 0.1, 0.2, 0.5, 0.6, 2: int(6 / 4) = 1 is dropped at either end.
    assert estimates_lib.interquartile_mean(scores) == pytest.approx(
        (0.1 + 0.2 + 0.5 + 0.6) / 4
    )
    # Runs beyond 1 count as 1: gaps of the games (1 + 0) / 2, 0.5, 0.7.
    assert estimates_lib.optimality_gap(scores) == pytest.approx((0.5 + 0.5 + 0.7) / 3)
    # A mean of exactly 1 is at human level.
    assert estimates_lib.superhuman_count(scores) == 1


def test_probability_of_improvement_by_hand():
    # Pairs of the first game: 1 > 0, 1 = 1, 3 > 0, 3 > 1, that is 3.5 of 4; of the
    # second: 0 < 2, that is 0 of 1.
    x = [np.array([1.0, 3.0]), np.array([0.0])]
    y = [np.array([0.0, 1.0]), np.array([2.0])]
    assert estimates_lib.probability_of_improvement(x, y) == pytest.approx(3.5 / 4 / 2)
    assert estimates_lib.probability_of_improvement(y, x) == pytest.approx(
        1.0 - 3.5 / 4 / 2
    )
    assert estimates_lib.probability_of_improvement(x, x) == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_probability_of_improvement_matches_references(seed):
    x = make_scores((3, 1, 5), seed=seed)
    y = make_scores((2, 4, 5), seed=seed + 10)
    y[0][0] = x[0][1]  # A tie.
    value = estimates_lib.probability_of_improvement(x, y)
    assert value == pytest.approx(
        references_statistics.probability_of_improvement(x, y), abs=1e-12
    )
    u = [
        scipy.stats.mannwhitneyu(a, b).statistic / (a.size * b.size)
        for a, b in zip(x, y, strict=True)
    ]
    assert value == pytest.approx(np.mean(u), abs=1e-12)


def test_probability_of_improvement_needs_the_same_games():
    x = make_scores((2, 2))
    with pytest.raises(ValueError, match="2 and 1 games"):
        estimates_lib.probability_of_improvement(x, x[:1])


@pytest.mark.parametrize("name", AGGREGATES)
def test_order_of_runs_and_games_does_not_matter(name):
    scores = make_scores((3, 1, 5, 2))
    shuffled = [np.flip(game) for game in reversed(scores)]
    aggregate = getattr(estimates_lib, name)
    np.testing.assert_allclose(aggregate(shuffled), aggregate(scores), rtol=1e-12)


@pytest.mark.parametrize("name", ["mean", "median", "interquartile_mean"])
def test_scaling_and_shifting_scores_scales_and_shifts_the_aggregate(name):
    scores = make_scores((3, 1, 5, 2))
    aggregate = getattr(estimates_lib, name)
    moved = aggregate([3.0 * game - 2.0 for game in scores])
    np.testing.assert_allclose(moved, 3.0 * aggregate(scores) - 2.0, rtol=1e-12)


@pytest.mark.parametrize("name", AGGREGATES)
def test_leading_axes_are_resamples(name):
    resamples = [np.stack([game, game + 1.0, -game]) for game in make_scores((3, 1, 5))]
    aggregate = getattr(estimates_lib, name)
    values = aggregate(resamples)
    assert values.shape == (3,)
    for index in range(3):
        alone = aggregate([game[index] for game in resamples])
        np.testing.assert_allclose(values[index], alone, rtol=1e-12)


def test_bootstrap_by_hand():
    # Two runs, 0 and 1: a resample's mean is 0, 1/2 or 1 with probability 1/4, 1/2,
    # 1/4, so the 2.5th and 97.5th percentiles are 0 and 1.
    group = [np.array([0.0, 1.0])]
    wide = estimates_lib.bootstrap(estimates_lib.mean, group, seed=0)
    assert wide == (0.5, 0.0, 1.0)


def test_bootstrap_keeps_to_the_strata():
    # Games differ, runs of one game do not: redrawing runs within games changes
    # nothing, redrawing over games would.
    group = [np.full(3, 0.2), np.full(3, 5.0)]
    estimate = estimates_lib.bootstrap(estimates_lib.mean, group, seed=0)
    np.testing.assert_allclose(estimate, [2.6, 2.6, 2.6])


@pytest.mark.parametrize("name", ["mean", "median", "interquartile_mean"])
def test_bootstrap_matches_all_possible_resamples(name):
    scores = [np.array([0.0, 1.0, 5.0]), np.array([0.3, 2.2, 0.9])]
    exact = references_statistics.exact_bootstrap(
        getattr(references_statistics, name), scores
    )
    estimate = estimates_lib.bootstrap(
        getattr(estimates_lib, name),
        scores,
        seed=1,
        num_resamples=20_000,
    )
    # The share of all resamples below each end is what the end stands for.
    slack = 0.01
    for end, share in ((estimate.low, 0.025), (estimate.high, 0.975)):
        assert np.mean(exact < end - 1e-9) <= share + slack
        assert np.mean(exact <= end + 1e-9) >= share - slack


def test_bootstrap_matches_scipy():
    game = make_scores((8,))[0]
    theirs = scipy.stats.bootstrap(
        (game,), np.mean, method="percentile", n_resamples=20_000, rng=3
    ).confidence_interval
    ours = estimates_lib.bootstrap(
        estimates_lib.mean, [game], seed=0, num_resamples=20_000
    )
    np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.01)


def test_groups_are_resampled_independently():
    # The same runs on both sides: resampled together, the gain would always be 0.
    group = make_scores((6,))

    def gain(ours, theirs):
        return estimates_lib.mean(ours) - estimates_lib.mean(theirs)

    estimate = estimates_lib.bootstrap(gain, group, group, seed=0)
    assert estimate.value == 0.0
    assert estimate.low < -0.1 < 0.1 < estimate.high


def test_bootstrap_of_a_vector_statistic_is_pointwise():
    scores = make_scores((4, 5))
    functions = estimates_lib.mean, estimates_lib.median
    both = estimates_lib.bootstrap(
        lambda group: np.stack([f(group) for f in functions], axis=-1), scores, seed=0
    )
    each = [estimates_lib.bootstrap(f, scores, seed=0) for f in functions]
    np.testing.assert_allclose(np.transpose(both), each)


def test_equal_seeds_give_equal_intervals():
    scores = make_scores((4, 5))
    first, again, other = (
        estimates_lib.bootstrap(estimates_lib.mean, scores, seed=seed, num_resamples=50)
        for seed in (7, 7, 8)
    )
    assert first == again
    assert first.value == other.value
    assert first[1:] != other[1:]


def test_bootstrap_takes_plain_lists_and_a_single_resample():
    estimate = estimates_lib.bootstrap(
        estimates_lib.mean, [[0, 1], [2, 4, 6]], seed=0, num_resamples=1
    )
    assert estimate.value == pytest.approx(2.25)
    assert estimate.low == estimate.high


def test_a_single_run_gives_no_interval():
    scores = [np.array([0.5, 0.7]), np.array([0.1])]
    estimate = estimates_lib.bootstrap(estimates_lib.mean, scores, seed=0)
    assert estimate.value == pytest.approx(0.35)
    assert np.isnan(estimate.low) and np.isnan(estimate.high)
    assert isinstance(estimate.low, float)


@pytest.mark.parametrize(
    "group, options, message",
    [
        ([], {}, "at least one game"),
        ([np.array([])], {}, r"at least one run, got \(0,\)"),
        ([np.ones((2, 2))], {}, r"got \(2, 2\)"),
        ([np.array([0.0, np.nan])], {}, "finite"),
        ([np.array([0.0, np.inf])], {}, "finite"),
        ([np.ones(2)], {"num_resamples": 0}, "at least 1, got 0"),
    ],
)
def test_bootstrap_refuses(group, options, message):
    with pytest.raises(ValueError, match=message):
        estimates_lib.bootstrap(estimates_lib.mean, group, seed=0, **options)


@pytest.mark.parametrize("num_seeds, low, high", [(3, 0.70, 0.80), (10, 0.86, 0.94)])
def test_interval_covers_as_often_as_documented(num_seeds, low, high):
    # docs/protocol.md: 0.75 with 3 seeds, 0.90 with 10, of one game.
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(500):
        runs = rng.normal(size=num_seeds)
        estimate = estimates_lib.bootstrap(
            estimates_lib.mean, [runs], seed=seed, num_resamples=400
        )
        hits += estimate.low <= 0.0 <= estimate.high
    assert low < hits / 500 < high


def test_matches_rliable():
    for name, theirs in RLIABLE.items():
        ours = estimates_lib.bootstrap(
            getattr(estimates_lib, name), by_game(RUNS), seed=0
        )
        np.testing.assert_allclose(ours.value, theirs[0], rtol=1e-6)
        np.testing.assert_allclose(ours[1:], theirs[1:], atol=0.012)


def test_comparison_matches_rliable():
    ours = estimates_lib.bootstrap(
        estimates_lib.probability_of_improvement, by_game(RUNS), by_game(RIVAL), seed=0
    )
    np.testing.assert_allclose(ours, RLIABLE_IMPROVEMENT, atol=0.018)
    assert ours.value == pytest.approx(RLIABLE_IMPROVEMENT[0])
