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
import numpy as np

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
    """Returns the symmetric `[D, D]` inverse root of variances, from the floor on."""
    if covariance.shape[0] > _MOST_SWEPT:
        return _by_eigenvalues(covariance)
    # Eigensolvers of accelerators are libraries that launch many kernels.
    return jax.lax.platform_dependent(
        covariance, cpu=_by_eigenvalues, default=_by_resolvents
    )


def _floor(mean_variance: jax.Array) -> jax.Array:
    return jnp.maximum(_SMALLEST_SHARE * mean_variance, _SMALLEST_VARIANCE)


def _by_eigenvalues(covariance: jax.Array) -> jax.Array:
    variances, directions = jnp.linalg.eigh(covariance)
    scale = jax.lax.rsqrt(jnp.maximum(variances, _floor(jnp.mean(variances))))
    return jnp.matmul(
        directions * scale[None, :], directions.T, precision=jax.lax.Precision.HIGHEST
    )


# Up to this many features.
_MOST_SWEPT = 16
# Step of the rule of rectangles over log t. Both integrands are analytic within pi / 2
# of the real line, so that its error is exp(-pi^2 / step).
_STEP = 0.6


def _by_resolvents(covariance: jax.Array) -> jax.Array:
    """Computes the same from integrals of inverses, each by elimination.

    With M the covariance over its trace and f the floor over the same,

        sign(M - f) = 2 / pi  int Re (M - f + i t)^-1 dt,
        B = f + (M - f) (1 + sign(M - f)) / 2,    that is max(M, f),
        B^-1/2 = 2 / pi  int (B + t^2)^-1 dt,

    over all t > 0 (Higham, Functions of Matrices, 2008, sections 5.1 and 6.1).
    """
    dim, dtype = covariance.shape[0], covariance.dtype
    eye = jnp.eye(dim, dtype=dtype)
    trace = jnp.trace(covariance)
    floor = _floor(trace / dim)
    scale = jnp.maximum(trace, dim * floor)

    above = (covariance - floor * eye) / scale
    log_t = np.arange(-23.0, 19.0, _STEP)  # Beyond it changes no float32 variance.
    weight, t = np.exp(log_t) * _STEP * 2.0 / np.pi, np.exp(log_t)
    wide = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    shifted = above.astype(wide)[None] + _diagonals(1j * t, dim).astype(wide)
    sign = _weighted(weight, jnp.real(_inverses(shifted)))
    square = jnp.matmul(above, sign, precision=jax.lax.Precision.HIGHEST)
    clamped = floor / scale * eye + 0.5 * (above + 0.5 * (square + square.T))
    shifted = clamped[None] + _diagonals(t**2, dim).astype(dtype)
    return _weighted(weight, _inverses(shifted)) * jax.lax.rsqrt(scale)


def _diagonals(values: np.ndarray, dim: int) -> np.ndarray:
    return values[:, None, None] * np.eye(dim)[None]


def _weighted(weight: np.ndarray, matrices: jax.Array) -> jax.Array:
    weight = weight.astype(matrices.dtype)[:, None, None]
    return jnp.sum(weight * matrices, axis=0)


def _inverses(matrices: jax.Array) -> jax.Array:
    """Inverts symmetric `[m, D, D]`, by sweeps without a choice of pivots.

    Stable for matrices of positive definite real or imaginary part.
    """
    for k in range(matrices.shape[-1]):
        is_k = np.arange(matrices.shape[-1]) == k
        row = matrices[:, k, :]
        over = row / row[:, k : k + 1]
        in_row, in_column = is_k[None, :, None], is_k[None, None, :]
        swept = matrices - row[:, :, None] * over[:, None, :]
        swept = jnp.where(in_row, over[:, None, :], swept)
        swept = jnp.where(in_column, over[:, :, None], swept)
        pivot = -1.0 / row[:, k, None, None]
        matrices = jnp.where(in_row & in_column, pivot, swept)
    return -matrices
