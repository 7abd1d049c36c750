"""Task vectors: inferring one from rewards, and choosing actions by many.

A reward is explained by the features of the state reached, `r ~ phi^T w`. `w` is the
least squares solution; its direction is the task, and its norm turns `psi^T w` into the
units of the reward. Results are float32 or wider (`precision.widen`). Letters: `N`
samples, `A` actions, `D` feature dimension, `K` candidates.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.ops import precision, sphere
from aps_jax.types import Array, PRNGKey


class RegressionMoments(NamedTuple):
    """Sufficient statistics of the regression of rewards on features.

    Products of deviations from the mean: however far from 0 features and rewards lie,
    no digits are lost.
    """

    mean: Array  # [D + 1] float, of the features and, last, of the reward.
    comoment: Array  # [D + 1, D + 1] float, sum of the deviations' outer products.
    num_samples: Array  # [] int32
    num_nonzero: Array  # [] int32, samples with a reward other than 0.


class InferredTask(NamedTuple):
    """The task that explains the rewards seen, and how well it does."""

    task: Array  # [D] float, unit.
    scale: Array  # [] float, norm of w before it was made a unit vector.
    intercept: Array  # [] float, reward where the features are 0.
    r_squared: Array  # [] float in [0, 1], share of the rewards explained.
    num_samples: Array  # [] int32.
    num_nonzero: Array  # [] int32.
    is_fallback: Array  # [] bool, nothing could be inferred: `task` is a substitute.


def init_regression_moments(dim: int) -> RegressionMoments:
    """Returns the moments of no samples, for features of `dim` components.

    Raises:
      ValueError: if `dim` is not positive.
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}.")

    mean, comoment = jnp.zeros((dim + 1,)), jnp.zeros((dim + 1, dim + 1))
    return RegressionMoments(mean, comoment, jnp.int32(0), jnp.int32(0))


def update_regression_moments(
    moments: RegressionMoments, phi_t: Array, r_t: Array, mask: Array
) -> RegressionMoments:
    """Adds samples, each the features of a state and the reward for reaching it.

    The moments of the batch are merged with those before it by the formula of Chan,
    Golub and LeVeque (1983, https://doi.org/10.1080/00031305.1983.10483115).

    Args:
      moments: of the samples so far.
      phi_t: `[N, D]` float, features of the states reached.
      r_t: `[N]` float, one-step rewards of the same transitions.
      mask: `[N]` bool, whether to use the sample; the others may be NaN.
    """
    chex.assert_rank([phi_t, r_t, mask], [2, 1, 1])
    chex.assert_type([phi_t, r_t], float)
    chex.assert_type(mask, bool)
    chex.assert_equal_shape([phi_t[:, 0], r_t, mask])
    chex.assert_shape(moments.mean, (phi_t.shape[1] + 1,))
    if phi_t.shape[0] == 0:
        return moments

    mean, comoment, phi_t, r_t = precision.widen(*moments[:2], phi_t, r_t)
    is_used = mask[:, None]
    samples = jnp.where(is_used, jnp.column_stack([phi_t, r_t]), 0.0)
    num_added = jnp.sum(mask, dtype=jnp.int32)
    num_samples = moments.num_samples + num_added
    num_before, added, total = (
        jnp.asarray(x, mean.dtype)
        for x in (moments.num_samples, num_added, num_samples)
    )
    share = added / jnp.maximum(total, 1.0)
    # Without a mean, the first sample will do: what is subtracted need only be near.
    mean = jnp.where(num_before > 0, mean, samples[jnp.argmax(mask)])
    deviation = jnp.where(is_used, samples - mean[None, :], 0.0)
    shift = jnp.sum(deviation, axis=0) / jnp.maximum(added, 1.0)
    deviation = jnp.where(is_used, deviation - shift[None, :], 0.0)
    square = jnp.matmul(deviation.T, deviation, precision=jax.lax.Precision.HIGHEST)
    square = square + num_before * share * (shift[:, None] * shift[None, :])
    return RegressionMoments(
        mean=mean + share * shift,
        comoment=comoment + square,
        num_samples=num_samples,
        num_nonzero=moments.num_nonzero + jnp.sum(samples[:, -1] != 0, dtype=jnp.int32),
    )


