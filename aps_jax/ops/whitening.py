"""Whitening of features by their moments over the states in the replay.

The outputs of a fresh network are nearly the same for all pictures of one game: projected
onto the sphere they are one point, from which no task can be told. Letters: `N` states,
`D` feature dimension.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from aps_jax.types import Array

# Directions that vary less than this share of the mean variance are not stretched
# further: what the features do not say must not become their loudest part.
_SMALLEST_SHARE = 1e-3
# And if nothing varies at all, the transform stays finite.
_SMALLEST_VARIANCE = 1e-12


class Whitening(NamedTuple):
    """The moments of features, and the map that they define."""

    weight: Array  # [] float32, number of batches behind the moments, decayed.
    mean: Array  # [D] float32, of the last batch alone.
    covariance: Array  # [D, D] float32
    transform: Array  # [D, D] float32, inverse square root of the covariance.


def init_whitening(dim: int) -> Whitening:
    """Returns the moments of no batch; `whiten` then changes nothing."""
    return Whitening(
        weight=jnp.float32(0),
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
    features of a network that learns drift within a few updates by more than they differ
    between states: by a running mean all states would be on the same side.

    Args:
      whitening: the moments so far.
      h: `[N, D]` float, features of states drawn at random.
      decay: in [0, 1], per update.

    Returns:
      The moments with the batch included, and their transform: symmetric, so that a
      small change of the moments turns no feature into another.
    """
    chex.assert_rank(h, 2)
    chex.assert_type(h, float)
    chex.assert_equal_shape([h[0], whitening.mean])

    weight = decay * whitening.weight + 1.0
    batch_mean = jnp.mean(h, axis=0)
    deviation = h - batch_mean[None, :]
    square = jnp.matmul(deviation.T, deviation, precision=jax.lax.Precision.HIGHEST)
    batch_covariance = square / h.shape[0]
    covariance = (
        whitening.covariance + (batch_covariance - whitening.covariance) / weight
    )
    return Whitening(
        weight=weight,
        mean=batch_mean,
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

    whitening = jax.lax.stop_gradient(whitening)
    mean = jnp.expand_dims(whitening.mean, tuple(range(h.ndim - 1)))
    return jnp.matmul(
        h - mean, whitening.transform, precision=jax.lax.Precision.HIGHEST
    )


def _inverse_square_root(covariance: jax.Array) -> jax.Array:
    """Returns the symmetric `[D, D]` inverse root, by the eigenvalues."""
    variances, directions = jnp.linalg.eigh(covariance)
    floor = jnp.maximum(_SMALLEST_SHARE * jnp.mean(variances), _SMALLEST_VARIANCE)
    scale = jax.lax.rsqrt(jnp.maximum(variances, floor))
    return jnp.matmul(
        directions * scale[None, :], directions.T, precision=jax.lax.Precision.HIGHEST
    )
