"""Points on the unit sphere of `R^D`: projection onto it and sampling from it.

Features and task vectors both live on this sphere. Results are float32 or wider
(`precision.widen`). Letters: `D` feature dimension.
"""

import math

import chex
import jax
import jax.numpy as jnp

from aps_jax.ops import precision
from aps_jax.types import Array, PRNGKey

# A larger concentration would change no digit of a sample in float32, but overflow.
_LARGEST_KAPPA = 1e30


def normalize(vectors: Array) -> jax.Array:
    """Projects vectors onto the unit sphere, `v / norm(v)`.

    The zero vector has no direction: it stays zero, and its gradient is zero. (An
    encoder without biases maps a black frame to it, so this does happen.) Vectors
    are first divided by their largest component, so that neither very short nor
    very long ones leave the range of float32 when squared.

    Args:
      vectors: `[..., D]` float.

    Returns:
      `[..., D]` float, of unit norm, or zero where `vectors` is zero; NaN where a
      component is NaN or infinite.
    """
    chex.assert_type(vectors, float)
    chex.assert_axis_dimension_gt(vectors, -1, 0)

    (vectors,) = precision.widen(vectors)
    # The direction does not depend on these factors, hence neither does its gradient.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    # A power of two: the reciprocal of the largest numbers would be rounded to 0.
    factor = jnp.where(largest > 1, jnp.asarray(2.0**-24, vectors.dtype), 2.0**24)
    largest = factor * largest
    is_zero = largest == 0
    scaled = factor * vectors / jnp.where(is_zero, 1.0, largest)
    square_norm = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)
    # Both branches of the last `where` are finite, else its gradient would be NaN.
    norm = jnp.sqrt(jnp.where(is_zero, 1.0, square_norm))
    return jnp.where(is_zero, 0.0, scaled / norm)


