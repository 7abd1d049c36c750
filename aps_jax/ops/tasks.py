"""Task vectors: inferring one from rewards, and choosing actions by many.

A reward is explained by the features of the state reached, `r ~ phi^T w`. `w` is the
least squares solution; its direction is the task, and its norm turns `psi^T w` into the
units of the reward. Letters: `N` samples, `A` actions, `D` feature dimension, `K`
candidates.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.ops import precision, sphere
from aps_jax.types import Array, PRNGKey


class InferredTask(NamedTuple):
    """The task that explains the rewards seen, and how well it does."""

    task: np.ndarray  # [D] float64, unit.
    scale: float  # norm of w before it was made a unit vector.
    intercept: float  # reward where the features are 0.
    r_squared: float  # in [0, 1], share of the rewards explained.
    num_samples: int
    num_nonzero: int  # samples with a reward other than 0.
    is_fallback: bool  # nothing could be inferred: `task` is a substitute.


def regress_task(
    phi: Array,
    r: Array,
    mask: Array | None = None,
    *,
    fallback_task: Array,
    ridge: float = 1.0,
    intercept: bool = True,
) -> InferredTask:
    """Infers the task by ridge regression of rewards on features, on the host.

    `w = argmin_w sum (r - phi^T w - b)^2 + ridge norm(w)^2` (APS,
    https://arxiv.org/abs/2108.13956, section 4.4). This is the regression of rewards on
    features: the other way round, as in the URLB benchmark's code, w would be the
    direction of `Phi^T r`, which is wrong as soon as features are correlated.

    The ridge is a Gaussian prior of w: the variance of a reward's noise, divided by
    that of a component of w. Hence a few samples already give a direction. 1 is right
    for unit features that explain a good part of the rewards; noisier rewards want
    more.

    Args:
      phi: `[N, D]` float, features of the states reached.
      r: `[N]` float, one-step rewards of the same transitions.
      mask: `[N]` bool, whether to use the sample, the others may be NaN; None for all.
      fallback_task: `[D]` float, taken if nothing can be inferred: rewards that are all
        the same (without an intercept: all 0), features that do not vary with them, or
        anything that is not finite.
      ridge: weight of the prior, at least 0. Without it, the smallest w is taken where
        several fit alike.
      intercept: whether to fit a constant reward `b` too; else it is 0.

    Returns:
      The task. `r_squared` is relative to the sum of the squares of the rewards'
      deviations from their mean, without an intercept of the rewards themselves. As a
      fallback, the task is `fallback_task` with scale 1, intercept 0 and `r_squared` 0,
      never NaN.
    """
    phi, r, fallback_task = (np.asarray(x, np.float64) for x in (phi, r, fallback_task))
    mask = np.ones(r.shape, bool) if mask is None else np.asarray(mask)
    chex.assert_rank([phi, r, mask, fallback_task], [2, 1, 1, 1])
    chex.assert_type(mask, bool)
    chex.assert_equal_shape([phi[:, 0], r, mask])
    chex.assert_axis_dimension(phi, 1, fallback_task.size)

    samples = np.column_stack([phi, r])[mask]
    num_samples, num_nonzero = len(samples), int(np.count_nonzero(samples[:, -1]))
    task = fallback_task / (np.linalg.norm(fallback_task) or 1.0)
    fallback = InferredTask(
        task, 1.0, 0.0, 0.0, num_samples, num_nonzero, is_fallback=True
    )
    if num_samples == 0 or not np.isfinite(samples).all():
        return fallback
    mean = np.zeros_like(samples[0])
    if intercept:
        # Of differences: a plain sum of many equal offsets would lose their digits.
        mean = samples[0] + np.mean(samples - samples[0], axis=0)
    deviations = samples - mean
    x, y = deviations[:, :-1], deviations[:, -1]
    # The prior is a sample for each component of w, by which that is 0.
    prior = np.sqrt(ridge) * np.eye(len(task))
    w = np.linalg.lstsq(
        np.vstack([x, prior]), np.append(y, np.zeros(len(task))), rcond=None
    )[0]
    scale, total = float(np.linalg.norm(w)), np.sum(np.square(y))
    if not 0 < scale * total < np.inf:
        return fallback
    share_left = np.sum(np.square(y - x @ w)) / total
    return InferredTask(
        task=w / scale,
        scale=scale,
        intercept=float(mean[-1] - mean[:-1] @ w),
        r_squared=float(np.clip(1.0 - share_left, 0.0, 1.0)),
        num_samples=num_samples,
        num_nonzero=num_nonzero,
        is_fallback=False,
    )


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
