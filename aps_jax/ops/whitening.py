"""Whitening of features by their moments over the states in the replay.

The outputs of a fresh network are nearly the same for all pictures of one game:
projected onto the sphere they are one point, from which no task can be told. What is
not a number shows in the result. Results are float32 or wider (`precision.widen`).
Letters: `N` states, `D` feature dimension.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from aps_jax.ops import precision
from aps_jax.types import Array

# Directions that vary less than this share of the mean variance are not stretched
# further: what the features do not say must not become their loudest part.
_SMALLEST_SHARE = 1e-3
# And if nothing varies at all, the transform stays finite.
_SMALLEST_VARIANCE = 1e-12


class Whitening(NamedTuple):
    """The moments of features, and the map that they define."""

    weight: Array  # [] float, number of batches behind the moments, decayed.
    mean: Array  # [D] float, of the last batch alone.
    covariance: Array  # [D, D] float
    transform: Array  # [D, D] float, inverse square root of the covariance.


def init_whitening(dim: int) -> Whitening:
    """Returns the moments of no batch; `whiten` then changes nothing."""
    return Whitening(
        weight=jnp.zeros(()),
        mean=jnp.zeros((dim,)),
        covariance=jnp.zeros((dim, dim)),
        transform=jnp.eye(dim),
    )


def update_whitening(
    whitening: Whitening, h: Array, *, decay: float = 0.99
) -> Whitening:
    """Takes the mean of a batch of features, and adds it to their running covariance.

    `weight' = decay * weight + 1`, and the covariance moves by `1 / weight'` of its
    distance to the batch's, around the batch's own mean: features which drift all
    together are not taken for features that vary. The mean is the batch's, because the
    features of a network that learns drift within a few updates by more than they
    differ between states: by a running mean all states would be on the same side.

    Args:
      whitening: the moments so far.
      h: `[N, D]` float, features of states drawn at random, below 1e18. None of them,
        `N = 0`, change nothing.
      decay: in [0, 1], per update.

    Returns:
      The moments with the batch included, and their transform: symmetric, so that a
      small change of the moments turns no feature into another.
    """
    chex.assert_rank(h, 2)
    chex.assert_type(h, float)
    chex.assert_equal_shape_suffix([h, whitening.mean], 1)

    weight, before, h, kept = precision.widen(
        whitening.weight, whitening.covariance, h, decay
    )
    if h.shape[0] == 0:
        return whitening
    weight = kept * weight + 1.0
    # Moments of differences: the sum of many equal offsets would lose their digits.
    difference = h - h[0][None, :]
    mean = jnp.mean(difference, axis=0)
    deviation = difference - mean[None, :]
    square = jnp.matmul(deviation.T, deviation, precision=jax.lax.Precision.HIGHEST)
    covariance = before + (square / h.shape[0] - before) / weight
    return Whitening(
        weight=weight,
        mean=h[0] + mean,
        covariance=covariance,
        transform=_inverse_square_root(covariance),
    )


def whiten(whitening: Whitening, h: Array) -> jax.Array:
    """Makes features white, `transform (h - mean)`; gradient reaches `h` only.

    Args:
      whitening: the moments.
      h: `[..., D]` float.

    Returns:
      `[..., D]` float, of mean 0 and covariance 1 over states with these moments.
    """
    chex.assert_type(h, float)

    h, mean, transform = precision.widen(h, whitening.mean, whitening.transform)
    mean, transform = jax.lax.stop_gradient((mean, transform))
    deviation = h - jnp.expand_dims(mean, tuple(range(h.ndim - 1)))
    return jnp.matmul(deviation, transform, precision=jax.lax.Precision.HIGHEST)


def _inverse_square_root(covariance: jax.Array) -> jax.Array:
    """Returns the symmetric `[D, D]` inverse root, by the eigenvalues."""
    variances, directions = jnp.linalg.eigh(covariance)
    floor = jnp.maximum(_SMALLEST_SHARE * jnp.mean(variances), _SMALLEST_VARIANCE)
    scale = jax.lax.rsqrt(jnp.maximum(variances, floor))
    return jnp.matmul(
        directions * scale[None, :], directions.T, precision=jax.lax.Precision.HIGHEST
    )