def sample_uniform(key: PRNGKey, shape: tuple[int, ...], dim: int) -> jax.Array:
    """Samples uniformly from the unit sphere: the direction of a Gaussian vector.

    Args:
      key: the key is consumed.
      shape: leading dimensions of the result, `()` for a single vector.
      dim: `D`, at least 1. With 1, the sphere is the two points -1 and 1.

    Returns:
      `[*shape, D]` of unit norm, in JAX's default float type.

    Raises:
      ValueError: if `dim` is not positive.
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}.")

    gaussian = jax.random.normal(key, (*shape, dim))
    # A Gaussian sample can be exactly 0 in float32, which has no direction.
    is_zero = jnp.all(gaussian == 0, axis=-1, keepdims=True)
    return normalize(jnp.where(is_zero, 1.0, gaussian))


def sample_von_mises_fisher(
    key: PRNGKey, mean: Array, *, kappa: float | Array, num: int
) -> jax.Array:
    """Samples from the von Mises-Fisher distribution, density ~ exp(kappa mean^T x).

    Exact rejection sampling of the cosine to the mean (Wood 1994, "Simulation of the
    von Mises Fisher distribution", https://doi.org/10.1080/03610919408813161, section
    3), with a uniform direction around it. Wood's formulas are rearranged so that they
    compute one minus the cosine: no digits cancel however large `kappa` is.

    Args:
      key: the key is consumed.
      mean: `[D]` float, the mean direction, of any norm but zero.
      kappa: `[]` concentration, at least 0 and finite. 0 is the uniform distribution;
        more than 1e30 counts as 1e30.
      num: number of samples.

    Returns:
      `[num, D]` float, of unit norm. NaN if `mean` is, or a traced `kappa`, which
      cannot be checked, is negative or not finite.

    Raises:
      ValueError: if `num` is not positive or `kappa` is negative or not finite.
    """
    chex.assert_rank(mean, 1)
    chex.assert_type(mean, float)
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}.")
    chex.assert_rank(kappa, 0)
    if not isinstance(kappa, jax.core.Tracer):
        if not 0 <= float(kappa) < math.inf:
            raise ValueError(f"kappa must be finite and at least 0, got {kappa}.")
        kappa = min(float(kappa), _LARGEST_KAPPA)

    mean = normalize(mean)
    dim, dtype = mean.shape[0], mean.dtype
    kappa = jnp.asarray(kappa, dtype)
    is_valid = (kappa >= 0) & (kappa < jnp.inf)
    mean = jnp.where(is_valid, mean, jnp.nan)
    kappa = jnp.where(is_valid, jnp.minimum(kappa, _LARGEST_KAPPA), 0.0)
    if dim == 1:
        is_positive = jax.random.bernoulli(key, jax.nn.sigmoid(2 * kappa), (num, 1))
        return jnp.where(is_positive, mean[None, :], -mean[None, :])
    key_cosine, key_tangent = jax.random.split(key)
    one_minus_cosine = _sample_one_minus_cosine(key_cosine, kappa, num=num, dim=dim)
    cosine = 1 - one_minus_cosine
    sine = jnp.sqrt(one_minus_cosine * (1 + cosine))
    tangent = sample_uniform(key_tangent, (num,), dim - 1).astype(dtype)
    around_first_axis = jnp.concatenate(
        [cosine[:, None], sine[:, None] * tangent], axis=-1
    )
    return normalize(_rotate_first_axis_to(mean, around_first_axis))


def _sample_one_minus_cosine(
    key: PRNGKey, kappa: jax.Array, *, num: int, dim: int
) -> jax.Array:
    """Samples `1 - mean^T x` for `x` from a von Mises-Fisher distribution, `dim >= 2`.

    In Wood's notation: `b` and `x0` as there, `Z ~ Beta((D-1)/2, (D-1)/2)`, the cosine
    `W = (1 - (1+b) Z) / (1 - (1-b) Z)`, accepted if
    `kappa (W - x0) + (D-1) log((1 - x0 W) / (1 - x0^2)) >= log U`.
    """
    dtype = kappa.dtype
    b = (dim - 1) / (2 * kappa + jnp.hypot(2 * kappa, jnp.asarray(dim - 1, dtype)))
    one_minus_x0 = 2 * b / (1 + b)
    one_minus_x0_square = one_minus_x0 * 2 / (1 + b)

    # At least half of all proposals are accepted, whatever the concentration and `dim`.
    def has_missing(state):
        _, _, is_accepted = state
        return ~jnp.all(is_accepted)

    def propose(state):
        round_index, sample, is_accepted = state
        key_beta, key_uniform = jax.random.split(jax.random.fold_in(key, round_index))
        # A Beta variable is a ratio of chi-square ones: exact near both of its ends.
        gaussian = jax.random.normal(key_beta, (2, num, dim - 1), dtype)
        chi_square = jnp.sum(jnp.square(gaussian), axis=-1)
        z = chi_square[0] / (chi_square[0] + chi_square[1])
        one_minus_w = 2 * b * z / (1 - (1 - b) * z)
        one_minus_x0_w = one_minus_x0 + (1 - one_minus_x0) * one_minus_w
        log_ratio = kappa * (one_minus_x0 - one_minus_w) + (dim - 1) * jnp.log(
            one_minus_x0_w / one_minus_x0_square
        )
        # Of (0, 1]: the logarithm of 0 would accept everything.
        log_u = jnp.log1p(-jax.random.uniform(key_uniform, (num,), dtype))
        is_new = ~is_accepted & (log_ratio >= log_u)
        sample = jnp.where(is_new, one_minus_w, sample)
        return round_index + 1, sample, is_accepted | is_new

    state = (jnp.int32(0), jnp.zeros((num,), dtype), jnp.zeros((num,), bool))
    _, sample, _ = jax.lax.while_loop(has_missing, propose, state)
    return sample


def _rotate_first_axis_to(mean: jax.Array, points: jax.Array) -> jax.Array:
    """Applies an orthogonal map that takes the first axis to the unit vector `mean`.

    A Householder reflection, with the sign under which nothing cancels.
    """
    sign = jnp.where(mean[0] < 0, -1.0, 1.0)
    normal = mean.at[0].add(sign)  # Of square norm 2 + 2 |mean_0|, never near 0.
    height = jnp.sum(points * normal[None, :], axis=-1, keepdims=True)
    reflected = points - height * normal[None, :] / (1 + jnp.abs(mean[0]))
    return -sign * reflected
