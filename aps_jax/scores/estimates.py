"""Aggregate scores over games and seeds, with stratified bootstrap intervals.

The estimators of rliable, Agarwal et al. 2021, https://arxiv.org/abs/2108.13264, in
NumPy. Letters: `G` games, `R` runs (seeds) of one game, `S` resamples, `N` values.

`scores` are always `G` arrays `[..., R]`; `R` may differ between games. Leading axes
are bootstrap resamples, so that one function gives the estimate and its resampled
values: `[...]`, in the unit of the scores unless the function says otherwise.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Scores = Sequence[np.ndarray]


class Estimate(NamedTuple):
    """A point estimate and the ends of its interval, in the unit of the statistic.

    All are float64, `[]` (NumPy scalars) or `[N]`. The ends are NaN where the data hold
    no information about the spread between runs.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean(scores: Scores) -> np.ndarray:
    """Computes the mean over games of each game's mean over runs."""
    return _game_means(scores).mean(axis=-1)


def median(scores: Scores) -> np.ndarray:
    """Computes the median over games of each game's mean over runs."""
    return np.median(_game_means(scores), axis=-1)


def interquartile_mean(scores: Scores) -> np.ndarray:
    """Computes the mean of the middle half of all runs of all games.

    rliable, Sec. 4.3, https://arxiv.org/abs/2108.13264: of n runs, `int(n / 4)` are
    dropped at either end. Runs are pooled, so a game with more runs weighs more.
    """
    pooled = np.sort(np.concatenate(scores, axis=-1), axis=-1)
    num_runs = pooled.shape[-1]
    num_dropped = num_runs // 4
    return pooled[..., num_dropped : num_runs - num_dropped].mean(axis=-1)


def optimality_gap(scores: Scores) -> np.ndarray:
    """Computes how far runs fall short of 1, the human score, on average; 0 is best.

    rliable, Sec. 4.3, https://arxiv.org/abs/2108.13264: `1 - mean(min(score, 1))`,
    games weighing equally.
    """
    return 1.0 - mean([np.minimum(game, 1.0) for game in scores])


def superhuman_count(scores: Scores) -> np.ndarray:
    """Counts the games whose mean over runs is at least 1, the human score."""
    return np.sum(_game_means(scores) >= 1.0, axis=-1)


def probability_of_improvement(scores_x: Scores, scores_y: Scores) -> np.ndarray:
    """Computes how likely a run of X beats a run of Y in a game drawn at random.

    rliable, Sec. 4.3, https://arxiv.org/abs/2108.13264: the mean over games of
    `P(x > y) + P(x = y) / 2` over all pairs of runs (Mann and Whitney's U over its
    largest value). 0.5 says that neither is better.

    Args:
      scores_x: `G` arrays `[..., R]`.
      scores_y: `G` arrays `[..., R']` of the same games in the same order.

    Returns:
      `[...]` in [0, 1].

    Raises:
      ValueError: The numbers of games differ.
    """
    if len(scores_x) != len(scores_y):
        given = f"{len(scores_x)} and {len(scores_y)} games"
        raise ValueError(f"X and Y must hold the same games, got {given}.")
    by_game = []
    for x, y in zip(scores_x, scores_y, strict=True):
        pairs_x, pairs_y = x[..., :, np.newaxis], y[..., np.newaxis, :]
        wins = (pairs_x > pairs_y) + 0.5 * (pairs_x == pairs_y)
        by_game.append(wins.mean(axis=(-2, -1)))
    return np.mean(by_game, axis=0)


def bootstrap(
    statistic: Callable[..., np.ndarray],
    *groups: Sequence[npt.ArrayLike],
    seed: int,
    num_resamples: int = 10_000,
) -> Estimate:
    """Estimates a statistic with its 95 % stratified bootstrap percentile interval.

    rliable, Sec. 4.1, https://arxiv.org/abs/2108.13264: the runs of each game are drawn
    with replacement from that game's runs, in each group independently; games are never
    redrawn, so the interval tells what other seeds would give on the same games.

    A game with a single run would be redrawn unchanged, and an interval of width zero
    would claim certainty. The ends are then NaN.

    Args:
      statistic: Maps each group, `G` arrays `[..., R]`, to `[...]` or `[..., N]`.
      *groups: Scores `[R]` of each game, for one group or for several to compare.
      seed: Root of the resampling; equal seeds give equal intervals.
      num_resamples: Resamples `S` behind the interval.

    Returns:
      The statistic of the scores themselves, and the interval's ends in its shape.

    Raises:
      ValueError: A group is empty, a game has no run, a score is not finite,
        or `num_resamples` is not positive.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}.")
    arrays = [[np.asarray(game, np.float64) for game in group] for group in groups]
    for group in arrays:
        _check_group(group)

    value = statistic(*arrays)
    if any(game.size < 2 for group in arrays for game in group):
        unknown = np.full(np.shape(value), np.nan)[()]  # A scalar for a scalar.
        return Estimate(value, unknown, unknown)
    rng = np.random.default_rng(seed)
    resampled = [
        [game[rng.integers(game.size, size=(num_resamples, game.size))] for game in g]
        for g in arrays
    ]
    low, high = np.percentile(statistic(*resampled), [2.5, 97.5], axis=0)
    return Estimate(value, low, high)


def _game_means(scores: Scores) -> np.ndarray:
    """Returns `[..., G]`, the mean over runs of each game."""
    return np.stack([game.mean(axis=-1) for game in scores], axis=-1)


def _check_group(group: Scores) -> None:
    if not group:
        raise ValueError("A group must hold at least one game.")
    for game in group:
        if game.ndim != 1 or not game.size:
            shape = game.shape
            raise ValueError(
                f"Each game needs a vector of at least one run, got {shape}."
            )
        if not np.all(np.isfinite(game)):
            raise ValueError(f"Scores must be finite, got {game}.")
