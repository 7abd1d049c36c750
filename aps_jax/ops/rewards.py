"""The intrinsic reward: see new states (particle entropy) and obey a task (skill).

`r = skill_weight * r_skill + entropy_weight * r_entropy`. APS weighs the two (1, 1),
VISR (1, 0), and an agent driven by entropy alone, as in APT, (0, 1). All functions but
those of the running mean are written for one state: `jax.vmap` them over a batch. What
is not a number shows in the result. Results are float32 or wider (`precision.widen`).

Letters: `D` feature dimension, `k` nearest neighbours.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from aps_jax.ops import precision
from aps_jax.types import Array


class DistanceScale(NamedTuple):
    """The running mean of the distances to the nearest neighbours."""

    weight: Array  # [] float, number of distances behind the mean, decayed.
    mean: Array  # [] float, in units of the features; 0 before any distance.


def init_distance_scale() -> DistanceScale:
    """Returns the scale before any distance was seen: weight 0, mean 0."""
    return DistanceScale(weight=jnp.zeros(()), mean=jnp.zeros(()))


def update_distance_scale(
    scale: DistanceScale, distances: Array, *, decay: float = 0.99
) -> DistanceScale:
    """Adds a batch of distances to their decaying running mean.

    `weight' = decay * weight + count` and `mean' = mean + sum(d - mean) / weight'`:
    each update makes all earlier ones count `decay` times as much. With `decay = 1`
    this is the mean of all distances ever seen, however they were split into batches.

    The public code divides by a running variance that never forgets; a mean has the
    units of a distance, so that the reward does not depend on the norm of the features,
    and decay lets it follow them when that norm drifts.

    Args:
      scale: the mean so far.
      distances: `[..., k]` float, non-negative. Entries that are +inf stand for a
        neighbour that does not exist, and do not count.
      decay: in [0, 1], per update.

    Returns:
      The mean with the batch included; unchanged but for its decayed weight if the
      batch has no neighbour.
    """
    chex.assert_rank([*scale], 0)
    chex.assert_type([*scale, distances], float)

    weight, mean, distances, kept = precision.widen(*scale, distances, decay)
    exists = distances != jnp.inf
    # Deviations from the mean are small once it is known, and summed row by row: so
    # float32 keeps their sum exact to a few units in the last place.
    deviations = jnp.where(exists, distances - mean, 0.0)
    deviation = jnp.sum(jnp.sum(deviations, axis=-1))
    weight = kept * weight + jnp.sum(exists, dtype=mean.dtype)
    mean = mean + deviation / jnp.where(weight == 0, 1.0, weight)
    return DistanceScale(weight=weight, mean=mean)


def particle_entropy_reward(
    distances: Array, sigma: Array, *, c: float = 1.0, clip: float = 1e-4
) -> jax.Array:
    """Rewards a state for being far from its k nearest neighbours among the particles.

    `log(c + (1/k) * sum_j max(d_j / sigma - clip, 0))`: a particle-based estimate of
    the entropy of the state distribution, up to constants (APT,
    https://arxiv.org/abs/2103.04551, eq. 5; APS, https://arxiv.org/abs/2108.13956,
    section 4.2). The mean is over the k distances, not over their powers of `D` as in
    the theory: both papers found that more stable.

    Args:
      distances: `[k]` float, to the nearest particles, the state itself excluded.
        Entries that are +inf stand for a neighbour that does not exist, and do not
        count.
      sigma: `[]` float, the running mean of the distances.
      c: added to the mean before the logarithm; 1 keeps the reward at least 0.
      clip: relative distances up to this one count as 0.

    Returns:
      `[]` float; near log(c + 1) where the distances are as usual. It is `log(c)` where
      no neighbour exists or `sigma` is 0, that is when all particles coincide.
    """
    chex.assert_rank([distances, sigma], [1, 0])
    chex.assert_type([distances, sigma], float)

    distances, sigma = precision.widen(distances, sigma)
    # +inf is replaced before the arithmetic, not after it: the gradient stays finite.
    is_nan = jnp.isnan(distances) | jnp.isnan(sigma)
    counts = ((distances != jnp.inf) & (sigma > 0)) | is_nan
    relative = jnp.where(counts, distances, 0.0) / jnp.where(sigma <= 0, 1.0, sigma)
    novelty = jnp.where(counts, jnp.maximum(relative - clip, 0.0), 0.0)
    num_neighbors = jnp.maximum(jnp.sum(counts, dtype=sigma.dtype), 1.0)
    return jnp.log(c + jnp.sum(novelty) / num_neighbors)


def skill_reward(phi_t: Array, w: Array) -> jax.Array:
    """Rewards the features reached for pointing where the task does, `phi(s_t)^T w`.

    Up to constants the log-likelihood of the task under a von Mises-Fisher distribution
    around the features, which bounds -H(s|w) (APS, https://arxiv.org/abs/2108.13956,
    section 4.3). The features are those of the state that the action led to, as in VISR
    (https://arxiv.org/abs/1906.05030).

    Args:
      phi_t: `[D]` float, unit features of the state reached.
      w: `[D]` float, unit task vector that was followed.

    Returns:
      `[]` float in [-1, 1].
    """
    chex.assert_rank([phi_t, w], 1)
    chex.assert_type([phi_t, w], float)
    chex.assert_equal_shape([phi_t, w])

    phi_t, w = precision.widen(phi_t, w)
    return jnp.sum(phi_t * w)


def intrinsic_reward(
    r_skill: Array,
    r_entropy: Array,
    *,
    skill_weight: float | Array,
    entropy_weight: float | Array,
) -> jax.Array:
    """Weighs the two parts, `skill_weight * r_skill + entropy_weight * r_entropy`.

    Args:
      r_skill: `[]` float.
      r_entropy: `[]` float.
      skill_weight: 1 for APS and VISR, 0 for entropy alone.
      entropy_weight: 1 for APS and entropy alone, 0 for VISR.

    Returns:
      `[]` float.
    """
    chex.assert_type([r_skill, r_entropy], float)
    chex.assert_equal_shape([r_skill, r_entropy])

    r_skill, r_entropy, skill_weight, entropy_weight = precision.widen(
        r_skill, r_entropy, skill_weight, entropy_weight
    )
    return skill_weight * r_skill + entropy_weight * r_entropy
