"""Slow, obvious float64 versions of what `aps_jax.scores.estimates` computes."""

import itertools

import numpy as np


def mean(scores):
    return float(np.mean([np.mean(np.float64(game)) for game in scores]))


def median(scores):
    means = sorted(np.mean(np.float64(game)) for game in scores)
    middle = len(means) // 2
    if len(means) % 2:
        return float(means[middle])
    return float((means[middle - 1] + means[middle]) / 2)


def interquartile_mean(scores):
    """Sorts all runs, and drops a quarter (rounded down) at either end one by one."""
    runs = sorted(float(run) for game in scores for run in game)
    for _ in range(int(0.25 * len(runs))):  # The range is fixed before any is dropped.
        del runs[0], runs[-1]
    return sum(runs) / len(runs)


def optimality_gap(scores):
    gaps = []
    for game in scores:
        short = [max(1.0 - float(run), 0.0) for run in game]
        gaps.append(sum(short) / len(short))
    return sum(gaps) / len(gaps)


def superhuman_count(scores):
    return sum(np.mean(np.float64(game)) >= 1.0 for game in scores)


def probability_of_improvement(scores_x, scores_y):
    by_game = []
    for x, y in zip(scores_x, scores_y, strict=True):
        wins = 0.0
        for a, b in itertools.product(x, y):
            wins += 1.0 if a > b else 0.5 if a == b else 0.0
        by_game.append(wins / (len(x) * len(y)))
    return sum(by_game) / len(by_game)


def exact_bootstrap(statistic, scores):
    """Returns the statistic of every possible resample, all equally likely."""
    draws = [list(itertools.product(game, repeat=len(game))) for game in scores]
    return np.array([statistic(resample) for resample in itertools.product(*draws)])
