"""Slow float64 versions of `aps_jax.ops.rewards`."""

import math

import numpy as np


def decayed_mean(batches, decay):
    """Weighs every finite distance by `decay` to the power of the updates after it."""
    total, weight = 0.0, 0.0
    for age, batch in enumerate(reversed(batches)):
        for distance in np.float64(batch).ravel():
            if math.isfinite(distance):
                total += decay**age * distance
                weight += decay**age
    return weight, total / weight if weight else 0.0


def particle_entropy_reward(distances, sigma, c, clip):
    """Averages over the neighbours that exist, one at a time."""
    terms = [
        max(float(distance) / float(sigma) - clip, 0.0)
        for distance in distances
        if math.isfinite(distance) and sigma > 0
    ]
    return math.log(c + (sum(terms) / len(terms) if terms else 0.0))