def infer_task(
    moments: RegressionMoments,
    *,
    fallback_task: Array,
    ridge: float | Array = 1.0,
    intercept: bool = True,
) -> InferredTask:
    """Infers the task by ridge regression of rewards on features.

    `w = argmin_w sum (r - phi^T w - b)^2 + ridge norm(w)^2` (APS,
    https://arxiv.org/abs/2108.13956, section 4.4). This is the regression of rewards on
    features: the other way round, as in the URLB benchmark's code, w would be the
    direction of `Phi^T r`, which is wrong as soon as features are correlated.

    The ridge is a Gaussian prior of w: the variance of a reward's noise, divided by
    that of a component of w. Hence a few samples already give a direction. 1 is right
    for unit features that explain a good part of the rewards; noisier rewards want
    more.

    Args:
      moments: of any number of samples.
      fallback_task: `[D]` float, taken if nothing can be inferred: rewards that are all
        the same (without an intercept: all 0), features that do not vary with them, or
        anything that is not finite.
      ridge: added to the diagonal of the sum of `phi phi^T` over the samples, with an
        intercept of the deviations from the mean; at least 0.
      intercept: whether to fit a constant reward `b` too; else it is 0.

    Returns:
      The task. `r_squared` is relative to the sum of the squares of the rewards'
      deviations from their mean, without an intercept of the rewards themselves. As a
      fallback, the task is `fallback_task` with scale 1, intercept 0 and `r_squared` 0,
      never NaN.
    """
    chex.assert_rank([moments.comoment, fallback_task], [2, 1])
    chex.assert_type(fallback_task, float)
    dim = fallback_task.shape[0]
    chex.assert_shape(moments.mean, (dim + 1,))

    mean, square, fallback_task, ridge = precision.widen(
        *moments[:2], fallback_task, ridge
    )
    is_finite = jnp.all(jnp.isfinite(square)) & jnp.all(jnp.isfinite(mean))
    mean, square = (jnp.where(is_finite, x, 0.0) for x in (mean, square))
    if not intercept:
        total = jnp.asarray(moments.num_samples, mean.dtype)
        square = square + total * (mean[:, None] * mean[None, :])
    gram, phi_r, r_square = square[:dim, :dim], square[:dim, dim], square[dim, dim]
    w = _solve_ridge(gram, phi_r, ridge)
    explained = jnp.sum(w * (2 * phi_r - jnp.sum(gram * w[None, :], axis=-1)))
    scale = jnp.sqrt(jnp.sum(jnp.square(w)))
    constant = mean[dim] - jnp.sum(mean[:dim] * w) if intercept else 0.0 * scale

    is_fallback = ~(is_finite & (r_square > 0) & (scale > 0) & jnp.isfinite(scale))

    def unless_fallback(value, substitute):
        return jnp.where(is_fallback, substitute, value)

    return InferredTask(
        task=unless_fallback(sphere.normalize(w), sphere.normalize(fallback_task)),
        scale=unless_fallback(scale, 1.0),
        intercept=unless_fallback(constant, 0.0),
        r_squared=unless_fallback(
            jnp.clip(explained / jnp.where(r_square > 0, r_square, 1.0), 0.0, 1.0), 0.0
        ),
        num_samples=moments.num_samples,
        num_nonzero=moments.num_nonzero,
        is_fallback=is_fallback,
    )


