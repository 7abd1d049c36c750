"""Task vectors: inferring one from rewards, and choosing actions by many.

A reward is explained by the features of the state reached, `r ~ phi^T w`. `w` is the least
squares solution; its direction is the task, and its norm turns `psi^T w` into the units
of the reward. Letters: `N` samples, `A` actions, `D` feature dimension, `K` candidates.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from aps_jax.ops import sphere
from aps_jax.types import Array, PRNGKey


class RegressionMoments(NamedTuple):
    """Sufficient statistics of the regression of rewards on features."""

    gram: Array  # [D, D] float32, sum of phi phi^T.
    phi_r: Array  # [D] float32, sum of phi r.
    phi_sum: Array  # [D] float32, sum of phi.
    r_sum: Array  # [] float32, sum of r.
    r_square_sum: Array  # [] float32, sum of r^2.
    num_samples: Array  # [] int32.
    num_nonzero: Array  # [] int32, samples with a reward other than 0.
    excess: tuple[Array, ...]  # what rounding added to each of the five sums above.


class InferredTask(NamedTuple):
    """The task that explains the rewards seen, and how well it does."""

    task: Array  # [D] float32, unit.
    scale: Array  # [] float32, norm of w before it was made a unit vector.
    intercept: Array  # [] float32, reward where the features are 0.
    r_squared: Array  # [] float32 in [0, 1], share of the rewards explained.
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

    vector, scalar = jnp.zeros((dim,)), jnp.float32(0)
    sums = (jnp.zeros((dim, dim)), vector, vector, scalar, scalar)
    return RegressionMoments(
        *sums, num_samples=jnp.int32(0), num_nonzero=jnp.int32(0), excess=sums
    )


def update_regression_moments(
    moments: RegressionMoments, phi_t: Array, r_t: Array, mask: Array
) -> RegressionMoments:
    """Adds samples, each the features of a state and the reward for reaching it.

    The sums are compensated (Kahan 1965, https://doi.org/10.1145/363707.363723): however
    many small batches are added, they are as exact as float32 can hold.

    Args:
      moments: of the samples so far.
      phi_t: `[N, D]` float, features of the states reached.
      r_t: `[N]` float, one-step rewards of the same transitions.
      mask: `[N]` bool, whether to use the sample. What stands in the others does not
        matter, not even if it is not a number.

    Returns:
      Moments with the samples included.
    """
    chex.assert_rank([phi_t, r_t, mask], [2, 1, 1])
    chex.assert_type([phi_t, r_t], float)
    chex.assert_type(mask, bool)
    chex.assert_equal_shape([phi_t[:, 0], r_t, mask])
    chex.assert_equal_shape([phi_t[0], moments.phi_sum])

    phi_t = jnp.where(mask[:, None], phi_t, 0.0)
    r_t = jnp.where(mask, r_t, 0.0)
    highest = jax.lax.Precision.HIGHEST
    additions = (
        jnp.matmul(phi_t.T, phi_t, precision=highest),
        jnp.matmul(r_t, phi_t, precision=highest),
        jnp.sum(phi_t, axis=0),
        jnp.sum(r_t),
        jnp.sum(jnp.square(r_t)),
    )
    additions = jax.tree.map(jnp.subtract, additions, moments.excess)
    before = moments[: len(additions)]
    sums = jax.tree.map(jnp.add, before, additions)
    return RegressionMoments(
        *sums,
        num_samples=moments.num_samples + jnp.sum(mask, dtype=jnp.int32),
        num_nonzero=moments.num_nonzero + jnp.sum(r_t != 0, dtype=jnp.int32),
        excess=jax.tree.map(lambda x, y, z: (x - y) - z, sums, before, additions),
    )


def infer_task(
    moments: RegressionMoments,
    *,
    fallback_task: Array,
    ridge: float = 1e-6,
    intercept: bool = False,
) -> InferredTask:
    """Infers the task by ridge regression of rewards on features.

    `w = argmin_w sum (r - phi^T w - b)^2 + lambda norm(w)^2` (APS,
    https://arxiv.org/abs/2108.13956, section 4.4). This is the regression of rewards on
    features: the other way round, as in the URLB benchmark's code, w would be the direction
    of `Phi^T r`, which is wrong as soon as features are correlated.

    Args:
      moments: of at least `D` samples, one more with an intercept.
      fallback_task: `[D]` float, taken if nothing can be inferred: too few samples, rewards
        that are all 0 (with an intercept: all the same), features that are all 0 (all the
        same), or anything that is not finite.
      ridge: lambda, in units of the mean of the diagonal of the matrix that is
        inverted: the Gram matrix, with an intercept the centred one.
      intercept: whether to fit a constant reward `b` too; else it is 0.

    Returns:
      The task. `r_squared` is relative to the sum of the squares of the rewards, with an
      intercept to that of their deviations from the mean. As a fallback, the task is
      `fallback_task` with scale 1, intercept 0 and `r_squared` 0, never NaN.
    """
    chex.assert_rank([moments.gram, fallback_task], [2, 1])
    chex.assert_type(fallback_task, float)
    chex.assert_equal_shape([moments.phi_r, fallback_task])

    dim = moments.phi_r.shape[0]
    epsilon = jnp.finfo(jnp.float32).eps
    # What float32 cannot tell from no variation at all, in the features and the rewards.
    gram_noise = (8 + dim) * epsilon * jnp.trace(moments.gram)
    r_noise = 32 * epsilon * moments.r_square_sum
    gram, phi_r, r_square = moments.gram, moments.phi_r, moments.r_square_sum
    count = jnp.maximum(moments.num_samples, 1).astype(jnp.float32)
    phi_mean, r_mean = moments.phi_sum / count, moments.r_sum / count
    if intercept:
        gram = gram - moments.phi_sum[:, None] * phi_mean[None, :]
        phi_r = phi_r - moments.phi_sum * r_mean
        r_square = r_square - moments.r_sum * r_mean

    w = _solve_ridge(gram, phi_r, ridge, gram_noise)
    explained = jnp.sum(w * (2 * phi_r - jnp.sum(gram * w[None, :], axis=-1)))
    scale = jnp.sqrt(jnp.sum(jnp.square(w)))

    is_fallback = (
        (moments.num_samples < dim + intercept)
        | (moments.num_nonzero == 0)
        | ~(r_square > r_noise)
        | ~(scale > 0)
        | ~jnp.isfinite(scale)
    )

    def unless_fallback(value, substitute):
        return jnp.where(is_fallback, substitute, value)

    return InferredTask(
        task=unless_fallback(sphere.normalize(w), sphere.normalize(fallback_task)),
        scale=unless_fallback(scale, 1.0),
        intercept=unless_fallback(
            r_mean - jnp.sum(phi_mean * w) if intercept else jnp.zeros_like(scale), 0.0
        ),
        r_squared=unless_fallback(
            jnp.clip(explained / jnp.where(r_square > 0, r_square, 1.0), 0.0, 1.0), 0.0
        ),
        num_samples=moments.num_samples,
        num_nonzero=moments.num_nonzero,
        is_fallback=is_fallback,
    )


def gpi_action_values(psi: Array, w: Array) -> jax.Array:
    """Values actions by the best of several policies, `max_i psi(s, a, w_i)^T w`.

    Generalised policy improvement (Barreto et al. 2017, https://arxiv.org/abs/1606.05312,
    theorem 1). Every policy is scored by the task that counts, `w`, not by the `w_i`
    that it was trained for as in the authors' notebook.

    Args:
      psi: `[K, A, D]` float, successor features of the policies of K candidate tasks.
      w: `[D]` float, the task to solve.

    Returns:
      `[A]` float; act greedily in it.
    """
    chex.assert_rank([psi, w], [3, 1])
    chex.assert_type([psi, w], float)
    chex.assert_equal_shape([psi[0, 0], w])

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

    w = jnp.asarray(w)
    if num == 0:
        return w[None, :]
    others = sphere.sample_von_mises_fisher(key, w, kappa=kappa, num=num)
    return jnp.concatenate([w[None, :], others], axis=0)


def _solve_ridge(
    gram: jax.Array, phi_r: jax.Array, ridge: float | Array, noise: jax.Array
) -> jax.Array:
    """Solves `(gram + lambda I) w = phi_r`, `lambda = ridge * mean(diag(gram))`.

    Directions in which the features vary by no more than `noise` get weight 0, as in a
    pseudo-inverse: there a Cholesky factor would be NaN, and any weight an accident.
    """
    eigenvalues, eigenvectors = jnp.linalg.eigh(gram)
    penalty = ridge * jnp.mean(jnp.diagonal(gram))
    is_signal = eigenvalues > noise
    inverse = jnp.where(
        is_signal, 1 / jnp.where(is_signal, eigenvalues + penalty, 1.0), 0.0
    )
    highest = jax.lax.Precision.HIGHEST
    coordinates = jnp.matmul(eigenvectors.T, phi_r, precision=highest)
    return jnp.matmul(eigenvectors, inverse * coordinates, precision=highest)