def regress_task(
    phi: Array,
    r: Array,
    mask: Array | None = None,
    *,
    fallback_task: Array,
    ridge: float = 1.0,
    intercept: bool = True,
) -> InferredTask:
    """Infers the task from all samples at once, in float64 on the host.

    The result is that of `update_regression_moments` and `infer_task`.

    Args:
      phi: `[N, D]` float, features of the states reached.
      r: `[N]` float, one-step rewards of the same transitions.
      mask: `[N]` bool, whether to use the sample; None for all.
      fallback_task, ridge, intercept: as of `infer_task`.

    Returns:
      The task as NumPy arrays, float64 and not float32.
    """
    phi, r, fallback_task = (np.asarray(x, np.float64) for x in (phi, r, fallback_task))
    mask = np.ones(r.shape, bool) if mask is None else np.asarray(mask)
    with jax.enable_x64(True), jax.default_device(_host()):
        moments = jax.jit(update_regression_moments)(
            init_regression_moments(fallback_task.size), phi, r, mask
        )
        found = jax.jit(infer_task, static_argnames="intercept")(
            moments, fallback_task=fallback_task, ridge=ridge, intercept=intercept
        )
        return jax.device_get(found)


def gpi_action_values(psi: Array, w: Array) -> jax.Array:
    """Values actions by the best of several policies, `max_i psi(s, a, w_i)^T w`.

    Generalised policy improvement (Barreto et al. 2017,
    https://arxiv.org/abs/1606.05312, theorem 1). Every policy is scored by the task
    that counts, `w`, not by the `w_i` that it was trained for as in the authors'
    notebook.

    Args:
      psi: `[K, A, D]` float, successor features of the policies of K candidate tasks.
      w: `[D]` float, the task to solve.

    Returns:
      `[A]` float; act greedily in it.
    """
    chex.assert_rank([psi, w], [3, 1])
    chex.assert_type([psi, w], float)
    chex.assert_equal_shape([psi[0, 0], w])

    psi, w = precision.widen(psi, w)
    return jnp.max(jnp.sum(psi * w[None, None, :], axis=-1), axis=0)


def candidate_tasks(
    key: PRNGKey, w: Array, *, num: int, kappa: float | Array
) -> jax.Array:
    """Draws tasks around `w` whose policies may also serve it.

    VISR (https://arxiv.org/abs/1906.05030, section 5) draws 10 with kappa = 5.

    Args:
      key: the key is consumed.
      w: `[D]` float, the task to solve.
      num: number of further tasks; may be 0.
      kappa: concentration of the von Mises-Fisher distribution around w, 0 for uniform.

    Returns:
      `[1 + num, D]` float, `w` itself first.

    Raises:
      ValueError: if `num` is negative, or `kappa` negative or not finite.
    """
    chex.assert_rank(w, 1)
    chex.assert_type(w, float)
    if num < 0:
        raise ValueError(f"num must be at least 0, got {num}.")

    (w,) = precision.widen(w)
    if num == 0:
        return w[None, :]
    others = sphere.sample_von_mises_fisher(key, w, kappa=kappa, num=num)
    return jnp.concatenate([w[None, :], others], axis=0)


def _host() -> jax.Device | None:
    """Returns the CPU, or None for the default device if JAX runs without a CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _solve_ridge(gram: jax.Array, phi_r: jax.Array, ridge: jax.Array) -> jax.Array:
    """Solves `(gram + ridge I) w = phi_r`.

    Directions in which the left side is within rounding errors of 0 get weight 0, as in
    a pseudo-inverse: any weight would be an accident.
    """
    eigenvalues, eigenvectors = jnp.linalg.eigh(gram)
    denominators = eigenvalues + ridge
    noise = (8 + gram.shape[0]) * jnp.finfo(gram.dtype).eps * jnp.trace(gram)
    is_signal = denominators > noise
    inverse = jnp.where(is_signal, 1 / jnp.where(is_signal, denominators, 1.0), 0.0)
    highest = jax.lax.Precision.HIGHEST
    coordinates = jnp.matmul(eigenvectors.T, phi_r, precision=highest)
    return jnp.matmul(eigenvectors, inverse * coordinates, precision=highest)
